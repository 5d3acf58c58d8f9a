"""What a run has forgotten: old evaluation data before and after it, and the averaged weights that it ends with."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from danlu import files
from danlu.adapt import QAT
from danlu.adapt import folder as adapters
from danlu.errors import ConfigError
from danlu.evaluate.loss import Loss
from danlu.figures import direction
from danlu.log import say
from danlu.models import weights
from danlu.train import checkpoint
from danlu.train.continual import Average
from danlu.train.recipe import Run
from danlu.train.shards import Crew
from danlu.words import _

if TYPE_CHECKING:
    from danlu.train.setup import Data, Work

DETAILS = ("precision", "recall", "_micro", "_weighted")                     # figures that the file has and the table has not
Measure = Callable[[Any], Loss]                          # an Old to its figures
Figures = dict[str, dict[str, float | None]]             # name of a part -> figure -> value, None where there is none


def before(run: Run, work: Work, data: Data, measure: Measure) -> None:
    """Write what the start model says of the old data; a run that goes on has done so already."""
    path = run.out / "forgetting.json"
    crew = Crew(work.engine.world.saving)
    if not data.old or crew.first(path.is_file):
        return
    figures = _figures(data, measure)
    crew.first(lambda: files.write_json(path, {"before": figures}))


def after(run: Run, work: Work, data: Data, measure: Measure) -> Figures:
    """Average the weights if that is asked for, measure the old data again, and tell; return each figure before and after."""
    world = work.engine.world
    if run.continual is not None and run.continual.average is not None:
        crew = Crew(world.saving)
        crew.first(lambda: str(average(run, run.continual.average, data.folder)))       # type: ignore[union-attr, arg-type]
        weights.fill(dict(work.model.named_parameters()), run.network, run.out / "averaged")
        work.ema = None                                  # what is measured is the average of these weights
    if not data.old:
        return {}
    figures, path = _figures(data, measure), run.out / "forgetting.json"
    if world.main:
        told = files.read_json(path)["before"]
        files.write_json(path, {"before": told, "after": figures})
        show(told, figures)
        return {name: {f"{figure}_{when}": value for when, found in (("before", told[name]), ("after", figures[name]))
                       for figure, value in found.items()} for name in figures}
    return {}


def _figures(data: Data, measure: Measure) -> Figures:
    made: Figures = {}
    for old in data.old:
        name = old.name if old.name not in made else f"{old.name} {len(made) + 1}"
        made[name] = {figure: value if math.isfinite(value) else None for figure, value in measure(old).values().items()}
    return made


def show(before: Mapping[str, Mapping[str, float | None]], after: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print each figure before and after, and by how much it became worse."""
    table = Table(title=_("What the model could do before"), title_justify="left")
    for name in (_("data"), _("figure"), _("before"), _("after"), _("forgotten")):
        table.add_column(name, justify="left" if name in (_("data"), _("figure")) else "right")
    for name, figures in after.items():
        for figure, value in figures.items():
            if any(word in figure for word in DETAILS):
                continue
            then = before[name][figure]
            if then is None or value is None:
                table.add_row(name, figure, *("–" if one is None else f"{one:.4f}" for one in (then, value)), "–")
                continue
            worse = then - value if higher(figure) else value - then
            table.add_row(name, figure, f"{then:.4f}", f"{value:.4f}", f"{worse:+.4f}")
    Console(stderr=True).print(table)


def higher(figure: str) -> bool:
    """Return whether more of a figure is better."""
    return not figure.endswith(("loss", "perplexity", "bits_per_byte")) and direction(figure)


def average(run: Run, given: Average, tokenizer: Path) -> Path:
    """Write `out/averaged`: (1 - share) · mean of the last checkpoints + share · start model; return it."""
    found = checkpoint.listing(run.out)[-given.last:]
    if len(found) < given.last:
        raise ConfigError(_("{n} checkpoints are to be averaged, and there are {m}").format(n=given.last, m=len(found)),
                          where="continual.average.last", fix=_("lower it, or save more often with every.save"))
    cfg = run.network
    parts = [(1 - given.start) / len(found)] * len(found)
    states = [weights.from_hf(cfg, weights.read_tensors(path)) for path in found]
    if given.start:
        states.append(_of_start(run, states[0]))
        parts.append(given.start)
    target = run.out / "averaged"
    shutil.rmtree(target, ignore_errors=True)
    with files.appearing(target) as temporary:
        weights.write_folder(temporary, cfg, {name: _mean(states, parts, name) for name in states[0]}, tokenizer=tokenizer)
        if isinstance(run.adapt, QAT):
            adapters.mark(temporary, run.adapt)
        manifest = files.read_json(found[-1] / "manifest.json") | {"of": found[-1].name, "averaged": {
            **{path.name: part for path, part in zip(found, parts, strict=False)}, "start": given.start}}
        listed = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(temporary.iterdir())}
        files.write_json(temporary / "manifest.json", manifest | {"files": listed})
    say(_("averaged weights: {folder}").format(folder=target))
    return target


def _of_start(run: Run, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the start model; where it has none, those that were learned."""
    assert run.start is not None, "checked with the recipe"
    held = {name: tensor.clone() for name, tensor in state.items()}
    weights.fill(held, run.network, run.start, fresh=lambda name: name.startswith(("heads.", "pooler.")))
    return held


def _mean(states: Sequence[Mapping[str, Tensor]], parts: Sequence[float], name: str) -> Tensor:
    """Return the weighted sum of one tensor of each state, computed in float64."""
    total = torch.zeros(states[0][name].shape, dtype=torch.float64)
    for state, part in zip(states, parts, strict=True):
        total.add_(state[name].double(), alpha=part)
    return total.to(states[0][name].dtype)
