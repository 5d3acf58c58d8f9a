"""Run to directory.  The package is also the verb: `danlu.train(run)` trains (its loop needs PyTorch, imported then)."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """A package that can be called: the verb has the room's name."""

    def __call__(self, run: Any) -> Path:
        """Train as `run` says; return the last checkpoint.  See `danlu.train.run.train`."""
        last: Path = import_module("danlu.train.run").train(run)
        return last


sys.modules[__name__].__class__ = _Verb
