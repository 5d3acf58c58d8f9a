"""The section `sparsify` of a recipe: zeros that stay, or weights that become zeros on the way, and when."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from danlu.config import Model
from danlu.errors import ConfigError
from danlu.schedule import Length, span
from danlu.words import _

Spared = Annotated[tuple[str, ...], Field(description="Layers that stay as they are, by name or pattern.")]
Also = Annotated[tuple[str, ...], Field(description="Layers beside, such as heads of tasks, which else stay as they are.")]
Begin = Annotated[Length, Field(
    validation_alias=AliasChoices("begin", "from", "begin_step"),
    description="When the first weights become 0: an integer is steps, a number below 1 a share of the run.")]
Until = Annotated[Length, Field(validation_alias=AliasChoices("until", "end_step"),
                                description="When the last ones do; the rest of the run makes up for them.")]
Often = Annotated[int, Field(ge=1, validation_alias=AliasChoices("every", "frequency"), description="Steps from one time to the "
                             "next.")]


class KeepZeros(Model):
    """Every 0 of a linear layer stays one: a pruned model learns, and is as sparse as before."""

    kind: Literal["keep"] = "keep"


class Magnitude(Model):
    """The smallest weights become 0, at first many and then fewer at a time: s(1 - (1 - t)³) (Zhu and Gupta, 2017)."""

    kind: Literal["magnitude"] = "magnitude"
    sparsity: float = Field(0.5, gt=0, lt=1, allow_inf_nan=False, validation_alias=AliasChoices("sparsity", "final_sparsity"),
                            description="Share of the weights that are 0 in the end.")
    initial: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False, validation_alias=AliasChoices("initial", "initial_sparsity"),
                           description="Share that becomes 0 at `begin`.")
    begin: Begin = 0.1
    until: Until = 0.7
    every: Often = 20
    over: Literal["layer", "model"] = Field("layer", description="Weights that are compared: those of each matrix, so that each "
                                            "becomes as sparse, or those of all matrices.")
    keep: Spared = ()
    also: Also = ()

    @model_validator(mode="after")
    def _rising(self) -> Magnitude:
        if self.initial > self.sparsity:
            raise ValueError(_("initial={a} is more than sparsity={b}").format(a=self.initial, b=self.sparsity))
        return self


class TwoFour(Model):
    """Of every four weights in a row the two smallest become 0 (2:4; Mishra et al., 2021), those first that are the smallest of
    their matrix."""

    kind: Literal["2:4"] = "2:4"
    begin: Begin = 0.1
    until: Until = 0.7
    every: Often = 20
    keep: Spared = ()
    also: Also = ()


Sparsify = KeepZeros | Magnitude | TwoFour
HALF = 0.5                                               # of the weights are 0 in the form 2:4


def share(how: Magnitude | TwoFour, step: int, total: int) -> float | None:
    """Return the share of weights that are 0 after `step` updates of `total`; None where it does not change there."""
    first, last = max(1, span(how.begin, total)), settled(how, total)
    if not (first <= step < last and (step - first) % how.every == 0) and step != last:
        return None
    begin, end = (how.initial, how.sparsity) if isinstance(how, Magnitude) else (0.0, HALF)
    behind = min(1.0, (step - first) / max(1, last - first)) if step < last else 1.0
    return end + (begin - end) * (1 - behind) ** 3


def settled(how: Sparsify, total: int) -> int:
    """Return the step from which on a model is as sparse as it will be."""
    return 0 if isinstance(how, KeepZeros) else max(1, span(how.until, total))


def check(how: Sparsify, total: int) -> None:
    """Raise ConfigError unless the times of `how` fit into a run of `total` updates."""
    if isinstance(how, KeepZeros):
        return
    first, last = span(how.begin, total), span(how.until, total)
    if first > last or last > total:
        raise ConfigError(_("sparsify begins at step {first} and is done at {last}, and the run has {total} steps").format(
            first=first, last=last, total=total), where="sparsify.until",
            fix=_("let begin be before until, and until at most the end: shares such as 0.1 and 0.7 fit every run"))
