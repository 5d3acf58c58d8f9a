"""Filters as the command line names them, and how often each stops what it should not, measured on a file of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from danlu.data import records
from danlu.data.encode import encode
from danlu.data.example import Labelled
from danlu.data.inputs import Input
from danlu.errors import ConfigError, DataError
from danlu.evaluate import rows
from danlu.evaluate.lines import Line, row_of
from danlu.evaluate.subject import open_subject
from danlu.evaluate.tell import tell
from danlu.objectives import Classify
from danlu.serve.filter import Classifier, Filter, words_of
from danlu.words import _

BAD = ("1", "true", "bad", "block", "yes")               # labels of texts that a filter should stop


def opened(told: str, device: torch.device) -> Filter:
    """Return a filter: a file of words, or a run folder of a classifier as RUN:LABEL or RUN:LABEL=0.8.  Raises ConfigError."""
    if Path(told).is_file():
        return words_of(Path(told))
    folder, colon, wanted = told.rpartition(":")
    label, equals, least = wanted.partition("=")
    if not colon or not Path(folder).is_dir():
        raise ConfigError(_("{text!r} is neither a file of words nor RUN:LABEL").format(text=told), where="--filter")
    try:
        chance = float(least) if equals else 0.5
    except ValueError:
        raise ConfigError(_("{text!r} is no probability").format(text=least), where="--filter") from None
    task = rows.task_of(open_subject(Path(folder), graph=True), rows.How(overlong="cut"), device)
    known: tuple[str, ...] = task.objective.labels if isinstance(task.objective, Classify) else ()
    if label not in known:
        raise ConfigError(_("the model has no class {label!r}; it has {labels}").format(label=label, labels=", ".join(known)),
                          where="--filter")

    def ask(text: str) -> str | None:
        content = Labelled((text,), None)
        line = Line("filter", 1, {}, text, None, content, tuple(map(row_of, encode(content, task.encoder()))))
        (_line, outs), = rows.answered(task, [line])
        found = dict(tell(task.objective, outs, line, top=len(known))["top"])
        return label if found[label] >= chance else None

    return Classifier(ask, f"{Path(folder).resolve().name}:{label}")


def measured(filters: Sequence[Filter], path: Path) -> dict[str, Any]:
    """Return of each filter how many of the texts it stops, as share with an interval (Wilson, 95 %).

    Rows have `text`, and perhaps `label`: 1, true, bad or block for a text that should be stopped, anything else for one
    that should not.  Without labels every text counts as one that should not.
    """
    texts: list[tuple[str, bool]] = []
    for row in records.read(Input.model_validate({"path": str(path)})):
        if not isinstance(row.columns.get("text"), str):
            raise DataError(_("the row has no text"), where=f"{row.file}:{row.line}", fix=_("call the column `text`"))
        label = row.columns.get("label")
        texts.append((row.columns["text"], label is not None and str(label).lower() in BAD))
    if not texts:
        raise DataError(_("there is no text"), where=str(path))
    found: list[dict[str, Any]] = []
    for one in filters:
        hits = [one.judge(text) is not None for text, _bad in texts]
        good = [hit for hit, (_text, bad) in zip(hits, texts, strict=True) if not bad]
        bad_ = [hit for hit, (_text, bad) in zip(hits, texts, strict=True) if bad]
        found.append({"filter": one.name, "false_positives": _share(good), "caught": _share(bad_) if bad_ else None,
                      "lines": [n for n, hit in enumerate(hits, 1) if hit and not texts[n - 1][1]][:20]})
    return {"texts": len(texts), "filters": found}


def wilson(hits: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927), which is right for rare events, too."""
    if not number:
        return 0.0, 1.0
    share, extra = hits / number, z * z / number
    middle, half = share + extra / 2, z * math.sqrt(share * (1 - share) / number + extra / number / 4)
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(hits), len(hits))
    return {"stopped": sum(hits), "of": len(hits), "share": sum(hits) / len(hits) if hits else 0.0, "low": low, "high": high}


def shown(found: dict[str, Any]) -> str:
    """Return the measurement as people read it."""
    lines = []
    for one in found["filters"]:
        for name, told in ((_("stopped wrongly"), one["false_positives"]), (_("stopped rightly"), one["caught"])):
            if told is not None:
                lines.append(_("{filter}: {name} {n} of {all}, {share:.2%} [{low:.2%}, {high:.2%}]").format(
                    filter=one["filter"], name=name, n=told["stopped"], all=told["of"], share=told["share"], low=told["low"],
                    high=told["high"]))
        if one["lines"]:
            lines.append(_("  first lines stopped wrongly: {lines}").format(lines=", ".join(map(str, one["lines"]))))
    return "\n".join(lines)
