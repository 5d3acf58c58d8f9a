"""How well a model does its task: rows with what is true of them, from files as they are or a prepared folder.

B rows of a batch, T tokens, K classes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu import chance, files, parallel
from danlu.data.encode import Encoder
from danlu.data.shards import Shards
from danlu.data.stream import Overlong
from danlu.data.tokenizer import Special
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.evaluate import judge, metrics
from danlu.evaluate.lines import TARGETS, Line, Reading, Row, named, prepared, read, source
from danlu.evaluate.metrics import Judged
from danlu.evaluate.record import merged, whole
from danlu.evaluate.subject import Subject, open_subject
from danlu.evaluate.tell import Said, of_report, tell, unlabelled
from danlu.log import say
from danlu.models.session import SessionModel
from danlu.nn import paths
from danlu.objectives import Answer, Tasks
from danlu.objectives.protocol import Objective
from danlu.train.intake import refuse_rejects
from danlu.train.sources import Source
from danlu.words import _

TOKENS = 8192                                            # places of a batch, padding included
LINES, BYTES = 1024, 32 << 20                            # rows that are sorted by length and computed together
Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class How:
    """How rows are read and computed; what is None is as the recipe says."""

    split: str | None = None                             # of a prepared folder, or of a hub data set
    names: Mapping[str, str] = field(default_factory=dict)           # columns by role
    encoding: str | None = None
    format: str | None = None
    overlong: Overlong | None = None
    length: int | None = None
    precision: str = "fp32"
    rows: int | None = None                              # most rows of a batch
    head: str | None = None                              # which of several tasks

    @property
    def part(self) -> str:
        """The split of a prepared folder."""
        return self.split or "val"


@dataclass(frozen=True)
class Task:
    """A model that does a task, ready to compute: what it was trained on, and how long a row may be."""

    subject: Subject
    head: str
    objective: Objective
    length: int
    overlong: Overlong
    precision: str
    rows: int
    device: torch.device

    @property
    def like(self) -> Source | None:
        """The first of the recipe's sources that trained the head, as which new rows are read."""
        return next(iter(self.subject.sources(self.head)), None)

    def encoder(self) -> Encoder:
        """Return what makes ids of raw rows, as in training."""
        room, _overlap, reserve = self.objective.room(self.length)
        return Encoder(self.subject.tokenizer, length=room - reserve, overlong=self.overlong,
                       labels=tuple(getattr(self.objective, "labels", ())), several=self.objective.wants == "labels",
                       stride=self.objective.stride if isinstance(self.objective, Answer) else 0)

    def reading(self, how: How, *, unlabelled: bool = False) -> Reading:
        """Return how raw rows are read."""
        usual = {} if self.like is None else {role: str(name) for role, name in self.like.columns.items()}
        target = TARGETS.get(self.objective.wants, "label")
        names = {target if role == "label" else role: name for role, name in how.names.items()}
        return Reading(self.objective.wants, self.encoder(), names, usual, unlabelled)


def task_of(subject: Subject, how: How, device: torch.device) -> Task:
    """Return the subject ready to do its task.  Raises ConfigError or IncompatibleError if it has none, or for its length."""
    head = subject.head(how.head)
    objective = subject.objective_of(head)
    if not judge.can_judge(objective):
        raise IncompatibleError(_("the model has no head of a task"), where=str(subject.folder),
                                fix=_("train one with objective.kind: classify, or another task"))
    length = how.length or subject.length
    if length > subject.cfg.context:
        raise ConfigError(_("length={length} is more than the model's context of {context}").format(
            length=length, context=subject.cfg.context), where="--length")
    overlong: Overlong = how.overlong or (subject.run.overlong if subject.run is not None else "error")
    if isinstance(subject.model, SessionModel) and how.precision != "fp32":
        raise ConfigError(_("a graph computes in the precision that it was exported in"), where=f"--precision {how.precision}")
    model: Any = subject.model.to(device).eval()
    model.use(paths.rule(device, parallel.DTYPES[how.precision], length, causal=subject.cfg.causal))
    if hasattr(model, "unpadded"):
        model.unpadded = device.type == "cpu"
    return Task(subject, head.name, objective, length, overlong, how.precision, how.rows or TOKENS, device)


def answered(task: Task, lines: Iterable[Line], *, said: judge.Said | None = None) -> Iterator[tuple[Line, list[Said]]]:
    """Yield each line in order with what the head gives for each of its rows; nothing for a line without rows.

    Rows of like length are computed together, those of at most LINES lines or BYTES of text.  said: takes in the batches.
    """
    window, size = list[Line](), 0
    for line in lines:
        window.append(line)
        size += line.bytes
        if len(window) >= LINES or size > BYTES:
            yield from _window(task, window, said)
            window, size = [], 0
    yield from _window(task, window, said)


