"""Several tasks in one run: each has sources, an objective, a head and a weight of its own; they share the rest of the model.

A row belongs to one task, which its `task` numbers.  A batch holds rows of any of them: what the model reads stands in
common columns, what belongs to a task alone under `NAME/…`; rows of other tasks weigh 0 in it.  B rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from danlu.config import Model
from danlu.data.tokenizer import Special
from danlu.errors import ConfigError
from danlu.nn.tasks import Head
from danlu.objectives.answer import Answer
from danlu.objectives.classify import Classify, Regress
from danlu.objectives.frame import pad_id
from danlu.objectives.mixture import Mixture, Single, spell_out
from danlu.objectives.protocol import UNLEARNED, Batch, Objective, Out, Rng, Row
from danlu.objectives.tag import Tag
from danlu.words import _

Each = Annotated[Single | Mixture | Classify | Regress | Tag | Answer, Field(discriminator="kind")]
TRAINED = ("data", "continual.replay.data")              # keys of a recipe that name what is learned from
_ISOLATING = ("segments", "positions")                   # columns that are left out where every row is one full document
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def _kind(value: Any) -> Any:
    value = spell_out(value)
    return {"kind": value} if isinstance(value, str) else value


class Task(Model):
    """One of several tasks."""

    objective: Annotated[Each, BeforeValidator(_kind)] = Field(description="What is learned.")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Weight of its loss in the sum.")


def _task(value: Any) -> Any:
    return {"objective": value} if isinstance(value, str | list) or (isinstance(value, dict) and "kind" in value) else value


class Tasks(Model):
    """Tasks that one model learns at once; `task` of a source says which its rows are for.

    The loss is the sum of those of the tasks by weight, each the mean over its own rows (or tokens) of the step, however
    many rows of other tasks stand beside them.  How often a task comes is told by the weights of its sources.
    """

    kind: Literal["tasks"] = "tasks"
    parts: dict[str, Annotated[Task, BeforeValidator(_task)]] = Field(
        min_length=1, description="Name of each task: its objective and weight.")

    @field_validator("parts")
    @classmethod
    def _named(cls, parts: dict[str, Task]) -> dict[str, Task]:
        """Return the parts, whose heads are called by the names of their tasks."""
        made = {}
        for name, part in parts.items():
            if not _NAME.fullmatch(name) or name == "distil":
                raise ValueError(_("a task cannot be called {name!r}: letters, digits, - and _ make a name").format(name=name))
            if part.objective.tasks():
                Head(name=name)                          # refuses what no head can be called
                made[name] = part.model_copy(update={"objective": part.objective.model_copy(update={"name": name})})
            else:
                made[name] = part
        heads = {head for part in made.values() for head in part.objective.heads}
        if {"lm", "mlm"} <= heads:
            raise ValueError(_("causal_lm reads left to right, {other} both ways: one model cannot learn both; keep one").format(
                other="masked_lm"))
        return made

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"{name}/{term}" for name, part in self.parts.items() for term in part.objective.terms)

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(part.weight * scale for part in self.parts.values() for scale in part.objective.scales)

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(head for part in self.parts.values() for head in part.objective.heads))

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.objective.inputs))

    @property
    def partner(self) -> bool:
        return False                                     # each source is asked by the objective of its task

    @property
    def packs(self) -> bool:
        return all(part.objective.packs for part in self.parts.values())

    @property
    def wants(self) -> str:
        raise AssertionError("each task has its own rows: ask `single` for its objective")

    def number(self, task: str) -> int:
        """Return the number that rows of `task` bear."""
        return list(self.parts).index(task)

    def tasks(self) -> tuple[Head, ...]:
        return tuple(head for part in self.parts.values() for head in part.objective.tasks())

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        raise AssertionError("each task has its own classes: see `met`")

    def met(self, found: Mapping[str, tuple[Sequence[str], Sequence[int]]]) -> Self:
        """Return the objective, each task of which knows its classes and how often each stands in its data."""
        return self.model_copy(update={"parts": {
            name: part.model_copy(update={"objective": part.objective.meet(*found[name])}) for name, part in self.parts.items()}})

    def room(self, length: int) -> tuple[int, int, int]:
        raise AssertionError("each task has its own rows: ask `single` for its objective")

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return the columns that the model reads, [B, T] and [B], and of each task NAME/rows [B] (1: its own) and NAME/….

        Every task gives its columns, be there no row of it.
        """
        numbers = np.array([int(row["task"]) for row in rows])
        places, batches = [], []
        for number, part in enumerate(self.parts.values()):
            mine = np.flatnonzero(numbers == number)
            own = [rows[i] for i in mine.tolist()] or [blank(part.objective, vocab)]
            batch = part.objective.collate(own, vocab, rng, length)
            places.append(torch.from_numpy(mine))
            batches.append({name: column[: len(mine)] for name, column in batch.items()})
        isolated = any("segments" in batch for place, batch in zip(places, batches, strict=True) if len(place))
        whole: Batch = {}
        for name, place, batch in zip(self.parts, places, batches, strict=True):
            columns = _isolated(batch, length) if isolated else {n: c for n, c in batch.items() if n not in _ISOLATING}
            for column, values in {**columns, "rows": torch.ones(len(place))}.items():
                called = column if column in self.inputs else f"{name}/{column}"
                if called not in whole:
                    fill = {"ids": pad_id(vocab), "labels": UNLEARNED}.get(called, 0)
                    whole[called] = torch.full((len(rows), *values.shape[1:]), fill, dtype=values.dtype)
                _lay(whole[called], values, place, name=called)
        return whole

    def view(self, task: str, batch: Batch) -> Batch:
        """Return the batch as the objective of `task` made it, but for rows of other tasks, which weigh 0 here."""
        own = {name.removeprefix(f"{task}/"): column for name, column in batch.items() if name.startswith(f"{task}/")}
        shared = {name: column for name, column in batch.items() if "/" not in name}
        rows = own.pop("rows")
        if "weights" in shared:
            shared["weights"] = shared["weights"] * rows[:, None]
        return shared | own

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        return torch.cat([part.objective.count(self.view(name, batch)) for name, part in self.parts.items()])

    def loss(self, out: Out, batch: Batch) -> Tensor:
        return torch.cat([part.objective.loss(out, self.view(name, batch)) for name, part in self.parts.items()])


