"""`danlu factorize RUN --rank auto --out DIR`: thinner matrices, and how far the model then is from what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danlu import config
from danlu.compress.factorize import Factorize, factorize
from danlu.compress.rows import Rows
from danlu.verbs import smaller


def main(run: Path, *, rank: str, error: float, keep: list[str], also: list[str], **rest: Any) -> int:
    """Write the smaller model to `out`, and print both sizes and their distance."""
    how = config.validate(Factorize, {"rank": int(rank) if rank.isdecimal() else rank, "error": error, "keep": tuple(keep),
                                      "also": tuple(also)})

    def change(model: Any, given: Rows) -> Any:
        factorize(model, how, given)
        return model

    return smaller.made(run, how=how, verb="factorize", change=change, **rest)
