"""Rows that stand twice: within a source, or in training and evaluation data alike; word for word, or nearly.

Rows are nearly the same if the sets of their neighbouring ids (pairs, as they follow each other) have a Jaccard index of
4/5 at least.  Pairs that stand in a tenth of the rows compared with, and in more than 20 of them, are a template's and
count for nothing.  No such pair of rows is missed: two sets so alike share one of the first n - ceil(4n/5) + 1 of their
n elements in any common order (prefix filtering: Chaudhuri et al. 2006; Bayardo et al. 2007), and in the order of
rarity few others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from danlu.data.shards import Shards

Array = NDArray[np.int64]
TEMPLATE, FEW = 10, 20                                   # a pair in more than 1/10 of the rows, and in more than 20, says nothing
NONE = np.uint64(0xFFFFFFFF)                             # stands behind the only id of a row
ROW = np.int64(32)                                       # bits below the number of a row in a key
AT_ONCE = 1 << 22                                        # elements looked up at a time
PAIRS = 1 << 25                                          # pairs of rows that are looked at; the rest is left out, and told


class Rows(NamedTuple):
    """Rows one after the other: ids [tokens], row i is ids[offsets[i]:offsets[i + 1]]."""

    ids: NDArray[np.integer]
    offsets: Array                                       # [rows + 1]

    @property
    def number(self) -> int:
        """How many rows there are."""
        return len(self.offsets) - 1


def rows(documents: Sequence[NDArray[np.integer]]) -> Rows:
    """Return documents as Rows."""
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(one) for one in documents], out=offsets[1:])
    return Rows(np.concatenate([*documents, np.zeros(0, np.int64)]).astype(np.int64), offsets)


def ranges(starts: Array, counts: Array) -> Array:
    """Return starts[i], starts[i] + 1 … (counts[i] of them), for each i, one after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def hashes(given: Rows) -> NDArray[np.uint64]:
    """Return a number of 64 bits for each row [rows], which rows of the same ids share and others hardly ever."""
    sizes = np.diff(given.offsets)
    place = np.arange(len(given.ids)) - np.repeat(given.offsets[:-1], sizes)
    mixed = _mix(given.ids.astype(np.uint64) ^ _mix(place.astype(np.uint64)))
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return _mix(total[given.offsets[1:]] - total[given.offsets[:-1]] + sizes.astype(np.uint64))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well mixed bits (splitmix64)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed


def first_of(keys: NDArray[np.uint64]) -> Array:
    """Return for each row the number of the first row with the same key [rows]: its own for a row that stands once."""
    _values, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found: Array = first[inverse].astype(np.int64)
    return found


def _pairs(given: Rows) -> tuple[Array, NDArray[np.uint64]]:
    """Return row and pair of ids (first << 32 | second), each pair once in a row, rows in order."""
    sizes = np.diff(given.offsets)
    bits = max(int(given.ids.max(initial=0) + 1).bit_length(), 1)
    assert 2 * bits + given.number.bit_length() <= 64, "a row's number and two ids fit a key"
    none = np.uint64((1 << bits) - 1)
    first = given.ids.astype(np.uint64)
    second = np.append(first[1:], none)
    ends = given.offsets[1:][sizes > 0] - 1
    second[ends] = none
    keep = np.ones(len(first), bool)
    keep[ends] = sizes[sizes > 0] == 1
    row = np.repeat(np.arange(given.number, dtype=np.uint64), sizes)[keep]
    key = _once((row << np.uint64(2 * bits)) | (first[keep] << np.uint64(bits)) | second[keep]) 
    first, second = (key >> np.uint64(bits)) & none, key & none
    second[second == none] = NONE
    return (key >> np.uint64(2 * bits)).astype(np.int64), (first << np.uint64(32)) | second


