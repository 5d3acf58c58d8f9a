"""A smaller model as a folder: as `transformers` opens it where it can be, else in our own forms; with a receipt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from danlu import files
from danlu.compress import prune
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.nn import forms, packed
from danlu.words import _

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def table_of(model: Any) -> forms.Table:
    """Return the forms that the layers of `model` are stored in, where those are not plain weights of the config's sizes."""
    return [*packed.cuts(model, weights.shapes(model.cfg)), *packed.forms(model)]


def write(out: Path, model: Any, *, receipt: Mapping[str, Any], run: Mapping[str, Any] | None = None,
          tokenizer: Path | None = None, dtype: str = "fp32", sparse: bool = False) -> int:
    """Write `model` as the new folder `out`, whole or not at all; return the bytes of its weights.

    receipt: run.json, to which the files' hashes are added.  run: the recipe that the model was trained by, so that the
    folder is evaluated as the run is.  dtype: of the weights that are not packed; sparse: zeros take a bit each.
    """
    if out.exists():
        raise ConfigError(_("the folder exists already"), where=str(out), fix=_("choose another name, or remove it"))
    out.parent.mkdir(parents=True, exist_ok=True)
    kind = DTYPES[dtype]
    table = [*table_of(model), *(prune.sparse(model, kind) if sparse else ())]
    with files.appearing(out) as temporary:
        if table:
            plain = dict.fromkeys((name for name, _p in model.named_parameters()), kind)
            written = weights.write_packed(temporary, model.cfg, model.state_dict(), table=table, tokenizer=tokenizer,
                                           dtype=plain)
        else:
            written = weights.write_folder(temporary, model.cfg, model.state_dict(), dtype=kind, tokenizer=tokenizer)
        listed = {file.relative_to(temporary).as_posix(): {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
                  for file in sorted(p for p in temporary.rglob("*") if p.is_file())}
        if run is not None:
            files.write_json(temporary / "manifest.json", {"schema": 1, "run": dict(run), "files": listed})
        files.write_json(temporary / "run.json", {**receipt, "files": listed})
    return sum(record.bytes for record in written.values())


def source(folder: Path) -> dict[str, Any]:
    """Return what a receipt says of the model that a smaller one was made from: where it is, and the hashes of its weights."""
    return {"folder": str(folder.resolve()), "sha256": {path.name: files.sha256(path) for path in shards(folder)}}


def shards(folder: Path) -> list[Path]:
    """Return the files of weights in a folder."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name != "optimizer.safetensors")


def size(folder: Path) -> int:
    """Return the bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in shards(folder))


def dtype_of(folder: Path) -> str:
    """Return the type of the weights in a folder by its name, fp32 where there are several; of packed ones that of the others."""
    try:
        packs = (folder / weights.PACKED).is_file()
        held = weights.read_packed(folder) if packs else weights.read_tensors(folder)
        kinds = {t.dtype for name, t in held.items() if t.is_floating_point() and (
            not packs or name.rpartition(".")[2] in ("weight", "bias", "up", "down", "values"))}
    except ConfigError:                                  # an adapter: merged, it is computed in float32
        return "fp32"
    return next((name for name, kind in DTYPES.items() if kinds == {kind}), "fp32")
