"""`danlu export runs/x --to hf --out DIR`: written, opened again in its own runtime, compared; red ones are not done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danlu import parallel
from danlu.evaluate.subject import open_subject
from danlu.export import artefacts, gate
from danlu.export.parity import Limits
from danlu.export.table import Options
from danlu.log import say
from danlu.verbs.parity import limited, show
from danlu.words import _


def main(run: Path, *, to: str, out: Path, dtype: str | None, rows: int | None, limit: Sequence[str], as_json: bool,
         **options: str | None) -> int:
    """Write the model to the new folder `out`; exit 4, and keep it as OUT.red, if it does not say the same there."""
    parallel.start(threads=None, device="cpu")
    subject = open_subject(run)

    def allowed(usual: Limits) -> Limits:
        return limited(limit, usual)

    report = gate.export(subject, to, out, options=Options(dtype=dtype, **options), allowed=allowed,
                         rows=gate.rows_for(subject, rows=rows or artefacts.ROWS))
    show(report, as_json=as_json)
    say(_("{out}: opened again by {name}, and it says the same").format(out=out, name=report.b[0]))
    return 0
