"""`danlu merge runs/x`: an adapter and its base as one model, compared with what they were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from danlu import files, parallel
from danlu.adapt import folder as adapters
from danlu.adapt.merge import ROWS, TOKENS, merge
from danlu.data.shards import Shards, read_manifest
from danlu.evaluate.subject import open_subject
from danlu.export import gate
from danlu.export.source import speak
from danlu.log import say
from danlu.train import checkpoint
from danlu.verbs.parity import limited
from danlu.words import _


def main(run: Path, *, out: Path | None, dtype: str | None, tolerance: float | None,
         limit: Sequence[str], as_json: bool) -> int:
    """Write the merged model, by default to `run`/merged; exit 6, and write nothing, if it does not say the same here.

    Exit 4, and keep it as OUT.red, if it says or reads something else in transformers.
    """
    parallel.start(threads=None, device="cpu")
    source = checkpoint.chosen(run)
    found = merge(source, out or run / "merged", dtype=dtype, rows=rows_of(source), tolerance=tolerance)
    if (found.folder / "tokenizer.json").is_file():
        speak(open_subject(source), found.folder)
        gate.prove(source, found.folder, dtype=found.dtype, allowed=lambda usual: limited(limit, usual))
    else:
        say(_("{folder} has no tokenizer, and was compared by what it says of ids alone: no parity.json").format(
            folder=found.folder))
    if as_json:
        print(json.dumps(found.record(), ensure_ascii=False))
        return 0
    print(_("{folder}: {dtype}; at most {difference:.3g} from the adapter on its base (largest number said: {largest:.3g}), "
            "the same likeliest in {agreement:.2%} of {compared}").format(
        folder=found.folder, dtype=found.dtype, difference=found.difference, largest=found.largest, agreement=found.agreement,
        compared=found.compared))
    return 0


def rows_of(source: Path) -> Tensor | None:
    """Return rows [B, T] of what the run was trained on, if that is still there and the model has room for them."""
    manifest = next((f / "manifest.json" for f in (source, source.parent) if (f / "manifest.json").is_file()), None)
    if manifest is None:
        return None
    for told in files.read_json(manifest)["run"]["data"]:
        place = Path(told.get("prepared") or told["path"])
        if not (place / "manifest.json").is_file():
            continue
        split = "val" if read_manifest(place)["splits"].get("val") else told["split"]
        shards = Shards(place, split, verify=False)
        ids = np.concatenate([shards.document(n).ids.astype(np.int64) for n in range(min(shards.documents, 256))])
        length = min(TOKENS, adapters.read_config(source).context)
        rows = min(ROWS, len(ids) // length)
        if rows:
            return torch.from_numpy(ids[: rows * length]).view(rows, length)
    return None
