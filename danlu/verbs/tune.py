"""`danlu tune recipe.yaml --trials 20 --search 'optim.lr=log(1e-5,1e-3)'`: the best values of some keys, by trying."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from danlu import config
from danlu.errors import ConfigError, DataError
from danlu.log import say
from danlu.tune import space as spaces
from danlu.verbs import needed
from danlu.words import _

SHOWN = 30                                               # trials in the table


def main(file: Path | None, overrides: list[str], *, trials: int, metric: str, direction: Literal["minimize", "maximize"] | None,
         search: list[str], space: Path | None, sampler: Literal["tpe", "random", "grid"],
         pruner: Literal["median", "hyperband", "none"] | None, timeout: float | None, seed: int, out: Path,
         as_json: bool) -> int:
    """Run or go on with a study; print its trials, the best first, and how to train the best one."""
    if trials < 1:
        raise ConfigError(_("a study needs a trial at least"), where="--trials")
    path, axes = needed(file), spaces.read(search, space)
    if "out" in axes:
        raise ConfigError(_("every trial has a folder of its own"), where="--search", fix=_("leave `out` away"))
    run = spaces.check(axes, path, overrides)
    if sampler == "grid":
        spaces.grid(axes)
    from danlu.tune import study  # what the checks above never need: optuna

    chosen = pruner or ("median" if run.every.evaluate else "none")
    if chosen != "none" and not run.every.evaluate:
        raise ConfigError(_("trials can be stopped early only where they evaluate on the way"), where="--pruner",
                          fix=_("set every.evaluate, or --pruner none"))
    if not run.every.evaluate:
        say(_("every.evaluate is 0: trials run to their end before they are compared"))
    fixed = config.dump(run.model_copy(update={"out": Path()}))
    about = study.Search(recipe={key: value for key, value in fixed.items() if key not in ("out", "report", "trackers")},
                         space={key: config.dump(axis) for key, axis in axes.items()}, metric=metric, sampler=sampler,
                         pruner=chosen, seed=seed, direction=direction or study.direction(metric))
    job = study.Job(path, overrides, axes, about, out, run)
    found = study.study(job, study.Limits(trials, timeout))
    top, lines = study.best(found, about), study.rows(found)
    if top is None:
        raise DataError(_("no trial ran to its end"), where=str(out), fix=_("see train.log in the folders of the trials"))
    if as_json:
        print(json.dumps({"best": lines[top.number], "recipe": str(out / "best.yaml"), "trials": lines}, ensure_ascii=False))
        return 0
    show(lines, list(axes), metric, least=about.direction == "minimize")
    say(_("{n} trials in {time}; the best is {trial}").format(n=len(found), time=study.took(found),
                                                              trial=lines[top.number]["folder"]))
    print(f"danlu train {out / 'best.yaml'}")
    return 0


def show(lines: list[dict[str, Any]], keys: list[str], metric: str, *, least: bool) -> None:
    """Print a row for each trial: the best first, then those that were stopped or failed."""
    words = {"complete": _("complete"), "pruned": _("stopped"), "fail": _("failed"), "running": _("under way")}
    table = Table()
    for title in (_("trial"), metric, _("state"), _("step"), *keys):
        table.add_column(title)
    worst = float("inf")
    order = sorted(lines, key=lambda line: (worst if line["value"] is None else line["value"] * (1 if least else -1),
                                            line["trial"]))
    for line in order[:SHOWN]:
        value = "" if line["value"] is None else f"{line['value']:.6g}"
        table.add_row(str(line["trial"]), value, words.get(line["state"], line["state"]), str(line["step"]),
                      *(f"{tried:.4g}" if isinstance(tried, float) else str(tried)
                        for tried in (line["values"].get(key) for key in keys)))
    Console(file=sys.stdout).print(table)
