"""Low-rank adaptation of linear layers and embeddings (Hu et al., 2021), with what has been added to it since.

r rank, I inputs, O outputs, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from danlu import chance
from danlu.adapt.layers import LoRAEmbedding, LoRALinear
from danlu.adapt.quantize import Bits, PackedLinear
from danlu.adapt.targets import chosen, freeze, matches, sites, theirs
from danlu.config import Model
from danlu.errors import ConfigError, IncompatibleError
from danlu.layout import Layout
from danlu.nn import placed
from danlu.words import _


def split(value: Any) -> Any:
    """Return "q,v" as ["q", "v"]; "all" and everything else as it is."""
    if not isinstance(value, str):
        return value
    return "all" if value in ("all", "all-linear", "all_linear") else [part.strip() for part in value.split(",") if part.strip()]


Target = Annotated[Literal["all"] | tuple[str, ...], BeforeValidator(split)]
Kept = Annotated[tuple[str, ...], Field(description="Modules of the base that are trained in full and saved beside the adapter; "
                                                    "a task's new heads always are.")]
Start = Annotated[Path | None, Field(description="A folder with such an adapter to go on from, as PEFT or Danlu writes it.")]


class LoRA(Model):
    """Beside each chosen matrix W two thin ones are learned: W + scale·B·A."""

    merges: ClassVar[bool] = True

    kind: Literal["lora"] = "lora"
    rank: int = Field(8, gt=0, description="Rows of A and columns of B.")
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False, description="scale = alpha / rank; empty: twice the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False, description="Share of A's inputs dropped in training.")
    target: Target = Field("all", description="Layers: all (linear ones of the blocks), or names: q, k, v, o, up, gate, down, "
                           "embed, those of Hugging Face (query, q_proj, c_attn), or patterns with *.")
    rslora: bool = Field(False, description="scale = alpha / sqrt(rank), which keeps large ranks stable (Kalajdzievski, 2023).")
    dora: bool = Field(False, description="Learn the length of each output's weights by itself (DoRA; Liu et al., 2024).")
    init: Literal["default", "pissa"] = Field(
        "default", description="default: B is 0. pissa: the largest singular values of W are what is moved (Meng et al., 2024).")
    rate_ratio: float = Field(1.0, gt=0, allow_inf_nan=False, description="Learning rate of B over that of A (LoRA+; "
                              "Hayou et al., 2024, advise 16).")
    ranks: dict[str, int] = Field({}, description="Other ranks, by name or pattern of the layer.")
    alphas: dict[str, float] = Field({}, description="Other alphas, by name or pattern of the layer.")
    base: Bits | None = Field(
        None, description="Keep the frozen matrices in 4 or 8 bits (QLoRA; extra: bnb).")
    modules_to_save: Kept = ()
    start: Start = None

    def of(self, *names: str) -> tuple[int, float]:
        """Return rank and scale of the layer of these names."""
        rank = next((r for pattern, r in self.ranks.items() if matches(pattern, *names)), self.rank)
        whole = self.alpha if self.alpha is not None else 2.0 * rank
        alpha = next((a for pattern, a in self.alphas.items() if matches(pattern, *names)), whole)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def apply(self, model: Any) -> None:
        """Freeze `model` (whole) and adapt its layers, in place.  Raises ConfigError for a target that does not exist."""
        freeze(model, self.modules_to_save)
        named, found = theirs(model.cfg), chosen(model, self.target, embeddings=True)
        self._check_fused(model, {name for name, _module in found})
        for name, module in found:
            rank, scale = self.of(name, named.get(name, ""))
            if isinstance(module, torch.nn.Linear):
                LoRALinear.of(module, rank=rank, scale=scale, dropout=self.dropout, dora=self.dora, pissa=self.init == "pissa")
            elif self.dora or self.init == "pissa":
                raise ConfigError(_("embeddings take neither dora nor pissa"), where="adapt.target",
                                  fix=_("leave {name} out of adapt.target").format(name=name))
            else:
                LoRAEmbedding.of(module, rank=rank, scale=scale)

    def _check_fused(self, model: Any, found: set[str]) -> None:
        for site in sites(model.cfg):
            here = found & set(site.ours)
            if len({self.of(ours, site.theirs)[1] for ours in here}) > 1:
                raise ConfigError(
                    _("{names} need the same scale: in the Hugging Face layout they are one matrix, {theirs}").format(
                        names=", ".join(sorted(o.rsplit(".", 1)[-1] for o in here)), theirs=site.theirs), where="adapt.alphas",
                    fix=_("let alpha / rank be the same for them"))
            if self.dora and here and len(here) < len(site.ours):
                raise ConfigError(
                    _("dora must take all of {names}: in the Hugging Face layout they are one matrix, {theirs}").format(
                        names=", ".join(o.rsplit(".", 1)[-1] for o in site.ours), theirs=site.theirs), where="adapt.target")

    def begin(self, model: Any, seed: int) -> None:
        """Fill in what `apply` added, by generators keyed by its names: `model` (a part of it) computes what it did before."""
        for name, module in model.named_modules():
            if isinstance(module, LoRAEmbedding):
                placed.fill(module.lora_a, partial(torch.zeros, module.lora_a.shape))
                placed.fill(module.lora_b, _normal(module.lora_b, f"{name}.lora_b", seed))
            elif isinstance(module, LoRALinear):
                self._begin(name, module, seed)

    def _begin(self, name: str, module: LoRALinear, seed: int) -> None:
        if self.init == "pissa":
            parts = _principal(placed.whole(module.dense()), module.rank, module.scale)
            for added, first, part in ((module.lora_a, module.lora_a0, parts[0]), (module.lora_b, module.lora_b0, parts[1])):
                assert first is not None
                for each in (added, first):
                    placed.fill(each, partial(torch.clone, part))
        else:
            placed.fill(module.lora_a, _uniform(module.lora_a, f"{name}.lora_a", seed))
            placed.fill(module.lora_b, partial(torch.zeros, module.lora_b.shape))
        if module.magnitude is not None:
            lengths = placed.whole(module.dense()).square().sum(1).sqrt()        # as `LoRALinear.norms` does it
            placed.fill(module.magnitude, lambda: lengths)

    def merge(self, model: Any) -> None:
        """Put the adapter into the weights of `model` (whole, plain), which is then a base model again.

        A token embedding that the head reads, too, must be two tensors by then (`folder.untied`).
        """
        for module in list(model.modules()):
            if isinstance(module, LoRALinear | LoRAEmbedding):
                module.merge()
            elif isinstance(module, PackedLinear):
                module.unpack()

    def rate(self, name: str) -> float:
        """Return the factor on the learning rate of a parameter."""
        return self.rate_ratio if name.endswith(".lora_b") else 1.0

    def check(self, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
        """Return what cannot be, and which setting to change."""
        split_up = layout.tp * layout.pp > 1 or layout.shard != "none"
        if self.base is not None and split_up:
            return [_("a quantized base cannot be cut; set layout.tp=1, layout.pp=1 and layout.shard=none, or leave adapt.base "
                      "out")]
        return []


def _principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A [r, I] and B [O, r] with scale·B·A the best approximation of `weight` of this rank."""
    if rank > min(weight.shape):
        raise IncompatibleError(_("rank {rank} is more than a matrix of {shape} has").format(
            rank=rank, shape=tuple(weight.shape)), where="adapt.rank", fix=_("lower adapt.rank"))
    full = torch.promote_types(weight.dtype, torch.float32)
    left, values, right = torch.linalg.svd(weight.detach().to("cpu", full), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _uniform(like: Tensor, name: str, seed: int) -> Callable[[], Tensor]:
    """Return what makes a matrix [r, I] as Kaiming's rule with a = sqrt(5), which is uniform within 1/sqrt(I)."""
    source, bound = torch.Generator().manual_seed(chance.torch_seed(seed, f"init/{name}")), 1 / math.sqrt(like.shape[1])
    return lambda: torch.empty(like.shape).uniform_(-bound, bound, generator=source)


def _normal(like: Tensor, name: str, seed: int) -> Callable[[], Tensor]:
    source = torch.Generator().manual_seed(chance.torch_seed(seed, f"init/{name}"))
    return lambda: torch.empty(like.shape).normal_(generator=source)
