"""What the layers of a model are given when it reads calibration rows: block by block, each behind those changed before it.

R rows, one at a time and without padding; I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from danlu.errors import ConfigError
from danlu.words import _

Rows = Sequence[Mapping[str, Tensor]]                    # what the model is called with, by keyword


@dataclass
class Moments:
    """Sums over the tokens that a layer was given, in float64."""

    products: Tensor                                     # [I, I] of xᵀx
    sizes: Tensor                                        # [I] of |x|
    tokens: int = 0

    @property
    def mean(self) -> Tensor:
        """Mean |x| of each input [I], float32."""
        return (self.sizes / max(1, self.tokens)).float()

    @property
    def norms(self) -> Tensor:
        """The Euclidean norm of each input over all tokens, [I], float32."""
        return self.products.diagonal().sqrt().float()


class Stage(NamedTuple):
    """Layers that are given what does not depend on one another's changes but for those of the same block."""

    layers: dict[str, nn.Linear]
    run: Callable[[], None]                              # lets the rows through them


def needed(rows: Rows | None, method: str) -> Rows:
    """Return `rows`; ConfigError: there are none, and `method` looks at what layers are given."""
    if not rows:
        raise ConfigError(_("{method} looks at what layers are given, and there are no rows").format(method=method),
                          where="--data", fix=_("name a file of some hundred rows such as the model will be used on"))
    return rows


@torch.no_grad()
def stages(model: Any, layers: Mapping[str, nn.Linear], rows: Rows) -> Iterator[Stage]:
    """Yield the stages of `model` that have one of `layers`, in the order in which rows pass them.

    The rows go on through a block when the next stage is asked for: as it is then.
    """
    inside: set[str] = set()
    if len(model.blocks):
        first, beside = _entered(model, rows)
        for number, block in enumerate(model.blocks):
            here = {name: layer for name, layer in layers.items() if name.startswith(f"blocks.{number}.")}
            inside |= here.keys()

            def run(block: Any = block, xs: list[Tensor] = first, rest: Any = beside[number]) -> None:
                for x, (args, named) in zip(xs, rest, strict=True):
                    block(x, *args, **named)
            if here:
                yield Stage(here, run)
            first = [block(x, *args, **named) for x, (args, named) in zip(first, beside[number], strict=True)]
    if rest := {name: layer for name, layer in layers.items() if name not in inside}:
        yield Stage(rest, lambda: read(model, rows))


@torch.no_grad()
def read(model: Any, rows: Rows) -> None:
    """Let the model read all rows."""
    for row in rows:
        model(**row)


def _entered(model: Any, rows: Rows) -> tuple[list[Tensor], list[list[tuple[Any, Any]]]]:
    """Return what the first block is given of each row, and what each block is given beside."""
    first: list[Tensor] = []
    beside: list[list[tuple[Any, Any]]] = [[] for _block in model.blocks]

    def keep(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            first.extend([args[0]] if number == 0 else [])
            beside[number].append((args[1:], named))
        return hook
    hooks = [block.register_forward_pre_hook(keep(number), with_kwargs=True) for number, block in enumerate(model.blocks)]
    try:
        read(model, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return first, beside


@torch.no_grad()
def moments(layers: Mapping[str, nn.Linear], run: Callable[[], None]) -> dict[str, Moments]:
    """Return the moments of what each layer is given while `run` runs."""
    found = {name: Moments(torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64),
                           torch.zeros(layer.in_features, dtype=torch.float64)) for name, layer in layers.items()}
    seen: list[Any] = [None, None, None]                 # several layers are given the same: it is multiplied once

    def take(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x, moment = args[0], found[name]
            if seen[0] is not x:
                flat = x.detach().reshape(-1, x.shape[-1]).double()
                seen[:] = [x, flat.mT @ flat, flat.abs().sum(0)]
            moment.products += seen[1]
            moment.sizes += seen[2]
            moment.tokens += x.numel() // x.shape[-1]
        return hook
    hooks = [layer.register_forward_pre_hook(take(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def error(difference: Tensor, moment: Moments) -> float:
    """Return the sum of squares, over the tokens, of what a change of the weight [O, I] changes in what a layer says."""
    d = difference.double()
    return float(((d @ moment.products) * d).sum().clamp(min=0))
