"""Tiny models of tasks and of conversations, trained or made on the spot."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

from danlu import cli
from danlu.data.kinds import BPE, WordPiece
from danlu.data.tokenizer import train
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder

GOOD = ("fine", "warm", "splendid", "bright", "真好", "lovely")
BAD = ("dull", "cold", "awful", "grey", "很差", "sad")
OTHER = ("the", "film", "was", "and", "a", "story", "with", "music", "of", "电影", "old", "day")


def texts(number: int, seed: int, kinds: int = 2) -> list[tuple[str, str]]:
    """Rows of (text, label): words of one side among neutral ones."""
    draw, rows = random.Random(seed), []
    for n in range(number):
        label = ("bad", "good", "mixed")[n % kinds]
        own = {"bad": BAD, "good": GOOD, "mixed": (*GOOD, *BAD)}[label]
        words = [*draw.choices(OTHER, k=draw.randint(2, 24)), *draw.choices(own, k=draw.randint(1, 3))]
        draw.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def encoder(folder: Path, context: int = 64) -> Path:
    """A tiny BERT without heads, with random weights, as a Hugging Face folder."""
    tokenizer = train([text for text, _label in texts(60, 0, 3)], WordPiece.model_validate({"vocab": 200}))
    tokenizer.save(folder / "tokenizer")
    cfg = Encoder.model_validate({"width": 32, "layers": 2, "heads": 2, "context": context, "init_std": 0.1}).filled(
        vocab=tokenizer.size, heads=())
    weights.save(folder / "model", build(cfg, "cpu").init(1), tokenizer=folder / "tokenizer")
    return folder / "model"


def decoder(folder: Path, said: list[str], context: int = 128, **more: Any) -> Path:
    """A tiny Llama with random weights, as a Hugging Face folder."""
    tokenizer = train(said, BPE.model_validate({"vocab": 300, **more}))
    tokenizer.save(folder / "tokenizer")
    cfg = Decoder.model_validate({"width": 32, "layers": 2, "heads": 2, "context": context, "vocab": tokenizer.size,
                                  "init_std": 0.1})
    weights.save(folder / "model", build(cfg, "cpu").init(1), tokenizer=folder / "tokenizer")
    return folder / "model"


def table(path: Path, heads: list[str], rows: list[Any], *, encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    return path


def trained(folder: Path, start: Path, data: Any, **more: Any) -> Path:
    """The folder of a run of a few steps."""
    recipe = {"out": str(folder / "run"), "start": str(start), "data": data, "objective": "classify",
              "optim": {"kind": "adamw", "lr": 3e-3}, "schedule": "constant", "rows": 16, "steps": 40, "length": 32,
              "overlong": "cut", "precision": "fp32", "threads": 1, "every": {"log": 20}, "guard": {"reload": False}} | more
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert cli.main(["train", str(folder / "recipe.json")]) == 0
    return folder / "run"
