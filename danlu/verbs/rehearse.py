"""`danlu rehearse file.yaml --world 1024`: every process of a layout, on one CPU and with nothing allocated."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from danlu import config, yamls
from danlu.errors import ConfigError
from danlu.layout import Layout
from danlu.log import count
from danlu.rehearse import Rehearsal, record, rehearse, settled, spans
from danlu.train.intake import located
from danlu.train.recipe import Run
from danlu.verbs import needed
from danlu.words import _

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2.0**10, "MI": 2.0**20, "GI": 2.0**30, "TI": 2.0**40}


def main(file: Path | None, overrides: list[str], *, world: int | None, vocab: int | None, memory: str | None,
         as_json: bool) -> int:
    """Print what every process would hold, send and wait for."""
    path, room = needed(file), None if memory is None else amount(memory)
    run = config.load(Run, path, [*overrides, *spread(path, overrides, world)])
    rehearsal = rehearse(settled(located(run), vocab))
    fits = None if room is None else rehearsal.largest.memory.peak <= room
    if as_json:
        print(json.dumps(record(rehearsal) | {"memory": room, "fits": fits}, ensure_ascii=False))
    else:
        show(rehearsal, room)
    return 0


def amount(text: str) -> float:
    """Return the bytes that '80GB', '80 GiB' or '8e10' means.  Raises ConfigError for anything else."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper().replace("E", "e"))
    try:
        size = float(found[1]) * UNITS[found[2]] if found else float(text)
        if not 1 <= size < 1e18:
            raise ValueError
        return size
    except (KeyError, ValueError):
        raise ConfigError(_("{text!r} is no amount of memory").format(text=text), where="--memory",
                          fix=_("write it as 80GB or 80GiB")) from None


def spread(path: Path, overrides: list[str], world: int | None) -> list[str]:
    """Return the change that makes the recipe's layout one of `world` processes.  Raises ConfigError if none does."""
    if world is None:
        return []
    data, _lines = yamls.read(path)
    given = data.get("layout") if isinstance(data, dict) else None
    words = [word.lstrip("-").removeprefix("layout.") for word in overrides if word.lstrip("-").startswith("layout.")]
    changes = config.load(Layout, None, words)
    layout = config.validate(Layout, dict(given) if isinstance(given, dict) else {})
    layout = layout.model_copy(update={name: getattr(changes, name) for name in changes.model_fields_set})
    others = layout.world // layout.dp
    if world == layout.world:
        return []
    if layout.dp == 1 and world > 0 and world % others == 0:
        return [f"layout.dp={world // others}"]
    choices = [others * n for n in sorted({max(1, world // others + d) for d in (-1, 0, 1)})]
    raise ConfigError(
        _("the layout needs {n} processes, not {world}").format(n=layout.world, world=world), where="--world",
        fix=_("give --world {n}, or change layout.dp, tp, pp or cp").format(n=layout.world) if layout.dp > 1 else
        _("tp·pp·cp={others} must divide the processes: give --world one of {choices}, or change layout.tp, pp or cp").format(
            others=others, choices=choices))


def gigabytes(size: float) -> str:
    """Return a size as people read it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.2f} kB"


def show(rehearsal: Rehearsal, room: float | None) -> None:
    """Print the tables and what follows from them."""
    run, console = rehearsal.run, Console(highlight=False)
    layout = run.layout
    axes = " × ".join(f"{name} {getattr(layout, name)}" for name in ("dp", "tp", "pp", "cp") if getattr(layout, name) > 1)
    console.print(_("{parameters} parameters on {world} processes ({axes}) · {rows} rows × {length} tokens a step · "
                    "{precision}").format(parameters=count(rehearsal.parameters), world=layout.world, axes=axes or "1",
                                          rows=run.step_rows, length=run.length, precision=run.precision), soft_wrap=True)
    console.print(_memory(rehearsal))
    console.print(_messages(rehearsal))
    largest = rehearsal.largest
    lines = [
        _("pipeline bubble: {share:.1%} of the step with equal stages, {by_work:.1%} by each stage's FLOPs").format(
            share=rehearsal.bubble, by_work=rehearsal.bubble_by_work) if layout.pp > 1 else "",
        _("largest: process {rank}, {size}; equally large: {ranks}").format(
            rank=largest.ranks[0], size=gigabytes(largest.memory.peak), ranks=spans(largest.holdings[0].ranks)),
        _("kept: activations for backward passes; rest: gathered weights and gradients, logits, messages, working memory; "
          "what the device's libraries take comes on top"),
        *(_("stage {n} puts out {what}: what it sends / what the next one expects; the run would stop there").format(
            n=stage.number, what=stage.misfit)
          for part in rehearsal.parts for stage in part.traced.stages if stage.misfit),
    ]
    if room is not None:
        short = largest.memory.peak - room
        lines.append(_("it fits into {room}, {free} are left").format(room=gigabytes(room), free=gigabytes(-short))
                     if short <= 0 else _("it does not fit into {room}: {short} are lacking; raise layout.tp or pp, "
                                          "shard=full or recompute=full").format(room=gigabytes(room), short=gigabytes(short)))
    for line in lines:
        if line:
            console.print(line, markup=False, soft_wrap=True)


def _memory(rehearsal: Rehearsal) -> Table:
    unit, name = (1e9, "GB") if rehearsal.largest.memory.peak >= 1e9 else (1e6, "MB")
    table = Table(title=_("one process of each pipeline stage at its peak, in {unit}").format(unit=name), title_justify="left",
                  box=None, pad_edge=False)
    for title in (_("processes"), _("blocks"), _("parameters"), _("weights"), _("grads"), _("optim"), _("kept"), _("rest"),
                  _("peak")):
        table.add_column(title, justify="right")
    for part in rehearsal.parts:
        memory, each = part.memory, [holding.parameters for holding in part.holdings]
        parameters = f"{max(each):,}" if max(each) == min(each) else f"{min(each):,} – {max(each):,}"
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.rest, memory.peak)
        table.add_row(spans(part.ranks), "+".join(str(stage.blocks) for stage in part.traced.stages), parameters,
                      *(f"{size / unit:.2f}" for size in sizes))
    return table


def _messages(rehearsal: Rehearsal) -> Table:
    table = Table(title=_("messages of one process in a step"), title_justify="left", box=None, pad_edge=False)
    for name in (_("processes"), _("axis"), _("kind")):
        table.add_column(name)
    for name in (_("number"), _("bytes")):
        table.add_column(name, justify="right")
    shown: list[object] = []
    for part in rehearsal.parts:
        lines = part.traffic.record()
        if lines in shown:                               # as in a stage above
            continue
        shown.append(lines)
        alike = spans([rank for p in rehearsal.parts if p.traffic.record() == lines for rank in p.ranks])
        for number, line in enumerate(lines):
            table.add_row(alike if number == 0 else "", line["axis"], line["kind"], f"{line['count']:,}",
                          gigabytes(line["bytes"]))
    return table
