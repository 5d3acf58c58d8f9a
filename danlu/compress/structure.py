"""Heads, hidden units and blocks taken out whole: what is left is a smaller model of the same make.

R rows, T tokens, D width, H heads, K head width, F hidden width, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.compress import rows
from danlu.errors import ConfigError, IncompatibleError
from danlu.models.build import build
from danlu.nn import forms, packed
from danlu.words import _


def smaller(model: Any, what: str, share: float, given: rows.Rows | None) -> Any:
    """Return `model` without `share` of its heads, hidden units (ffn) or blocks (layers): those that matter least.

    Of a family whose config has no word for fewer heads (BERT, RoBERTa, GPT-2) the model is changed in place.
    """
    if model.cfg.kind == "foreign":
        raise IncompatibleError(_("{family} is a model of transformers: what its parts are is not known here").format(
            family=model.cfg.family), fix="--method magnitude")
    if what == "layers":
        return without_layers(model, kept_layers(model, share, rows.needed(given, "layers")))
    norms = _norms(model, given, "attention.o" if what == "heads" else "mlp.down")
    if what == "ffn":
        return with_units(model, [_best(score, _left(score, share)) for score in (
            _unit_scores(block, norms.get(f"blocks.{i}.mlp.down")) for i, block in enumerate(model.blocks))])
    scores = [_head_scores(block, norms.get(f"blocks.{i}.attention.o")) for i, block in enumerate(model.blocks)]
    return with_heads(model, [_best(score, _left(score, share)) for score in scores])


def _left(scores: Tensor, share: float) -> int:
    count = len(scores) - round(share * len(scores))
    if not 0 < count < len(scores):
        raise ConfigError(_("of {n} parts, {share:.0%} is all or nothing").format(n=len(scores), share=share), where="--sparsity")
    return count


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest, in order."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _norms(model: Any, given: rows.Rows | None, part: str) -> dict[str, Tensor]:
    """Return the norms of what the layers called `part` are given; nothing where there are no rows."""
    layers = {f"blocks.{i}.{part}": block.get_submodule(part) for i, block in enumerate(model.blocks)}
    found = rows.moments(layers, lambda: rows.read(model, given)) if given else {}
    return {name: moment.norms for name, moment in found.items()}


def _unit_scores(block: Any, norms: Tensor | None) -> Tensor:
    """Return how much each hidden unit matters, [F]: the norm of what it adds to the stream, or without rows of its weights."""
    mlp, out = block.mlp, block.mlp.down.weight.norm(dim=0)
    if norms is not None:
        return out * norms
    gate = 1.0 if mlp.gate is None else mlp.gate.weight.norm(dim=1)
    return out * mlp.up.weight.norm(dim=1) * gate        # type: ignore[no-any-return]


def _head_scores(block: Any, norms: Tensor | None) -> Tensor:
    """Return how much each head matters, or each group of heads that share keys: [G]."""
    attention = block.attention
    groups = attention.k.out_features // attention.head_width
    out = attention.o.weight.norm(dim=0)
    if norms is None:
        v = attention.v.weight.norm(dim=1).view(groups, 1, -1)
        norms = v.expand(-1, attention.q.out_features // attention.k.out_features, -1).reshape(-1)
    return (out * norms).square().view(groups, -1).sum(1).sqrt()     # type: ignore[no-any-return]


@torch.no_grad()
def kept_layers(model: Any, share: float, given: rows.Rows) -> list[int]:
    """Return the blocks that stay: those that turn the stream the most (Men et al., 2024)."""
    turned = torch.zeros(len(model.blocks), dtype=torch.float64)

    def take(number: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            turned[number] += (1 - F.cosine_similarity(args[0].double(), out.double(), dim=-1)).sum()
        return hook
    hooks = [block.register_forward_hook(take(number)) for number, block in enumerate(model.blocks)]
    try:
        rows.read(model, given)
    finally:
        for hook in hooks:
            hook.remove()
    return _best(turned, _left(turned, share)).tolist()


def without_layers(model: Any, kept: list[int]) -> Any:
    """Return a model of the blocks `kept` alone."""
    cfg = model.cfg
    told = {"layers": len(kept)}
    if getattr(cfg, "full_layers", 0):
        told["full_layers"] = sum(number < cfg.full_layers for number in kept)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("blocks.")}
    for new, old in enumerate(kept):
        state |= {f"blocks.{new}.{name}": t for name, t in model.blocks[old].state_dict().items()}
    return _filled(model, told, state)


def with_units(model: Any, kept: list[Tensor]) -> Any:
    """Return a model of those hidden units alone; kept [F']: of each block, as many of each."""
    state = dict(model.state_dict())
    for number, units in enumerate(kept):
        for part in ("up", "gate"):
            for kind in ("weight", "bias"):
                if (name := f"blocks.{number}.mlp.{part}.{kind}") in state:
                    state[name] = state[name][units]
        state[f"blocks.{number}.mlp.down.weight"] = state[f"blocks.{number}.mlp.down.weight"][:, units]
    return _filled(model, {"hidden": len(kept[0])}, state)


def with_heads(model: Any, kept: list[Tensor]) -> Any:
    """Return a model of those heads alone, or groups of them; kept [G']: of each block, as many of each."""
    cfg, count = model.cfg, len(kept[0])
    state = dict(model.state_dict())
    for number, (block, groups) in enumerate(zip(model.blocks, kept, strict=True)):
        attention, at = block.attention, f"blocks.{number}.attention"
        for part in "qkvo":
            layer = getattr(attention, part)
            size = layer.in_features if part == "o" else layer.out_features
            places = torch.arange(size).view(attention.k.out_features // attention.head_width, -1)[groups].flatten()
            state[f"{at}.{part}.weight"] = layer.weight[:, places] if part == "o" else layer.weight[places]
            if part != "o" and layer.bias is not None:
                state[f"{at}.{part}.bias"] = layer.bias[places]
    if cfg.kind == "decoder" and cfg.family != "gpt2":
        told = {"heads": cfg.heads // cfg.kv_heads * count, "kv_heads": count, "head_width": cfg.head_width}
        return _filled(model, told, state)
    for number, block in enumerate(model.blocks):
        for part in "qkvo":
            name = f"blocks.{number}.attention.{part}"
            bias = state.get(f"{name}.bias")
            packed.cut_to(block.get_submodule(f"attention.{part}"), state[f"{name}.weight"].clone(),
                          None if bias is None else bias.clone())
    return model


def _filled(model: Any, told: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Return the model whose config differs by `told`, with these weights."""
    made: Any = build(type(model.cfg).model_validate(model.cfg.model_dump() | told))
    sizes = {name: t.shape for name, t in made.state_dict().items()}
    packed.install(made, [(name.removesuffix(".weight"), forms.Cut(rows=t.shape[0], columns=t.shape[1]))
                          for name, t in state.items() if t.shape != sizes[name] and name.endswith(".weight")])
    made.load_state_dict({name: t.detach().clone().contiguous() for name, t in state.items()}, strict=True, assign=True)
    return made.train(model.training)

