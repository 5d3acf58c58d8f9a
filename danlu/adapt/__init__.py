"""Adapters: values that edit a model in place before it is cut up, and keep the names of the base's weights.

`LoRA(rank=8).apply(model)` freezes the base and adds what is trained; `begin` fills that in; `merge` puts it into the
weights.  `folder` reads and writes them in PEFT's layout, `merge` makes a plain model, `switch` holds several.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from danlu.adapt.bottleneck import Bottleneck
from danlu.adapt.freeze import BitFit, Freeze
from danlu.adapt.ia3 import IA3
from danlu.adapt.lora import LoRA
from danlu.adapt.prompt import Prefix, Prompt, PTuning

Adapter = LoRA | IA3 | Bottleneck | Prompt | Prefix | PTuning | BitFit | Freeze


def _spelt_out(value: Any) -> Any:
    """Return "lora" as {"kind": "lora"}; where only settings are given, LoRA's are meant."""
    if isinstance(value, str):
        return {"kind": value}
    return {"kind": "lora", **value} if isinstance(value, dict) and "kind" not in value else value


Adapters = Annotated[Adapter, Field(discriminator="kind"), BeforeValidator(_spelt_out)]

__all__ = ["IA3", "Adapter", "Adapters", "BitFit", "Bottleneck", "Freeze", "LoRA", "PTuning", "Prefix", "Prompt"]
