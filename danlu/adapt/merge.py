"""An adapter into the weights of its base: in float32, rounded once, written, opened again, and compared with what it was.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu import files
from danlu.adapt import folder as adapters
from danlu.errors import ConfigError, NumericError
from danlu.models import weights
from danlu.models.build import Config, build
from danlu.words import _

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest difference of what both say, as a share of the largest number said: rounding of the weights, many times over.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
ROWS, TOKENS = 4, 64                    # of random ids, where there are no others


@dataclass(frozen=True)
class Merged:
    """How far a merged model is from the adapter on its base."""

    folder: Path
    dtype: str
    difference: float                   # the largest, of any number said
    largest: float                      # number said
    agreement: float                    # share of tokens or rows for which both find the same likeliest
    compared: int                       # such tokens or rows

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready values."""
        return {"merged": str(self.folder), "dtype": self.dtype, "max_abs_difference": self.difference,
                "largest": self.largest, "top1_agreement": self.agreement, "compared": self.compared}


def merge(source: Path, out: Path, *, dtype: str | None = None, rows: Tensor | None = None,
          tolerance: float | None = None) -> Merged:
    """Write the model that the adapter in `source` and its base make together to the new folder `out`.

    rows [B, T]: ids to compare on; random ones otherwise.  dtype: that of the base otherwise.  tolerance: share of the
    largest number said.  Raises ConfigError for an adapter that is no part of weights, NumericError above the tolerance;
    then there is no `out`.
    """
    if not adapters.is_adapter(source):
        raise ConfigError(_("there is no adapter to merge"), where=str(source),
                          fix=_("give a run with `adapt`, its checkpoint, or a folder of PEFT's"))
    opened = adapters.describe(source)
    adapters.check_merges(opened, source)
    if out.exists():
        raise ConfigError(_("the folder exists already"), where=str(out), fix=_("choose another name, or remove it"))
    dtype = dtype or _dtype_of(opened.base)
    given = _ids(opened.cfg) if rows is None else rows
    model: Any = adapters.load(source).eval()
    before = _said(model, given)
    cfg = adapters.untied(model)
    opened.adapt.merge(model)
    tokenizer = source if (source / "tokenizer.json").is_file() else opened.base
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.appearing(out) as temporary:
        weights.write_folder(temporary, cfg, model.state_dict(), dtype=DTYPES[dtype],
                             tokenizer=tokenizer if (tokenizer / "tokenizer.json").is_file() else None)
        del model
        found = _compared(before, _said(weights.load(temporary).eval(), given), out, dtype)
        allowed = (TOLERANCE[dtype] if tolerance is None else tolerance) * found.largest
        if not found.difference <= allowed:
            raise NumericError(
                _("the merged model does not say the same: {found:.3g} apart, {allowed:.3g} allowed, {agreement:.1%} of the "
                  "likeliest are the same").format(found=found.difference, allowed=allowed, agreement=found.agreement),
                where=str(source), fix=_("merge with --dtype fp32, or keep the adapter apart"))
    return found


def _dtype_of(base: Path) -> str:
    kinds = {t.dtype for t in weights.read_tensors(base).values() if t.is_floating_point()}
    return next((name for name, kind in DTYPES.items() if kinds == {kind}), "fp32")


def _ids(cfg: Config) -> Tensor:
    room = build(cfg).cfg.context
    return torch.randint(0, cfg.vocab or 1, (ROWS, min(TOKENS, room)), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _said(model: Any, rows: Tensor) -> dict[str, Tensor]:
    """Return what the heads say of rows [B, T]; of a model without any, its last block."""
    out = {name: t.float() for name, t in model(rows).items() if isinstance(t, Tensor)}
    return {name: t for name, t in out.items() if name not in ("hidden", "pooled")} or out


def _compared(before: dict[str, Tensor], after: dict[str, Tensor], out: Path, dtype: str) -> Merged:
    assert before.keys() == after.keys(), "a merged model has the same heads"
    difference = max(float((after[name] - t).abs().max()) for name, t in before.items())
    same = torch.cat([(after[name].argmax(-1) == t.argmax(-1)).flatten() for name, t in before.items()])
    largest = max(float(t.abs().max()) for t in before.values())
    return Merged(out, dtype, difference, largest, float(same.float().mean()), len(same))
