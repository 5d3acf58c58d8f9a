"""Rows that a model is given for what it does with them, not for how well: to calibrate by, and to compare two models on.

One row at a time, and without padding.  T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from danlu import chance
from danlu.errors import DataError
from danlu.evaluate import rows, written
from danlu.evaluate import run as on_text
from danlu.evaluate.lines import Line, prepared, read, source
from danlu.evaluate.subject import Subject
from danlu.evaluate.tell import unlabelled
from danlu.words import _

TOKENS = 512                                             # longest row of text
RANDOM = 8                                               # rows of random ids, where there are no others
ASIDE = 5                                                # of so many rows one is kept for the comparison
Given = list[dict[str, Tensor]]


class Both(NamedTuple):
    """Rows to calibrate by, none where there is no data, and others to compare on."""

    given: Given
    aside: Given
    said: str                                            # where they are from


def both(subject: Subject, data: str | None, *, count: int, how: rows.How) -> Both:
    """Return up to `count` rows of `data`, or of what the run holds out or was trained on, in two parts; else random ids."""
    device = torch.device("cpu")
    task = rows.task_of(subject, replace(how, overlong=how.overlong or "cut"), device) if subject.cfg.tasks else None
    places = [(data, how.part)] if data is not None else _known(subject, how)
    for place, split in places:
        all_rows = _of_task(task, place, split, how) if task is not None else _of_text(subject, place, split, how)
        found = list(islice(all_rows, count))
        if not found and data is not None:
            raise DataError(_("there is no row that could be used"), where=data)
        if found:
            if len(found) < 2:
                return Both(found, found, f"{place}")
            aside = found[ASIDE - 1 :: ASIDE] or found[-1:]
            kept = {id(row) for row in aside}
            return Both([row for row in found if id(row) not in kept], aside, f"{place}")
    return Both([], random(subject), _("random ids"))


def random(subject: Subject) -> Given:
    """Return rows of ids drawn alike from the vocabulary."""
    cfg, draw = subject.cfg, torch.Generator().manual_seed(chance.torch_seed(0, "compare"))
    return [{"ids": torch.randint(0, cfg.vocab or 1, (1, min(64, cfg.context)), generator=draw)} for _row in range(RANDOM)]


def _known(subject: Subject, how: rows.How) -> list[tuple[str, str]]:
    """Return prepared folders of the run that are still there, and their splits; those it was trained on first."""
    if subject.run is None:
        return []
    head = subject.head(how.head).name if subject.cfg.tasks else None
    folders = [(subject.place(s), s.split) for s in (*subject.sources(head), *subject.run.eval)]
    return [(str(folder), split) for folder, split in folders if (Path(folder) / "manifest.json").is_file()]


def _of_task(task: rows.Task, place: str, split: str, how: rows.How) -> Iterator[dict[str, Tensor]]:
    """Yield what the model is called with for each row of a task."""
    lines: Iterator[Line]
    if on_text.is_prepared(place):
        lines, _counts = prepared(Path(place), split, task.subject.tokenizer, task.objective, length=task.length,
                                  overlong=task.overlong)
    else:
        item = source(place, task.like, format=how.format, encoding=how.encoding, split=how.split)
        lines = read(item, task.reading(how, unlabelled=True))
    for line in lines:
        for row in line.rows:
            batch = rows.collated(task.objective, [unlabelled(row, task.objective)], task.subject.tokenizer.special, task.length)
            yield {name: batch[name] for name in task.objective.inputs if name in batch}


def _of_text(subject: Subject, place: str, split: str, how: rows.How) -> Iterator[dict[str, Tensor]]:
    """Yield rows of text, or of conversations as the template writes them, each cut to one row's length."""
    length = min(how.length or subject.length, TOKENS, subject.cfg.context)
    if on_text.is_prepared(place):
        found = on_text.read_prepared(Path(place), split, subject.tokenizer)
    else:
        item = source(place, next(iter(subject.sources()), None), format=how.format, encoding=how.encoding, split=how.split)
        if subject.cfg.causal and written.answers(item, how.names):
            found = written.documents(subject, item, how.names)
        else:
            found = on_text.read_text(place, subject.tokenizer, sample_by="line", text=how.names.get("text", "text"),
                                      encoding=how.encoding or "utf-8", hub_split=item.hub_split)
    for document in found:
        if len(document.ids) > 1:
            yield {"ids": torch.from_numpy(document.ids[:length].copy())[None]}

