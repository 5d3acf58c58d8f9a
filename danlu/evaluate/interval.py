"""How far a held-out figure may lie from the true one: the bootstrap over documents (Efron, 1979).

Tokens of one document depend on each other, so documents are drawn, never tokens.  n documents, R resamples.
"""

from __future__ import annotations

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


def ratios(sums: Floats, counts: Floats, *, resamples: int, seed: int) -> Floats:
    """Return [R] the ratio Σ sums / Σ counts over `resamples` draws of n units [n] with replacement."""
    n = len(sums)
    draw = chance.generator(seed, "bootstrap", (n,))
    step, found = max(1, CELLS // n), []
    even = np.full(n, 1 / n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        times = draw.multinomial(n, even, size=size) if n <= CELLS else draw.poisson(1.0, size=(size, n))
        found.append((times @ sums) / np.maximum(times @ counts, 1e-300))
    return np.concatenate(found)


def estimate(sums: Floats, counts: Floats, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return Σ sums / Σ counts, its standard error and the 2.5 and 97.5 % points of its resamples."""
    keep = (counts > 0) | (sums != 0)
    sums, counts = sums[keep], counts[keep]
    value = float(sums.sum() / counts.sum()) if len(sums) else float("nan")
    if len(sums) < 2:
        return Estimate(value)
    spread = ratios(sums, counts, resamples=resamples, seed=seed)
    low, high = np.percentile(spread, (2.5, 97.5))
    return Estimate(value, float(spread.std(ddof=1)), float(low), float(high))


def exponential(of: Estimate) -> Estimate:
    """Return the interval of exp(x): its ends are those of x, its standard error by the delta method."""
    def exp(x: float | None) -> float | None:
        return None if x is None else float(np.exp(min(x, 700.0)))

    value = exp(of.value)
    assert value is not None
    return Estimate(value, None if of.stderr is None else value * of.stderr, exp(of.low), exp(of.high))
