"""Tensor parallelism: the matrices of a block and the vocabulary are cut over processes (Shoeybi et al., 2019).

Which way a matrix is cut stands in the model's table `TP`.  Between blocks every process has all activations, or with
`sequence` (Korthikanti et al., 2022) its strip of the tokens; then what the norms learn from is a strip, too, and their
gradients, which `partial_names` names, are summed over the group once a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from danlu.adapt.layers import CUTS, KeysAndValues
from danlu.models.decoder import TP
from danlu.nn.collective import Strip, numbered

PARTS = {"attention": ("q", "k", "v", "o"), "mlp": ("up", "gate", "down")}


def split(model: Any, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Cut `model` (on the meta device, whole or a stage) over `mesh`, in place; names of parameters stay."""
    between = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {}
    for part, names in PARTS.items():
        plan[part] = _gathered(between, 2 if part == "attention" else 1)
        for name in names:
            plan[f"{part}.{name}"] = ColwiseParallel() if TP[name] == "col" else RowwiseParallel(output_layouts=between)
    for _number, block in numbered(model.blocks):
        held = {name: style for name, style in plan.items() if "." not in name or _held(block, name)}
        apart = {name: _apart(block.get_submodule(name)) for name in held if "." in name}
        parallelize_module(block, mesh, held)
        for name, added in apart.items():
            _cut(block.get_submodule(name), added, mesh, {each: CUTS[each][TP[name.split(".")[-1]]] for each in added})
        if isinstance(block.attention.prefix, KeysAndValues):
            _cut(block.attention.prefix, _apart(block.attention.prefix), mesh, {"keys": 1, "values": 1})
    if model.embed is not None:
        added = _apart(model.embed)
        parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())})
        _cut(model.embed, added, mesh, dict.fromkeys(added))
    head: Any = getattr(model, "head", None)
    for name in ("weight", "bias") if head is not None else ():
        held_by_head = getattr(head, name, None)
        if held_by_head is not None:
            cut = distribute_tensor(held_by_head.data, mesh, [Shard(0)])
            head.register_parameter(name, nn.Parameter(cut, requires_grad=held_by_head.requires_grad))
    if sequence:
        model.strip = Strip(mesh)


def _gathered(between: Replicate | Shard, inputs: int) -> PrepareModuleInput:
    """Return the style that gives a module all tokens of its first input, gathered once for all its matrices."""
    rest = (None,) * (inputs - 1)
    return PrepareModuleInput(input_layouts=(between, *rest), desired_input_layouts=(Replicate(), *rest), use_local_output=False)


def _apart(module: nn.Module) -> dict[str, nn.Parameter]:
    """Take an adapter's parameters out of `module`, whose style knows only of weight and bias; return them by name."""
    found = {name: p for name, p in module.named_parameters(recurse=False) if name not in ("weight", "bias")}
    for name in found:
        setattr(module, name, None)
    return found


def _cut(module: nn.Module, parameters: dict[str, nn.Parameter], mesh: DeviceMesh, dims: Mapping[str, int | None]) -> None:
    """Put `parameters` back into `module`, each cut along its dimension, or whole everywhere (None)."""
    for name, p in parameters.items():
        dim = dims[name]
        cut = distribute_tensor(p.data, mesh, [Replicate() if dim is None else Shard(dim)])
        module.register_parameter(name, nn.Parameter(cut, requires_grad=p.requires_grad))


def _held(block: nn.Module, name: str) -> bool:
    part, _dot, matrix = name.partition(".")
    return getattr(getattr(block, part), matrix, None) is not None


def partial_names(model: nn.Module, *, sequence: bool) -> list[str]:
    """Return the parameters whose gradient is only a summand in each process of a tensor-parallel group."""
    inside = {"q_norm", "k_norm", *(("norm1", "norm2", "after") if sequence else ())}
    return [name for name, _parameter in model.named_parameters() if name.startswith("blocks.") and inside & set(name.split("."))]
