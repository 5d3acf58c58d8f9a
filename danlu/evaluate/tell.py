"""What a model says of one row, in words: the class, its probability, the loss where the truth is known.

K classes; one array for each stretch of ids that the model read of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from danlu.data.example import Chosen
from danlu.errors import IncompatibleError
from danlu.evaluate import judge
from danlu.evaluate.lines import Line, Row
from danlu.objectives import Answer, Choose, Classify, Embed, Regress, Tag
from danlu.objectives.protocol import UNLEARNED, Objective
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


def _ranked(chances: Said, labels: Sequence[Any], top: int) -> list[list[Any]]:
    order = np.argsort(-chances, kind="stable")[:top]
    return [[labels[i], float(chances[i])] for i in order]


@tell.register
def _score(objective: Regress, said: Sequence[Said], line: Line, *, top: int = 0) -> dict[str, Any]:
    score = float(said[0].reshape(-1)[0])
    return {"predicted": score} | ({} if line.label is None else {"loss": (score - float(line.rows[0]["label"])) ** 2})


@tell.register
def _tags(objective: Tag, said: Sequence[Said], line: Line, *, top: int = 0) -> dict[str, Any]:
    """probability: of the tag of each word, None for one that was cut off; loss: the mean over the words."""
    words = line.kept["words"] if line.kept is not None else ()
    tags, losses = [judge.missing(objective)] * len(words), list[float]()
    chances: list[float | None] = [None] * len(words)
    truth = None if line.kept is None or line.label is None else line.kept["tags"]
    for logits, row in zip(said, line.rows, strict=True):
        logp = logits - logits.max(-1, keepdims=True)
        logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        for word, place in enumerate(np.flatnonzero(row["tags"] != UNLEARNED), int(row["window"][2])):
            best = int(logp[place].argmax())
            tags[word], chances[word] = objective.labels[best], float(np.exp(logp[place, best]))
            if truth is not None:
                losses.append(-float(logp[place, objective.labels.index(truth[word])]))
    sure = {"sure": min(chance for chance in chances if chance is not None)} if losses or said else {}
    return {"predicted": tags, "probability": chances} | sure | ({"loss": float(np.mean(losses))} if losses else {})


@tell.register
def _answer(objective: Answer, said: Sequence[Said], line: Line, *, top: int = 0) -> dict[str, Any]:
    """score, null_score: the logits of the best answer, its first and last token together, and of no answer."""
    assert line.kept is not None
    best = np.stack([judge.span_of(objective, logits, row) for logits, row in zip(said, line.rows, strict=True)])
    found = judge.read_off(objective, best, line.kept)
    return {"predicted": found["said"], "score": found["score"], "null_score": found["null"]}


@tell.register
def _choice(objective: Choose, said: Sequence[Said], line: Line, *, top: int = 0) -> dict[str, Any]:
    logits = said[0][: _stretches(line.rows[0]["parts"].reshape(-1, 2).sum(1))]
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    best = int(chances.argmax())
    names = line.content.choices if isinstance(line.content, Chosen) else tuple(range(len(logits)))
    told: dict[str, Any] = {"predicted": names[best], "probability": float(chances[best])}
    if line.label is not None:
        told["loss"] = -float(np.log(np.maximum(chances[int(line.rows[0]["label"])], 1e-300)))
    return told | ({"top": _ranked(chances, names, top)} if top else {})


@tell.register
def _alike(objective: Embed, said: Sequence[Said], line: Line, *, top: int = 0) -> dict[str, Any]:
    """predicted: how alike the first two texts are, on the scale of the scores."""
    (low, high), vectors = objective.scores, said[0]
    if _stretches(line.rows[0]["parts"]) < 2:
        return {"predicted": [float(x) for x in vectors[0]]}
    first, second = (v / max(float(np.linalg.norm(v)), 1e-12) for v in vectors[:2])
    score = low + float(first @ second) * (high - low)
    return {"predicted": score} | ({} if line.label is None else {"loss": (score - float(line.label)) ** 2})


def _stretches(sizes: np.ndarray) -> int:
    return int((sizes > 0).sum())


def unlabelled(row: Row, objective: Objective) -> Row:
    """Return a row with what an objective's `collate` asks for beside the ids, where it has no label."""
    labels = len(getattr(objective, "labels", ()))
    blank: dict[str, Any] = {"label": np.int32(0), "labels": np.zeros(labels, np.uint8), "score": np.float32(0)}
    if objective.wants in blank:
        return {"label": np.asarray(blank[objective.wants])} | row
    if isinstance(objective, Embed) and not objective.across:
        return {"label": np.asarray(objective.scores[0], np.float32)} | row
    return row


def of_report(told: dict[str, Any]) -> dict[str, Any]:
    """Return what a line of predictions.jsonl tells: one probability, also where there are several labels."""
    told = dict(told)
    if "sure" in told:
        told["probability"] = told.pop("sure")
    return told
