"""The choice of paths is a value: chosen once, written down, and the same again."""

from __future__ import annotations

import pytest
import torch

from danlu.errors import IncompatibleError
from danlu.nn import paths
from danlu.nn.paths import Choice, choose


def test_a_choice_survives_its_record() -> None:
    choice = Choice(attention="block", gelu="sigmoid")
    assert Choice.restore(choice.record()) == choice


@pytest.mark.parametrize("record", [{"attention": "flash9"}, {"rope": "fast"}])
def test_an_unknown_path_is_refused(record: dict[str, str]) -> None:
    with pytest.raises(IncompatibleError):
        Choice.restore(record)


def test_measured_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose("cpu", torch.float32, (1, 1, 8, 4))
    monkeypatch.setattr(paths, "_fastest", lambda *_: pytest.fail("measured again"))
    assert choose("cpu", torch.float32, (1, 1, 8, 4)) == first
    assert choose("meta", torch.float32, (1, 1, 8, 4)) == Choice()          # not a CPU: nothing to measure


def test_measuring_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    choose("cpu", torch.float32, (1, 2, 9, 4))
    assert torch.equal(torch.rand(3), wanted)


def test_long_rows_are_left_to_the_path_that_keeps_no_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_fastest", lambda candidates: list(candidates)[-1])
    monkeypatch.setattr(paths, "KEPT_BYTES", 2 * 300**2 * 4)
    assert choose("cpu", torch.float32, (1, 2, 300, 4)).attention == "block"
    assert choose("cpu", torch.float32, (2, 2, 300, 4)).attention == "block"        # keeps half of what plain keeps
    assert choose("cpu", torch.float32, (3, 2, 300, 4)).attention == "sdpa"
    assert choose("cpu", torch.float32, (1, 2, 300, 4), causal=False).attention == "plain"


def test_the_fastest_wins_and_a_tie_goes_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(paths.time, "perf_counter", lambda: clock[0])

    def taking(seconds: float) -> torch.Tensor:
        clock[0] += seconds
        return torch.zeros(1, requires_grad=True) * 1

    assert paths._fastest({"slow": lambda: taking(3), "fast": lambda: taking(1)}) == "fast"
    assert paths._fastest({"first": lambda: taking(1.0), "second": lambda: taking(0.95)}) == "first"
