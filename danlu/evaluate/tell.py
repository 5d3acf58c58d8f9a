"""What a model says of one row, in words: the class, its probability, the loss where the truth is known.

K classes; one array for each stretch of ids that the model read of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from danlu.errors import IncompatibleError
from danlu.evaluate.lines import Line, Row
from danlu.objectives import Classify, Regress
from danlu.objectives.protocol import Objective
from danlu.words import _

Said = NDArray[np.float64]
THRESHOLD = 0.5                                          # from here on one of several labels is predicted


@singledispatch
def tell(objective: Any, said: Sequence[Said], line: Line, *, top: int = 0) -> dict[str, Any]:
    """Return {"predicted", "probability", "loss", …}, JSON-ready; "loss" where the line has a label.

    said: what the head gave for each of the line's rows.  top: the likeliest classes that are listed under "top".
    """
    raise IncompatibleError(_("predictions of a {kind} model are not known how to tell").format(kind=objective.kind))


@tell.register
def _class(objective: Classify, said: Sequence[Said], line: Line, *, top: int = 0) -> dict[str, Any]:
    logits, labels, label = said[0], objective.labels, line.rows[0]["label"] if line.label is not None else None
    if objective.several:
        return _several(logits, labels, label, top)
    logp = logits - logits.max()
    logp = logp - np.log(np.exp(logp).sum())
    best = int(logits.argmax())
    told: dict[str, Any] = {"predicted": labels[best], "probability": float(np.exp(logp[best]))}
    if label is not None:
        told["loss"] = float(-logp[int(label)])
    return told | ({"top": _ranked(np.exp(logp), labels, top)} if top else {})


def _several(logits: Said, labels: Sequence[str], truth: np.ndarray | None, top: int) -> dict[str, Any]:
    """Return the labels that are predicted; probability: of each of them; sure: of the least sure decision, either way."""
    sure = 1 / (1 + np.exp(-logits))
    there = np.flatnonzero(sure >= THRESHOLD)
    told: dict[str, Any] = {"predicted": [labels[int(i)] for i in there], "probability": [float(sure[i]) for i in there],
                            "sure": float(np.maximum(sure, 1 - sure).min())}
    if truth is not None:
        told["loss"] = float((np.logaddexp(0, logits) - truth * logits).mean())
    return told | ({"top": _ranked(sure, labels, top)} if top else {})


def _ranked(chances: Said, labels: Sequence[str], top: int) -> list[list[Any]]:
    order = np.argsort(-chances, kind="stable")[:top]
    return [[labels[i], float(chances[i])] for i in order]


@tell.register
def _score(objective: Regress, said: Sequence[Said], line: Line, *, top: int = 0) -> dict[str, Any]:
    score = float(said[0].reshape(-1)[0])
    return {"predicted": score} | ({} if line.label is None else {"loss": (score - float(line.rows[0]["label"])) ** 2})


def unlabelled(row: Row, objective: Objective) -> Row:
    """Return a row with what an objective's `collate` asks for beside the ids, where it has no label."""
    size, labels = len(row["ids"]), len(getattr(objective, "labels", ()))
    blank: dict[str, Any] = {"label": np.int32(0), "labels": np.zeros(labels, np.uint8), "score": np.float32(0)}
    if objective.wants in blank:
        return {"label": np.asarray(blank[objective.wants])} | row
    if objective.wants == "tags":
        return {"tags": np.full(size, -100, np.int16)} | row
    if objective.wants == "answer":
        return {"answer": np.full(2, -1, np.int32)} | row
    return {"label": np.asarray(0, np.int32)} | row


def of_report(told: dict[str, Any]) -> dict[str, Any]:
    """Return what a line of predictions.jsonl tells: one probability, also where there are several labels."""
    told = dict(told)
    if "sure" in told:
        told["probability"] = told.pop("sure")
    return told
