"""`danlu prune RUN --method … --sparsity .5 --out DIR`: fewer weights, and how far the model then is from what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danlu import config
from danlu.compress.prune import Prune, prune
from danlu.compress.rows import Rows
from danlu.verbs import smaller


def main(run: Path, *, method: str, sparsity: float, packed: bool, keep: list[str], also: list[str], **rest: Any) -> int:
    """Write the smaller model to `out`, and print both sizes and their distance."""
    how = config.validate(Prune, {"method": method, "sparsity": sparsity, "keep": tuple(keep), "also": tuple(also)})

    def change(model: Any, given: Rows) -> Any:
        return prune(model, how, given)

    return smaller.made(run, how=how, verb="prune", change=change, sparse=packed, **rest)
