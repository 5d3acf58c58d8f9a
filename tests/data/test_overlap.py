"""Rows that stand twice, held to brute force over Python's sets."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data import overlap

Ids = list[int]


def pairs(row: Ids) -> set[tuple[int, int]]:
    return set(pairwise(row)) if len(row) > 1 else {(row[0], -1)} if row else set()


def brute(some: list[Ids], others: list[Ids]) -> set[tuple[int, int]]:
    """Numbers of rows whose sets have a Jaccard index of 0.8 or more, by the definition."""
    often = Counter(pair for row in others for pair in pairs(row))
    template = {pair for pair, n in often.items() if n > 20 and 10 * n > len(others)}
    a, b = ([pairs(row) - template for row in rows] for rows in (some, others))
    return {(i, j) for i, x in enumerate(a) for j, y in enumerate(b) if x and y and 5 * len(x & y) >= 4 * len(x | y)}


def found(some: list[Ids], others: list[Ids], *, same: bool = False) -> set[tuple[int, int]]:
    a, b, compared = overlap.alike(made(some), overlap.index(made(others)), same=same)
    assert compared == len(some) and len(a) == len(set(zip(a.tolist(), b.tolist(), strict=True)))
    return set(zip(a.tolist(), b.tolist(), strict=True))


def made(rows: list[Ids]) -> overlap.Rows:
    return overlap.rows([np.array(row, np.uint16) for row in rows])


@st.composite
def likely(draw: st.DrawFn) -> tuple[list[Ids], list[Ids]]:
    """Rows that are often copies of each other with a few ids changed."""
    first = draw(st.lists(st.lists(st.integers(0, 6), max_size=14), min_size=1, max_size=8))
    def copies() -> list[Ids]:
        rows = [list(row) for row in draw(st.lists(st.sampled_from(first), max_size=8))]
        for row in rows:
            for _change in range(draw(st.integers(0, 2)) if row else 0):
                row[draw(st.integers(0, len(row) - 1))] = draw(st.integers(0, 40))
        return rows
    return copies(), copies()


@given(likely())
@settings(max_examples=300, deadline=None)
def test_near_rows_are_those_of_brute_force(rows: tuple[list[Ids], list[Ids]]) -> None:
    some, others = rows
    assert found(some, others) == brute(some, others)
    assert found(some, some, same=True) == {(i, j) for i, j in brute(some, some) if j < i}


def test_what_a_template_writes_is_no_likeness() -> None:
    draw = np.random.default_rng(0)
    head = list(range(50))
    rows = [head + draw.integers(100, 30_000, 10).tolist() for _row in range(40)]
    assert brute(rows, rows) == {(i, i) for i in range(40)} == found(rows, rows)
    assert found([head], rows) == set()


def test_many_rows_agree_with_brute_force_in_small_parts() -> None:
    draw = np.random.default_rng(1)
    base = draw.integers(0, 300, (60, 30))
    rows = [np.where(draw.random(30) < 0.04, draw.integers(0, 300, 30), base[i % 60]).tolist() for i in range(240)]
    wanted = brute(rows[:120], rows[120:])
    assert len(wanted) > 50
    before = overlap.AT_ONCE
    try:
        overlap.AT_ONCE = 64
        assert found(rows[:120], rows[120:]) == wanted
    finally:
        overlap.AT_ONCE = before


def test_no_more_pairs_are_looked_at_than_allowed() -> None:
    rows = [[1, 2, 3, 4]] * 15
    _a, _b, compared = overlap.alike(made(rows), overlap.index(made(rows)), same=True, most=30)
    assert 0 < compared < len(rows)


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=30))
@settings(deadline=None)
def test_the_first_of_equal_rows_is_found(rows: list[Ids]) -> None:
    first = overlap.first_of(overlap.hashes(made(rows))).tolist()
    assert first == [rows.index(row) for row in rows]
