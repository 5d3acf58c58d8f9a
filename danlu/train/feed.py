"""Batches in an order that is a pure function of the seed, each with the position after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from danlu import chance
from danlu.data.shards import Shards
from danlu.data.stream import Mixed, Overlong, Plan, Stream
from danlu.data.tokenizer import Special
from danlu.errors import DataError
from danlu.fault import fault
from danlu.objectives.distil import plain
from danlu.objectives.protocol import Objective
from danlu.objectives.tasks import number_of, single, snug
from danlu.words import _

Fed = tuple[dict[str, Tensor], Any]                    # the batch, and the position after it


def stream(shards: Shards, objective: Objective, *, length: int, overlong: Overlong, pack: bool,
           seed: int | None, group: int = 0, task: str | None = None) -> Stream:
    """Return the rows of a prepared split, cut and packed as `objective` needs them, or of like length by `group`.

    task: which of several tasks the rows are for.
    """
    own = single(objective, task)
    room, overlap, reserve = own.room(length)
    return Stream(shards, length=room, overlap=overlap, reserve=reserve, overlong=overlong, pack=pack and own.packs, seed=seed,
                  partner=own.partner, group=group, task=number_of(objective, task))


class Steps(IterableDataset[Fed]):
    """The batches from a position on, without end or for `rows_in_all` rows.

    Worker w of n makes every n-th batch; the loader puts them in order again.  share = (index, of): of each step's
    rows only this share is read, the same global order for any number of shares; a step that has too few rows for all
    is filled up with rows that weigh nothing, so that every process takes as many steps.
    tight: a batch is as long as its longest row, and not `length`.
    """

    def __init__(self, rows: Stream | Mixed, objective: Objective, vocab: Special, *, per_step: int, length: int,
                 seed: int, position: Any, rows_in_all: int | None = None, share: tuple[int, int] = (0, 1),
                 fill: bool = False, tight: bool = False) -> None:
        self.tight = tight
        self.rows, self.objective, self.vocab = rows, objective, vocab
        self.per_step, self.length, self.seed = per_step, length, seed
        self.position, self.rows_in_all, self.share, self.fill = position, rows_in_all, share, fill

    def rng(self, key: Any, purpose: str) -> np.random.Generator:
        """Return the generator of one row and purpose."""
        return chance.generator(self.seed, purpose, key)

    def __iter__(self) -> Iterator[Fed]:
        worker = torch.utils.data.get_worker_info()
        mine, of = (worker.id, worker.num_workers) if worker else (0, 1)
        plans = islice(self.rows.plans(self.position), self.rows_in_all)
        for step in count():
            dealt = list(islice(plans, self.per_step))
            if not dealt:
                return
            if step % of != mine:
                continue
            if worker is not None:
                fault("data.worker")
            yield self.batch([plan for plan, _after in dealt]), dealt[-1][1]

    def batch(self, plans: Sequence[Plan]) -> dict[str, Tensor]:
        """Return this share of a step's rows."""
        index, of = self.share
        size = self.per_step // of
        mine = plans[index * size : (index + 1) * size]
        spare = size - len(mine) if self.fill else 0
        rows = [self.rows.read(plan) for plan in (*mine, *[plans[0]] * spare)]
        length = snug(plain(self.objective), rows, self.length) if self.tight else self.length
        batch = self.objective.collate(rows, self.vocab, self.rng, length)
        if spare:
            for name, column in batch.items():
                if name.endswith("weights"):
                    column[len(mine) :] = 0
        return batch


def batches(steps: Steps, *, workers: int) -> Iterator[Fed]:
    """Yield the batches of `steps`, made by `workers` processes; see `watched` for one that dies."""
    if not workers:
        yield from steps
        return
    # without a timeout PyTorch looks every 5 seconds whether its processes live, should the signal that tells of a death be
    # lost; the watchdog ends a run whose processes live and do nothing
    loader: DataLoader[Any] = DataLoader(
        steps, batch_size=None, num_workers=workers, prefetch_factor=4, multiprocessing_context="fork", collate_fn=as_arrays)
    for batch, position in loader:
        yield {name: torch.from_numpy(column) for name, column in batch.items()}, position


def as_arrays(fed: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Return a batch that travels through the pipe by itself.

    Tensors would travel as shared memory: a container gives little of it, and a process that hands it over prints a
    traceback of its own when the other end dies.
    """
    batch, position = fed
    return {name: column.numpy() for name, column in batch.items()}, position


@contextmanager
def watched() -> Iterator[None]:
    """Turn the death of a process that makes batches into a DataError, wherever PyTorch's signal handler raises it."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            _("a process that makes batches died: {why}").format(why=error),
            fix=_("start again: the run goes on from its newest checkpoint; workers=0 makes batches in this process"),
        ) from error
