"""`danlu quantize RUN --bits 8|4 --out DIR`: the weights of a model in fewer bits, and how far it then is from what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu import config, parallel
from danlu.compress.quantize import Quantize, quantize
from danlu.compress.rows import Rows
from danlu.evaluate import smaller
from danlu.evaluate.rows import How
from danlu.verbs.eval import by_role


def main(run: Path, *, out: Path, bits: int | None, method: str, group: int, embeddings: str, keep: list[str], also: list[str],
         data: str | None, rows: int, columns: list[str], encoding: str | None, format: str | None, length: int | None,
         head: str | None, dtype: str | None, as_json: bool) -> int:
    """Write the smaller model to `out`, and print both sizes and their distance."""
    parallel.start(threads=None, device="cpu")
    usual = 4 if method == "nf4" else 8
    how = config.validate(Quantize, {"bits": usual if bits is None else bits, "method": method, "group": group,
                                     "embeddings": embeddings, "keep": tuple(keep), "also": tuple(also)})

    def change(model: Any, given: Rows) -> Any:
        quantize(model, how, given)
        return model

    found = smaller.make(run, out, verb="quantize", how=how, change=change, data=data, count=rows, dtype=dtype, reading=How(
        names=by_role(columns), encoding=encoding, format=format, length=length, head=head))
    if as_json:
        print(json.dumps(found.record(), ensure_ascii=False))
    else:
        smaller.show(found)
    return 0
