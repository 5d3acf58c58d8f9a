"""`danlu train file.yaml`: a recipe to a trained, verified model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from danlu import config, files, yamls
from danlu.log import say
from danlu.train import launch
from danlu.train.recipe import Run
from danlu.verbs import needed
from danlu.words import _

PLANNED = "plan=auto"


def planned(file: Path, overrides: list[str]) -> list[str]:
    """Return the words that fill in what a recipe leaves open, so that the run fits on this machine; leave its plan in `out`.

    Raises ResourceError, with the cheapest changes that help, if it cannot fit.
    """
    from danlu.planner.plan import filled
    from danlu.verbs.searched import machine_of

    run = config.load(Run, file, overrides)
    data, _lines = yamls.read(file)
    given = {name for name in ("precision", "recompute", "allocator")
             if name in data or any(word.lstrip("-").startswith(f"{name}=") for word in overrides)}
    micro = isinstance(data.get("layout"), dict) and "micro" in data["layout"]
    if micro or any(word.lstrip("-").startswith("layout.micro=") for word in overrides):
        given.add("layout.micro")
    if any(source.raw for sources in run.named.values() for source in sources):
        from danlu.train.intake import taken_in

        run = taken_in(run)
    run, found = filled(run, machine_of(f"{run.layout.world}xhere", None), given=given)
    files.write_json(run.out / "plan.json", found.record())
    words = [f"precision={found.run.precision}", f"recompute={run.recompute}", f"layout.micro={run.layout.micro}",
             f"allocator={run.allocator}", *([] if run.micro_rows is None else [f"micro_rows={run.micro_rows}"])]
    say(_("plan: {words}; {phase} needs most, {need:.2f} of {room:.2f} GB").format(
        words=" ".join(words), phase=found.worst, need=found.phases[found.worst].resident / 1e9, room=found.room / 1e9))
    return words


def main(file: Path | None, overrides: list[str], *, command: list[str], as_json: bool) -> int:
    """Train as a YAML file says, in as many processes as its layout needs; the first prints the last checkpoint.

    command: the words after `danlu` that say all this, for the processes started here.
    """
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if PLANNED in overrides:
        told = planned(needed(file), [word for word in overrides if word != PLANNED])
        command = [*(word for word in command if word not in (PLANNED, f"--{PLANNED}")), *told]
        overrides = [*(word for word in overrides if word != PLANNED), *told]
    run = config.load(Run, needed(file), overrides)
    if any(source.raw for sources in run.named.values() for source in sources):
        from danlu.train.intake import taken_in  # rows are made before any process group exists

        run = taken_in(run)
    if not started:
        launch.refuse_elsewhere(os.environ, run.layout.world)
        if run.layout.world > 1:
            return launch.supervise(command, world=run.layout.world, run_folder=run.out)
    from danlu.train.run import train  # what a supervisor never needs

    last = train(run)
    if not started or os.environ["RANK"] == "0":
        print(json.dumps({"checkpoint": str(last)}) if as_json else last)
    return 0