def _window(task: Task, lines: list[Line], said: judge.Said | None) -> Iterator[tuple[Line, list[Said]]]:
    found: list[list[Any]] = [[None] * len(line.rows) for line in lines]
    places = [(i, j) for i, line in enumerate(lines) for j in range(len(line.rows))]
    places.sort(key=lambda at: -len(lines[at[0]].rows[at[1]]["ids"]))
    for part in _batches(places, lambda at: len(lines[at[0]].rows[at[1]]["ids"]), task.rows):
        for (i, j), one in zip(part, computed(task, [lines[i].rows[j] for i, j in part], said), strict=True):
            found[i][j] = one
    yield from zip(lines, found, strict=True)


def _batches(places: list[tuple[int, int]], size: Callable[[tuple[int, int]], int], most: int
             ) -> Iterator[list[tuple[int, int]]]:
    """Yield places, longest first, at most TOKENS tokens with padding and `most` rows a batch."""
    batch: list[tuple[int, int]] = []
    for place in places:
        if batch and (size(batch[0]) * (len(batch) + 1) > TOKENS or len(batch) >= most):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def computed(task: Task, rows: list[Row], said: judge.Said | None = None) -> list[Said]:
    """Return what the head gives for each row, float64: [K] of a class, [n, K] of each of its n tokens, …"""
    objective, special = task.objective, task.subject.tokenizer.special
    batch = collated(objective, [unlabelled(row, objective) for row in rows], special, task.length)
    batch = {name: column.to(task.device) for name, column in batch.items()}
    inputs = {name: batch[name] for name in objective.inputs if name in batch}
    with torch.no_grad(), parallel.autocast(task.precision, task.device):
        out = task.subject.model(**inputs)
    if said is not None:
        said.add(out, batch)
    head: Tensor = out[objective.heads[0]].double().cpu()
    by_token = head.ndim > 1 and head.shape[1] == batch["ids"].shape[1] and task.objective.wants in ("tags", "answer")
    return [np.asarray(one[: len(row["ids"])] if by_token else one) for one, row in zip(head, rows, strict=True)]


def collated(objective: Objective, rows: list[Row], special: Special, length: int) -> dict[str, Tensor]:
    """Return the rows as a batch that is as long as its longest row."""
    room, _overlap, reserve = objective.room(length)
    beside = length - (room - reserve)
    return objective.collate(rows, special, lambda key, purpose: chance.generator(0, purpose, key),
                             beside + max(len(row["ids"]) for row in rows))


