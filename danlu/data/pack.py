"""First-fit decreasing: pieces into as few rows as a fast rule finds (at most 11/9 of the best + 1; Johnson, 1973).

Filling row after row with the largest piece that still fits gives exactly the rows of first-fit decreasing, and needs
no search: which sizes are left stands in the bits of one integer.
"""

from __future__ import annotations

import numpy as np


def pack(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Return rows of indices into `sizes`; the sizes in a row sum to `room` at most; equal sizes go in their order.

    Every size is from 1 to `room`.
    """
    buckets: dict[int, list[int]] = {}
    numbers = sizes.tolist()
    for index in range(len(numbers) - 1, -1, -1):
        buckets.setdefault(numbers[index], []).append(index)
    left_over = sum(1 << size for size in buckets)
    rows = []
    while left_over:
        row, space = [], room
        while fitting := left_over & ((2 << space) - 1):
            size = fitting.bit_length() - 1
            bucket = buckets[size]
            row.append(bucket.pop())
            space -= size
            if not bucket:
                left_over ^= 1 << size
        rows.append(row)
    return rows


def count(sizes: np.ndarray, room: int) -> int:
    """Return how many rows `pack` makes."""
    if 2 * int(sizes.min()) > room:
        return len(sizes)
    tally = np.bincount(sizes)
    found = np.flatnonzero(tally).tolist()
    pieces = dict(zip(found, tally[found].tolist(), strict=True))
    left_over, rows = sum(1 << size for size in found), 0
    while left_over:
        space = room
        while fitting := left_over & ((2 << space) - 1):
            size = fitting.bit_length() - 1
            taken = min(pieces[size], space // size)
            pieces[size] -= taken
            space -= taken * size
            if not pieces[size]:
                left_over ^= 1 << size
        rows += 1
    return rows
