"""What prompts begin with, kept from request to request: keys and values of blocks of tokens, by the ids up to their end.

T tokens of a block, L layers, G key heads, K head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import takewhile

import numpy as np
from torch import Tensor

from danlu.nn.cache import Cache

BLOCK = 32              # tokens: less than that is sooner computed than looked up


class Prefixes:
    """Blocks of prompts [L, 2, T, G, K], each under a hash of all ids up to its end; the longest unused go first.

    Two prompts share their blocks as far as they are equal, and no further.  Prompts of different adapters share none.
    """

    def __init__(self, most_bytes: int, block: int = BLOCK) -> None:
        self.most_bytes, self.block = most_bytes, block
        self.bytes = 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def _keys(self, ids: Sequence[int], adapter: str | None) -> Iterator[bytes]:
        key = blake2b(repr(adapter).encode(), digest_size=32).digest()
        for stop in range(self.block, len(ids) + 1, self.block):
            key = blake2b(key + np.array(ids[stop - self.block:stop], np.int64).tobytes(), digest_size=32).digest()
            yield key

    def fill(self, cache: Cache, ids: Sequence[int], adapter: str | None) -> int:
        """Put into an empty cache what is known of the beginning of `ids`, all but the last id at most; return its tokens."""
        keys = list(takewhile(self._blocks.__contains__, self._keys(ids[:-1], adapter)))
        if keys:
            cache.load([self._blocks[key] for key in keys])
        self._use(keys)
        return len(keys) * self.block

    def keep(self, cache: Cache, ids: Sequence[int], adapter: str | None) -> None:
        """Remember the blocks of a prompt that `cache` holds whole."""
        if not self.most_bytes:
            return
        keys = list(self._keys(ids, adapter))
        for number, key in enumerate(keys):
            if key not in self._blocks:
                self._blocks[key] = cache.read(number * self.block, (number + 1) * self.block)
                self.bytes += self._blocks[key].nbytes
        self._use(keys)
        while self.bytes > self.most_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].nbytes

    def _use(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):      # the end of a prompt goes before its beginning, without which it is of no use
            self._blocks.move_to_end(key)

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self.bytes = 0
