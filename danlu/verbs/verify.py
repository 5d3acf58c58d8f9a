"""`danlu verify layout file.yaml layout.dp=2 …`: a layout changes nothing.  `danlu verify runs/x`: nothing has been changed."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from danlu import config, files
from danlu.errors import ConfigError, IncompatibleError, NumericError
from danlu.log import say
from danlu.train import launch
from danlu.train.recipe import Run
from danlu.verbs import needed
from danlu.words import _

if TYPE_CHECKING:
    from danlu.export.check import Found

TOLERANCE = {"fp64": 1e-6, "fp32": 1e-3}


def main(file: Path | None, overrides: list[str], *, what: str, steps: int, precision: str, tolerance: float | None,
         against: Path | None, command: list[str], as_json: bool) -> int:
    """Train some steps in one process and under the layout; NumericError if they differ by more than `tolerance`.

    what: "layout", or the path of a run, a checkpoint or an artefact, of which every hash is computed anew.
    """
    if what != "layout":
        if file is not None or overrides:
            raise ConfigError(_("one path is verified at a time"), where=_("command line"), fix="danlu verify runs/x")
        return artefact(Path(what), as_json=as_json)
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


def artefact(path: Path, *, as_json: bool) -> int:
    """Compute every hash in the line of `path` anew and print what has changed and what that spoils; 4 if something has."""
    from danlu.export import check, lineage  # imports torch

    found = check.check(lineage.walk(path))
    changed = [one for one in found if one.state == "changed"]
    if as_json:
        print(json.dumps({"path": str(path), "whole": not changed, "found": [one.record() for one in found]}, ensure_ascii=False))
    else:
        for one in reversed(found):                      # from the raw files on
            for line in _lines(one):
                print(line)
    if changed:
        first = changed[-1]
        spoiled = [str(one.node.path) for one in found if one.state == "spoiled"]
        raise IncompatibleError(
            _("{n} changed: {what}").format(
                n=len(changed), what="; ".join(f"{one.node.path}: {one.changed[0]}" for one in changed)),
            where=str(first.node.path), fix=_("put back what it was, or make again what came after: {after}").format(
                after=", ".join(spoiled) or _("nothing")))
    left = sum(bool(one.untold) for one in found)
    say(_("{path}: every recorded hash fits").format(path=path) if not left else _(
        "{path}: every recorded hash fits; of {n} things not all could be checked").format(path=path, n=left))
    return 0


def _lines(one: Found) -> Iterator[str]:
    """Yield what is printed of one thing."""
    yield _("{state}: {what} {path}").format(state=one.state, what=one.node.what, path=one.node.path)
    yield from (f"    {line}" for line in one.changed)
    yield from (_("    came from {path}, which has changed").format(path=path) for path in one.spoiled_by)
    yield from (_("    not checked: {why}").format(why=why) for why in one.untold)
