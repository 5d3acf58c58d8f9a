"""`danlu verify layout file.yaml layout.dp=2 …`: shows that a layout changes nothing."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from danlu import config, files
from danlu.errors import ConfigError, NumericError
from danlu.log import say
from danlu.train import launch
from danlu.train.recipe import Run
from danlu.verbs import needed
from danlu.words import _

TOLERANCE = {"fp64": 1e-6, "fp32": 1e-3}


def main(file: Path | None, overrides: list[str], *, what: str, steps: int, precision: str, tolerance: float | None,
         against: Path | None, command: list[str], as_json: bool) -> int:
    """Train some steps in one process and under the layout; NumericError if they differ by more than `tolerance`."""
    allowed = TOLERANCE[precision] if tolerance is None else tolerance
    run = config.load(Run, needed(file), overrides)
    if run.layout.world == 1 or run.layout.local is not None:
        raise ConfigError(_("there is nothing to compare: the layout is one process, or replicas that step alone"),
                          where="layout", fix=_("add for example layout.dp=2 to the command"))
    from danlu.train import verify  # imports torch

    if against is not None and "RANK" in os.environ:
        verify.compare(run, against, steps, precision)
        return 0
    launch.refuse_elsewhere(os.environ, run.layout.world)
    with tempfile.TemporaryDirectory(prefix="danlu-verify-") as name:
        say(_("{steps} steps in one process …").format(steps=steps))
        verify.reference(run, Path(name), steps, precision)
        say(_("… and in {n} processes").format(n=run.layout.world))
        code = launch.supervise([*command, "--against", name], world=run.layout.world, run_folder=Path(name), max_restarts=0)
        if code:
            return code
        made = files.read_json(Path(name) / "result.json")["steps"]
    worst = max(max(step["loss"], step["norm"], *step["gradients"].values()) for step in made)
    if as_json:
        print(json.dumps({"layout": config.dump(run.layout), "tolerance": allowed, "worst": worst, "steps": made}))
    else:
        show(made)
    if not worst <= allowed:
        raise NumericError(_("the layout differs from one process by {worst:.2e}, and {tolerance:.0e} is allowed").format(
            worst=worst, tolerance=allowed), where="layout", fix=_("report it, with the recipe: this must not happen"))
    say(_("the layout changes nothing: the largest relative difference is {worst:.1e}").format(worst=worst))
    return 0


def show(made: list[dict[str, Any]]) -> None:
    """Print a row for each step."""
    table = Table()
    for title in (_("step"), _("loss"), _("gradient norm"), _("gradients"), _("the worst of them")):
        table.add_column(title)
    for number, step in enumerate(made):
        name = max(step["gradients"], key=step["gradients"].__getitem__)
        table.add_row(str(number + 1), f"{step['loss']:.1e}", f"{step['norm']:.1e}", f"{step['gradients'][name]:.1e}", name)
    Console(file=sys.stdout).print(table)
