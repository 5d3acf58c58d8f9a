"""Files of a few rows for each task, a tokenizer for them, and a recipe: what a task's training needs at least."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from danlu import config
from danlu.data.tokenizer import BPE, WordPiece, train
from danlu.train.recipe import Run

NAMES, PLACES = ("anna", "boris", "chen", "dora"), ("paris", "oslo", "kyoto", "lima")
WORDS = (*NAMES, *PLACES, "lives", "in", "and", "works", "near", "the", "sea", "who", "where", "is", "born", "lovely", "old", ".",
         "?")


def wordpiece(folder: Path) -> Path:
    """Write a tokenizer that cuts words into pieces, with [CLS] and [SEP]."""
    made = train([" ".join(random.Random(n).sample(WORDS, 12)) for n in range(200)], WordPiece(vocab=80))
    made.save(folder)
    return folder


def bpe(folder: Path) -> Path:
    """Write a byte-level tokenizer without [CLS]."""
    made = train([" ".join(random.Random(n).sample(WORDS, 12)) for n in range(200)], BPE(vocab=300))
    made.save(folder)
    return folder


def rows(kind: str, number: int = 60) -> list[dict[str, Any]]:
    """Return rows that can be learned: of names, places and where who lives."""
    made: list[dict[str, Any]] = []
    for n in range(number):
        draw = random.Random(n)
        name, place, other = draw.choice(NAMES), draw.choice(PLACES), draw.choice(PLACES)
        extra = draw.choices(("lovely", "old", "the"), k=draw.randint(0, 4))
        if kind == "tag":
            words = [*extra, name, "lives", "in", place, "."]
            made.append({"tokens": words, "tags": ["B-PER" if w in NAMES else "B-LOC" if w in PLACES else "O" for w in words]})
        elif kind == "answer":
            context = " ".join([*extra, name, "lives", "in", place, "near", "the", "sea", "."])
            made.append({"id": str(n), "question": f"where is {name} ?", "context": context,
                         "answers": {"text": [place], "answer_start": [context.index(place)]}})
        elif kind == "choose":
            choices = [f"in {place}", *(f"near {p}" for p in draw.sample([p for p in PLACES if p != place], draw.randint(1, 3)))]
            right = draw.randrange(len(choices))
            choices[0], choices[right] = choices[right], choices[0]
            made.append({"question": f"{name} lives", "choices": choices, "answer": right})
        elif kind == "embed":
            made.append({"anchor": f"{name} in {place} {' '.join(extra)}", "positive": f"{place} and {name}"})
        else:
            made.append({"sentence1": f"{name} in {place}", "sentence2": f"{name} near {other} {' '.join(extra)}",
                         "score": 5.0 if place == other else 1.0})
    return made


def recipe(kind: str, folder: Path, **changes: Any) -> Run:
    """Return a recipe of a tiny encoder on a file of rows that this writes."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind)), encoding="utf-8")
    objectives: dict[str, Any] = {"scored": {"kind": "embed", "loss": "cosine", "scores": [0, 5]}}
    base: dict[str, Any] = {
        "out": str(folder / "run"), "data": [{"path": str(folder / "rows.jsonl")}], "tokenizer": str(wordpiece(folder / "tok")),
        "objective": objectives.get(kind, {"kind": kind}), "optim": {"kind": "adamw", "lr": 3e-3},
        "model": {"kind": "encoder", "width": 32, "layers": 2, "heads": 2, "context": 128, "dropout": 0.0},
        "schedule": {"kind": "cosine", "warmup": 2}, "steps": 12, "rows": 8, "length": 64, "held_out": 0.2,
        "guard": {"overlap": 1.0},
        "precision": "fp32", "every": {"log": 4, "evaluate": 6, "save": 12}, "threads": 1, "device": "cpu",
    }
    return config.validate(Run, base | changes)
