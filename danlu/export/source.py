"""What every exporter needs of a subject: the weights with an adapter merged into them, and the files beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from danlu import files
from danlu.adapt import folder as adapters
from danlu.data import chat
from danlu.errors import ConfigError
from danlu.evaluate.subject import Subject
from danlu.evaluate.written import template_of
from danlu.export import artefacts
from danlu.export.beside import stops
from danlu.generate import writes
from danlu.models import weights
from danlu.words import _


def merged(subject: Subject) -> Any:
    """Return the subject's model anew in float32, an adapter merged into it.

    Raises ConfigError for an adapter that is no part of the weights, and for weights in few bits: those of other runtimes are
    made from whole ones.
    """
    if artefacts.kind_of(subject) == "quantized":
        raise ConfigError(_("weights in few bits are not exported: other runtimes have their own"), where=str(subject.folder),
                          fix=_("export the model that was quantized, with --quantize"))
    model: Any = adapters.load(subject.folder)
    if adapters.is_adapter(subject.folder):
        adapt = adapters.describe(subject.folder).adapt
        if not adapt.merges:
            raise ConfigError(_("the adapter {kind} is no part of any weight and cannot be merged").format(kind=adapt.kind),
                              where=str(subject.folder), fix="--to peft")
        adapters.untied(model)
        adapt.merge(model)
    return model.eval()


def dtype_of(subject: Subject) -> str:
    """Return the arithmetic that the weights were rounded to, an adapter's base's: fp32, bf16 or fp16."""
    folder = subject.folder
    return artefacts.dtype_of(adapters.describe(folder).base if adapters.is_adapter(folder) else folder)


def leave(subject: Subject, folder: Path, model: Any, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json, generation_config.json with what ends an answer, the tokenizer's files and the chat template."""
    tokenizer = adapters.tokenizer_in(subject.folder)
    weights.write_config(folder, model.cfg, dtype=dtype, tokenizer=tokenizer)
    weights.copy_tokenizer(tokenizer, folder)
    speak(subject, folder)


def speak(subject: Subject, folder: Path) -> None:
    """Write into a folder with generation_config.json how a model that writes is talked with: its template and its ends."""
    if not writes(subject.model):
        return
    template = template_of(subject)
    if artefacts.templated(subject):
        template.save(folder)
    ends = list(stops(template, subject.tokenizer))
    told = files.read_json(folder / "generation_config.json")
    files.write_json(folder / "generation_config.json", told | {"eos_token_id": ends[0] if len(ends) == 1 else ends or None})


def template(subject: Subject) -> chat.Template | None:
    """Return the chat template that the model was trained with; None if it was with none."""
    return template_of(subject) if artefacts.templated(subject) else None
