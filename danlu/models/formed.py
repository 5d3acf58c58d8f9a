"""Models whose layers are not as their config says: two thin matrices in place of one, or fewer rows (`nn/forms`), which learn.

Such a folder has its weights under our own names.  What is in fewer bits does not learn, and is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor, nn

from danlu import tensorfile
from danlu.errors import DataError, IncompatibleError
from danlu.models import weights
from danlu.models.build import Config, build
from danlu.nn import forms, packed, placed
from danlu.words import _

TASKS = ("head.", "heads.", "pairs.", "pooler.")         # weights that another objective may have no use for


def table_of(folder: Path | None) -> forms.Table:
    """Return the forms of the layers in `folder` that learn in a form of their own; none where its weights are whole.

    Zeros that take a bit each are whole weights again.  Raises IncompatibleError for weights in fewer bits.
    """
    if folder is None or not (folder / weights.PACKED).is_file():
        return []
    table = _told(folder)
    if any(isinstance(form, forms.Rounded) or getattr(form, "rounded", None) for _name, form in table):
        raise IncompatibleError(_("weights in few bits do not learn"), where=str(folder), fix=_(
            "start from the model that was quantized; adapt=qat learns for few bits, adapt=lora with adapt.base=nf4 on them"))
    return [(name, form) for name, form in table if not isinstance(form, forms.Bits)]


def _told(folder: Path) -> forms.Table:
    try:
        return packed.table_of(weights.forms_in(weights.read_json(folder / "config.json")) or [])
    except (ValidationError, KeyError, TypeError) as error:
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=str(error).splitlines()[0]),
                        where=str(folder / "config.json")) from None


def made(cfg: Config, table: forms.Table) -> nn.Module:
    """Return the module that `cfg` describes with layers in the forms of `table`, on the meta device."""
    model: nn.Module = build(cfg)
    packed.install(model, table)
    return model


def names(cfg: Config, table: forms.Table) -> set[str]:
    """Return the names of all weights of the whole model."""
    return set(made(cfg, table).state_dict())


def fill(held: Mapping[str, Tensor], cfg: Config, folder: str | Path, *,
         fresh: Callable[[str], bool] = lambda name: False) -> list[str]:
    """Do what `weights.fill` does, also from a folder whose layers have forms of their own."""
    folder = Path(folder)
    if not (folder / weights.PACKED).is_file():
        return weights.fill(held, cfg, folder, fresh=fresh)
    state, there = _state(folder), weights.read_config(folder)
    wanted = names(cfg, table_of(folder))
    shared = tuple(f"heads.{task.name}." for task in there.tasks if task in cfg.tasks)
    state = {name: t for name, t in state.items() if not name.startswith("heads.") or name.startswith(shared)}
    if left := sorted(name for name in state if name not in wanted and not name.startswith(TASKS)):
        raise IncompatibleError(_("the weight {name} belongs to nothing in this model").format(name=left[0]), where=str(folder))
    lacking = []
    for name, tensor in held.items():
        if name not in state and fresh(name):
            lacking.append(name)
            continue
        found = tuple(state[name].shape) if name in state else None
        if found != tuple(tensor.shape):
            raise IncompatibleError(_("the weight {name} has shape {found}, and the model asks for {wanted}").format(
                name=name, found=found, wanted=tuple(tensor.shape)), where=str(folder))
        placed.fill(tensor, partial(state.__getitem__, name))
    return lacking


def _state(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder under our names; those that took a bit for each zero are whole."""
    state, sizes = weights.read_packed(folder), weights.shapes(weights.read_config(folder))
    for name, form in _told(folder):
        if isinstance(form, forms.Bits):
            parts = {part: state.pop(f"{name}.{part}") for part in ("mask", "values")}
            state[f"{name}.weight"] = form.dense(parts, sizes[f"{name}.weight"][1])
    return state


def write(folder: Path, cfg: Config, state: Mapping[str, Tensor], *, table: forms.Table, like: Mapping[str, Tensor] | None = None,
          tokenizer: Path | None = None) -> dict[str, tensorfile.Written]:
    """Write weights into an existing folder: as Hugging Face lays them out, or with a `table` under our own names."""
    if not table:
        return weights.write_folder(folder, cfg, state, like=like, tokenizer=tokenizer)
    return weights.write_packed(folder, cfg, state, table=table, tokenizer=tokenizer)
