"""`danlu parity A B`: whether any two artefacts say the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from danlu import parallel
from danlu.errors import ConfigError
from danlu.export import artefacts, gate, parity
from danlu.export.parity import Limits, Report
from danlu.export.texts import DIALOGUES, TEXTS
from danlu.log import say
from danlu.words import _


def main(a: str, b: str, *, data: Path | None, rows: int | None, limit: Sequence[str], as_json: bool) -> int:
    """Print how far `b` is from `a`; exit 4 if something is red."""
    parallel.start(threads=None, device="cpu")
    first, second = gate.opened(a), gate.opened(b)
    more, said = list[str](), list[list[dict[str, str]]]()
    allowed = limited(limit, gate.limits_for(second, gate.place(b)))
    if data is None:
        given = gate.rows_of(first, rows=rows or artefacts.ROWS)
    else:
        given, more, said = artefacts.read_rows(data, first, rows=rows)
    report = parity.compare(first, second, given, [*TEXTS, *more], limits=allowed, dialogues=[*DIALOGUES, *said])
    show(report, as_json=as_json)
    if not report.green:
        gate.refuse(report, b)
    return 0


def limited(words: Sequence[str], limits: Limits) -> Limits:
    """Return `limits` with those of the command line, NAME=VALUE; VALUE none: shown, not judged."""
    told = dict(word.partition("=")[::2] for word in words)
    try:
        given = {name: None if value == "none" else value for name, value in told.items()}
        return Limits.model_validate(limits.model_dump() | given)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()), where="--limit",
                          fix=_("use {names}").format(names=", ".join(f"{name}=…" for name in Limits.model_fields))) from None


def show(report: Report, *, as_json: bool) -> None:
    """Print the report: a table, or JSON."""
    if as_json:
        print(json.dumps(report.record(), ensure_ascii=False))
        return
    marks = {"green": "[green]✓[/]", "red": "[red]✗[/]", "shown": " ", "not compared": "–"}
    table = Table(title=_("{a} and {b}, {rows} rows, {tokens} tokens").format(
        a=report.a[0], b=report.b[0], rows=report.rows, tokens=report.tokens))
    for title in (_("check"), "", _("value"), _("limit"), _("found")):
        table.add_column(title)
    for check in report.checks:
        table.add_row(check.name, marks[check.state], *("" if x is None else f"{x:.3g}" for x in (check.value, check.limit)),
                      plain(check.told if check.state != "not compared" else _("not compared: {why}").format(why=check.told)))
    Console(file=sys.stdout).print(table)
    for cause in report.causes:
        say(_("likeliest cause: {cause}").format(cause=cause))


def plain(text: str) -> str:
    """Return text that rich prints as it is."""
    return text.replace("[", r"\[")
