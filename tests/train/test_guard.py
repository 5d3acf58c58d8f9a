"""The guard: what it lets pass, what it skips, what it stops; held to counts and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from danlu.errors import ConfigError, DataError, NumericError
from danlu.parallel import World
from danlu.parallel.place import Leaf
from danlu.schedule import Cosine, Linear
from danlu.train import guard
from danlu.train.guard import Guard


def filled(n: int = 20) -> Guard:
    watch = Guard(max_skips=3, spike=6.0)
    for i in range(n):
        assert watch.allow(2.0 + 0.2 * (-1) ** i, 1.0, step=i)
    return watch


def test_the_score_is_deviations_above_the_mean() -> None:
    assert filled().score(3.2) == pytest.approx((3.2 - 2.0) / 0.2)


def test_a_flat_history_does_not_make_a_small_rise_a_spike() -> None:
    watch = Guard(max_skips=3, spike=6.0, history=[2.0] * 50)
    assert watch.score(2.1) == pytest.approx(1.0) and watch.allow(2.1, 1.0, step=1)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf), (100.0, 1.0)])
def test_bad_numbers_are_skipped_and_the_fourth_in_a_row_stops(loss: float, norm: float) -> None:
    watch = filled()
    for _turn in range(3):
        assert not watch.allow(loss, norm, step=1) and watch.reason
    assert watch.skipped == 3
    with pytest.raises(NumericError) as caught:
        watch.allow(loss, norm, step=1)
    assert caught.value.code == 6


def test_a_good_step_in_between_starts_the_count_anew() -> None:
    watch = filled()
    for _turn in range(3):
        assert not watch.allow(math.nan, 1.0, step=1)
        assert not watch.allow(math.nan, 1.0, step=1)
        assert watch.allow(2.0, 1.0, step=1)


def test_a_spike_stays_out_of_the_history_and_the_history_travels() -> None:
    watch = filled()
    assert not watch.allow(100.0, 1.0, step=1)
    again = Guard(max_skips=3, spike=6.0, history=list(watch.history), skipped=watch.skipped)
    assert again.score(3.0) == watch.score(3.0) and max(again.history) < 3


@pytest.mark.parametrize(("loss", "norm"), [(0.0, 1.0), (2.0, 0.0)])
def test_a_loss_or_norm_of_exactly_zero_stops_at_once(loss: float, norm: float) -> None:
    with pytest.raises(NumericError):
        Guard(max_skips=3, spike=6.0).allow(loss, norm, step=1)


def test_a_batch_without_a_token_to_learn_stops() -> None:
    guard.check_counts(torch.tensor([1.0, 0.0]), step=0)
    with pytest.raises(DataError):
        guard.check_counts(torch.tensor([0.0]), step=0)


def test_overflows_of_fp16_are_counted_and_end_where_no_scale_can_help() -> None:
    watch = filled()
    for turn in range(guard.OVERFLOWS):
        assert not watch.allow(2.0, math.inf, step=turn, scaler=True)
    assert watch.skipped == guard.OVERFLOWS and watch.in_a_row == 0
    with pytest.raises(NumericError, match="no loss scale is low enough"):
        watch.allow(2.0, math.inf, step=99, scaler=True)
    watch = filled()
    assert not watch.allow(2.0, math.inf, step=1, scaler=True) and watch.allow(2.0, 1.0, step=2, scaler=True)
    assert watch.overflows == 0 and watch.skipped == 1


def test_a_rate_that_never_leaves_zero_is_refused() -> None:
    guard.check_schedule(Cosine(warmup=10), 100)

    class Dead(Linear):
        def at(self, step: int, total: int) -> float:
            return 0.0

    with pytest.raises(ConfigError):
        guard.check_schedule(Dead(), 100)


def alone_leaves(model: torch.nn.Module) -> list[Leaf]:
    return [Leaf(name, p, p, 1) for name, p in model.named_parameters()]


def test_parameters_that_do_not_move_are_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    leaves, world = alone_leaves(model), World()
    before = guard.fingerprint(leaves)
    with torch.no_grad():
        model[0].weight.add_(0.1)
        model[0].bias.add_(0.1)
        model[1].weight.mul_(-1)                          # same square, other sum
    with pytest.raises(NumericError, match=r"1\.bias"):
        guard.check_moved(before, leaves, world, step=10)
    with torch.no_grad():
        model[1].bias.add_(1e-6)
    guard.check_moved(before, leaves, world, step=10)


def test_a_resumed_step_must_repeat_the_recorded_loss_to_the_bit() -> None:
    guard.check_replay(None, 2.0, step=1)
    guard.check_replay((2.0).hex(), 2.0, step=1)
    with pytest.raises(NumericError):
        guard.check_replay((2.0).hex(), math.nextafter(2.0, 3.0), step=1)
