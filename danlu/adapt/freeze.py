"""Training a part of the model as it is: its biases, its last blocks, whatever a pattern means."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from danlu.adapt.lora import Kept
from danlu.adapt.targets import freeze, matches, theirs
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.layout import Layout
from danlu.words import _


class BitFit(Model):
    """Only biases are trained (Ben Zaken et al., 2022)."""

    merges: ClassVar[bool] = True

    kind: Literal["bitfit"] = "bitfit"
    modules_to_save: Kept = ()

    def apply(self, model: Any) -> None:
        """Freeze all of `model` (whole) but its biases.  Raises ConfigError if it has none."""
        freeze(model, self.modules_to_save)
        biases = [p for name, p in model.named_parameters() if name.startswith("blocks.") and name.endswith(".bias")]
        if not biases:
            raise ConfigError(_("this model has no biases"), where="adapt.kind", fix=_("use adapt=ia3 or adapt=lora"))
        for bias in biases:
            bias.requires_grad = True

    def begin(self, model: Any, seed: int) -> None:
        """Nothing was added."""

    def merge(self, model: Any) -> None:
        """Nothing is apart from the weights."""

    def rate(self, name: str) -> float:
        return 1.0

    def check(self, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
        return []


class Freeze(Model):
    """Only the last blocks are trained, or what patterns mean; blocks may follow one by one, from the top."""

    merges: ClassVar[bool] = True

    kind: Literal["freeze"] = "freeze"
    last: int | None = Field(None, ge=0, description="Blocks at the end that are trained, with the norm after them.")
    train: tuple[str, ...] = Field((), description="Modules or parameters that are trained, by name or pattern.")
    thaw: tuple[int, ...] = Field((), description="Steps from which one block more is trained, the next deeper one "
                                  "(gradual unfreezing; Howard & Ruder, 2018).")
    modules_to_save: Kept = ()

    @model_validator(mode="after")
    def _something(self) -> Freeze:
        if self.last is None and not self.train:
            raise ValueError(_("say what is trained: adapt.last (blocks) or adapt.train (names)"))
        if self.thaw and self.last is None:
            raise ValueError(_("thaw goes down from the last blocks; give adapt.last, too"))
        if list(self.thaw) != sorted(self.thaw) or any(step < 1 for step in self.thaw):
            raise ValueError(_("thaw must be rising steps, from 1 on"))
        return self

    def apply(self, model: Any) -> None:
        """Freeze `model` (whole) but what is to learn, sooner or later.  Raises ConfigError for what is not there."""
        freeze(model, self.modules_to_save)
        cfg, named = model.cfg, theirs(model.cfg)
        blocks = (self.last or 0) + len(self.thaw)
        if blocks > cfg.layers:
            raise ConfigError(_("{n} blocks are to be trained, and the model has {layers}").format(n=blocks, layers=cfg.layers),
                              where="adapt.last" if not self.thaw else "adapt.thaw")
        learning = {f"blocks.{i}." for i in range(cfg.layers - blocks, cfg.layers)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad |= any(name.startswith(each) for each in learning)
            parameter.requires_grad |= self.last is not None and name.startswith("norm.")
        for pattern in self.train:
            here = [p for name, p in model.named_parameters() if self._means(pattern, name, named)]
            if not here:
                raise ConfigError(_("there is no module {name!r}").format(name=pattern), where="adapt.train")
            for parameter in here:
                parameter.requires_grad = True

    def _means(self, pattern: str, name: str, named: dict[str, str]) -> bool:
        parts = name.split(".")
        inside = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return any(matches(pattern, each, named.get(each, "")) for each in inside)

    def asleep(self, name: str, step: int, layers: int) -> bool:
        """Return whether a parameter does not learn yet in step number `step` (from 0)."""
        parts = name.split(".")
        if not self.thaw or parts[0] != "blocks" or any(self._means(pattern, name, {}) for pattern in self.train):
            return False
        awake = (self.last or 0) + sum(step >= at for at in self.thaw)
        return int(parts[1]) < layers - awake

    def begin(self, model: Any, seed: int) -> None:
        """Nothing was added."""

    def merge(self, model: Any) -> None:
        """Nothing is apart from the weights."""

    def rate(self, name: str) -> float:
        return 1.0

    def check(self, layout: Layout, *, length: int, context: int | None, pack: bool) -> list[str]:
        if layout.pp > 1 and self.last is not None:
            return [_("the last blocks are in the last stage, and the others would have nothing to learn; set layout.pp=1")]
        return []
