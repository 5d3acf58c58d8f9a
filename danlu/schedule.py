"""Learning-rate schedules.  A schedule is its own configuration; `at(step, total)` is the factor on `optim.lr`.

Steps count from 0: the first update of a run uses `at(0, total)`, the last `at(total - 1, total)`.  `at(total, total)`,
where the run ends, is the floor; so no update is spent at factor 0, and after the warm-up the factors equal those of
the field's schedulers (`transformers.get_scheduler`).  A warm-up of w steps gives 1/w, 2/w, … 1: the first is never 0.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field, field_validator

from danlu.config import Model
from danlu.errors import ConfigError
from danlu.words import _


def _length(value: object) -> object:
    """Refuse true/false, and a number at 1 or above that is not whole: it would be neither steps nor a fraction."""
    if isinstance(value, bool):
        raise ValueError(_("give a number of steps or a fraction of the run, not true or false"))
    if isinstance(value, float) and value >= 1:
        raise ValueError(_("{value} is neither steps nor a fraction below 1; write an integer").format(value=value))
    return value


Length = Annotated[int | float, BeforeValidator(_length), Field(ge=0, allow_inf_nan=False)]
Warmup = Annotated[
    Length,
    Field(
        validation_alias=AliasChoices("warmup", "warmup_steps", "warmup_ratio"),
        description="Length of the linear warm-up: an integer is steps, a number below 1 is a fraction of the run.",
    ),
]
Floor = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        validation_alias=AliasChoices("floor", "min_lr_rate", "min_lr_ratio"),
        description="Factor at the end of the run.",
    ),
]


def span(length: int | float, total: int) -> int:
    """Return `length` in steps: an integer as it is, a fraction as the steps that cover it (rounded up)."""
    if isinstance(length, int):
        return length
    return math.ceil(round(length * total, 6))  # rounded first: 0.1 * 30 is 3.0000000000000004


def progress(step: int, start: int, total: int) -> float:
    """Return how much of [start, total] lies behind `step`: 0 at `start`, 1 at `total` and after."""
    return min(1.0, max(0, step - start) / max(1, total - start))


def ramp(step: int, warmup: int) -> float | None:
    """Return the warm-up factor of `step`, or None once the warm-up is over."""
    return (step + 1) / warmup if step < warmup else None


def between(floor: float, shape: float) -> float:
    """Return `shape` in [0, 1] squeezed into [floor, 1]."""
    return floor + (1.0 - floor) * shape


class Constant(Model):
    """Stays at 1 after the warm-up."""

    kind: Literal["constant", "constant_with_warmup"] = "constant"
    warmup: Warmup = 0

    @field_validator("kind")
    @classmethod
    def _one_name(cls, kind: str) -> str:
        return "constant"

    def at(self, step: int, total: int) -> float:
        """Return the factor on the learning rate of update `step` (0-based) of `total`."""
        rising = ramp(step, span(self.warmup, total))
        return 1.0 if rising is None else rising


class Linear(Model):
    """Falls on a straight line from 1 to the floor (Devlin et al., 2019)."""

    kind: Literal["linear"] = "linear"
    warmup: Warmup = 0
    floor: Floor = 0.0

    def at(self, step: int, total: int) -> float:
        """Return the factor on the learning rate of update `step` (0-based) of `total`."""
        warmup = span(self.warmup, total)
        rising = ramp(step, warmup)
        return between(self.floor, 1.0 - progress(step, warmup, total)) if rising is None else rising


class Cosine(Model):
    """Falls along half a cosine from 1 to the floor (Loshchilov and Hutter, 2017, without restarts)."""

    kind: Literal["cosine", "cosine_with_min_lr"] = "cosine"
    warmup: Warmup = 0
    floor: Floor = 0.0

    @field_validator("kind")
    @classmethod
    def _one_name(cls, kind: str) -> str:
        return "cosine"

    def at(self, step: int, total: int) -> float:
        """Return the factor on the learning rate of update `step` (0-based) of `total`."""
        warmup = span(self.warmup, total)
        rising = ramp(step, warmup)
        if rising is not None:
            return rising
        return between(self.floor, 0.5 * (1.0 + math.cos(math.pi * progress(step, warmup, total))))


class InverseSqrt(Model):
    """Falls as 1/sqrt(step), never below the floor (Vaswani et al., 2017); it does not look at the end of the run."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup: Warmup = 0
    floor: Floor = 0.0
    timescale: int | None = Field(
        default=None,
        gt=0,
        description="Steps in one unit of the fall; if absent, the length of the warm-up, or 10000 without one.",
    )

    def at(self, step: int, total: int) -> float:
        """Return the factor on the learning rate of update `step` (0-based) of `total`."""
        warmup = span(self.warmup, total)
        rising = ramp(step, warmup)
        if rising is not None:
            return rising
        scale = self.timescale or warmup or 10_000
        return max(self.floor, 1.0 / math.sqrt((step - warmup + scale) / scale))


