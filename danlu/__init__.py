"""Danlu (丹炉): train large models end to end, with runs that cannot lie.

`danlu.train(run)` trains as a recipe says and returns the last checkpoint; `danlu.load(path)` returns the model of a run,
checkpoint or Hugging Face folder.  Both import PyTorch when they are first asked for, not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "load", "train"]

_WHERE = {"Run": "danlu.train.recipe", "load": "danlu.train.checkpoint"}


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("danlu.train")              # callable: see there
    if name not in _WHERE:
        raise AttributeError(name)
    return getattr(import_module(_WHERE[name]), {"load": "load_model"}.get(name, name))