def single(objective: Objective, task: str | None) -> Objective:
    """Return what rows of a source that names `task` are learned by: of several tasks that one's objective."""
    return objective.parts[task].objective if isinstance(objective, Tasks) and task is not None else objective


def singles(objective: Objective) -> list[Objective]:
    """Return the objectives of all tasks."""
    return [part.objective for part in objective.parts.values()] if isinstance(objective, Tasks) else [objective]


def terms_of(objective: Objective, task: str | None) -> slice:
    """Return which of the objective's terms are those of a task."""
    if not isinstance(objective, Tasks) or task is None:
        return slice(None)
    sizes = [len(part.objective.terms) for part in objective.parts.values()]
    number = objective.number(task)
    return slice(sum(sizes[:number]), sum(sizes[: number + 1]))


def number_of(objective: Objective, task: str | None) -> int | None:
    """Return the number that rows of a source bear as their `task`; None where there is but one."""
    return objective.number(task) if isinstance(objective, Tasks) and task is not None else None


def check_sources(objective: Objective, sources: Mapping[str, Sequence[str | None]]) -> list[str]:
    """Return what is wrong with the tasks that sources name; `sources`: the tasks of those under each key of the recipe."""
    known, problems = list(objective.parts) if isinstance(objective, Tasks) else [], []
    for key, named in sources.items():
        for number, task in enumerate(named):
            if known and task not in known:
                problems.append(_("{key}.{n}.task must be one of {tasks}").format(key=key, n=number, tasks=", ".join(known)))
            if not known and task is not None:
                problems.append(_("{key}.{n}.task={task}, but objective.kind is not tasks").format(key=key, n=number, task=task))
    without = [task for task in known if not any(task in named for key, named in sources.items() if key in TRAINED)]
    return problems + [_("the task {task} has no source; name it as `task` of one under data").format(task=task)
                       for task in without]


def snug(objective: Objective, rows: Sequence[Row], length: int) -> int:
    """Return how many tokens a batch of `rows` needs at least, of the `length` there may be."""
    if isinstance(objective, Tasks):
        parts = [part.objective for part in objective.parts.values()]
        held = [[row for row in rows if int(row["task"]) == number] for number in range(len(parts))]
        return max(snug(part, own, length) for part, own in zip(parts, held, strict=True) if own)
    room, _overlap, reserve = objective.room(length)
    if any(len(row["documents"]) > 1 for row in rows):
        return length                                    # packed rows are full, but for a little
    return length + max(len(row["ids"]) for row in rows) - (room - reserve)


def blank(objective: Objective, vocab: Special) -> Row:
    """Return a row that stands for none: it has every column a row may have, and two ids that mean nothing."""
    several = objective.tasks()[0].size if objective.wants == "labels" else 0
    ids, none = np.full(2, pad_id(vocab), np.int64), np.zeros(4, np.int64)
    return {"ids": ids, "weights": np.zeros(2, np.float32), "segments": np.ones(2, np.int32), "documents": none[:1], "key": none,
            "other": ids, "label": np.zeros(several or (), np.int64), "parts": np.array([2, 0], np.int32),
            "tags": np.full(2, UNLEARNED, np.int16), "answer": np.full(2, -1, np.int32), "example": none[0],
            "window": np.zeros(3, np.int32)}


def _isolated(batch: Batch, length: int) -> Batch:
    """Return the batch with the columns that to_batch leaves out where every row is one full document."""
    if "segments" in batch:
        return dict(batch)
    number = len(batch["ids"])
    return {**batch, "segments": torch.ones(number, length, dtype=torch.int32),
            "positions": torch.arange(length).expand(number, length)}


def _lay(whole: Tensor, values: Tensor, place: Tensor, *, name: str) -> None:
    """Put the rows of a task, which stand at `place`, into a column of the whole batch."""
    if whole.shape[1:] != values.shape[1:]:
        raise ConfigError(_("these tasks lay out {name} differently, and cannot stand in one batch").format(name=name),
                          where="objective.parts", fix=_("train them one after the other"))
    whole[place] = values
