"""Keys and values of the tokens already read, so that generation reads each token once.

B rows, S tokens so far, G key heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.errors import ResourceError
from danlu.words import _


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
            raise ResourceError(
                _("{n} tokens do not fit the model's context of {limit}").format(n=stop, limit=self.limit),
                fix=_("shorten the prompt or ask for fewer new tokens"),
            )
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

    def __init__(self, layers: int, limit: int) -> None:
        self.layers = [Past(limit) for _layer in range(layers)]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length
