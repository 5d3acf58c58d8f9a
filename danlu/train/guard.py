"""Silent failures become stops.

Watched in every run: no trainable token in a batch or a source · a loss that is exactly 0, not finite, or far above its
history · a gradient of norm 0 · a learning rate that never leaves 0 · trained parameters that do not move · a checkpoint
that does not reload to the same loss · a resumed run whose losses are not the recorded ones.  What stands in the data is
the audit's to look at.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from danlu.data.stream import Position, Stream
from danlu.errors import ConfigError, DataError, NumericError
from danlu.parallel import World
from danlu.parallel.place import Leaf
from danlu.schedule import Schedule, check
from danlu.words import _

HISTORY = 128                                           # losses that a new one is compared with
ENOUGH = 10                                             # before so many there is no history to speak of
OVERFLOWS = 40                                          # updates in a row: a loss scale is halved by each
MOVED_AFTER = 10                                        # updates after which every trained parameter must have moved


class Guard:
    """Judges each step; its history travels with the checkpoint."""

    def __init__(self, *, max_skips: int, spike: float, history: Sequence[float] = (), skipped: int = 0) -> None:
        self.max_skips, self.spike = max_skips, spike
        self.history: deque[float] = deque(history, maxlen=HISTORY)
        self.in_a_row, self.overflows, self.skipped = 0, 0, skipped            # the first two: up to now, without a break
        self.reason = ""

    def score(self, loss: float) -> float:
        """Return how many deviations `loss` lies above its history; 0 while there is too little history.

        The deviation is at least 5 % of the mean: a flat history does not make a small rise a spike.
        """
        if len(self.history) < ENOUGH:
            return 0.0
        history = np.fromiter(self.history, np.float64, len(self.history))      # numpy reads a deque ten times as slowly
        mean = float(history.mean())
        return (loss - mean) / max(float(history.std()), 0.05 * abs(mean), 1e-12)

    def allow(self, loss: float, norm: float, *, step: int, scaler: bool = False) -> bool:
        """Return whether the update may be made.  Raises NumericError when the run must stop.

        Under a loss scaler an overflow is the scaler's business: it skips and lowers its scale.
        """
        self.reason = ""
        if scaler and not math.isfinite(norm) and math.isfinite(loss):
            self.reason = _("fp16 overflow: the loss scale is lowered")
            self.overflows += 1
            self.skipped += 1
            if self.overflows > OVERFLOWS:
                raise NumericError(
                    _("{n} updates in a row had to be skipped: {why}").format(n=self.overflows, why=_(
                        "no loss scale is low enough; the gradients themselves are not finite")),
                    where=_("step {step}").format(step=step), fix=_("set precision=bf16 or fp32, or lower optim.lr"))
            return False
        self.overflows = 0
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.reason = _("loss {loss} or gradient norm {norm} is not finite").format(loss=loss, norm=norm)
        elif self.score(loss) > self.spike:
            self.reason = _("loss {loss:.4g} lies {score:.1f} deviations above its history").format(
                loss=loss, score=self.score(loss))
        if self.reason:
            self.in_a_row += 1
            self.skipped += 1
            if self.in_a_row > self.max_skips:
                raise NumericError(
                    _("{n} updates in a row had to be skipped: {why}").format(n=self.in_a_row, why=self.reason),
                    where=_("step {step}").format(step=step),
                    fix=_("lower optim.lr, look at the dumped batch, or set precision=fp32"))
            return False
        if loss == 0.0:
            raise NumericError(_("the loss is exactly 0: nothing is learned"), where=_("step {step}").format(step=step),
                               fix=_("look at the rows with `danlu inspect`: which tokens carry loss?"))
        if norm == 0.0:
            raise NumericError(_("the gradient norm is exactly 0: no parameter hears of the loss"),
                               where=_("step {step}").format(step=step), fix=_("check what is frozen"))
        self.in_a_row = 0
        self.history.append(loss)
        return True


def check_counts(counts: Tensor, *, step: int) -> None:
    """Raise DataError unless some token of the batch carries loss."""
    if float(counts.sum()) == 0.0:
        raise DataError(_("no token of this batch carries loss"), where=_("step {step}").format(step=step),
                        fix=_("look at the rows with `danlu inspect`"))


def check_source(stream: Stream, name: str, rows: int = 512) -> None:
    """Raise DataError if none of the first rows of a source has a token to learn from."""
    for number, (plan, _after) in enumerate(stream.plans(Position())):
        if stream.read(plan)["weights"].any():
            return
        if number >= min(rows, stream.rows(0)) - 1:
            break
    raise DataError(_("none of its first rows has a token that carries loss"), where=name,
                    fix=_("look at the rows with `danlu inspect`"))


def check_schedule(schedule: Schedule, total: int) -> None:
    """Raise ConfigError if the learning rate never leaves 0, or the schedule is longer than the run."""
    check(schedule, total)
    steps = sorted({0, total - 1, *range(0, total, max(1, total // 1000))})
    if max(schedule.at(step, total) for step in steps) <= 0.0:
        raise ConfigError(_("the learning rate is 0 at every step of this schedule"), where="schedule",
                          fix=_("shorten schedule.warmup or raise steps"))


def fingerprint(leaves: Sequence[Leaf]) -> dict[str, tuple[float, float]]:
    """Return two sums for each trained parameter; a parameter that moves changes at least one."""
    with torch.no_grad():
        return {leaf.name: (float(leaf.local.double().sum()), float(leaf.local.double().square().sum())) for leaf in leaves}


def check_moved(before: Mapping[str, tuple[float, float]], leaves: Sequence[Leaf], world: World, *, step: int) -> None:
    """Raise NumericError naming the trained parameters that are what they were, in every process that has a part."""
    now = fingerprint(leaves)
    moved = world.add(torch.tensor([float(before.get(leaf.name) != now[leaf.name]) for leaf in leaves]), ("dp", "cp", "tp"))
    still = [leaf.name for leaf, moves in zip(leaves, moved.tolist(), strict=True) if not moves]
    if still:
        raise NumericError(
            _("{n} trained parameters have not moved: {names}").format(n=len(still), names=", ".join(still[:5])),
            where=_("step {step}").format(step=step), fix=_("freeze them, or raise optim.lr"))


def check_replay(recorded: str | None, loss: float, *, step: int) -> None:
    """Raise NumericError if a resumed step does not give the loss (hexadecimal) recorded before the interruption."""
    if recorded is not None and recorded != loss.hex():
        raise NumericError(
            _("the resumed run does not repeat: loss {now:.9g}, recorded {then:.9g}").format(
                now=loss, then=float.fromhex(recorded)),
            where=_("step {step}").format(step=step),
            fix=_("resume with the same threads, device and versions, or start in a new folder"))
