"""Which GPU a process takes; no GPU is needed to ask."""

from __future__ import annotations

import pytest

from danlu.errors import ConfigError
from danlu.parallel.device import _own_gpu


@pytest.mark.parametrize(("place", "visible", "srun", "taken"), [(0, 1, False, 0), (3, 4, False, 3), (3, 1, True, 0)])
def test_each_process_takes_a_gpu_of_its_own(place: int, visible: int, srun: bool, taken: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(place))
    monkeypatch.setenv("SLURM_PROCID", "3") if srun else monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert _own_gpu(visible) == taken


@pytest.mark.parametrize("visible", [1, 2])
def test_more_processes_than_gpus_are_told_so(visible: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(ConfigError, match=f"4 processes on this machine, and {visible} GPUs"):
        _own_gpu(visible)
