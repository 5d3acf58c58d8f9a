"""A shuffled order that needs no memory: a keyed permutation of 0..size-1, computed where it is asked for.

A Feistel network permutes the least power of two that holds `size`; numbers that land outside are sent through it again
until they land inside (cycle walking: Black and Rogaway, 2002), which leaves a permutation of 0..size-1.
"""

from __future__ import annotations

import numpy as np

from danlu import chance

ROUNDS = 8


def keys(seed: int, purpose: str, *position: int) -> np.ndarray:
    """Return the round keys [ROUNDS] uint64 of the permutation named by the arguments."""
    return chance.generator(seed, purpose, position).integers(0, 2**64, ROUNDS, dtype=np.uint64)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Return where the permutation of 0..size-1 sends each of `index` [n], as int64 [n]."""
    bits = max(2, (size - 1).bit_length())
    walked = _network(index.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(walked >= size)).size:
        walked[outside] = _network(walked[outside], bits, keys)
    return walked.astype(np.int64)


def _network(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    high, low = numbers >> low_bits, numbers & low_mask
    for turn, key in enumerate(keys):
        if turn % 2:
            low ^= _mix(high + key) & low_mask
        else:
            high ^= _mix(low + key) & high_mask
    joined: np.ndarray = (high << low_bits) | low
    return joined


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (the finaliser of SplitMix64: Steele et al., 2014); overflow is meant."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
