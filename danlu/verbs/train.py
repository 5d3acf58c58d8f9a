"""`danlu train file.yaml`: a recipe to a trained, verified model."""

from __future__ import annotations

import json
from pathlib import Path

from danlu import config
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.verbs import needed


def main(file: Path | None, overrides: list[str], *, as_json: bool) -> int:
    """Train as a YAML file says; print the last checkpoint."""
    last = train(config.load(Run, needed(file), overrides))
    print(json.dumps({"checkpoint": str(last)}) if as_json else last)
    return 0
