"""Exact duplicates: a 128-bit fingerprint of each text, and a compact set of all that were seen."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

BITS = 3
PARTS = 1 << BITS                                   # tables that grow one at a time, so that growing needs little room
FULL = 0.7                                          # a table grows beyond this load
GROWTH = 1.3
SPACE = re.compile(r"\s+")
Digests = NDArray[np.uint64]                        # [n, 2]


def digests(texts: Iterable[str], *, loose: bool = False) -> Digests:
    """Return the 128-bit BLAKE2b of each text; `loose` ignores case, width and the amount of white space."""
    chosen = map(_folded, texts) if loose else texts
    joined = b"".join(blake2b(text.encode(), digest_size=16).digest() for text in chosen)
    return np.frombuffer(joined, np.dtype("<u8")).reshape(-1, 2)


def _folded(text: str) -> str:
    return SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


class Seen:
    """The fingerprints seen so far, each with the small number it first came with.

    Takes at most 32 bytes a row (17 bytes an entry, tables 54 to 70 % full), and an eighth more while a table grows.
    """

    def __init__(self) -> None:
        self.tables = [_Table(1024) for _number in range(PARTS)]

    def __len__(self) -> int:
        return sum(table.count for table in self.tables)

    @property
    def nbytes(self) -> int:
        """Return the bytes that the tables take."""
        return sum(table.keys.nbytes + table.notes.nbytes for table in self.tables)

    def add(self, keys: Digests, notes: NDArray[np.uint8]) -> NDArray[np.int16]:
        """Remember `keys` [n, 2] in order; return [n]: -1 where a key is new, else the note that it first came with."""
        if not len(keys):
            return np.zeros(0, np.int16)
        order = np.lexsort((keys[:, 1], keys[:, 0]))            # stable: of equal keys the first row comes first
        ranked = keys[order]
        new = np.ones(len(keys), bool)
        new[1:] = (ranked[1:] != ranked[:-1]).any(1)
        leaders = order[new]                                    # the first row of each distinct key
        found = np.full(len(leaders), -1, np.int16)
        distinct = keys[leaders]
        part = (distinct[:, 0] >> np.uint64(64 - BITS)).astype(np.int64)
        for number in np.unique(part):
            rows = np.flatnonzero(part == number)
            found[rows] = self.tables[number].add(distinct[rows], notes[leaders[rows]])
        group = np.cumsum(new) - 1
        result = np.empty(len(keys), np.int16)
        result[order] = np.where(found[group] >= 0, found[group], notes[leaders][group].astype(np.int16))
        result[leaders] = found
        return result


class _Table:
    """One open-addressing table with double hashing; its size is prime, and rows of zeros are free."""

    def __init__(self, size: int) -> None:
        size = _prime(size)
        self.keys = np.zeros((size, 2), np.uint64)
        self.notes = np.zeros(size, np.uint8)
        self.count = 0

    def add(self, keys: Digests, notes: NDArray[np.uint8]) -> NDArray[np.int16]:
        """Insert distinct keys; return -1 for the new ones, the stored note for the others."""
        if self.count + len(keys) > FULL * len(self.keys):
            self._grow(self.count + len(keys))
        return self._insert(keys, notes)

    def _grow(self, count: int) -> None:
        used = self.keys.any(1)
        keys, notes = self.keys[used], self.notes[used]
        size = _prime(int(max(len(self.keys), count / FULL) * GROWTH))
        self.keys, self.notes, self.count = np.zeros((size, 2), np.uint64), np.zeros(size, np.uint8), 0
        self._insert(keys, notes)

    def _insert(self, keys: Digests, notes: NDArray[np.uint8]) -> NDArray[np.int16]:
        keys = np.where(np.any(keys, axis=1, keepdims=True), keys, np.array([0, 1], np.uint64))    # zeros mean free
        size = len(self.keys)
        slots = (keys[:, 1] % np.uint64(size)).astype(np.int64)
        steps = (keys[:, 0] % np.uint64(size - 1)).astype(np.int64) + 1
        found = np.full(len(keys), -1, np.int16)
        left = np.arange(len(keys))
        while len(left):
            slot, key = slots[left], keys[left]
            free: NDArray[np.bool_] = np.all(self.keys[slot] == 0, axis=1)
            self.keys[slot[free]] = key[free]                   # of several that want one slot, the last gets it
            mine: NDArray[np.bool_] = np.all(self.keys[slot] == key, axis=1)
            taken = mine & free
            self.notes[slot[taken]] = notes[left[taken]]
            self.count += int(taken.sum())
            known = mine & ~free
            found[left[known]] = self.notes[slot[known]]
            left = left[~mine]
            slots[left] = (slots[left] + steps[left]) % size
        return found


def _prime(least: int) -> int:
    """Return the least prime from `least` on."""
    while any(least % factor == 0 for factor in range(2, int(least**0.5) + 1)):
        least += 1
    return least
