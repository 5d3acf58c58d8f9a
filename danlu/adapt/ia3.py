"""IA³: activations are multiplied by learned vectors (Liu et al., 2022).  A few numbers a layer."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from danlu.adapt.layers import ScaledLinear
from danlu.adapt.lora import Kept, Start, Target
from danlu.adapt.targets import chosen, freeze, matches, sites, theirs
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.layout import Layout
from danlu.nn import placed
from danlu.words import _


class IA3(Model):
    """Keys, values and the inner activations of the feed-forward part are each scaled by a learned vector."""

    merges: ClassVar[bool] = True

    kind: Literal["ia3"] = "ia3"
    target: Target = Field(("k", "v", "down"), description="Layers that are scaled.")
    feedforward: tuple[str, ...] = Field(("down",), description="Those of them whose inputs are scaled; of the others, outputs.")
    modules_to_save: Kept = ()
    start: Start = None

    def apply(self, model: Any) -> None:
        """Freeze `model` (whole) and let its layers scale, in place.  Raises ConfigError for a target that cannot be."""
        freeze(model, self.modules_to_save)
        named, found = theirs(model.cfg), chosen(model, self.target, embeddings=False)
        inputs = {name for name, _module in found
                  if any(matches(pattern, name, named.get(name, "")) for pattern in self.feedforward)}
        for site in sites(model.cfg):
            if len(site.ours) > 1 and (here := inputs & set(site.ours)):
                raise ConfigError(
                    _("the inputs of {names} cannot be scaled: in the Hugging Face layout they are a part of one matrix, {theirs}"
                      ).format(names=", ".join(sorted(o.rsplit(".", 1)[-1] for o in here)), theirs=site.theirs),
                    where="adapt.feedforward", fix=_("leave them out of adapt.feedforward: their outputs are scaled then"))
        for name, module in found:
            ScaledLinear.of(module, inputs=name in inputs)

    def begin(self, model: Any, seed: int) -> None:
        """Fill in what `apply` added: ones."""
        for module in model.modules():
            if isinstance(module, ScaledLinear):
                for scale in (module.scale_in, module.scale_out):
                    if scale is not None:
                        placed.fill(scale, partial(torch.ones, scale.shape))

    def merge(self, model: Any) -> None:
        """Put the scales into the weights."""
        for module in list(model.modules()):
            if isinstance(module, ScaledLinear):
                module.merge()

    def rate(self, name: str) -> float:
        return 1.0

    def check(self, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
        return []
