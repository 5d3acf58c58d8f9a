"""The loop: batch, gradients, judgement, update; and what happens every so many steps."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from danlu import files
from danlu.errors import ConfigError, NumericError, Stopped
from danlu.evaluate.loss import Loss
from danlu.fault import fault
from danlu.log import LiveLine, Metrics, count, duration, say
from danlu.objectives.protocol import Batch
from danlu.schedule import Schedule
from danlu.train import guard as guards
from danlu.train.feed import Fed
from danlu.train.guard import Guard
from danlu.train.meter import Phase, peak
from danlu.train.outer import Outer
from danlu.train.room import fit_in
from danlu.train.signals import Asked
from danlu.train.step import Engine
from danlu.words import _


@dataclass
class Progress:
    """How far a run is: all that a checkpoint needs beside tensors."""

    step: int = 0
    position: Any = None
    tokens: int = 0                                      # tokens that carried loss
    best: float | None = None
    best_step: int | None = None
    waited: int = 0                                      # evaluations without improvement
    evaluation: dict[str, float | None] = field(default_factory=dict)        # None: no figure
    history: list[float] = field(default_factory=list)   # the guard's
    skipped: int = 0
    micro: int | None = None                             # micro-batches of a step since memory ran out

    def record(self) -> dict[str, Any]:
        """Return the progress as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What the loop is asked to do; plain values and functions, so that the loop knows no files and no formats."""

    total: int
    lr: float
    schedule: Schedule
    log: int
    evaluate: int
    save: int
    sample: int
    best: bool                                           # save when an evaluation is the best so far
    patience: int | None
    min_delta: float
    metric: str
    higher: bool                                         # more of it is better
    settled: int                                         # from this step on an evaluation may be the best
    flops: float                                         # of one step, forward and backward
    peak: float                                          # measured FLOP/s of this device, 0 = unknown
    rows: tuple[str, ...] = ()                           # settings that keep the rows of a step when layout.micro changes


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out for."""

    measure: Callable[[], Loss | None]                   # loss on held-out rows
    save: Callable[[Progress, bool], None]               # (progress, wait for the disk)
    saved: Callable[[], str]                             # '12s' since the last checkpoint, or ''
    kept: Callable[[], str]                              # the name of the last checkpoint that is on disk
    poll: Callable[[], None]                             # tells failures of saves under way
    sample: Callable[[], None]
    after_update: Callable[[], None]                     # averaged weights
    beat: Callable[[int, str], None]                     # (step, what it does now) for the watchdog
    enter: Callable[[Phase], None]                       # … and for what is measured of the run itself


def _warm(plan: Plan) -> int:
    """Return the first step whose learning rate is at least half of what the schedule reaches."""
    factors = [plan.schedule.at(step, plan.total) for step in range(min(plan.total, 100_000))]
    return next(step for step, factor in enumerate(factors) if factor >= 0.5 * max(factors))


def _due(step: int, every: int, total: int) -> bool:
    return bool(every) and step % every == 0 and step < total


