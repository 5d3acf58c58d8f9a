"""An adapter's folder, as `peft` opens it: what a run's checkpoint holds of it, and no more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from danlu import files
from danlu.adapt import folder as adapters
from danlu.adapt.peft import TYPES
from danlu.errors import ConfigError
from danlu.evaluate.subject import Subject
from danlu.evaluate.written import template_of
from danlu.export import artefacts
from danlu.export.beside import stops
from danlu.export.card import card
from danlu.export.protocol import Artefact
from danlu.export.theirs import GENERATION, installed, with_adapter
from danlu.generate import writes
from danlu.log import say
from danlu.models import weights
from danlu.words import _

if TYPE_CHECKING:
    from danlu.export.table import Options

KEPT = (adapters.CONFIG, adapters.TENSORS, adapters.OURS, adapters.REST)


def write(subject: Subject, folder: Path, options: Options) -> None:
    """Write the adapter into an existing, empty `folder`; the base stays where it is, named by path and hash."""
    if not adapters.is_adapter(subject.folder):
        raise ConfigError(_("there is no adapter: the run has trained the whole model"), where=str(subject.folder), fix="--to hf")
    if options.dtype is not None or options.quantize is not None:
        raise ConfigError(_("an adapter is written as it was trained"), where="--dtype, --quantize", fix="--to hf")
    for name in KEPT:
        if (subject.folder / name).is_file():
            shutil.copyfile(subject.folder / name, folder / name)
            files.flush(folder / name)
    weights.copy_tokenizer(adapters.tokenizer_in(subject.folder), folder)
    if writes(subject.model):
        files.write_json(folder / GENERATION, {"eos_token_id": list(stops(template_of(subject), subject.tokenizer)) or None})
        if artefacts.templated(subject):
            template_of(subject).save(folder)
    files.write_text(folder / "README.md", card(subject, library="peft"))


def holds(path: Path) -> bool:
    """Return whether `path` is an adapter's folder and no run's checkpoint."""
    return adapters.is_adapter(path) and not (path / "manifest.json").is_file()


def open(path: Path) -> Artefact:
    """Return the adapter on its base in peft; in Danlu, saying so, where that is not installed or has no such kind."""
    if not installed("transformers", "peft"):
        say(_("peft is not installed: {folder} is opened by Danlu alone").format(folder=path.name))
        return artefacts.opened(path)
    if adapters.describe(path).adapt.kind not in TYPES:
        say(_("peft has no adapter of this kind: {folder} is opened by Danlu alone").format(folder=path.name))
        return artefacts.opened(path)
    return with_adapter(path)