def _once(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the values in order, each once; np.unique is several times as slow."""
    values = np.sort(values)
    once: NDArray[np.uint64] = values[np.append(True, values[1:] != values[:-1])[: len(values)]]
    return once


def _places(ordered: NDArray[Any], values: NDArray[Any]) -> Array:
    """Return np.searchsorted(ordered, values); many values in their own order are found several times as fast."""
    order = np.argsort(values)
    found = np.empty(len(values), np.int64)
    found[order] = np.searchsorted(ordered, values[order])
    return found


class Index(NamedTuple):
    """Rows that others are compared with; see `index`."""

    codes: NDArray[np.uint64]                            # pairs of ids, sorted
    rank: Array                                          # place of each by rarity; -1: a template's
    sets: Array                                          # row << 32 | rank of each element, sorted
    sizes: Array                                         # elements of each row
    posted: Array                                        # ranks that open a set, sorted
    rows: Array                                          # the row of each


def index(given: Rows) -> Index:
    """Return what `alike` compares other rows with."""
    row, code = _pairs(given)
    codes = _once(code)
    inverse = _places(codes, code)
    often = np.bincount(inverse, minlength=len(codes))
    rank = np.empty(len(codes), np.int64)
    rank[np.argsort(often, kind="stable")] = np.arange(len(codes))
    rank[(often > FEW) & (often * TEMPLATE > given.number)] = -1
    kept = rank[inverse] >= 0
    sets = np.sort((row[kept] << ROW) | rank[inverse[kept]])
    sizes = np.bincount(row[kept], minlength=given.number).astype(np.int64)
    opening = sets[ranges(np.cumsum(sizes) - sizes, _opening(sizes))]
    ranks = opening & np.int64(NONE)
    order = np.argsort(ranks, kind="stable")
    return Index(codes, rank, sets, sizes, ranks[order], (opening >> ROW)[order])


def _opening(sizes: Array) -> Array:
    """Return how many elements of a set, the rarest first, another one that is like it must share one of."""
    return np.where(sizes > 0, sizes + (-4 * sizes) // 5 + 1, 0)


def alike(given: Rows, others: Index, *, same: bool = False, most: int = PAIRS) -> tuple[Array, Array, int]:
    """Return rows of `given` and of `others` that are nearly the same or the same [pairs], and how many rows were compared.

    same: `others` was made of `given`, and each pair is wanted once, the lower number second.  most: pairs to look at.
    """
    row, code = _pairs(given)
    rank = np.full(len(code), -2, np.int64)              # -2: a pair that no other row has
    if len(others.codes):
        at = np.minimum(_places(others.codes, code), len(others.codes) - 1)
        rank = np.where(others.codes[at] == code, others.rank[at], rank)
    sizes = np.bincount(row[rank != -1], minlength=given.number).astype(np.int64)
    known = np.sort((row[rank >= 0] << ROW) | rank[rank >= 0])
    counts = np.bincount(known >> ROW, minlength=given.number).astype(np.int64)
    starts = np.cumsum(counts) - counts
    opening = np.maximum(_opening(sizes) - (sizes - counts), 0)     # what no other row has comes first, and is met nowhere
    places = ranges(starts, opening)
    ranks, of = known[places] & np.int64(NONE), known[places] >> ROW
    left, right = (np.searchsorted(others.posted, ranks, side) for side in ("left", "right"))
    load = np.cumsum(np.bincount(of, right - left, minlength=given.number))
    compared = int(np.searchsorted(load, most, side="right"))
    found: list[Array] = []
    for part in _parts(np.where(of < compared, right - left, 0)):
        meets = others.rows[ranges(left[part], (right - left)[part])]
        found.append(np.unique((np.repeat(of[part], (right - left)[part]) << ROW) | meets))
    candidates = np.unique(np.concatenate([np.zeros(0, np.int64), *found]))
    a, b = candidates >> ROW, candidates & np.int64(NONE)
    fit = 5 * np.minimum(sizes[a], others.sizes[b]) >= 4 * np.maximum(sizes[a], others.sizes[b])
    fit &= (b < a) if same else np.True_
    a, b = a[fit], b[fit]
    shared = np.zeros(len(a), np.int64)
    for part in _parts(counts[a]):
        wanted = known[ranges(starts[a[part]], counts[a[part]])] & np.int64(NONE)
        pair = np.repeat(np.arange(part.start, part.stop), counts[a[part]])
        wanted |= b[pair] << ROW
        at = np.minimum(_places(others.sets, wanted), len(others.sets) - 1)
        shared += np.bincount(pair[others.sets[at] == wanted], minlength=len(a))
    good = 5 * shared >= 4 * (sizes[a] + others.sizes[b] - shared)
    return a[good], b[good], compared


def _parts(counts: Array) -> list[slice]:
    """Return stretches of `counts` whose sums are about AT_ONCE or less."""
    total = np.cumsum(counts)
    if not len(counts):
        return []
    cuts = np.searchsorted(total, np.arange(AT_ONCE, int(total[-1]) + AT_ONCE, AT_ONCE), side="right")
    ends = [*dict.fromkeys(cuts[(cuts > 0) & (cuts < len(counts))].tolist()), len(counts)]
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def shared(train: Sequence[Shards], held_out: Shards, *, most: int = 100_000) -> tuple[list[int], int]:
    """Return the numbers of the evaluation documents that also stand in `train`, and how many were looked for.

    Exact: documents are compared by a hash of their token ids, with all of `train`; of a held-out part with more than
    `most` documents the first `most` are looked for, equal ones once.
    """
    looked_for: dict[bytes, int] = {}
    for number in range(min(held_out.documents, most)):
        looked_for.setdefault(_hash(held_out.document(number).ids), number)
    signatures = np.unique(held_out.signatures()[:most])
    found: set[int] = set()
    for shards in train:
        for candidate in np.flatnonzero(np.isin(shards.signatures(), signatures)).tolist():
            same = looked_for.get(_hash(shards.document(candidate).ids))
            if same is not None:
                found.add(same)
    return sorted(found), len(looked_for)


def _hash(ids: np.ndarray) -> bytes:
    return blake2b(np.ascontiguousarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
