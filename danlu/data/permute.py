"""A shuffled order that needs no memory: a keyed permutation of 0..size-1, computed where it is asked for.

A Feistel network permutes the least power of two that holds `size`; numbers that land outside are sent through it again
until they land inside (cycle walking: Black and Rogaway, 2002), which leaves a permutation of 0..size-1.
"""

from __future__ import annotations

import numpy as np

from danlu import chance

ROUNDS = 12                      # below 1,024 numbers halves are so narrow that 6 rounds are measurably uneven
WIDE_ROUNDS = 6
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)     # odd, and mix well (SplitMix64)


def keys(seed: int, purpose: str, *position: int) -> np.ndarray:
    """Return the round keys [ROUNDS] uint64 of the permutation named by the arguments."""
    return _raw(ROUNDS, seed, purpose, position)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Return where the permutation of 0..size-1 sends each of `index` [n], as int64 [n]."""
    bits = max(2, (size - 1).bit_length())
    keys = keys[:WIDE_ROUNDS] if bits > 10 else keys
    walked = _network(index.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(walked >= size)).size:
        walked[outside] = _network(walked[outside], bits, keys)
    return walked.astype(np.int64)


def small(size: int, seed: int, purpose: str, *position: int) -> np.ndarray:
    """Return a whole permutation of 0..size-1 [size] int64, for a size that fits in memory."""
    return np.argsort(_raw(size, seed, purpose, position), kind="stable")


def _raw(number: int, seed: int, purpose: str, position: tuple[int, ...]) -> np.ndarray:
    """Return uint64 [number], raw from Philox: NumPy promises that this never changes, unlike what is made of it."""
    raw: np.ndarray = chance.generator(seed, purpose, position).bit_generator.random_raw(number)
    return raw


def _network(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    high, low = numbers >> low_bits, numbers & np.uint64((1 << bits // 2) - 1)
    for turn, key in enumerate(keys):
        if turn % 2:
            low ^= _mix(high + key) >> (np.uint64(64) - low_bits)
        else:
            high ^= _mix(low + key) >> (np.uint64(64) - high_bits)
    joined: np.ndarray = (high << low_bits) | low
    return joined


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits in place, the high ones best; overflow is meant."""
    x *= FIRST
    x ^= x >> np.uint64(32)
    x *= SECOND
    return x