class _Clock:
    """Tokens and steps a second, smoothed over about the last 20 steps."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.seconds, self.tokens = 0.0, 0.0

    def step(self, tokens: int) -> None:
        now = time.perf_counter()
        share = 0.05 if self.seconds else 1.0
        self.seconds += share * (now - self.last - self.seconds)
        self.tokens += share * (tokens - self.tokens)
        self.last = now

    @property
    def speed(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


@dataclass
class Loop:
    """A run between its first step and its last."""

    engine: Engine
    optimizer: Optimizer
    plan: Plan
    hooks: Hooks
    guard: Guard
    progress: Progress
    metrics: Metrics
    out: Path
    outer: Outer | None = None                           # of replicas that step alone
    live: LiveLine = field(default_factory=LiveLine)

    def fit(self, feed: Iterator[Fed], *, recorded: dict[int, str], asked: Asked) -> Progress:
        """Train to the last step, or until patience ends or a signal asks; return the progress.

        recorded: exact losses of steps that an interrupted run had already made; they must come out again.
        """
        plan, progress, clock = self.plan, self.progress, _Clock()
        moved_at = min(plan.total, _warm(plan) + guards.MOVED_AFTER)
        unmoved = progress.step < moved_at
        before = guards.fingerprint(self.engine.leaves) if unmoved else {}
        counted = self.engine.counts > 0                 # terms that rows have counted for; a task may come late
        self.engine.asked = lambda: bool(asked.signal)
        if progress.step == 0:
            self.evaluate()
        while progress.step < plan.total and not self.impatient():
            self.hooks.beat(progress.step, "data")
            self.hooks.enter("data")
            batch, position = next(feed)
            self.hooks.beat(progress.step, "step")
            self.hooks.enter("step")
            losses, loss, lr, norm = self.step(batch, recorded)
            self.hooks.enter("other")
            progress.step, progress.position = progress.step + 1, position
            if self.outer is not None and self.outer.due(progress.step, plan.total, self.engine.stopping):
                self.outer.meet(self.optimizer)
            clock.step(int(batch["ids"].numel()) * self.engine.layout.dp)
            counted |= self.engine.counts > 0
            if unmoved and progress.step >= moved_at and bool(counted.all()) and not self.guard.skipped:
                unmoved = False
                awake = [leaf for leaf in self.engine.leaves if not self.engine.asleep(leaf.name, progress.step - 1)]
                guards.check_moved(before, awake, self.engine.world, step=progress.step)
            if progress.step % plan.log == 0 or progress.step == plan.total or self.guard.reason:
                self.metrics.write(progress.step, self.values(losses, loss, lr, norm, clock))
            self.hooks.poll()
            patience_ended = self.after_step()
            self.live.show(self.line(loss, lr, norm, clock), force=patience_ended or progress.step == plan.total)
            if patience_ended:
                break
            if asked.signal if self.engine.world.size == 1 else self.engine.stopping:
                self.live.end()
                self.hooks.save(progress, True)
                told = _("stopped by a signal at step {step}; the same command goes on from there")
                if self.hooks.kept() != f"checkpoint-{progress.step}":
                    told = _("stopped by a signal at step {step}, not saved; the same command goes on from {place}")
                raise Stopped(told.format(step=progress.step, place=self.hooks.kept()), signal=asked.signal or signal.SIGTERM)
        self.live.end()
        return progress

    def step(self, batch: Batch, recorded: dict[int, str]) -> tuple[Tensor, float, float, float]:
        """Make one update if the guard allows it; return [terms] losses, their weighted sum, the rate and the norm."""
        engine, number = self.engine, self.progress.step
        fault("train.step")
        losses = fit_in(engine, batch, step=number, rows=self.plan.rows)
        self.progress.micro = engine.micro if engine.micro > engine.layout.micro else None
        guards.check_counts(engine.counts, step=number)
        if fault("loss") == "scale50":
            losses = losses * 50
        loss = float((losses * engine.scales).sum())
        guards.check_replay(recorded.pop(number + 1, None), loss, step=number + 1)
        lr = self.plan.lr * self.plan.schedule.at(number, self.plan.total)
        norm = self.update(batch, loss, lr)
        if engine.zeros is not None and engine.zeros.changed:
            self.guard.history.clear()                   # what the model loses with its weights is no spike
        self.hooks.after_update()
        self.progress.tokens += int(engine.counts[0])
        self.progress.history, self.progress.skipped = list(self.guard.history), self.guard.skipped
        return losses, loss, lr, norm

    def update(self, batch: Batch, loss: float, lr: float) -> float:
        """Let the engine update if the guard allows it; a batch that stops the run is dumped first.  Return the norm."""
        step, scaler = self.progress.step + 1, self.engine.scaler is not None
        try:
            norm = self.engine.update(self.optimizer, lr, allow=lambda n: self.guard.allow(loss, n, step=step, scaler=scaler))
        except NumericError:
            dumped = {name: column.tolist() for name, column in batch.items()}
            rank = f"-{self.engine.world.rank}" if self.engine.world.size > 1 else ""
            files.write_json(self.out / f"failed-batch{rank}.json", {"step": step, "batch": dumped})
            say(_("the batch is in {file}").format(file=self.out / f"failed-batch{rank}.json"))
            raise
        if self.guard.reason:
            say(_("step {step}: update skipped: {why}").format(step=step, why=self.guard.reason))
        return norm

    def after_step(self) -> bool:
        """Sample, evaluate and save where it is time; return whether patience has ended."""
        plan, progress = self.plan, self.progress
        if _due(progress.step, plan.sample, plan.total):
            self.hooks.beat(progress.step, "sample")
            self.hooks.sample()
        if (_due(progress.step, plan.evaluate, plan.total) or progress.step == plan.total) and self.evaluate():
            say(_("stopped early at step {step}: {metric} has not become better for {n} evaluations").format(
                step=progress.step, metric=plan.metric, n=progress.waited))
            return True
        best = plan.best and progress.best_step == progress.step
        if _due(progress.step, plan.save, plan.total) or (best and progress.step < plan.total):
            self.hooks.beat(progress.step, "save")
            self.hooks.save(progress, False)
        return False

    def evaluate(self) -> bool:
        """Measure, write, keep the best; return whether patience has ended."""
        plan, progress = self.plan, self.progress
        measured = self.hooks.measure()
        if measured is None:
            return False
        values = measured.values("eval/")
        self.metrics.write(progress.step, values)
        progress.evaluation = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        if plan.metric not in values:
            raise ConfigError(_("there is no metric {name}; there are {names}").format(
                name=plan.metric, names=", ".join(values)), where="metric")
        if progress.step < plan.settled:
            return False
        value = values[plan.metric]
        if not math.isfinite(value):                     # no figure: held-out rows of one class, of one score
            progress.waited += 1
            return self.impatient()
        sign = 1 if plan.higher else -1
        better = progress.best is None or sign * (value - progress.best) > plan.min_delta
        if better or (progress.best_step == 0 and value == progress.best):       # no better than untrained, but trained
            progress.best, progress.best_step, progress.waited = value, progress.step, 0
            return False
        progress.waited += 1
        return self.impatient()

    def impatient(self) -> bool:
        """Return whether patience has ended, in this process or in one that the run goes on from."""
        return self.plan.patience is not None and self.progress.waited >= self.plan.patience

    def values(self, losses: Tensor, loss: float, lr: float, norm: float, clock: _Clock) -> dict[str, float | int | str]:
        """Return what a line of metrics says, under the field's names."""
        values: dict[str, float | int | str] = {
            "train/loss": loss, "grad_norm": norm, "learning_rate": lr, "tokens_per_second": round(clock.speed, 1),
            "memory/max_alloc": peak(), "tokens": self.progress.tokens, "spike_score": self.guard.score(loss),
        }
        if len(losses) > 1:
            values |= {f"train/{name}_loss": float(value)
                       for name, value in zip(self.engine.objective.terms, losses, strict=True)}
        if self.engine.penalties:
            values["train/penalty"] = self.engine.penalty
        if self.engine.zeros is not None:
            values["sparsity"] = self.engine.zeros.share
        if self.plan.peak:
            values["mfu"] = round(self.plan.flops / max(clock.seconds, 1e-9) / self.plan.peak, 4)
        if self.engine.scaler is not None:
            values["loss_scale"] = float(self.engine.scaler.get_scale())
        if self.progress.micro is not None:
            values["micro"] = self.progress.micro
        if self.guard.reason:
            values["skipped"] = self.guard.skipped
        return values

    def line(self, loss: float, lr: float, norm: float, clock: _Clock) -> str:
        """Return the live line."""
        plan, progress, saved = self.plan, self.progress, self.hooks.saved()
        val, goal = progress.evaluation.get("eval/loss"), progress.evaluation.get(plan.metric)
        parts = [
            _("step {step}/{total} {percent:.0f}%").format(step=progress.step, total=plan.total,
                                                          percent=100 * progress.step / plan.total),
            _("loss {loss:.4f}").format(loss=loss), "" if val is None else _("val {val:.4f}").format(val=val),
            "" if goal is None or plan.metric == "eval/loss" else f"{plan.metric.removeprefix('eval/')} {goal:.4f}",
            f"lr {lr:.2e}", _("grad {norm:.2f}").format(norm=norm), f"{count(clock.speed)} tok/s",
            f"{peak() / 1e6:.0f} MB", _("ETA {time}").format(time=duration((plan.total - progress.step) * clock.seconds)),
            _("saved {age} ago").format(age=saved) if saved else "",
        ]
        return " · ".join(part for part in parts if part)
