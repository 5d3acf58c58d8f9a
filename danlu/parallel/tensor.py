"""Tensor parallelism: the matrices of a block and the vocabulary are cut over processes (Shoeybi et al., 2019).

Which way a matrix is cut stands in the model's table `TP`.  Between blocks every process has all activations, or with
`sequence` (Korthikanti et al., 2022) its strip of the tokens; then what the norms learn from is a strip, too, and their
gradients, which `partial_names` names, are summed over the group once a step.
"""

from __future__ import annotations

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
        parallelize_module(block, mesh, held)
    if model.embed is not None:
        parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())})
    head: Any = getattr(model, "head", None)
    for name in ("weight", "bias") if head is not None else ():
        held_by_head = getattr(head, name, None)
        if held_by_head is not None:
            cut = distribute_tensor(held_by_head.data, mesh, [Shard(0)])
            head.register_parameter(name, nn.Parameter(cut))
    if sequence:
        model.strip = Strip(mesh)


def _gathered(between: Replicate | Shard, inputs: int) -> PrepareModuleInput:
    """Return the style that gives a module all tokens of its first input, gathered once for all its matrices."""
    rest = (None,) * (inputs - 1)
    return PrepareModuleInput(input_layouts=(between, *rest), desired_input_layouts=(Replicate(), *rest), use_local_output=False)


def _held(block: nn.Module, name: str) -> bool:
    part, _dot, matrix = name.partition(".")
    return getattr(getattr(block, part), matrix, None) is not None


def partial_names(model: nn.Module, *, sequence: bool) -> list[str]:
    """Return the parameters whose gradient is only a summand in each process of a tensor-parallel group."""
    inside = ("q_norm", "k_norm", *(("norm1", "norm2") if sequence else ()))
    return [name for name, _parameter in model.named_parameters()
            if name.startswith("blocks.") and name.split(".")[-2] in inside]
