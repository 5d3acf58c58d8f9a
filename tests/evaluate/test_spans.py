"""Spans against seqeval called on all sentences at once, in both its modes."""

from __future__ import annotations

import numpy as np
import pytest
from seqeval import metrics as reference
from seqeval.scheme import IOB2, IOBES

from danlu.errors import ConfigError, DataError
from danlu.evaluate import spans as module
from danlu.evaluate.spans import spans

IOB = ["O", "O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def drawn(tags: list[str], n: int = 120, seed: int = 0) -> tuple[list[list[str]], list[list[str]]]:
    """Sentences of tags in any order, and predictions that change some."""
    draw = np.random.default_rng(seed)
    truth = [[str(t) for t in draw.choice(tags, draw.integers(1, 12))] for _ in range(n)]
    return truth, [[str(draw.choice(tags)) if draw.random() < 0.2 else t for t in row] for row in truth]


@pytest.mark.parametrize("tags", [IOB, [*IOB, "E-PER", "S-LOC", "S-PER"]])
@pytest.mark.parametrize("strict", [False, True])
def test_they_are_seqevals(tags: list[str], strict: bool) -> None:
    truth, guess = drawn(tags)
    how = {"mode": "strict", "scheme": IOB2 if tags is IOB else IOBES} if strict else {}
    found = spans(truth, guess, strict=strict, resamples=50)
    want = {"precision": reference.precision_score(truth, guess, **how), "recall": reference.recall_score(truth, guess, **how),
            "f1": reference.f1_score(truth, guess, **how), "f1_macro": reference.f1_score(truth, guess, average="macro", **how),
            "accuracy": reference.accuracy_score(truth, guess)}
    assert {name: one.value for name, one in found.figures.items()} == pytest.approx(want)
    each = reference.classification_report(truth, guess, output_dict=True, **how)
    assert set(found.types) == {"PER", "LOC"}
    for kind, figures in found.types.items():
        assert figures["f1"].value == pytest.approx(each[kind]["f1-score"])
        assert figures["recall"].value == pytest.approx(each[kind]["recall"])
        assert f"{figures['precision'].value:.4f}" in found.report
    assert all(one.low is not None and one.high is not None and one.low <= one.value <= one.high
               for one in found.figures.values())


def test_strict_and_not_differ_as_told() -> None:
    truth, guess = [["B-PER", "I-PER", "O"]], [["I-PER", "I-PER", "O"]]
    assert spans(truth, guess).figures["f1"].value == 1
    assert spans(truth, guess, strict=True).figures["f1"].value == 0


def test_other_letters_are_the_same_spans() -> None:
    iobes = [["B-A", "I-A", "E-A", "O", "S-B"]], [["B-A", "E-A", "O", "O", "S-B"]]
    for letters in ({"I": "M"}, {"E": "L", "S": "U"}):
        other = [[[letters.get(t[0], t[0]) + t[1:] for t in row] for row in side] for side in iobes]
        for strict in (False, True):
            assert spans(*other, strict=strict).figures == spans(*iobes, strict=strict).figures


def test_the_interval_of_f1_is_that_of_drawn_sentences() -> None:
    truth, guess = drawn(IOB, 100)
    draw, found = np.random.default_rng(1), spans(truth, guess, resamples=2000).figures
    drawn_rows = [draw.integers(0, 100, 100) for _ in range(200)]
    for name, average in (("f1", "micro"), ("f1_macro", "macro")):
        plain = [reference.f1_score([truth[i] for i in some], [guess[i] for i in some], average=average) for some in drawn_rows]
        assert found[name].stderr == pytest.approx(np.std(plain), rel=0.2)


def test_nothing_found_is_zero() -> None:
    found = spans([["B-A", "O"], ["O"]], [["O", "O"], ["O"]]).figures
    assert (found["precision"].value, found["recall"].value, found["f1"].value) == (0, 0, 0)
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert spans([["O"]], [["O"]]).figures["f1"].value == 0      # as seqeval has it: no span, no credit


def test_what_is_no_span_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'NOUN'") as error:
        spans([["O"], ["NOUN"]], [["O"], ["O"]])
    assert error.value.where == "sentence 2"
    with pytest.raises(ValueError, match="sentence 1: 2 words, 1"):
        spans([["O", "O"]], [["O"]])
    with pytest.raises(DataError):
        spans([], [])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as missing:
        spans([["O"]], [["O"]])
    assert missing.value.fix == 'pip install "danlu[metrics]"'
