"""The set of fingerprints against a dict; its size against what it promises."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.dedup import Seen, digests


@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), max_size=30), max_size=8))
@settings(max_examples=100, deadline=None)
def test_seen_equals_a_dict(batches: list[list[tuple[int, int]]]) -> None:
    seen, known = Seen(), dict[int, int]()

    def add(number: int, note: int) -> int:
        before = known.get(number, -1)
        known.setdefault(number, note)
        return before

    for batch in batches:
        keys = digests([str(number) for number, _note in batch])
        got = seen.add(keys, np.array([note for _number, note in batch], np.uint8))
        assert got.tolist() == [add(number, note) for number, note in batch]
    assert len(seen) == len(known)


def test_many_keys_in_little_memory() -> None:
    seen, rng, worst = Seen(), np.random.default_rng(0), 0.0
    for _batch in range(60):
        keys = rng.integers(0, 1 << 63, (5000, 2), dtype=np.uint64) * np.uint64(2)
        assert (seen.add(keys, np.zeros(5000, np.uint8)) == -1).all()
        assert (seen.add(keys[::7], np.zeros(715, np.uint8)) == 0).all()
        if len(seen) > 50_000:
            worst = max(worst, seen.nbytes / len(seen))
    assert len(seen) == 300_000
    assert worst < 32


def test_keys_that_fall_on_one_slot_are_kept_apart() -> None:
    keys = np.array([[number << 32, 7] for number in range(500)] + [[0, 0]], np.uint64)
    seen = Seen()
    assert (seen.add(keys, np.arange(501, dtype=np.uint64).astype(np.uint8)) == -1).all()
    assert seen.add(keys, np.zeros(501, np.uint8)).tolist() == [number % 256 for number in range(501)]


def test_fingerprints_are_blake2b_of_the_text() -> None:
    wanted = hashlib.blake2b("文 a".encode(), digest_size=16).digest()
    assert digests(["文 a"]).tobytes() == wanted
    assert digests([]).shape == (0, 2)


def test_loose_fingerprints_ignore_case_width_and_spaces() -> None:
    first, second, other = digests(["Ａ  b\nC", "a B c ", "a b d"], loose=True)
    assert (first == second).all() and not (first == other).all()
    assert not (digests(["A b"])[0] == digests(["a b"])[0]).all()
