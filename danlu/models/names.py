"""Our names of weights and Hugging Face's, as data; `to_hf` and `from_hf` are exact inverses.

A model's file lists one Name for each tensor that its Hugging Face folder holds or may hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from danlu.errors import IncompatibleError
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
            where: str | None = None) -> dict[str, Tensor]:
    """Return {our name: tensor}, mostly views, of exactly the names and shapes of `shapes`.

    Raises IncompatibleError that names a missing, left-over or misshapen tensor.
    """
    state: dict[str, Tensor] = {}
    rest = set(tensors)
    copies = []
    for name in names:
        if name.theirs not in tensors:
            if name.ours and not name.copy:
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
    lacking = shapes.keys() - state.keys()
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
