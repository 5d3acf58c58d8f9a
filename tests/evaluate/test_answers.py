"""Answers against SQuAD's definitions written down once more, another way, and against values worked out by hand."""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.errors import DataError
from danlu.evaluate.answers import answers, judge

WORDS = ["the", "A", "cat", "Cat's", "an", "U.S.", "sat", "-", "1,000", "theory", "été"]
TEXT = st.lists(st.sampled_from(WORDS)).map(" ".join)


def squad(said: str, golds: list[str]) -> tuple[float, float]:
    """The official script's steps: lower, no punctuation, no articles, blanks; the best over answers."""
    def normal(text: str) -> str:
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text, flags=re.UNICODE).split())

    def f1(gold: str) -> float:
        one, two = normal(gold).split(), normal(said).split()
        same = sum((Counter(one) & Counter(two)).values())
        if not one or not two:
            return float(one == two)
        if not same:
            return 0.0
        precision, recall = same / len(two), same / len(one)
        return 2 * precision * recall / (precision + recall)

    right = [gold for gold in golds if normal(gold)] or [""]
    return max(float(normal(gold) == normal(said)) for gold in right), max(f1(gold) for gold in right)


@given(TEXT, st.lists(TEXT, max_size=3))
def test_english_is_squads(said: str, golds: list[str]) -> None:
    assert judge(said, golds, chinese=False) == pytest.approx(squad(said, golds))


def test_by_hand() -> None:
    found = answers([("The cat!", ["a cat", "dog"]), ("black cat", ["cat"]), ("", []), ("dog", [])]).figures
    assert {name: one.value for name, one in found.items()} == pytest.approx({
        "exact_match": 2 / 4, "f1": (1 + 2 / 3 + 1 + 0) / 4, "has_answer_exact_match": 1 / 2,
        "has_answer_f1": (1 + 2 / 3) / 2, "no_answer_exact_match": 1 / 2, "no_answer_f1": 1 / 2})
    assert set(answers([("cat", ["cat"])]).figures) == {"exact_match", "f1"}
    with pytest.raises(DataError):
        answers([])


def test_chinese_is_compared_by_character() -> None:
    assert judge("北京市。", ["北京市"], chinese=True) == (1, 1)
    exact, f1 = judge("北京", ["北京市"], chinese=True)
    assert (exact, f1) == (0, pytest.approx(2 * 2 / (2 + 3)))
    assert judge("2008年", ["2008 年"], chinese=True) == (1, 1)              # a number is one word
    assert judge("2008年", ["2009年"], chinese=True)[1] == pytest.approx(1 / 2)
    assert judge("北京", ["北京市"], chinese=False) == (0, 0)
    found = answers([("北京", ["北京市"])] * 3).figures      # decided by the texts
    assert found["f1"].value == pytest.approx(0.8)


def test_the_interval_is_the_binomial_one() -> None:
    rows = [("yes", ["yes" if i % 4 else "no"]) for i in range(400)]
    one = answers(rows, resamples=2000).figures["exact_match"]
    assert one.value == 0.75 and one.stderr == pytest.approx(np.sqrt(0.75 * 0.25 / 400), rel=0.08)
