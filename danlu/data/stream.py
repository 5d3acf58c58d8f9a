"""Documents to rows, in an order that is a pure function of (seed, epoch, window, offset).

A *piece* is a document, or a part of one that is too long.  A keyed permutation orders all pieces of an epoch; `window`
consecutive ones form a window, inside which they are packed.  So any position is reached by making one window, for any
number of documents, and memory holds a few numbers per document.  Every rank makes the same plans and reads its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from danlu import chance, files
from danlu.data import pack, permute
from danlu.errors import ConfigError, DataError
from danlu.words import _

Row = dict[str, np.ndarray]
Overlong = Literal["error", "split", "drop", "cut"]
SLOTS = 1000                     # the pattern in which a mixture takes its sources repeats after so many rows


class Documents(Protocol):
    """What a Stream needs of prepared data.

    answers: the columns of a document that its row carries (label, parts …), and `tags`, of which each id has one.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def answers(self) -> tuple[str, ...]: ...
    def answer(self, name: str, document: int, start: int, stop: int) -> np.ndarray: ...
    def lengths(self) -> np.ndarray: ...
    def part(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]: ...
    def where(self, number: int) -> str: ...


class Position(NamedTuple):
    """The next row: its epoch, the window in the epoch, the row in the window."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


class Plan(NamedTuple):
    """A row before its ids are read: its place, and (document, first id, number of ids) of each piece."""

    source: int
    epoch: int
    window: int
    offset: int
    pieces: tuple[tuple[int, int, int], ...]


class Stream:
    """Rows of at most `length` ids from prepared documents; see `plans` and `read`.

    overlap: ids that consecutive pieces of a split document share; they carry loss only in the first of the two.
    reserve: places each piece needs beside its ids.    seed: None gives the stored order.
    overlong: what becomes of a document that does not fit: `error`, `split` into pieces, `drop`, or `cut` its end off
    (with it goes the mark of the end).    partner: rows also get `other`, a piece of another document.
    group: unpacked rows of like length come together, `group` at a time, in groups at random: no place is wasted.
    task: the number that rows bear as their `task`, where there are several.
    """

    def __init__(self, shards: Documents, *, length: int, overlap: int = 0, reserve: int = 0, overlong: Overlong,
                 pack: bool, seed: int | None, window: int = 2048, partner: bool = False, group: int = 0,
                 task: int | None = None) -> None:
        self.task = task
        self.group = group if seed is not None and not pack else 0
        self.shards, self.length, self.reserve, self.overlap = shards, length, reserve, overlap
        self.overlong, self.pack, self.seed, self.window, self.partner = overlong, pack, seed, window, partner
        self.room = length - reserve
        if self.room <= overlap:
            raise ConfigError(
                _("length={length} leaves no room: {reserve} places are reserved and {overlap} overlap").format(
                    length=length, reserve=reserve, overlap=overlap), where="length", fix=_("raise length"))
        lengths = shards.lengths()
        self._refuse_overlong(lengths)
        number = self._pieces_of(lengths)
        self.counts = self._counted(lengths, number)
        self.pieces = int(number.sum())
        if self.pieces == 0:
            raise DataError(_("0 rows are left of {n} documents").format(n=len(lengths)),
                            fix=_("raise length, or set overlong: split"))
        kept = np.minimum(lengths, self.room) if overlong == "cut" else lengths
        self._lengths = kept.astype(np.int32) if kept.max() < 2**31 else kept
        self._first = None if (number == 1).all() else np.concatenate([[0], np.cumsum(number)])
        self._rows: dict[int, int] = {}
        if partner and self.pieces == int(number.max()):
            raise DataError(_("rows need a piece of another document, and there is only one document"))

    def begin(self) -> Position:
        """Return the position of the first row."""
        return Position()

    def restore(self, value: Sequence[int]) -> Position:
        """Return the position that JSON gave back as a list.  Raises DataError if there is no such place here."""
        position = Position(*(int(v) for v in value))
        if min(position) < 0 or position.window >= self._windows or position.offset >= self.window:
            raise DataError(_("the position {position} does not exist in this data").format(position=tuple(position)))
        return position

    @cached_property
    def fingerprint(self) -> str:
        """The hash of everything that the order and content of the rows depends on."""
        return files.digest([self.shards.fingerprint, self.length, self.overlap, self.reserve, self.overlong, self.pack,
                             self.seed, self.window, self.partner, *([self.group] if self.group else []),
                             *([f"task {self.task}"] if self.task is not None else [])])

    def rows(self, epoch: int) -> int:
        """Return the exact number of rows in an epoch."""
        if not self.pack:
            return self.pieces
        epoch = epoch if self.seed is not None else 0
        if epoch not in self._rows:
            order = self._keys(epoch)
            sizes = (self._located(window, order)[2] + self.reserve for window in range(self._windows))
            self._rows[epoch] = sum(pack.count(s, self.length) for s in sizes)
        return self._rows[epoch]

    def plans(self, position: Position) -> Iterator[tuple[Plan, Position]]:
        """Yield each row's plan, from `position` on and without end, and the position after it.

        No ids are read.  After the last row of an epoch comes the first of the next.
        """
        epoch, window, offset = position
        while True:
            order = self._keys(epoch)
            while window < self._windows:
                made = self._planned(epoch, window, order)
                for at in range(offset, len(made) - 1):
                    yield Plan(0, epoch, window, at, made[at]), Position(epoch, window, at + 1)
                if offset < len(made):
                    last = window + 1 == self._windows
                    after = Position(epoch + 1) if last else Position(epoch, window + 1)
                    yield Plan(0, epoch, window, len(made) - 1, made[-1]), after
                window, offset = window + 1, 0
            epoch, window = epoch + 1, 0

    def read(self, plan: Plan) -> Row:
        """Return the row, n ids of k documents, and with `partner` m ids of another.

        ids [n] int64, weights [n] float32 (1: learned from), segments [n] int32 (1..k), documents [k] int64,
        key [4] int64 (source, epoch, window, offset: names the row's random numbers), other [m] int64.  Of what the
        documents are labelled with: tags [n], and of a row that is one document its label, parts, answer, example.
        """
        size = sum([piece[2] for piece in plan.pieces])
        ids, weights, segments = np.empty(size, np.int64), np.ones(size, np.float32), np.ones(size, np.int32)
        at = 0
        for number, (document, start, length) in enumerate(plan.pieces, 1):
            end = at + length
            ids[at:end], given = self.shards.part(document, start, start + length)
            if given is not None:
                weights[at:end] = given
            if start:
                weights[at : at + self.overlap] = 0      # learned at the end of the piece before
            if number > 1:
                segments[at:end] = number
            at = end
        documents = np.array([piece[0] for piece in plan.pieces])
        row: Row = {"ids": ids, "weights": weights, "segments": segments, "documents": documents,
                    "key": np.array(plan[:4])}
        if self.task is not None:
            row["task"] = np.array(self.task)
        if self.partner:
            row["other"] = self._other(plan)
        for name in self.shards.answers:
            if name == "tags":
                row[name] = np.concatenate([self.shards.answer(name, d, start, start + n) for d, start, n in plan.pieces])
            elif len(plan.pieces) == 1:
                row[name] = self.shards.answer(name, documents[0], 0, 0)
        return row

    @property
    def _windows(self) -> int:
        return -(-self.pieces // self.window)

    def _keys(self, epoch: int) -> np.ndarray | None:
        return None if self.seed is None else permute.keys(self.seed, "order", epoch)

    def _other(self, plan: Plan) -> np.ndarray:
        """Return the ids of a piece of a document that is not in the row, each piece as likely as any."""
        inside = sorted({document for document, _start, _size in plan.pieces})
        spans = [(document, document + 1) if self._first is None else
                 (int(self._first[document]), int(self._first[document + 1])) for document in inside]
        outside = self.pieces - sum(stop - start for start, stop in spans)
        if outside == 0:
            raise DataError(_("a row needs a piece of another document, and it holds them all"),
                            fix=_("set pack: false"))
        piece = chance.key(self.seed or 0, "partner", plan[:4]) % outside
        for start, stop in spans:
            piece += (stop - start) * (piece >= start)
        document, start, size = (int(column[0]) for column in self._pieces_at(np.array([piece])))
        return self.shards.part(document, start, start + size)[0].astype(np.int64)

    def _planned(self, epoch: int, window: int, order: np.ndarray | None) -> list[tuple[tuple[int, int, int], ...]]:
        """Return the pieces of every row of a window."""
        columns = self._located(window, order)
        pieces = list(zip(*(column.tolist() for column in columns), strict=True))
        if not self.pack:
            alike = self._grouped(columns[2], epoch, window) if self.group else range(len(pieces))
            return [(pieces[i],) for i in alike]
        rows = [sorted(row) for row in pack.pack(columns[2] + self.reserve, self.length)]
        if self.seed is None:
            rows.sort()
        else:                                    # packing puts long pieces first; rows are met in any order
            rows = [rows[i] for i in permute.small(len(rows), self.seed, "rows", epoch, window).tolist()]
        return [tuple([pieces[i] for i in row]) for row in rows]

    def _grouped(self, sizes: np.ndarray, epoch: int, window: int) -> list[int]:
        """Return the order of a window's pieces [n] in which groups of like size follow each other at random.

        Groups begin where batches do, counted from the first row of the first epoch; what a group lacks at the border of
        a window comes from the next.
        """
        head = -(epoch * self.pieces + window * self.window) % self.group
        first = permute.small(len(sizes), self.seed or 0, "head", epoch, window)[:head]     # of any size: it ends a batch
        rest = np.setdiff1d(np.arange(len(sizes)), first)
        rest = rest[np.argsort(sizes[rest], kind="stable")]
        whole = len(rest) // self.group * self.group
        spare = permute.small(len(rest), self.seed or 0, "spare", epoch, window)[: len(rest) - whole]
        tail, rest = rest[np.sort(spare)], np.delete(rest, spare)
        groups = rest.reshape(-1, self.group)
        order = permute.small(len(groups), self.seed or 0, "groups", epoch, window)
        return np.concatenate([first, groups[order].ravel(), tail]).tolist()      # type: ignore[no-any-return]

    def _located(self, window: int, order: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return document, first id and number of ids of each piece of a window, in the epoch's order."""
        numbers = np.arange(window * self.window, min(self.pieces, (window + 1) * self.window))
        return self._pieces_at(numbers if order is None else permute.permute(numbers, self.pieces, order))

    def _pieces_at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._first is None:
            return numbers, np.zeros_like(numbers), self._lengths[numbers]
        order = np.argsort(numbers)              # neighbours look in the same part of memory: several times faster
        documents = np.empty_like(numbers)
        documents[order] = np.searchsorted(self._first, numbers[order], side="right") - 1
        starts = (numbers - self._first[documents]) * (self.room - self.overlap)
        return documents, starts, np.minimum(self._lengths[documents] - starts, self.room)

    def _pieces_of(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many pieces each document gives [documents]."""
        number = (lengths > 0).astype(np.int64)
        if self.overlong == "split":
            beyond = np.maximum(lengths - self.room, 0)
            number += -(-beyond // (self.room - self.overlap))
        elif self.overlong == "drop":
            number[lengths > self.room] = 0
        return number

    def _counted(self, lengths: np.ndarray, number: np.ndarray) -> dict[str, int]:
        long = lengths > self.room
        lost = {"split": 0, "error": 0, "drop": int(lengths[long].sum()),
                "cut": int((lengths[long] - self.room).sum())}[self.overlong]
        amount = {"split": 0, "drop": 0, "cut": 0} | {self.overlong: int(long.sum())}
        return {
            "documents": len(lengths), "pieces": int(number.sum()), "empty": int((lengths == 0).sum()),
            "split": amount["split"], "dropped": amount["drop"], "cut": amount["cut"],
            "tokens": int(lengths.sum()) - lost, "tokens_lost": lost,
        }

    def _refuse_overlong(self, lengths: np.ndarray) -> None:
        long = np.flatnonzero(lengths > self.room)
        if self.overlong == "error" and long.size:
            first = int(long[0])
            raise DataError(
                _("this document has {size} tokens and a row has room for {room}; {n} documents are too long").format(
                    size=int(lengths[first]), room=self.room, n=len(long)),
                where=self.shards.where(first), fix=_("raise length, or set overlong: split, drop or cut"))


class MixedPosition(NamedTuple):
    """The number of the next row, and the position of each source."""

    row: int
    sources: tuple[Position, ...]


class Mixed:
    """Rows of several streams, taken by weight: which source row n comes from is a pure function of n and the seed.

    Shares hold exactly over every 1,000 rows.  A source that ends begins anew; an epoch is as many rows as all have.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], seed: int) -> None:
        self.streams = tuple(streams)
        slots = np.repeat(np.arange(len(weights)), _slots(weights))
        self.pattern: list[int] = slots[permute.small(SLOTS, seed, "mixture")].tolist()
        self.counts: dict[str, int] = dict(sum((Counter(s.counts) for s in streams), Counter()))
        self.counts |= {name: 0 for name in streams[0].counts if name not in self.counts}

    def begin(self) -> MixedPosition:
        """Return the position of the first row."""
        return MixedPosition(0, tuple(stream.begin() for stream in self.streams))

    def restore(self, value: Sequence[Any]) -> MixedPosition:
        """Return the position that JSON gave back as lists.  Raises DataError if there is no such place here."""
        row, positions = value
        if len(positions) != len(self.streams) or int(row) < 0:
            raise DataError(_("the position {position} does not exist in this data").format(position=value))
        return MixedPosition(int(row), tuple(s.restore(p) for s, p in zip(self.streams, positions, strict=True)))

    @cached_property
    def fingerprint(self) -> str:
        """The hash of everything that the order and content of the rows depends on."""
        return files.digest([self.pattern, [stream.fingerprint for stream in self.streams]])

    def rows(self, epoch: int) -> int:
        """Return the number of rows that all sources have in an epoch of their own."""
        return sum(stream.rows(epoch) for stream in self.streams)

    def plans(self, position: MixedPosition) -> Iterator[tuple[Plan, MixedPosition]]:
        """Yield each row's plan, from `position` on and without end, and the position after it."""
        row, sources = position.row, list(position.sources)
        plans = [stream.plans(at) for stream, at in zip(self.streams, sources, strict=True)]
        while True:
            source = self.pattern[row % SLOTS]
            plan, sources[source] = next(plans[source])
            row += 1
            yield plan._replace(source=source), MixedPosition(row, tuple(sources))

    def read(self, plan: Plan) -> Row:
        """Return the row; see Stream.read.  The first number of its key is the source."""
        return self.streams[plan.source].read(plan)


def _slots(weights: Sequence[float]) -> list[int]:
    """Share SLOTS out by weight, the largest remainders rounded up.  Raises ConfigError for a source without any."""
    total = sum(weights)
    if not weights or min(weights) <= 0 or not np.isfinite(total):
        raise ConfigError(_("the weights of sources must be positive, not {weights}").format(weights=list(weights)))
    exact = [SLOTS * weight / total for weight in weights]
    slots = [int(share) for share in exact]
    for source in sorted(range(len(slots)), key=lambda i: slots[i] - exact[i])[: SLOTS - sum(slots)]:
        slots[source] += 1
    if min(slots) == 0:
        raise ConfigError(
            _("source {n} would give none of {slots} rows").format(n=slots.index(0), slots=SLOTS),
            fix=_("raise its weight to at least {least:.3g}, or leave it out").format(least=total / SLOTS))
    return slots
