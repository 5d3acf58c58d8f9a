"""How far a held-out figure may lie from the true one: the bootstrap over documents or rows (Efron, 1979).

Tokens of one document depend on each other, so documents are drawn, never tokens.  n documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from danlu import chance

CELLS = 1 << 22                                          # resamples × documents held at a time: 32 MiB
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error and its 95 % interval; those are None where one unit says nothing of spread."""

    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None


def draws(units: NDArray[np.int64], *, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield [r, C] how often each of C kinds of unit was drawn, `resamples` rows in all.

    units [C]: how many units there are of each kind; as many as there are in all are drawn, with replacement.  Units that a
    statistic cannot tell apart are best given as one kind: a confusion matrix of 4 cells instead of 2,000 rows.
    """
    kinds, n = len(units), int(units.sum())
    draw = chance.generator(seed, "bootstrap", (n,))
    step, shares = max(1, CELLS // kinds), units / n
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        times = draw.multinomial(n, shares, size=size) if kinds <= CELLS else draw.poisson(units, size=(size, kinds))
        yield times.astype(np.float64)


def resampled(statistic: Callable[[Floats], Floats], n: int | NDArray[np.int64], *, resamples: int, seed: int) -> Floats:
    """Return [R] or [R, M] a statistic of `resamples` draws of n units with replacement.

    statistic: from [r, n] how often each unit was drawn to [r] figures or [r, M].  n: how many units, or [C] how many of
    each kind (see draws).
    """
    units = np.ones(n, np.int64) if isinstance(n, int) else n
    return np.concatenate([statistic(times) for times in draws(units, resamples=resamples, seed=seed)])


def around(value: float, spread: Floats) -> Estimate:
    """Return a figure with the standard error and the 2.5 and 97.5 % points of its resamples [R].

    Resamples where the figure is not defined (NaN: no row of a class was drawn) say nothing and are left out.
    """
    spread = spread[np.isfinite(spread)]
    if len(spread) < 2 or not np.isfinite(value):
        return Estimate(value)
    low, high = np.percentile(spread, (2.5, 97.5))
    return Estimate(value, float(spread.std(ddof=1)), float(low), float(high))


def ratios(sums: Floats, counts: Floats, *, resamples: int, seed: int) -> Floats:
    """Return [R] the ratio Σ sums / Σ counts over `resamples` draws of n units [n] with replacement."""
    return resampled(lambda times: (times @ sums) / np.maximum(times @ counts, 1e-300), len(sums),
                     resamples=resamples, seed=seed)


def estimate(sums: Floats, counts: Floats, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return Σ sums / Σ counts, its standard error and the 2.5 and 97.5 % points of its resamples; none for resamples=0."""
    keep = (counts > 0) | (sums != 0)
    sums, counts = sums[keep], counts[keep]
    value = float(sums.sum() / counts.sum()) if len(sums) else float("nan")
    if len(sums) < 2 or not resamples:
        return Estimate(value)
    return around(value, ratios(sums, counts, resamples=resamples, seed=seed))


def estimates(sums: Floats, counts: Floats, *, resamples: int = 2000, seed: int = 0) -> list[Estimate]:
    """Return Σ sums / Σ counts of M columns [n, M] with their spread, drawn once for all; NaN where nothing is counted."""
    above, below = sums.sum(0), counts.sum(0)
    values = divided(above, below)
    if not resamples or len(sums) < 2:
        return [Estimate(float(value)) for value in values]
    spread = resampled(lambda times: divided(times @ sums, times @ counts), len(sums), resamples=resamples, seed=seed)
    return [around(float(value), column) for value, column in zip(values, spread.T, strict=True)]


def divided(above: Floats, below: Floats) -> Floats:
    """Return above / below, NaN where below is 0."""
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def exponential(of: Estimate) -> Estimate:
    """Return the interval of exp(x): its ends are those of x, its standard error by the delta method."""
    def exp(x: float | None) -> float | None:
        return None if x is None else float(np.exp(min(x, 700.0)))

    value = exp(of.value)
    assert value is not None
    return Estimate(value, None if of.stderr is None else value * of.stderr, exp(of.low), exp(of.high))
