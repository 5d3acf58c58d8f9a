"""`danlu config schema|check`: what a recipe may say, and whether one is right."""

from __future__ import annotations

import json
from pathlib import Path

from danlu import config
from danlu.data.prepare import Prepare
from danlu.train.recipe import Run
from danlu.verbs import needed


def main(file: Path | None, overrides: list[str], *, action: str, about: str, as_json: bool) -> int:
    """Print the JSON schema of a recipe, or a recipe as it is after the overrides, every default spelt out."""
    kind: type[config.Model] = Run if about == "train" else Prepare
    if action == "schema":
        print(json.dumps(config.schema(kind), ensure_ascii=False, indent=1))
        return 0
    value = config.load(kind, needed(file), overrides)
    print(json.dumps(config.dump(value), ensure_ascii=False) if as_json else config.to_yaml(value), end="")
    return 0