@dataclass
class Finding:
    """What was found about one data set."""

    name: str
    place: str
    task: Task
    judged: Judged
    rows: Counter[str]                                   # read, judged, cut, lost (ids), and left out by reason
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return what the figures rest on."""
        return {"rows": self.rows["judged"], **{name: n for name, n in self.rows.items() if name not in ("read", "judged")},
                "interval_over": "rows"}

    def record(self) -> dict[str, Any]:
        """Return the result as lm-eval writes it, with what danlu/report.py shows beside."""
        return whole(self.name, self.judged.record(self.name), self.task.subject, self.facts(), read=self.rows["read"],
                     judged=self.rows["judged"], length=self.task.length, precision=self.task.precision,
                     seconds=self.seconds, resamples=metrics.RESAMPLES)

    def told(self) -> list[str]:
        """Return the lines below the table."""
        rows, task = self.rows, self.task
        lines = [_("{rows} rows of at most {length} tokens, {precision}").format(
            rows=rows["judged"], length=task.length, precision=task.precision), _("intervals: bootstrap over rows")]
        if rows["cut"]:
            lines.append(_("{n} rows were longer and cut; {tokens} tokens were not read").format(
                n=rows["cut"], tokens=rows["lost"]))
        left = {reason: n for reason, n in rows.items() if reason not in ("read", "judged", "cut", "lost")}
        if left:
            lines.append(_("rows left out: {reasons}").format(reasons=", ".join(f"{r} {n}" for r, n in sorted(left.items()))))
        return lines + ([self.judged.report] if self.judged.report else [])


def evaluate(task: Task, lines: Iterable[Line], *, name: str, place: str, write: Write, share: float = 0.0) -> Finding:
    """Return how well the task is done on `lines`; `write` gets what danlu/report.py reads of each row.

    share: of the rows that may be unusable and left out.  Raises DataError for more, at once if there may be none, and for a
    label that the model does not know.
    """
    judge.require(task.objective)
    began, said, rejects = time.perf_counter(), judge.Said(task.objective, task.length), list[dict[str, Any]]()
    rows: Counter[str] = Counter(read=0, judged=0)
    for line, outs in answered(task, _numbered(_usable(lines, rows, rejects, share), said), said=said):
        told = of_report(tell(task.objective, outs, line))
        if not all(np.isfinite(out).all() for out in outs):
            told = {key: value for key, value in told.items() if not isinstance(value, float) or math.isfinite(value)}
        rows["judged"] += 1
        write({"file": line.file, "line": line.line, "text": line.text, "label": line.label, **told})
    refuse_rejects(place, rows["read"], Counter(r["reason"] for r in rejects), rejects, share)
    if not rows["judged"]:
        raise DataError(_("there is no row to evaluate"), where=place)
    judged = judge.judge(task.objective, said.arrays(), said.texts, resamples=metrics.RESAMPLES)
    return Finding(name, place, task, judged, rows, time.perf_counter() - began)


def _numbered(lines: Iterable[Line], said: judge.Said) -> Iterator[Line]:
    """Yield the lines with their numbers in their rows, by which the windows of one are put together again."""
    for number, line in enumerate(lines):
        if line.kept is not None:
            said.texts.append(line.kept)
        yield line._replace(rows=tuple(row | {"example": np.array(number)} for row in line.rows))


def _usable(lines: Iterable[Line], rows: Counter[str], rejects: list[dict[str, Any]], share: float) -> Iterator[Line]:
    """Yield the lines that have rows, and count all of them."""
    for line in lines:
        rows["read"] += 1
        if line.reason:
            if line.reason == "unseen_label" or (not share and line.reason != "dropped"):
                fix = _("give rows of the classes that the model was trained on")
                raise DataError(_("the row cannot be used: {detail}").format(detail=line.detail),
                                where=f"{line.file}:{line.line}", fix=fix if line.reason == "unseen_label" else
                                _("mend or remove the row; one that is too long: --overlong cut"))
            rows[line.reason] += 1
            rejects.append({"file": line.file, "line": line.line, "reason": line.reason, "detail": line.detail})
            continue
        if line.cut:
            rows["cut"] += 1
            rows["lost"] += line.cut
        yield line


def judged_on(task: Task, data: str, how: How, write: Write) -> Finding:
    """Return how well the task is done on a prepared folder, or on files of rows."""
    run = task.subject.run
    if (Path(data) / "manifest.json").is_file():
        return _on_folder(task, named(data), Path(data), how.part, write)
    item = source(data, task.like, format=how.format, encoding=how.encoding, split=how.split)
    return evaluate(task, read(item, task.reading(how)), name=named(data), place=data, write=write,
                    share=run.guard.rejects if run is not None else 0.0)


def _on_folder(task: Task, name: str, folder: Path, split: str, write: Write) -> Finding:
    lines, counts = prepared(folder, split, task.subject.tokenizer, task.objective, length=task.length, overlong=task.overlong)
    found = evaluate(task, lines, name=name, place=f"{folder}:{split}", write=write)
    found.rows.update({"cut": counts["cut"], "lost": counts["tokens_lost"], "dropped": counts["dropped"]})
    found.rows += Counter()                              # without what is 0
    return found


def on_held_out(task: Task, write: Write) -> list[Finding]:
    """Return how well the task is done on what the recipe holds out."""
    run, subject = task.subject.run, task.subject
    if run is None:
        raise ConfigError(_("there is nothing to evaluate on"), where=str(subject.folder), fix="danlu eval RUN --data test.csv")
    several = isinstance(run.objective, Tasks)
    given = [(s, s.split) for s in run.eval if not several or s.task == task.head] or [
        (s, "val") for s in subject.sources(task.head)]
    found, numbers = list[Finding](), count(2)
    for origin, split in given:
        folder = subject.place(origin)
        if not run.eval and not Shards.has(folder, split):
            continue
        name = f"{task.head}/{named(origin.path)}" if several else named(origin.path)
        name = f"{name}-{next(numbers)}" if name in {one.name for one in found} else name
        found.append(_on_folder(task, name, folder, split, write))
    if not found:
        raise ConfigError(_("the run has held nothing out"), where=str(subject.folder), fix="danlu eval RUN --data test.csv")
    return found


def on_all_held_out(subject: Subject, how: How, device: torch.device, write: Write) -> list[Finding]:
    """Return how well each task is done, or that of `how.head`, on what the recipe holds out of it."""
    found = list[Finding]()
    for head in [how.head] if how.head is not None or not subject.heads else subject.heads:
        task = task_of(subject, replace(how, head=head), device)
        beside = {"task": task.head} if len(subject.heads) > 1 else {}
        found += on_held_out(task, partial(_beside, write, beside))
    return found


def _beside(write: Write, told: Mapping[str, Any], row: dict[str, Any]) -> None:
    write({**row, **told})


def leave(out: Path, *, device: torch.device, precision: str) -> None:
    """Write eval_results.json and predictions.jsonl of a run's held-out rows into its folder, by its best checkpoint."""
    with files.growing(out / "predictions.jsonl") as write:
        found = on_all_held_out(open_subject(out), How(precision=precision), device, write)
    files.write_json(out / "eval_results.json", merged([one.record() for one in found]))
    say(_("held-out rows: {file}, {rows}").format(file=out / "eval_results.json", rows=out / "predictions.jsonl"))
