"""`danlu quantize RUN --bits 8|4 --out DIR`: the weights of a model in fewer bits, and how far it then is from what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danlu import config
from danlu.adapt import folder as adapters
from danlu.compress.quantize import Quantize, quantize
from danlu.compress.rows import Rows
from danlu.log import say
from danlu.train import checkpoint
from danlu.verbs import smaller
from danlu.words import _

USUAL = {"bits": 8, "group": 64, "embeddings": "int8"}


def main(run: Path, *, bits: int | None, method: str, group: int | None, embeddings: str | None, keep: list[str],
         also: list[str], **rest: Any) -> int:
    """Write the smaller model to `out`, and print both sizes and their distance."""
    asked = {"bits": bits, "group": group, "embeddings": embeddings, "keep": tuple(keep) or None, "also": tuple(also) or None}
    told = {name: value for name, value in asked.items() if value is not None}
    trained = adapters.rounding(checkpoint.chosen(run))
    usual = USUAL | ({"bits": 4} if method == "nf4" else {})
    if trained is not None and method == "rtn":
        usual = trained.model_dump(include=set(asked))
        if other := {name: value for name, value in told.items() if value != getattr(trained, name)}:
            say(_("warning: the model has learned to be rounded otherwise: {settings}").format(
                settings=", ".join(f"{name}={getattr(trained, name)}" for name in other)))
    how = config.validate(Quantize, usual | told | {"method": method})

    def change(model: Any, given: Rows) -> Any:
        quantize(model, how, given)
        return model

    return smaller.made(run, how=how, verb="quantize", change=change, **rest)
