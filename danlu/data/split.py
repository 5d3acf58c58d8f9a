"""Which rows train, validate and test: by the text's own fingerprint, so that a row never moves."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from danlu import chance
from danlu.config import Model
from danlu.data.dedup import Digests
from danlu.words import _

NAMES = ("train", "val", "test")
Bounds = tuple[int, int]                            # fingerprints below the first are test, below the second val


class Split(Model):
    """How rows are shared out.

    hash: a keyed fingerprint of the text decides, so a row stays where it is when others come or go.  With labels and
    `stratify`, each class has its own bounds, chosen so that its share is exact: then adding rows of a class can move
    the few rows at that class's bound.  tail: the end of each document validates.  none: all rows train.
    """

    by: Literal["hash", "tail", "none"] = Field(
        default="hash", description="hash: whole rows; tail: the end of each text; none: all rows train.")
    val: float = Field(default=0.01, ge=0, lt=1, allow_inf_nan=False, description="Share that validates.")
    test: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False, description="Share that is kept for the test.")
    stratify: bool = Field(default=True, description="Give each class the same shares, where rows have labels.")
    strict: bool = Field(default=False, description="Stop when one text stands in two splits of the inputs.")

    @model_validator(mode="after")
    def _fits(self) -> Split:
        if self.val + self.test >= 1:
            raise ValueError(_("split.val + split.test = {sum:g} leaves nothing to train on; lower them").format(
                sum=self.val + self.test))
        return self

    def bounds(self) -> Bounds:
        """Return the bounds that give the shares in expectation."""
        return _bound(self.test), _bound(self.test + self.val)

    def exact(self, keys: NDArray[np.uint64]) -> Bounds:
        """Return the bounds that give the shares of these keys, to the nearest row; of three keys, a share gets one."""
        ranked, n = np.sort(keys), len(keys)
        tests = min(_share(self.test, n), max(0, n - 1))
        both = min(tests + _share(self.val, n), max(0, n - 1))      # one row at least is left to train on
        return int(ranked[tests]) if tests else 0, int(ranked[both]) if both else 0

    def place(self, keys: NDArray[np.uint64], bounds: Bounds) -> NDArray[np.uint8]:
        """Return the split of each key [n]: 0 train, 1 val, 2 test."""
        result = np.zeros(len(keys), np.uint8)
        low, high = bounds
        result[_below(keys, high)] = 1
        result[_below(keys, low)] = 2
        return result

    def cut(self, text: str) -> tuple[str, str, str]:
        """Return the parts of a document that train, validate and test, in this order in the text."""
        first = int(len(text) * (1 - self.val - self.test))
        second = int(len(text) * (1 - self.test)) if self.test else len(text)
        return text[:first], text[first:second], text[second:]


def keys(digests: Digests, seed: int) -> NDArray[np.uint64]:
    """Return a number for each digest [n, 2] that is uniform and depends on the seed (SplitMix64's finalizer)."""
    mixed = digests[:, 1] ^ np.uint64(chance.key(seed, "split") & (2**64 - 1))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _below(values: NDArray[np.uint64], bound: int) -> NDArray[np.bool_]:
    return np.ones(len(values), bool) if bound >= 2**64 else values < np.uint64(bound)


def _bound(share: float) -> int:
    return min(2**64, round(share * 2**64))


def _share(share: float, n: int) -> int:
    """Return how many of `n` rows a share is; at least one where there is a share and three rows or more."""
    return max(round(share * n), 1 if share > 0 and n >= 3 else 0)
