"""Files of a few rows, a tokenizer and recipes for runs of several tasks and for runs that go on learning."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from danlu import config
from danlu.data.tokenizer import BPE, WordPiece, train
from danlu.train.intake import taken_in
from danlu.train.recipe import Run

GOOD, BAD = ("fine", "lovely", "bright"), ("dull", "awful", "grey")
REST = ("the", "film", "sea", "is", "and", "old", "near", "very")
WORDS = (*GOOD, *BAD, *REST, ".")


def tokenizer(folder: Path, kind: str = "wordpiece") -> Path:
    """Write a tokenizer of words, with [CLS] and [SEP], or one of bytes."""
    texts = [" ".join(random.Random(n).choices(WORDS, k=12)) for n in range(200)]
    train(texts, WordPiece(vocab=96) if kind == "wordpiece" else BPE(vocab=300)).save(folder)
    return folder


def labelled(path: Path, number: int = 60, *, seed: int = 0, turned: bool = False) -> Path:
    """Write rows whose label one word tells; `turned`: the other way round."""
    lines = []
    for n in range(number):
        draw = random.Random(1000 * seed + n)
        kind = n % 2
        words = [*draw.choices(REST, k=draw.randint(2, 6)), draw.choice((BAD, GOOD)[kind])]
        draw.shuffle(words)
        lines.append({"text": " ".join(words), "label": ("bad", "good")[kind ^ turned]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def scored(path: Path, number: int = 60, *, seed: int = 0) -> Path:
    """Write rows with a score: how many good words there are."""
    lines = []
    for n in range(number):
        draw = random.Random(1000 * seed + n)
        words = draw.choices((*REST, *GOOD), k=draw.randint(3, 8))
        lines.append({"text": " ".join(words), "score": float(sum(word in GOOD for word in words))})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def texts(path: Path, number: int = 60, *, seed: int = 0, words: tuple[str, ...] = WORDS) -> Path:
    """Write texts of random words."""
    draws = [random.Random(1000 * seed + n) for n in range(number)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(4, 12)))}) + "\n" for draw in draws]
    path.write_text("".join(lines), encoding="utf-8")
    return path


ENCODER = {"kind": "encoder", "width": 32, "layers": 2, "heads": 2, "context": 64, "dropout": 0.0, "attention_dropout": 0.0}
DECODER = {"kind": "decoder", "family": "llama", "width": 32, "layers": 2, "heads": 2, "context": 64}


def recipe(out: Path, **changes: Any) -> Run:
    """Return a recipe whose rows are prepared."""
    base: dict[str, Any] = {
        "out": str(out), "optim": {"kind": "adamw", "lr": 3e-3}, "schedule": {"kind": "constant"}, "steps": 12, "rows": 8,
        "length": 32, "held_out": 0.2, "guard": {"overlap": 1.0}, "precision": "fp32", "metric": "loss",
        "every": {"log": 1, "evaluate": 6}, "threads": 1, "device": "cpu"}
    return taken_in(config.validate(Run, base | changes))


def lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
