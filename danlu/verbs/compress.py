"""`danlu compress RUN --target size=50MB --data val.jsonl`: what each way of making a model smaller costs here, and the best."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from danlu import files, parallel
from danlu.compress import folder as folders
from danlu.data.stream import Overlong
from danlu.errors import ConfigError
from danlu.evaluate import calibrate, smaller, tradeoff
from danlu.evaluate.rows import How
from danlu.evaluate.subject import Subject
from danlu.evaluate.tradeoff import Measured
from danlu.log import say
from danlu.verbs.eval import by_role
from danlu.words import _


def main(run: Path, *, target: list[str], data: str, calibrate: str | None, rows: int, only: list[str], out: Path | None,
         columns: list[str], encoding: str | None, format: str | None, split: str | None, overlong: Overlong | None,
         length: int | None, head: str | None, as_json: bool) -> int:
    """Print the table, and write to `out` the cheapest that meets the target and keeps the quality; exit 2 if none meets it."""
    parallel.start(threads=None, device="cpu")
    if out is not None and out.exists():
        raise ConfigError(_("the folder exists already"), where=str(out), fix=_("choose another name, or remove it"))
    wanted = tradeoff.target(target)
    how = How(names=by_role(columns), encoding=encoding, format=format, split=split, overlong=overlong, length=length, head=head)
    subject = smaller.opened(run)
    both = _rows(subject, calibrate, data, rows, how)
    home = Path.cwd() if out is None else out.parent
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".tmp-compress-") as scratch:
        found = measured(subject, both, Path(scratch), data=data, how=how, only=only)
        best, front = tradeoff.chosen(found, wanted), tradeoff.front(found)
        record = {"ways": [one.record() | {"front": one.way.name in front, "meets": wanted.met(one)} for one in found],
                  "target": wanted.model_dump(), "chosen": None if best is None else best.way.name, "calibrated": both.said}
        if out is not None and best is not None:
            files.write_json(Path(scratch) / _folder(best.way.name) / "compress.json", record)
            (Path(scratch) / _folder(best.way.name)).rename(out)
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
    else:
        show(found, front, best, wanted, title=f"{subject.folder} · {data}")
    if best is None:
        raise ConfigError(_("none of the {n} ways meets the target").format(n=len(found)), where="--target",
                          fix=_("allow more, train a smaller model, or distil into one"))
    if out is not None and not as_json:
        print(_("{way} → {folder}").format(way=best.way.name, folder=out))
    return 0


def _rows(subject: Subject, given: str | None, data: str, count: int, how: How) -> calibrate.Both:
    """Return the rows to calibrate by: the user's, the run's, else those of `data`, having said so."""
    both = calibrate.both(subject, given, count=count, how=how)
    if both.given:
        return both
    say(_("warning: the run's own rows are not there: methods are calibrated on rows of {data}, on which quality is measured, "
          "too; give others by --calibrate").format(data=data))
    return calibrate.both(subject, data, count=count, how=how)


def measured(subject: Subject, both: calibrate.Both, scratch: Path, *, data: str, how: How, only: list[str]) -> list[Measured]:
    """Return what is measured of each way, each in a folder of its own; those that make nothing smaller are left out."""
    row, found = tradeoff.typical(both.aside), list[Measured]()
    for way in tradeoff.tried(subject.model, bool(both.given), only):
        at = scratch / _folder(way.name)
        try:
            made = tradeoff.made(smaller.fresh(subject), way, both.given)
        except ConfigError as error:
            say(_("{way}: left out: {why}").format(way=way.name, why=error.what))
            continue
        smaller.write(subject, made, at, verb="compress", both=both, dtype=way.dtype,
                      options={"way": way.name, "steps": [step.model_dump(mode="json") for step in way.steps]})
        found.append(tradeoff.measure(way, at, size=folders.size(at), row=row, data=data, how=how))
    return found


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def show(found: list[Measured], front: set[str], best: Measured | None, wanted: tradeoff.Target, *, title: str) -> None:
    """Print what was measured, a way to a row: * stands on the Pareto front, → is chosen."""
    table, first = Table(title=title, title_justify="left"), found[0]
    for name in ("", _("way"), "MB", _("p50, ms"), _("a second"), first.figure, _("95 % interval"), _("meets")):
        table.add_column(name, justify="left" if name in ("", _("way")) else "right")
    for one in found:
        low, high = one.quality.low, one.quality.high
        mark = ("→" if one is best else "") + ("*" if one.way.name in front else "")
        table.add_row(mark, one.way.name, f"{one.bytes / 1e6:.2f}", f"{one.latency * 1e3:.2f}",
                      f"{one.rate:,.0f}", f"{one.quality.value:.4f}",
                      "–" if low is None or high is None else f"{low:.4f} – {high:.4f}", _("yes") if wanted.met(one) else _("no"))
    console = Console()
    console.print(table)
    console.print(_("p50: a row at a time, or a decoder's next token; a second: rows, or tokens read, of {n} at a time; "
                    "* none is better in size, time and quality alike").format(n=tradeoff.BATCH), highlight=False, markup=False)
