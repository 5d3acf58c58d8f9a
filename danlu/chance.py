"""Random numbers keyed by purpose and position, so that they do not change with workers, ranks or resumption.

The same (seed, purpose, position) gives the same numbers in any process (Philox counter generator: Salmon et al., 2011).
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np


def key(seed: int, purpose: str, position: Iterable[int] = ()) -> int:
    """Return 128 bits that depend on every argument."""
    text = f"{seed}/{purpose}/{','.join(str(int(p)) for p in position)}"
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, position: Iterable[int] = ()) -> np.random.Generator:
    """Return a NumPy generator that is a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, position)))


def torch_seed(seed: int, purpose: str, position: Iterable[int] = ()) -> int:
    """Return a seed that `torch.manual_seed` accepts (63 bits)."""
    return key(seed, purpose, position) & (2**63 - 1)
