"""`danlu inspect folder --row 17`: a prepared row as the model sees it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from danlu import chance, config
from danlu.data import view
from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer
from danlu.errors import DataError
from danlu.train.feed import Steps, stream
from danlu.train.recipe import Run
from danlu.words import _


def main(data: Path, *, row: int, split: str, recipe: Path | None, as_json: bool) -> int:
    """Show a stored document, or with a recipe the row of that number in its training order."""
    shards, tokenizer = Shards(data, split), Tokenizer.load(data / "tokenizer")
    if recipe is not None:
        shown = as_trained(shards, config.load(Run, recipe), row, tokenizer)
    elif 0 <= row < len(shards):
        shown = view.document(shards, row)
    else:
        raise DataError(_("row {row} is not among 0..{last}").format(row=row, last=len(shards) - 1), where=str(data))
    if as_json:
        print(json.dumps(view.row_view(shown, tokenizer), ensure_ascii=False))
    else:
        view.show(shown, tokenizer)
    return 0


def as_trained(shards: Shards, run: Run, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return row `number` of the training order, cut, packed and masked as the recipe's objective does."""
    task = next((source.task for source in run.data if source.folder == shards.folder), None)
    rows = stream(shards, run.objective, task=task, length=run.length, overlong=run.overlong, pack=run.pack,
                  seed=chance.torch_seed(run.seed, "order", (0,)))
    steps = Steps(rows, run.objective, tokenizer.special, per_step=1, length=run.length, seed=run.seed, position=rows.begin())
    batch, _after = next(islice(iter(steps), number, None))
    return {name: column[0].numpy() for name, column in batch.items()}
