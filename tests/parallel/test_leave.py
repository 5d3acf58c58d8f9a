"""Processes that have done their work end, whoever else does not."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from danlu import parallel
from danlu.parallel import world


def test_who_never_parts_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    never, begun = threading.Event(), threading.Event()

    def destroy() -> None:
        begun.set()
        never.wait()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    monkeypatch.setattr(world, "PARTING", 0.1)
    began = time.monotonic()
    parallel.leave()
    assert begun.is_set() and 0.1 <= time.monotonic() - began < 10
    never.set()