class Polynomial(Model):
    """Falls as a power of what is left of the run, from 1 to the floor."""

    kind: Literal["polynomial"] = "polynomial"
    warmup: Warmup = 0
    floor: Floor = 0.0
    power: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="Exponent; 1 is the linear schedule.")

    def at(self, step: int, total: int) -> float:
        """Return the factor on the learning rate of update `step` (0-based) of `total`."""
        warmup = span(self.warmup, total)
        rising = ramp(step, warmup)
        if rising is not None:
            return rising
        return between(self.floor, (1.0 - progress(step, warmup, total)) ** self.power)


class WSD(Model):
    """Warms up, stays at 1, falls to the floor over the last `decay` steps (Hu et al., 2024; Hägele et al., 2024)."""

    kind: Literal["wsd", "warmup_stable_decay"] = "wsd"
    warmup: Warmup = 0
    floor: Floor = 0.0
    decay: Length = Field(
        default=0.2,
        validation_alias=AliasChoices("decay", "num_decay_steps"),
        description="Length of the final fall: an integer is steps, a number below 1 is a fraction of the run.",
    )
    shape: Literal["linear", "sqrt", "cosine"] = Field(
        default="sqrt",
        validation_alias=AliasChoices("shape", "decay_type"),
        description="Form of the fall over its progress p: 1 - p, 1 - sqrt(p), or half a cosine.",
    )

    @field_validator("kind")
    @classmethod
    def _one_name(cls, kind: str) -> str:
        return "wsd"

    @field_validator("shape", mode="before")
    @classmethod
    def _field_name(cls, shape: object) -> object:
        return "sqrt" if shape == "1-sqrt" else shape

    def at(self, step: int, total: int) -> float:
        """Return the factor on the learning rate of update `step` (0-based) of `total`."""
        warmup = span(self.warmup, total)
        rising = ramp(step, warmup)
        start = max(warmup, total - span(self.decay, total))
        if rising is not None:
            return rising
        if step < start:
            return 1.0
        p = progress(step, start, total)
        falls = {"linear": 1.0 - p, "sqrt": 1.0 - math.sqrt(p), "cosine": 0.5 * (1.0 + math.cos(math.pi * p))}
        return between(self.floor, falls[self.shape])


Schedule = Constant | Linear | Cosine | InverseSqrt | Polynomial | WSD
Schedules = Annotated[Schedule, Field(discriminator="kind")]


def check(schedule: Schedule, total: int) -> None:
    """Raise ConfigError unless the schedule fits into a run of `total` updates, so that the full rate is reached."""
    warmup = span(schedule.warmup, total)
    decay = span(schedule.decay, total) if isinstance(schedule, WSD) else 0
    if warmup > total:
        raise ConfigError(
            _("the warm-up of {warmup} steps is longer than the run of {total}: the full rate is never reached").format(
                warmup=warmup, total=total
            ),
            where="schedule.warmup",
            fix=_("set schedule.warmup to at most {total}, or to a fraction such as 0.05").format(total=total),
        )
    if warmup + decay > total:
        raise ConfigError(
            _("warm-up ({warmup}) and decay ({decay}) together are longer than the run of {total} steps").format(
                warmup=warmup, decay=decay, total=total
            ),
            where="schedule.decay",
            fix=_("set schedule.decay to at most {room}, or to a fraction such as 0.2").format(room=total - warmup),
        )
