"""`danlu prune RUN --method … --sparsity .5 --out DIR`: fewer weights, and how far the model then is from what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu import config, parallel
from danlu.compress.prune import Prune, prune
from danlu.compress.rows import Rows
from danlu.evaluate import smaller
from danlu.evaluate.rows import How
from danlu.verbs.eval import by_role


def main(run: Path, *, out: Path, method: str, sparsity: float, packed: bool, keep: list[str], also: list[str],
         data: str | None, rows: int, columns: list[str], encoding: str | None, format: str | None, length: int | None,
         head: str | None, dtype: str | None, as_json: bool) -> int:
    """Write the smaller model to `out`, and print both sizes and their distance."""
    parallel.start(threads=None, device="cpu")
    how = config.validate(Prune, {"method": method, "sparsity": sparsity, "keep": tuple(keep), "also": tuple(also)})

    def change(model: Any, given: Rows) -> Any:
        return prune(model, how, given)

    found = smaller.make(run, out, verb="prune", how=how, change=change, data=data, count=rows, dtype=dtype, sparse=packed,
                         reading=How(names=by_role(columns), encoding=encoding, format=format, length=length, head=head))
    if as_json:
        print(json.dumps(found.record(), ensure_ascii=False))
    else:
        smaller.show(found)
    return 0
