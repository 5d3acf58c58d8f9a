"""Adapters: values that edit a model in place before it is cut up, and keep the names of the base's weights.

`LoRA(rank=8).apply(model)` freezes the base and adds what is trained; `begin` fills that in; `merge` puts it into the
weights.  `folder` reads and writes them in PEFT's layout, `merge` makes a plain model, `switch` holds several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from danlu import files
from danlu.adapt.bottleneck import Bottleneck
from danlu.adapt.freeze import BitFit, Freeze
from danlu.adapt.ia3 import IA3
from danlu.adapt.lora import LoRA
from danlu.adapt.prompt import Prefix, Prompt, PTuning
from danlu.adapt.qat import QAT

KINDS = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt", "P_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
Adapter = LoRA | IA3 | Bottleneck | Prompt | Prefix | PTuning | BitFit | Freeze | QAT


def _spelt_out(value: Any) -> Any:
    """Return "lora" as {"kind": "lora"}; without a kind, what the folder `start` holds is meant, or else LoRA."""
    if isinstance(value, str):
        return {"kind": value}
    if not isinstance(value, dict) or "kind" in value:
        return value
    return {"kind": _kind_in(Path(str(value["start"]))) if value.get("start") else "lora", **value}


def _kind_in(folder: Path) -> str:
    """Return the kind of the adapter in a folder; whether it can be read at all is asked when it is opened."""
    try:
        if (folder / "danlu_adapter.json").is_file():
            return str(files.read_json(folder / "danlu_adapter.json")["adapt"]["kind"])
        return KINDS[files.read_json(folder / "adapter_config.json")["peft_type"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "lora"


Adapters = Annotated[Adapter, Field(discriminator="kind"), BeforeValidator(_spelt_out)]

__all__ = ["IA3", "QAT", "Adapter", "Adapters", "BitFit", "Bottleneck", "Freeze", "LoRA", "PTuning", "Prefix", "Prompt"]
