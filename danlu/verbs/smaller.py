"""What the verbs that make a model smaller (quantize, prune, factorize) have in common."""

from __future__ import annotations

import json
from pathlib import Path

from danlu import parallel
from danlu.config import Model
from danlu.evaluate import smaller
from danlu.evaluate.rows import How
from danlu.verbs.eval import by_role


def made(run: Path, *, out: Path, verb: str, how: Model, change: smaller.Change, data: str | None, rows: int, columns: list[str],
         encoding: str | None, format: str | None, length: int | None, head: str | None, dtype: str | None, as_json: bool,
         sparse: bool = False) -> int:
    """Write to `out` what `change` makes of the model of `run`, and print both sizes and their distance."""
    parallel.start(threads=None, device="cpu")
    reading = How(names=by_role(columns), encoding=encoding, format=format, length=length, head=head)
    found = smaller.make(run, out, verb=verb, how=how, change=change, data=data, count=rows, reading=reading, dtype=dtype,
                         sparse=sparse)
    if as_json:
        print(json.dumps(found.record(), ensure_ascii=False))
    else:
        smaller.show(found)
    return 0
