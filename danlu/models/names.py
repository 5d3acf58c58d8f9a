"""Our names of weights and Hugging Face's, as data; `to_hf` and `from_hf` are exact inverses.

A model's file lists one Name for each tensor that its Hugging Face folder holds or may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from danlu.errors import IncompatibleError
from danlu.nn.tasks import Head
from danlu.words import _


class Name(NamedTuple):
    """One tensor of a Hugging Face folder and where it comes from."""

    theirs: str
    ours: tuple[str, ...]               # stacked along the first dimension; none: nothing of ours (zeros, or not read)
    turned: bool = False                # theirs is transposed (GPT-2's Conv1D)
    zeros: tuple[int, ...] | None = None    # their layout wants a tensor of this shape that our model lacks: all zeros
    copy: bool = False                  # may stand there as well, and must then equal `ours`; never written


def rows(names: Iterable[Name], layers: int) -> Iterator[Name]:
    """Yield the names with {i} replaced by each layer's number; those without {i} once, first."""
    listed = list(names)
    yield from (name for name in listed if "{i}" not in name.theirs)
    for i in range(layers):
        for name in listed:
            if "{i}" in name.theirs:
                here = tuple(ours.replace("{i}", str(i)) for ours in name.ours)
                yield name._replace(theirs=name.theirs.replace("{i}", str(i)), ours=here)


THEIRS = {"classify": "classifier", "tag": "classifier", "answer": "qa_outputs", "choose": "classifier"}


def task_names(tasks: Sequence[Head], dense: Mapping[str, tuple[str, str]], *, theirs: Mapping[str, str] = THEIRS,
               biased: Callable[[Head], bool] = lambda head: True) -> Iterator[Name]:
    """Yield the names of the heads of tasks; those of a single one are Hugging Face's, of several our own.

    dense: of a kind, what their dense and last layer are called where there are two.  Old heads that the model lacks
    may be there and are not read.
    """
    held = set()
    for task in tasks:
        base = theirs.get(task.kind, task.kind) if len(tasks) == 1 else f"heads.{task.name}"
        table = {f"heads.{task.name}.out": base}
        if task.kind in dense:
            first, last = dense[task.kind]
            table = {f"heads.{task.name}.dense": f"{base}.{first}", f"heads.{task.name}.out": f"{base}.{last}"}
        for ours, name in table.items() if task.size else ():
            for part in ("weight", "bias") if biased(task) else ("weight",):
                held.add(f"{name}.{part}")
                yield Name(f"{name}.{part}", (f"{ours}.{part}",))
    for name in sorted(set(theirs.values())):
        for layer in (name, f"{name}.dense", f"{name}.out_proj"):
            yield from (Name(f"{layer}.{part}", ()) for part in ("weight", "bias") if f"{layer}.{part}" not in held)


def to_hf(names: Iterable[Name], state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (their name, tensor), mostly views, one at a time.  IncompatibleError: one is missing or left over."""
    rest = set(state)
    for name in names:
        if name.copy or not (name.ours or name.zeros):
            continue
        missing = [ours for ours in name.ours if ours not in state]
        if missing:
            raise IncompatibleError(_("the model has no weight {name}").format(name=missing[0]))
        rest.difference_update(name.ours)
        if name.zeros is not None:
            like = next(iter(state.values()))
            yield name.theirs, torch.zeros(name.zeros, dtype=like.dtype)
            continue
        parts = [state[ours].detach() for ours in name.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield name.theirs, tensor.mT if name.turned else tensor
    if rest:
        raise IncompatibleError(_("the weight {name} has no Hugging Face name").format(name=min(rest)))


def from_hf(names: Iterable[Name], tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *,
            where: str | None = None, fresh: Callable[[str], bool] = lambda name: False) -> dict[str, Tensor]:
    """Return {our name: tensor}, mostly views, of exactly the names and shapes of `shapes`.

    fresh: our names that may be missing there.  Raises IncompatibleError that names a missing, left-over or misshapen
    tensor.
    """
    state: dict[str, Tensor] = {}
    rest = set(tensors)
    copies = []
    for name in names:
        if name.theirs not in tensors:
            if name.ours and not name.copy and not all(fresh(ours) for ours in name.ours):
                raise IncompatibleError(_("the weight {name} is missing").format(name=name.theirs), where=where)
            continue
        rest.discard(name.theirs)
        if name.copy:
            copies.append(name)
            continue
        tensor = tensors[name.theirs]
        if name.zeros is not None and tensor.count_nonzero():
            raise IncompatibleError(
                _("the weight {name} is not zero, but config.json says that the model has none").format(
                    name=name.theirs),
                where=where, fix=_("remove the `danlu` entry from config.json"))
        if name.ours:
            state.update(_parts(name, tensor, shapes, where))
    if rest:
        raise IncompatibleError(
            _("the weight {name} belongs to nothing in this model").format(name=min(rest)), where=where,
            fix=_("check that config.json and the weights belong together"))
    for name in copies:
        if not torch.equal(tensors[name.theirs], state[name.ours[0]]):
            raise IncompatibleError(
                _("the weight {name} differs from the one it is tied to").format(name=name.theirs), where=where,
                fix=_("set tie_word_embeddings to false in config.json"))
    lacking = {name for name in shapes.keys() - state.keys() if not fresh(name)}
    if lacking:
        raise IncompatibleError(_("no tensor gives the weight {name}").format(name=min(lacking)), where=where)
    return state


def _parts(name: Name, tensor: Tensor, shapes: Mapping[str, torch.Size],
           where: str | None) -> Iterator[tuple[str, Tensor]]:
    tensor = tensor.mT if name.turned else tensor
    wanted = [shapes[ours] for ours in name.ours]
    whole = (sum(shape[0] for shape in wanted), *wanted[0][1:])
    if tuple(tensor.shape) != whole:
        raise IncompatibleError(
            _("the weight {name} has shape {found}, and config.json asks for {wanted}").format(
                name=name.theirs, found=tuple(tensor.shape), wanted=whole[::-1] if name.turned else whole), where=where)
    yield from zip(name.ours, torch.split(tensor, [shape[0] for shape in wanted]), strict=True)
