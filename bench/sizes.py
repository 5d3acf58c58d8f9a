"""The models that everything is measured at, and the token files they read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Size:
    """One model and its batch: `rows` rows of `length` tokens a step, feed-forward 4 times the width."""

    layers: int
    heads: int
    width: int
    length: int
    rows: int
    vocabulary: int
    encoder: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.rows * self.length

    @property
    def flops(self) -> int:
        """Floating-point operations of a step, attention counted in full (the convention of nanoGPT and PaLM)."""
        matrices = 12 * self.layers * self.width**2 + self.vocabulary * self.width
        return self.tokens * (6 * matrices + 12 * self.layers * self.width * self.length)


SIZES = {
    "a": Size(layers=4, heads=4, width=128, length=64, rows=12, vocabulary=65),
    "b": Size(layers=6, heads=6, width=384, length=256, rows=16, vocabulary=65),
    "c": Size(layers=12, heads=12, width=768, length=512, rows=4, vocabulary=50304),
    "mlm": Size(layers=4, heads=4, width=256, length=128, rows=32, vocabulary=8192, encoder=True),
}


def write(folder: Path, vocabulary: int, *, text: Path | None = None, tokens: int = 1_000_000) -> list[str]:
    """Write train.bin and val.bin (uint16 ids, 9 to 1) and return the alphabet.

    With `text` the ids are its characters in sorted order; without, `tokens` ids drawn by Zipf's law, which cost the
    same time to learn from and teach nothing.
    """
    if text is not None:
        content = text.read_text(encoding="utf-8")
        alphabet = sorted(set(content))
        if len(alphabet) > vocabulary:
            raise SystemExit(f"{text} has {len(alphabet)} characters; the vocabulary of this size is {vocabulary}")
        place = {c: i for i, c in enumerate(alphabet)}
        ids = np.array([place[c] for c in content], dtype=np.uint16)
    else:
        alphabet = []
        share = 1.0 / np.arange(1, vocabulary + 1)
        ids = np.random.default_rng(0).choice(vocabulary, size=tokens, p=share / share.sum()).astype(np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    return alphabet
