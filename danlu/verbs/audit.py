"""`danlu audit file.yaml`: what a run would really learn from; exit code 3 where that is not what it should be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danlu import config, files
from danlu.errors import DataError
from danlu.log import count, silence
from danlu.train.audit import audited
from danlu.train.intake import located, taken_in
from danlu.train.recipe import Run
from danlu.train.setup import open_data, training_rows
from danlu.verbs import needed
from danlu.words import _


def main(file: Path | None, overrides: list[str], *, to: Path | None, as_json: bool) -> int:
    """Audit the data of a recipe and print tables and findings, or JSON; return 0, or 3 where it would stop the run."""
    run = config.load(Run, needed(file), overrides)
    if as_json:
        silence()
    files.check_writable(run.out)
    every = taken_in(run.model_copy(update={"guard": run.guard.model_copy(update={"rejects": 1.0})}))      # to name all faults
    run = located(run.naming(every.named))
    data = open_data(run)
    rows, total = training_rows(run, data)
    found = audited(run, rows, data.train, data.judged, data.tokenizer, total=total)
    if to is not None:
        files.write_json(to, found)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        show(found, to or run.out / "audit.json")
    return 0 if found["passed"] else DataError.code


def show(found: Mapping[str, Any], to: Path, console: Console | None = None) -> None:
    """Print a table for each source, what the batches are, and every finding with its examples."""
    console = console or Console()
    for source in dict.fromkeys(part["source"] for part in found["parts"]):
        console.print(of_source(source, [part for part in found["parts"] if part["source"] == source]))
    console.print(of_batches(found))
    for one in found["findings"]:
        kind = "[red]✗[/]" if one["stops"] else "[yellow]![/]"
        console.print(f"{kind} {escape(': '.join(filter(None, [one['source'], one['what']])))}", soft_wrap=True)
        for example in one["examples"]:
            console.print(f"    {escape(example['where'])}  [dim]{escape(example['text'])!r}[/]", soft_wrap=True)
        console.print("    → " + escape(one["fix"]), soft_wrap=True)
    end = _("nothing here stops the run") if found["passed"] else _("the run would not start")
    console.print(f"{end} · {escape(str(to))}", soft_wrap=True)


def of_source(source: str, parts: Sequence[Mapping[str, Any]]) -> Table:
    """Return the figures of a source, a column for each split."""
    table = Table(title=escape(source), title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for part in parts:
        table.add_column(part["split"], justify="right")
    for name, values in figures(parts):
        if any(value not in ("", "0", "–") for value in values) or name in (_("rows read"), _("masked")):
            table.add_row(name, *values)
    return table


def figures(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return each figure's name, and its value in every split."""
    names = {
        "read": _("rows read"), "documents": _("documents"), "looked_at": _("looked at"), "tokens": _("tokens"),
        "empty": _("without text"), "cut": _("cut"), "split_up": _("split"), "dropped": _("dropped"),
        "tokens_lost": _("tokens lost"), "masked": _("masked"), "unended": _("answers without an end"),
        "empty_answer": _("empty answers"), "double_bos": _("bos twice"), "no_bos": _("bos missing"),
        "duplicates": _("duplicates"), "near_duplicates": _("nearly duplicates"), "contradictions": _("contradictions"),
        "unknown": _("unknown tokens"), "garbled": _("garbled texts"), "markup": _("texts with HTML"),
    }
    table = [(word, [_number(part.get(name)) for part in parts]) for name, word in names.items()]
    for reason in dict.fromkeys(reason for part in parts for reason in part["left_out"]):
        told = [_number(part["left_out"].get(reason)) for part in parts]
        table.insert(1, (_("left out: {reason}").format(reason=reason), told))
    table.append((_("learned tokens"), [f"{part['learned']:.1%}" for part in parts]))
    table.append((_("length, 0 5 25 50 75 95 99 100 %"), [" ".join(map(str, part["lengths"].values())) for part in parts]))
    balances = [part["labels"] or {} for part in parts]
    for name in dict.fromkeys(name for balance in balances for name in list(balance.get("counts", {}))[:20]):
        told = [_number(balance.get("counts", {}).get(name)) for balance in balances]
        table.append((_("class {name}").format(name=name), told))
    table.append((_("accuracy of always the commonest class"),
                  [f"{balance['majority_accuracy']:.1%}" if balance.get("majority_accuracy") else "" for balance in balances]))
    table.append((_("scores, from to mean"),
                  ["{:g} {:g} {:.3g}".format(b["scores"]["0"], b["scores"]["100"], b["mean"]) if "scores" in b else ""
                   for b in balances]))
    return table


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def of_batches(found: Mapping[str, Any]) -> Table:
    """Return what the run makes of its sources: shares, passes, padding, overlap."""
    table = Table(title=_("in the run"), title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    for one in found["mixture"]:
        table.add_row(escape(one["source"]), _("{share:.1%} of the rows, {epochs:.3g} epochs of {rows} rows").format(
            share=one["share"], epochs=one["epochs"], rows=count(one["rows"])))
    batches = found["batches"]
    table.add_row(_("padding"), f"{1 - batches['filled'] / max(1, batches['places']):.1%}")
    for one in found["overlap"]:
        table.add_row(_("{name}, in the training data").format(name=escape(one["held_out"])),
                      _("{exact} of {of} exactly, {near} nearly").format(
                          exact=one["exact"], of=one["documents"], near=one["near"]))
    return table
