"""Rows of a class that weighs nothing in the loss: they are judged like any, and rows that only fill a batch are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from objectives.small import rng, vocab

from danlu.evaluate.judge import Said, judge
from danlu.objectives import Classify, Regress


def batch_of(objective: Classify | Regress, labels: list[Any], filled: int) -> dict[str, torch.Tensor]:
    """A batch whose last `filled` rows only fill it, as the feed does it."""
    rows = [{"ids": np.array([2, 5, 3]), "weights": np.ones(3, np.float32), "segments": np.ones(3, np.int32),
             "key": np.zeros(4, np.int64), "label": label} for label in labels]
    batch = objective.collate(rows, vocab(), rng(), 3)
    for name, column in batch.items():
        if name.endswith("weights") and filled:
            column[-filled:] = 0
    return batch


@pytest.mark.parametrize("several", [False, True])
def test_the_weight_of_a_class_is_not_that_of_its_rows(several: bool) -> None:
    objective = Classify(labels=("a", "b"), several=several, class_weights={"a": 0.0} if not several else {"a": 0.0, "b": 0.0})
    classes = [0, 0, 1, 1, 1]
    batch = batch_of(objective, [np.eye(2, dtype=np.int64)[c] if several else np.int64(c) for c in classes], 1)
    assert batch["label_weights"].sum() == (0 if several else 2)
    said = Said(objective, 3)
    said.add({"classify": torch.tensor([[-1.0, 1.0]] * 5)}, batch)
    arrays = said.arrays()
    assert arrays["counts"].tolist() == [1, 1, 1, 1, 0]
    figures = judge(objective, arrays, resamples=0).figures
    assert figures["subset_accuracy" if several else "accuracy"].value == 0.5


def test_scores_are_of_rows_that_are_there() -> None:
    said = Said(Regress(), 3)
    said.add({"classify": torch.zeros(3, 1)}, batch_of(Regress(), [0.5, 1.0, 2.0], 1))
    assert said.arrays()["counts"].tolist() == [1, 1, 0]
