"""Schedules against the field's own scheduler, closed forms, and properties that hold for every setting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from transformers import get_scheduler

from danlu.errors import ConfigError
from danlu.schedule import WSD, Constant, Cosine, InverseSqrt, Linear, Polynomial, Schedule, Schedules, check, span

TOTAL, WARMUP = 50, 7


def field_factors(name: str, *, extra: dict[str, object] | None = None) -> list[float]:
    """Return the factors of transformers' scheduler for steps 0 … TOTAL."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, WARMUP, TOTAL, scheduler_specific_kwargs=extra)
    return [scheduler.lr_lambdas[0](step) for step in range(TOTAL + 1)]


@pytest.mark.parametrize(
    ("schedule", "name", "extra"),
    [
        (Constant(warmup=WARMUP), "constant_with_warmup", None),
        (Linear(warmup=WARMUP), "linear", None),
        (Cosine(warmup=WARMUP), "cosine", None),
        (Cosine(warmup=WARMUP, floor=0.1), "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        (InverseSqrt(warmup=WARMUP), "inverse_sqrt", None),
        (InverseSqrt(warmup=WARMUP, timescale=20), "inverse_sqrt", {"timescale": 20}),
        (Polynomial(warmup=WARMUP, floor=0.2, power=1.7), "polynomial", {"lr_end": 0.2, "power": 1.7}),
        (WSD(warmup=WARMUP, decay=13, floor=0.05, shape="linear"), "warmup_stable_decay", {"decay_type": "linear"}),
        (WSD(warmup=WARMUP, decay=13, floor=0.05, shape="sqrt"), "warmup_stable_decay", {"decay_type": "1-sqrt"}),
        (WSD(warmup=WARMUP, decay=13, floor=0.05, shape="cosine"), "warmup_stable_decay", {"decay_type": "cosine"}),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_equals_the_field_after_the_warm_up(schedule: Schedule, name: str, extra: dict[str, object] | None) -> None:
    if isinstance(schedule, WSD):
        extra = {"num_decay_steps": 13, "min_lr_ratio": 0.05, **(extra or {})}
    theirs = field_factors(name, extra=extra)
    ours = [schedule.at(step, TOTAL) for step in range(TOTAL + 1)]
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:], abs=1e-12)
    assert ours[:WARMUP] == pytest.approx([(s + 1) / WARMUP for s in range(WARMUP)])  # theirs begins with a step at 0


@pytest.mark.parametrize(
    ("schedule", "half"),
    [
        (Linear(floor=0.2), 0.6),
        (Cosine(floor=0.2), 0.6),
        (Polynomial(floor=0.2, power=3), 0.2 + 0.8 / 8),
        (WSD(decay=100, floor=0.2, shape="linear"), 0.6),
        (WSD(decay=100, floor=0.2, shape="sqrt"), 0.2 + 0.8 * (1 - math.sqrt(0.5))),
        (WSD(decay=0.5, floor=0.2), 1.0),
        (InverseSqrt(timescale=50), 1 / math.sqrt(2)),
        (Constant(), 1.0),
    ],
)
def test_closed_forms_at_the_start_the_middle_and_the_end(schedule: Schedule, half: float) -> None:
    assert schedule.at(0, 100) == 1.0
    assert schedule.at(50, 100) == pytest.approx(half)
    if not isinstance(schedule, Constant | InverseSqrt):
        assert schedule.at(100, 100) == pytest.approx(0.2, abs=1e-12)
        assert schedule.at(99, 100) > 0.2  # no update is spent at the floor
        assert schedule.at(1000, 100) == schedule.at(100, 100)


lengths = st.one_of(st.integers(0, 40), st.floats(0, 0.99))
schedules = st.one_of(
    st.builds(Constant, warmup=lengths),
    st.builds(Linear, warmup=lengths, floor=st.floats(0, 1)),
    st.builds(Cosine, warmup=lengths, floor=st.floats(0, 1)),
    st.builds(InverseSqrt, warmup=lengths, floor=st.floats(0, 1), timescale=st.none() | st.integers(1, 50)),
    st.builds(Polynomial, warmup=lengths, floor=st.floats(0, 1), power=st.floats(0.25, 4)),
    st.builds(
        WSD, warmup=lengths, floor=st.floats(0, 1), decay=lengths, shape=st.sampled_from(["linear", "sqrt", "cosine"])
    ),
)


@given(schedules, st.integers(1, 60))
def test_every_schedule_rises_to_one_then_never_rises_again(schedule: Schedule, total: int) -> None:
    factors = [schedule.at(step, total) for step in range(total + 5)]
    warmup = span(schedule.warmup, total)
    assert all(0.0 <= f <= 1.0 for f in factors)
    assert factors[0] > 0
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert rising[:1] == ([1 / warmup] if rising else [])


@given(schedules, st.integers(2, 40))
def test_no_jump_where_the_phases_meet(schedule: Schedule, factor: int) -> None:
    """Spread over more steps a schedule jumps less: it is a sampled continuous curve."""
    if isinstance(schedule, Polynomial | WSD):
        return  # steep powers and 1 - sqrt(p) have an unbounded slope; the next test looks at their borders
    coarse = 100
    wide = coarse * factor
    stretch = {
        "warmup": schedule.warmup * factor if isinstance(schedule.warmup, int) else schedule.warmup,
        **({"timescale": 100 * factor} if isinstance(schedule, InverseSqrt) else {}),
    }
    long = schedule.model_copy(update=stretch)
    jumps = [abs(long.at(s + 1, wide) - long.at(s, wide)) for s in range(wide)]
    warmup, left = span(long.warmup, wide), max(1, wide - span(long.warmup, wide))
    assert max(jumps) <= max(1 / max(1, warmup), math.pi / left) + 1e-9


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_the_phases_of_wsd_meet(shape: str) -> None:
    schedule = WSD(warmup=1000, decay=0.25, shape=shape, floor=0.1)  # type: ignore[arg-type]
    total = 1_000_000
    start = 750_000
    assert schedule.at(999, total) == schedule.at(1000, total) == schedule.at(start, total) == 1.0
    assert schedule.at(start + 1, total) == pytest.approx(1.0, abs=3e-3)
    assert schedule.at(total - 1, total) == pytest.approx(0.1, abs=1e-5)


def test_a_fraction_counts_whole_steps() -> None:
    assert [span(0.1, n) for n in (30, 31, 5)] == [3, 4, 1]
    assert span(7, 3) == 7
    assert Linear(warmup=0.1).at(0, 30) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("given_", "kind", "cls"),
    [
        ("linear", "linear", Linear),
        ("cosine", "cosine", Cosine),
        ("cosine_with_min_lr", "cosine", Cosine),
        ("constant", "constant", Constant),
        ("constant_with_warmup", "constant", Constant),
        ("inverse_sqrt", "inverse_sqrt", InverseSqrt),
        ("polynomial", "polynomial", Polynomial),
        ("warmup_stable_decay", "wsd", WSD),
        ("wsd", "wsd", WSD),
    ],
)
def test_the_names_of_the_field_are_accepted(given_: str, kind: str, cls: type) -> None:
    parsed = TypeAdapter(Schedules).validate_python({"kind": given_, "warmup_steps": 5})
    assert type(parsed) is cls
    assert parsed.kind == kind
    assert parsed.warmup == 5
    assert TypeAdapter(Schedules).validate_python(parsed.model_dump()) == parsed


