"""`danlu train file.yaml`: a recipe to a trained, verified model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from danlu import config
from danlu.train import launch
from danlu.train.recipe import Run
from danlu.verbs import needed


def main(file: Path | None, overrides: list[str], *, command: list[str], as_json: bool) -> int:
    """Train as a YAML file says, in as many processes as its layout needs; the first prints the last checkpoint.

    command: the words after `danlu` that say all this, for the processes started here.
    """
    run = config.load(Run, needed(file), overrides)
    if any(source.raw for sources in run.named.values() for source in sources):
        from danlu.train.intake import taken_in  # rows are made before any process group exists

        run = taken_in(run)
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if not started:
        launch.refuse_elsewhere(os.environ, run.layout.world)
        if run.layout.world > 1:
            return launch.supervise(command, world=run.layout.world, run_folder=run.out)
    from danlu.train.run import train  # what a supervisor never needs

    last = train(run)
    if not started or os.environ["RANK"] == "0":
        print(json.dumps({"checkpoint": str(last)}) if as_json else last)
    return 0
