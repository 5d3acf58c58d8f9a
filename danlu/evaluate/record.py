"""What an evaluation found, as lm-eval writes it, and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

import danlu
from danlu.evaluate.interval import Estimate
from danlu.evaluate.subject import Subject
from danlu.words import _


def finite(value: float | None) -> float | None:
    """Return `value`, None where it is not a number: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def figures_of(task: str, found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return the parts of a record that tell figures and their intervals."""
    figures: dict[str, Any] = {"alias": task}
    for name, one in found.items():
        figures |= {f"{name},none": finite(one.value), f"{name}_stderr,none": finite(one.stderr)}
    return {"results": {task: figures},
            "intervals": {task: {name: [finite(one.low), finite(one.high)] for name, one in found.items()}}}


def whole(task: str, parts: Mapping[str, Any], subject: Subject, facts: Mapping[str, Any], *, read: int, judged: int,
          length: int, precision: str, seconds: float, resamples: int = 2000) -> dict[str, Any]:
    """Return a record of one data set.  parts: its figures; facts: what they rest on; read, judged: rows."""
    return {
        **parts, "facts": {task: dict(facts)}, "n-samples": {task: {"original": read, "effective": judged}},
        "n-shot": {task: 0}, "versions": {task: 1},
        "config": {"model": "danlu", "model_args": str(subject.folder), "length": length, "precision": precision,
                   "bootstrap_iters": resamples, "danlu": danlu.__version__},
        "model_name": str(subject.folder), "tokenizer_sha256": subject.tokenizer.sha256,
        "total_evaluation_time_seconds": round(seconds, 3),
    }


def merged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one record of several; what is told by task is joined."""
    joined = dict(records[0])
    for record in records[1:]:
        for name, value in record.items():
            if isinstance(value, dict) and name != "config":
                joined[name] = {**joined.get(name, {}), **value}
            else:
                joined.setdefault(name, value)
    return joined


def show(title: str, found: Mapping[str, Estimate], lines: Sequence[str], *, names: Mapping[str, str] | None = None) -> None:
    """Print the figures as a table, and below it what they rest on.  names: how figures are called, where not as they are."""
    console = Console()
    table = Table(title=title, title_justify="left")
    table.add_column(_("figure"))
    table.add_column(_("value"), justify="right")
    table.add_column(_("95 % interval"), justify="right")
    for name, one in found.items():
        spread = f"{one.low:.4f} – {one.high:.4f}" if one.low is not None and one.high is not None else "–"
        table.add_row((names or {}).get(name, name), f"{one.value:.4f}", spread)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False)
