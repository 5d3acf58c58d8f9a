"""Keys and values of the tokens already read, so that generation reads each token once.

`Cache` holds one text, or several of equal length; `Slots` holds texts of unequal length, which come and go.
B rows, T new tokens, S tokens so far, L layers, G key heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from danlu.errors import ResourceError
from danlu.words import _


def _too_many(tokens: int, limit: int) -> ResourceError:
    return ResourceError(_("{n} tokens do not fit the model's context of {limit}").format(n=tokens, limit=limit),
                         fix=_("shorten the prompt or ask for fewer new tokens"))


class Past:
    """What one layer keeps: grows in place up to `limit` tokens."""

    def __init__(self, limit: int) -> None:
        self.limit, self.length = limit, 0
        self.keys: Tensor | None = None          # [B, room, G, K]; room doubles, so that short texts stay small
        self.values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, T, G, K] and return all of them [B, S, G, K].  Raises ResourceError beyond `limit`."""
        stop = self.length + k.shape[1]
        if stop > self.limit:
            raise _too_many(stop, self.limit)
        self.keys, self.values = self._room(self.keys, k, stop), self._room(self.values, v, stop)
        self.keys[:, self.length:stop], self.values[:, self.length:stop] = k, v
        self.length = stop
        return self.keys[:, :stop], self.values[:, :stop]

    def _room(self, held: Tensor | None, new: Tensor, stop: int) -> Tensor:
        if held is not None and held.shape[1] >= stop:
            return held
        room = min(self.limit, max(64, 2 * stop))
        grown = torch.empty(new.shape[0], room, *new.shape[2:], dtype=new.dtype, device=new.device)
        if held is not None:
            grown[:, : self.length] = held[:, : self.length]
        return grown


class Cache:
    """The past of every layer of one model."""

    lengths: Tensor | None = None           # all rows are equally long

    def __init__(self, layers: int, limit: int) -> None:
        self.layers = [Past(limit) for _layer in range(layers)]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    def read(self, start: int, stop: int) -> Tensor:
        """Return a copy of what is kept of the first row's tokens start:stop, [L, 2, T, G, K]."""
        return torch.stack([torch.stack((_kept(p.keys)[0, start:stop], _kept(p.values)[0, start:stop])) for p in self.layers])

    def load(self, blocks: Sequence[Tensor]) -> None:
        """Take what `read` returned of the tokens that a text begins with, piece by piece, as read."""
        assert self.length == 0
        whole = torch.cat(tuple(blocks), 2)                                 # [L, 2, T, G, K]
        for past, (keys, values) in zip(self.layers, whole, strict=True):
            past.extend(keys[None], values[None])

    def cut(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        for past in self.layers:
            past.length = min(past.length, length)

    def pick(self, rows: Tensor) -> None:
        """Keep the rows [B] in this order; a row may come several times."""
        for past in self.layers:
            past.keys = _kept(past.keys).index_select(0, rows)
            past.values = _kept(past.values).index_select(0, rows)


def _kept(held: Tensor | None) -> Tensor:
    assert held is not None, "nothing was read yet"
    return held


class Slots:
    """The past of texts of unequal length, each from place 0 of its row on.  The rows have no holes: the last fills one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.places: list[int] = []                     # tokens of each row
        self.keys: list[Tensor] = []                    # of each layer [rows, room, G, K]; beyond a row's tokens anything finite
        self.values: list[Tensor] = []

    def add(self, cache: Cache) -> None:
        """Append the text of `cache`, whose only row it is."""
        row, length = len(self.places), cache.length
        self._reserve(row + 1, length + 1, like=cache)
        for mine, past in zip(zip(self.keys, self.values, strict=True), cache.layers, strict=True):
            mine[0][row, :length], mine[1][row, :length] = _kept(past.keys)[0, :length], _kept(past.values)[0, :length]
        self.places.append(length)

    def drop(self, row: int) -> None:
        """Forget a text; the last one takes its row."""
        last = len(self.places) - 1
        if row != last:
            length = self.places[last]
            for held in (*self.keys, *self.values):
                held[row, :length] = held[last, :length]
            self.places[row] = length
        self.places.pop()

    def step(self, tokens: int = 1) -> Step:
        """Return a cache that adds `tokens` to every row; raises ResourceError beyond `limit`."""
        stop = max(self.places) + tokens
        if stop > self.limit:
            raise _too_many(stop, self.limit)
        self._reserve(len(self.places), stop)
        step = Step(self, tokens)
        self.places = [place + tokens for place in self.places]
        return step

    def _reserve(self, rows: int, room: int, like: Cache | None = None) -> None:
        """Make room for so many rows of so many tokens: at least twice what there was, if there is not enough."""
        if like is not None and not self.keys:
            self.keys = [_kept(p.keys).new_zeros(0, 0, *_kept(p.keys).shape[2:]) for p in like.layers]
            self.values = [_kept(p.values).new_zeros(0, 0, *_kept(p.values).shape[2:]) for p in like.layers]
        have_rows, have_room = self.keys[0].shape[:2]
        if rows <= have_rows and room <= have_room:
            return
        rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        room = have_room if room <= have_room else min(self.limit, max(64, 2 * room))
        self.keys, self.values = ([_grown(one, rows, room) for one in held] for held in (self.keys, self.values))


def _grown(held: Tensor, rows: int, room: int) -> Tensor:
    # zeros: a place that nobody sees has probability 0, and 0 times what memory happens to hold may be NaN
    grown = held.new_zeros(rows, room, *held.shape[2:])
    grown[: held.shape[0], : held.shape[1]] = held
    return grown


class Step:
    """The cache of one forward pass over all rows of `Slots`; it looks like a `Cache` to the model."""

    def __init__(self, slots: Slots, tokens: int) -> None:
        self.length, rows = max(slots.places), len(slots.places)
        self.lengths: Tensor | None = None              # [B]; None: all rows are equally long
        device, index = slots.keys[0].device, None
        if min(slots.places) < self.length:
            self.lengths = torch.tensor(slots.places, device=device)
            index = (torch.arange(rows, device=device)[:, None], self.lengths[:, None] + torch.arange(tokens, device=device))
        self.layers = [StepPast(keys[:rows, : self.length + tokens], values[:rows, : self.length + tokens], self.length, index)
                       for keys, values in zip(slots.keys, slots.values, strict=True)]


class StepPast(NamedTuple):
    """What one layer keeps, for one forward pass."""

    keys: Tensor                                        # [B, S, G, K]
    values: Tensor
    length: int
    places: tuple[Tensor, Tensor] | None                # rows [B, 1] and places [B, T] of the new tokens; None: after `length`

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, T, G, K] into their places and return all of them [B, S, G, K]."""
        if self.places is None:
            self.keys[:, self.length:], self.values[:, self.length:] = k, v
        else:
            self.keys[self.places], self.values[self.places] = k.to(self.keys.dtype), v.to(self.values.dtype)
        return self.keys, self.values
