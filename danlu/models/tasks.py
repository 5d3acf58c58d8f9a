"""Heads of tasks in config.json: the names of classes as `id2label`, the kind of labels as `problem_type`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from danlu.errors import IncompatibleError
from danlu.nn.tasks import Head, Kind, Problem
from danlu.words import _

PROBLEMS: dict[str, Problem] = {"single_label_classification": "single", "multi_label_classification": "multi",
                                "regression": "regression"}


def read(kind: Kind, data: Mapping[str, Any], *, where: str) -> Head:
    """Return the head that a config.json of a class of transformers describes.  Raises IncompatibleError."""
    told = data.get("problem_type") or "single_label_classification"
    if told not in PROBLEMS:
        raise IncompatibleError(_("{key}={value} is not supported").format(key="problem_type", value=told), where=where)
    names = data.get("id2label") or {str(i): f"LABEL_{i}" for i in range(data.get("num_labels") or 2)}
    if not isinstance(names, dict) or sorted(names, key=str) != sorted(map(str, range(len(names))), key=str):
        raise IncompatibleError(_("id2label must give each class from 0 on a name"), where=where)
    problem = PROBLEMS[told]
    if "problem_type" not in data and kind == "classify" and len(names) == 1:
        problem = "regression"                           # as transformers understands a single label
    labels = tuple(str(names[str(i)]) for i in range(len(names))) if kind in ("classify", "tag") else ()
    return Head(kind=kind, labels=labels, problem=problem)


def restore(kept: Any, *, where: str) -> list[Head]:
    """Return the heads that `write` kept for us.  Raises IncompatibleError."""
    try:
        return [Head.model_validate(one) for one in kept]
    except (ValidationError, TypeError) as error:
        raise IncompatibleError(_("the heads of tasks are not understood: {why}").format(why=str(error).splitlines()[0]),
                                where=where) from None


def write(tasks: Sequence[Head]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what config.json says of the heads for transformers, and for us what that cannot say."""
    told: dict[str, Any] = {}
    if len(tasks) == 1 and tasks[0].kind in ("classify", "tag"):
        task = tasks[0]
        names = task.labels or ("LABEL_0",)
        told = {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}
        told |= {"problem_type": next(k for k, v in PROBLEMS.items() if v == task.problem)} if task.kind == "classify" else {}
    plain = len(tasks) == 1 and tasks[0].name == tasks[0].kind and tasks[0].kind != "embed"
    return told, [] if plain or not tasks else [task.model_dump(mode="json") for task in tasks]
