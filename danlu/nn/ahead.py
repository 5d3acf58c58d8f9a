"""What an adapter puts before the tokens of a row: virtual tokens, or keys and values that every layer has more.

B rows, T tokens, P virtual tokens, D width.  Real tokens are as many places further on, as in `transformers` with a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danlu.nn.attention import Sight, with_ahead, working_dtype


class Ahead(nn.Module):
    """Nothing, until an adapter sets `prompt` and `tokens`, or `keys`."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt: nn.Module | None = None    # returns [P, D]
        self.tokens = 0                         # P of the prompt
        self.keys = 0                           # P of the layers' prefixes

    def room(self, past: int = 0) -> int:
        """Return the places of the context that are taken, where a cache holds `past` tokens."""
        return self.keys + (self.tokens if not past else 0)

    def join(self, x: Tensor) -> Tensor:
        """Return [B, P+T, D] from embedded tokens [B, T, D]."""
        if self.prompt is None:
            return x
        return torch.cat((self.prompt().to(x.dtype).expand(len(x), -1, -1), x), 1)

    def positions(self, places: Tensor) -> Tensor:
        """Return the places of virtual and real tokens [B, P+T] from those of the real ones alone."""
        if self.keys:
            return places + self.keys
        if not self.tokens:
            return places
        before = torch.arange(self.tokens, device=places.device).expand(len(places), -1)
        return torch.cat((before, places + self.tokens), 1)

    def enter(self, x: Tensor, positions: Tensor, types: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, positions and types with what belongs to the virtual tokens; their type is 0."""
        if types is not None and self.tokens:
            types = torch.cat((types.new_zeros(len(types), self.tokens), types), 1)
        return self.join(x), self.positions(positions), types

    def segments(self, segments: Tensor | None) -> Tensor | None:
        """Return [B, P+T]: virtual tokens belong to the row's first segment."""
        if segments is None or not self.tokens:
            return segments
        return torch.cat((segments[:, :1].expand(-1, self.tokens), segments), 1)

    def see(self, sight: Sight, x: Tensor) -> Sight:
        """Return `sight` for keys that have the prefix in front; x [B, T, D] says how many queries there are."""
        return with_ahead(sight, self.keys, x.shape[1], device=x.device, dtype=working_dtype(x))
