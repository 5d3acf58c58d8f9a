"""What of a model's inside is let out beside what its heads say, for another model to learn from.

B rows, T tokens, D width, W width of all heads together.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from danlu.nn.collective import Strip, gathered, numbered


class Taps:
    """Nothing, until they are opened."""

    def __init__(self) -> None:
        self.blocks, self.held, self.listening = frozenset[int](), dict[str, Tensor](), False

    def open(self, model: Any, blocks: Collection[int], *, last: bool) -> None:
        """Let out what `blocks` of `model`, by number, put out; with `last` the last one's queries, keys and values, too."""
        self.blocks, self.listening = frozenset(blocks), True
        if last:
            _number, block = list(numbered(model.blocks))[-1]
            block.attention.tell = self.tell

    def take(self, number: int, x: Tensor) -> Tensor:
        """Return what block `number` put out, kept if it is asked for."""
        if number in self.blocks:
            self.held[f"block/{number}"] = x
        return x

    def tell(self, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep queries, keys and values [B, T, heads here, width of a head], before positions, of all heads."""
        for name, part in (("q", q), ("k", k), ("v", v)):
            self.held[f"last/{name}"] = gathered(part.flatten(-2), getattr(attention, name).weight)

    def let_out(self, strip: Strip, skip: int) -> dict[str, Tensor]:
        """Return what was kept, by name: block/NUMBER [B, T, D] and last/q, /k, /v [B, T, W].  skip: tokens of an adapter."""
        held, self.held = self.held, {}
        return {name: (strip.join(x) if name.startswith("block") else x)[:, skip:] for name, x in held.items()}
