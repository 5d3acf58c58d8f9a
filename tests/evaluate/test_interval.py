"""The bootstrap against the closed form of a normal mean, and against the truth it must cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from danlu.evaluate.interval import Estimate, estimate, estimates, exponential


def test_the_interval_of_a_normal_mean_is_the_textbook_one() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = estimate(x, np.ones(400), resamples=4000)
    half = 1.96 * x.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(x.mean(), abs=1e-12)
    assert found.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.1 * half)
    assert found.stderr == pytest.approx(half / 1.96, rel=0.05)


def test_it_covers_the_truth_19_times_in_20() -> None:
    draw, hits = np.random.default_rng(1), 0
    for number in range(500):
        lengths = draw.integers(5, 60, size=80).astype(float)    # documents of unequal length, each with its own level
        sums = lengths * draw.normal(3.0, 0.5, 80)
        found = estimate(sums, lengths, resamples=400, seed=number)
        assert found.low is not None and found.high is not None
        hits += found.low <= 3.0 <= found.high
    assert 0.92 <= hits / 500 <= 0.97


def test_long_documents_weigh_more() -> None:
    assert estimate(np.array([10.0, 1.0]), np.array([10.0, 4.0])).value == pytest.approx(11 / 14)


def test_columns_are_estimated_as_one_by_one() -> None:
    draw = np.random.default_rng(0)
    sums, counts = draw.normal(2, 1, (60, 3)), draw.integers(1, 9, (60, 3)).astype(float)
    found = estimates(sums, counts, resamples=300, seed=5)
    for column, one in enumerate(found):
        alone = estimate(sums[:, column], counts[:, column], resamples=300, seed=5)
        assert (one.value, one.stderr, one.low, one.high) == pytest.approx(
            (alone.value, alone.stderr, alone.low, alone.high))
    assert math.isnan(estimates(np.zeros((4, 1)), np.zeros((4, 1)))[0].value)


def test_the_same_seed_gives_the_same_interval() -> None:
    x, ones = np.arange(50.0), np.ones(50)
    assert estimate(x, ones, seed=3) == estimate(x, ones, seed=3) != estimate(x, ones, seed=4)


def test_one_document_has_no_interval() -> None:
    assert estimate(np.array([5.0]), np.array([2.0])) == Estimate(2.5)
    assert math.isnan(estimate(np.array([]), np.array([])).value)


def test_units_that_count_nothing_are_no_units() -> None:
    assert estimate(np.array([5.0, 0.0]), np.array([2.0, 0.0])) == Estimate(2.5)


def test_perplexity_keeps_the_ends_of_the_loss() -> None:
    found = exponential(Estimate(2.0, 0.1, 1.8, 2.2))
    assert (found.value, found.stderr, found.low, found.high) == pytest.approx(
        (math.exp(2.0), 0.1 * math.exp(2.0), math.exp(1.8), math.exp(2.2)))