def test_other_names_of_the_fields() -> None:
    adapter = TypeAdapter(Schedules)
    assert adapter.validate_python({"kind": "linear", "warmup_ratio": 0.1, "min_lr_ratio": 0.2}) == Linear(
        warmup=0.1, floor=0.2
    )
    assert adapter.validate_python({"kind": "wsd", "num_decay_steps": 3, "decay_type": "1-sqrt"}) == WSD(
        decay=3, shape="sqrt"
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "linear", "warmup": -1},
        {"kind": "linear", "warmup": True},
        {"kind": "linear", "warmup": 1.5},
        {"kind": "linear", "warmup": 1.0},
        {"kind": "linear", "warmup": math.nan},
        {"kind": "linear", "floor": 1.5},
        {"kind": "linear", "floor": math.nan},
        {"kind": "linear", "power": 2},
        {"kind": "linear", "warmup": 3, "warmup_steps": 4},
        {"kind": "polynomial", "power": 0},
        {"kind": "wsd", "shape": "square"},
        {"kind": "cosin"},
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Schedules).validate_python(bad)


def test_a_schedule_longer_than_the_run_is_refused_at_the_door() -> None:
    check(Linear(warmup=10), 10)
    check(WSD(warmup=2, decay=8), 10)
    with pytest.raises(ConfigError, match=r"warm-up of 11 steps"):
        check(Linear(warmup=11), 10)
    with pytest.raises(ConfigError, match=r"at most 8"):
        check(WSD(warmup=2, decay=9), 10)
