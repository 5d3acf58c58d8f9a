"""How well questions are answered: exact match and F1 as SQuAD's script has them (Rajpurkar et al., 2016, 2018), as shares."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from danlu.errors import DataError
from danlu.evaluate.interval import estimates
from danlu.evaluate.metrics import RESAMPLES, Judged
from danlu.evaluate.text import HAN, language
from danlu.words import _

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)


def answers(rows: Sequence[tuple[str, Sequence[str]]], *, chinese: bool | None = None, resamples: int = RESAMPLES,
            seed: int = 0) -> Judged:
    """Return exact_match and f1 of (predicted text, right texts); a row without right texts has no answer: "" is right.

    The best of the right texts counts.  If some rows have an answer and some none, also has_answer_… and no_answer_… of each.
    English: lower case, without ASCII punctuation and a, an, the; words between blanks.  Chinese (None: decided by the texts,
    for all rows alike): by character, each Han character a word, without any punctuation, as MLQA's script does
    (Lewis et al., 2020).  Shares of 1, not of 100.
    """
    if not rows:
        raise DataError(_("there is no row to evaluate"))
    if chinese is None:
        chinese = language([text for _said, golds in rows for text in golds] or [said for said, _golds in rows])
    found = np.array([judge(said, golds, chinese=chinese) for said, golds in rows], np.float64)     # [N, 2]
    has = np.array([any(golds) for _said, golds in rows])
    parts = {"": np.ones(len(rows), bool)}
    if has.any() and not has.all():
        parts |= {"has_answer_": has, "no_answer_": ~has}
    masks = np.repeat(np.stack(list(parts.values()), 1), 2, axis=1).astype(np.float64)             # [N, 2 for each part]
    ends = ("exact_match", "f1")
    figures = estimates(np.tile(found, len(parts)) * masks, masks, resamples=resamples, seed=seed)
    return Judged(dict(zip((part + end for part in parts for end in ends), figures, strict=True)))


def judge(said: str, golds: Sequence[str], *, chinese: bool) -> tuple[float, float]:
    """Return (exact match, F1) of one row: the best over its right texts."""
    mine = words(said, chinese=chinese)
    right = [found for gold in golds if (found := words(gold, chinese=chinese))] or [[]]
    return float(any(mine == one for one in right)), max(overlap(mine, one) for one in right)


def overlap(mine: Sequence[str], right: Sequence[str]) -> float:
    """Return the F1 of two bags of words; where one is empty, whether both are."""
    if not mine or not right:
        return float(mine == right)
    same = sum((Counter(mine) & Counter(right)).values())
    return 2 * same / (len(mine) + len(right))


def words(text: str, *, chinese: bool) -> list[str]:
    """Return the words that are compared."""
    text = text.lower()
    if not chinese:
        return ARTICLES.sub(" ", "".join(c for c in text if c not in PUNCTUATION)).split()
    kept = "".join(c for c in text if c not in PUNCTUATION and not unicodedata.category(c).startswith("P"))
    return HAN.sub(r" \g<0> ", kept).split()
