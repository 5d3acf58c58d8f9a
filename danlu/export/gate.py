"""Nothing is called done that does not say the same: written, opened in its own runtime, compared, and only then there."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from danlu import files
from danlu.errors import ConfigError, IncompatibleError
from danlu.evaluate.subject import Subject, open_subject
from danlu.export import artefacts, parity, table
from danlu.export.parity import Limits, Report
from danlu.export.protocol import Artefact
from danlu.export.table import EXPORTERS, Options
from danlu.export.texts import TEXTS
from danlu.words import _


def place(word: str) -> Path:
    """Return the path in what a user calls an artefact: PATH, or KIND:PATH."""
    kind, colon, rest = word.partition(":")
    return Path(rest) if colon and kind in ("danlu", *EXPORTERS) and not Path(word).exists() else Path(word)


def opened(word: str) -> Artefact:
    """Return the artefact that a user calls PATH, in its own runtime, or KIND:PATH, in that of the kind (danlu: Danlu)."""
    path = place(word)
    kind = None if Path(word) == path else word.partition(":")[0]
    found = None if kind == "danlu" else table.opened(path, kind)
    return artefacts.opened(path) if found is None else found


def rows_of(artefact: Artefact, *, rows: int = artefacts.ROWS) -> list[list[int]]:
    """Return rows to compare on, by the first of two artefacts: its run's held-out ones where it has a run."""
    if isinstance(artefact, artefacts.Danlu):
        return rows_for(artefact.subject, rows=rows)
    found = (artefact.encode(text) for text in TEXTS)
    return [ids[: artefacts.TOKENS] for ids in found if ids][:rows]


def rows_for(subject: Subject, *, rows: int = artefacts.ROWS) -> list[list[int]]:
    """Return what a model is compared on: what its run held out, else texts that every artefact must read alike."""
    return artefacts.held_out_rows(subject, rows=rows) or artefacts.rows_of_texts(subject, TEXTS)[:rows]


def limits_for(artefact: Artefact, folder: Path, *, dtype: str | None = None) -> Limits:
    """Return what may differ, by the kind of the second artefact and the numbers that its folder holds."""
    return parity.limits_of(artefact.kind, dtype=dtype or artefacts.dtype_of(folder), bits=artefacts.bits_of(folder))


def export(subject: Subject, to: str, out: Path, *, options: Options, rows: Sequence[Sequence[int]],
           allowed: Callable[[Limits], Limits] = lambda usual: usual) -> Report:
    """Write the subject to the new folder `out` as the exporter `to` does, and return how it compares.

    allowed: what may differ, from what usually may.  A red one becomes OUT.red, with its parity.json, and IncompatibleError is
    raised; what cannot be opened leaves nothing.
    """
    if out.exists():
        raise ConfigError(_("the folder exists already"), where=str(out), fix=_("choose another name, or remove it"))
    out.parent.mkdir(parents=True, exist_ok=True)
    room = out.parent / f".tmp-{out.name}-{secrets.token_hex(4)}"
    folder = room / out.name                                 # of that name, which the report tells
    folder.mkdir(parents=True)
    try:
        EXPORTERS[to].write(subject, folder, options)
        made = EXPORTERS[to].open(folder)
        report = parity.compare(artefacts.Danlu(subject), made, rows, TEXTS,
                                limits=allowed(limits_for(made, folder, dtype=options.dtype)))
        parity.write(report, folder, source=subject.folder)
        files.fsync_dir(folder)
        there = out if report.green else out.with_name(f"{out.name}.red")
        if there != out and there.exists():
            shutil.rmtree(there)
        folder.rename(there)
        files.fsync_dir(out.parent)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    if not report.green:
        refuse(report, str(there))
    return report


def prove(source: Path, made: Path, *, dtype: str | None = None,
          allowed: Callable[[Limits], Limits] = lambda usual: usual) -> Report:
    """Compare the new folder `made` with what it was made from, and leave parity.json in it.

    A red one is renamed to MADE.red, and IncompatibleError is raised.
    """
    subject = open_subject(source)
    other = opened(str(made))
    report = parity.compare(artefacts.Danlu(subject), other, rows_for(subject), TEXTS,
                            limits=allowed(limits_for(other, made, dtype=dtype)))
    parity.write(report, made, source=subject.folder)
    if not report.green:
        there = made.with_name(f"{made.name}.red")
        shutil.rmtree(there, ignore_errors=True)
        made.rename(there)
        refuse(report, str(there))
    return report


def refuse(report: Report, where: str) -> None:
    """Raise IncompatibleError that says what is red, and the likeliest cause."""
    first = next((c for c in report.checks if c.state == "red"), None)
    what = ", ".join(report.red) or _("nothing could be compared")
    told = f" ({first.told})" if first is not None and first.told else ""
    raise IncompatibleError(_("{b} does not say what {a} says: {what}{told}").format(
        a=report.a[0], b=report.b[0], what=what, told=told), where=where, fix="; ".join(report.causes) or None)
