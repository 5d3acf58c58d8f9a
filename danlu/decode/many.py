"""A list of prompts answered side by side, without a thread: for files and for evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from danlu.decode.prefix import Prefixes
from danlu.decode.rows import Row, Rows, check
from danlu.decode.sampling import Sampling
from danlu.decode.schema import Grammar
from danlu.decode.spoken import Finish, Piece
from danlu.generate import Writer

PREFIX_BYTES = 256 * 2**20


class Answer(NamedTuple):
    """What a model wrote after one prompt."""

    text: str
    ids: tuple[int, ...]
    finish: Finish | None


def answers(model: Writer, asked: Sequence[tuple[Sequence[int], Sampling]], *, slots: int,
            decode: Callable[[Sequence[int]], str] = lambda ids: "", ends: Sequence[int] = (),
            grammar: Callable[[], Grammar] | None = None,
            precision: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[Answer]:
    """Yield the answer to each (prompt, how), in order, up to `slots` written at a time.

    Each is what `generate` gives for it alone.  Raises ConfigError, before anything is written, for what does not fit.
    """
    for ids, how in asked:
        check(model, ids, how)
    rows = Rows(lambda _adapter: model, decode, ends=frozenset(ends), prefixes=Prefixes(PREFIX_BYTES), grammar=grammar,
                precision=precision)
    return _answers(rows, asked, slots)


def _answers(rows: Rows, asked: Sequence[tuple[Sequence[int], Sampling]], slots: int) -> Iterator[Answer]:
    under_way: deque[list[Piece | Exception]] = deque()
    left = deque(asked)
    while left or under_way:
        while left and len(rows) < slots:
            ids, how = left.popleft()
            under_way.append([])
            rows.add(Row(ids, how, under_way[-1].append))
        rows.step()
        while under_way and (said := under_way[0]) and (isinstance(said[-1], Exception) or said[-1].finish):
            yield _whole(under_way.popleft())


def _whole(said: list[Piece | Exception]) -> Answer:
    pieces: list[Piece] = []
    for one in said:
        if isinstance(one, Exception):
            raise one
        pieces.append(one)
    return Answer("".join(p.text for p in pieces), tuple(i for p in pieces for i in p.ids), pieces[-1].finish)
