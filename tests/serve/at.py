"""A real server on a free port of this machine, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from danlu.serve import app, connection, served
from danlu.serve.door import LOOPBACK
from danlu.serve.keys import Keys
from danlu.serve.limits import Limits

CPU = torch.device("cpu")


@dataclass
class At:
    """Where it is, and its parts."""

    port: int
    door: Any
    server: connection.Server
    shelf: served.Shelf

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def meter(self, name: str, **labels: str) -> float:
        return float(self.door.meters.registry.get_sample_value(name, labels) or 0.0)


@contextmanager
def serving(run: Path, adapters: Mapping[str, Path] | None = None, *, keys: tuple[str, ...] = (), name: str = "tiny",
            limits: Mapping[str, Any] | None = None, length: int | None = None, **more: Any) -> Iterator[At]:
    shelf = served.open_shelf(run, adapters or {}, device=CPU, name=name, length=length)
    bounds = Limits.model_validate(limits or {})
    door = app.build(shelf, limits=bounds, keys=Keys(keys), hosts=LOOPBACK, **more)
    begun = threading.Event()
    server = connection.Server(door, connection.bind("127.0.0.1", 0), limits=bounds, door=door, began=begun.set)
    at = At(server.port, door, server, shelf)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert begun.wait(30)
        yield at
    finally:
        server.end()
        thread.join(60)
        assert not thread.is_alive()


def until(true: Any, seconds: float = 10.0) -> float:
    """Wait until something is true; return the seconds it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it never came true"
        time.sleep(0.01)
    return time.monotonic() - began
