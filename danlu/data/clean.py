"""Clean one text: one form of each character, no control characters, and filters that say why they drop it.

A filtered row is a decision, not a fault: it is counted by reason, apart from rejects.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from danlu.config import Model
from danlu.words import _

NEWLINES = dict.fromkeys((0x0B, 0x0C, 0x85, 0x2028, 0x2029), "\n")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
TABLE = {code: None for code in (*range(0x20), *range(0x7F, 0xA0), 0xFEFF) if code not in (0x09, 0x0A)} | NEWLINES
UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U000323af]|[^\W\u3040-\u30ff"
                  r"\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U000323af]+|[^\w\s]")
GRAM = 10                                           # units in an n-gram: a word, a sign, a Han character, kana, hangul


class Clean(Model):
    """How texts are cleaned and which are dropped."""

    normalize: Literal["nfc", "nfkc", "none"] = Field(
        default="nfc", description="Unicode form of the text; nfkc also makes full-width letters plain.")
    min_chars: int = Field(default=1, ge=0, description="Drop texts with fewer characters than this, spaces aside.")
    max_chars: int | None = Field(default=None, ge=1, description="Drop texts with more characters than this.")
    max_repeat: float | None = Field(
        default=None, ge=0, le=1, allow_inf_nan=False,
        description="Drop texts of which a larger share repeats an earlier part of the same text; 0.3 suits web pages.")

    @model_validator(mode="after")
    def _fits(self) -> Clean:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(_("clean.max_chars={high} is below clean.min_chars={low}").format(
                high=self.max_chars, low=self.min_chars))
        return self

    def apply(self, text: str) -> tuple[str, str | None]:
        """Return the cleaned text, and the reason if it is to be dropped: too_short, too_long or repeats."""
        text = normal(text, self.normalize)
        if len(text) < self.min_chars or len(text.strip()) < self.min_chars:
            return text, "too_short"
        if self.max_chars is not None and len(text) > self.max_chars:
            return text, "too_long"
        if self.max_repeat is not None and repeated(text) > self.max_repeat:
            return text, "repeats"
        return text, None


def normal(text: str, form: Literal["nfc", "nfkc", "none"] = "nfc") -> str:
    """Return the text in Unicode `form`, with line feeds as its only line ends, and tabs as its only other controls."""
    if CONTROL.search(text):
        text = text.replace("\r\n", "\n").replace("\r", "\n").translate(TABLE)
    if form == "none" or text.isascii():
        return text
    return unicodedata.normalize("NFC" if form == "nfc" else "NFKC", text)


def repeated(text: str) -> float:
    """Return the share of a text that repeats an earlier part of it, 0..1: the larger of two shares.

    Of its characters, those in lines that stood before; and those in n-grams of ten units that stood before, a unit
    being a word, a sign or one character of a script without spaces (after Gopher's filters, Rae et al., 2021, A1.1).
    """
    return max(_repeated_lines(text), _repeated_grams(text))


def _repeated_lines(text: str) -> float:
    seen, total, again = set[str](), 0, 0
    for line in text.split("\n"):
        if kept := line.strip():
            total += len(kept)
            again += len(kept) if kept in seen else 0
            seen.add(kept)
    return again / total if total else 0.0


def _repeated_grams(text: str) -> float:
    units = UNIT.findall(text)
    if len(units) <= GRAM:
        return 0.0
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(unit, len(numbers)) for unit in units), np.uint64, len(units))
    sizes = np.fromiter(map(len, units), np.int64, len(units))
    grams = np.zeros(len(units) - GRAM + 1, np.uint64)
    for shift in range(GRAM):                       # a polynomial in an odd base, modulo 2^64
        grams = (grams + ids[shift:shift + len(grams)] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    _values, first = np.unique(grams, return_index=True)
    again = np.ones(len(grams), bool)
    again[first] = False                            # the first of equal n-grams is no repetition
    marks = np.zeros(len(units) + 1, np.int64)
    np.add.at(marks, np.flatnonzero(again), 1)
    np.add.at(marks, np.flatnonzero(again) + GRAM, -1)
    return float(sizes[np.cumsum(marks[:-1]) > 0].sum() / sizes.sum())
