"""Splits: shares against the binomial, classes against exact counts, the tail against nanoGPT's formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from danlu.data.dedup import digests
from danlu.data.split import Split, keys


def test_shares_are_met_in_expectation() -> None:
    cfg, n = Split(val=0.1, test=0.05), 20_000
    place = cfg.place(keys(digests(map(str, range(n))), 0), cfg.bounds())
    for part, share in enumerate((0.85, 0.1, 0.05)):
        assert abs((place == part).sum() - n * share) < 5 * np.sqrt(n * share * (1 - share))


def test_a_row_stays_where_it_is_whatever_stands_beside_it() -> None:
    cfg = Split(val=0.2)
    few = cfg.place(keys(digests(["a", "b", "c", "d"]), 3), cfg.bounds())
    many = cfg.place(keys(digests(["z", "d", "y", "c", "b", "x", "a"]), 3), cfg.bounds())
    assert few.tolist() == many[[6, 4, 3, 1]].tolist()


def test_a_larger_share_keeps_the_rows_of_the_smaller_one() -> None:
    found = keys(digests(map(str, range(2000))), 0)
    small, large = (set(np.flatnonzero(cfg.place(found, cfg.bounds()))) for cfg in (Split(val=0.05), Split(val=0.1)))
    assert small < large


def test_seeds_give_independent_splits() -> None:
    cfg, texts = Split(val=0.5), digests(map(str, range(4000)))
    one, two = (cfg.place(keys(texts, seed), cfg.bounds()) for seed in (0, 1))
    assert abs((one == two).mean() - 0.5) < 0.05


@given(st.integers(0, 300), st.sampled_from([(0.1, 0.1), (0.0, 0.0), (0.5, 0.4), (0.01, 0.0), (0.0, 0.9)]))
def test_classes_get_their_share_to_the_row(n: int, shares: tuple[float, float]) -> None:
    cfg = Split(val=shares[0], test=shares[1])
    found = keys(digests(map(str, range(n))), 0)
    counts = np.bincount(cfg.place(found, cfg.exact(found)), minlength=3)
    assert counts.sum() == n and (counts[0] > 0 or n == 0)
    for part, share in (1, shares[0]), (2, shares[1]):
        assert (counts[part] == 0) if share == 0 else (abs(counts[part] - share * n) <= 2)
        assert counts[part] > 0 or share == 0 or n < 3


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 99, 1115394])
def test_the_tail_is_cut_as_nanogpt_does(n: int) -> None:
    text = "x" * n
    train, val, test = Split(by="tail", val=0.1).cut(text)
    assert len(train) == int(n * 0.9) and len(val) == n - int(n * 0.9) and test == ""
    assert "".join(Split(by="tail", val=0.2, test=0.3).cut("0123456789")) == "0123456789"
    assert [len(part) for part in Split(by="tail", val=0.2, test=0.3).cut("0123456789")] == [5, 2, 3]


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"split\.val \+ split\.test"):
        Split(val=0.5, test=0.5)
