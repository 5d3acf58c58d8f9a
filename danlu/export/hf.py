"""A Hugging Face folder: weights, tokenizer, chat template, what stops it, a card; an adapter merged into its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from danlu import files
from danlu.adapt import folder as adapters
from danlu.adapt.merge import DTYPES
from danlu.errors import ConfigError
from danlu.evaluate.subject import Subject
from danlu.export import artefacts, source
from danlu.export.card import card
from danlu.export.protocol import Artefact
from danlu.export.theirs import Transformers, embeds, installed
from danlu.log import say
from danlu.models import weights
from danlu.words import _

if TYPE_CHECKING:
    from danlu.export.table import Options


def write(subject: Subject, folder: Path, options: Options) -> None:
    """Write the model into an existing, empty `folder`, an adapter merged in float32 and rounded once."""
    if options.quantize is not None or artefacts.kind_of(subject) == "quantized":
        raise ConfigError(_("a Hugging Face folder in few bits is written by another verb"), where="--quantize",
                          fix=f"danlu quantize {subject.folder}")
    model = source.merged(subject)
    weights.write_folder(folder, model.cfg, model.state_dict(), dtype=DTYPES[options.dtype or source.dtype_of(subject)],
                         tokenizer=adapters.tokenizer_in(subject.folder))
    source.speak(subject, folder)
    files.write_text(folder / "README.md", card(subject, library="transformers"))


def holds(path: Path) -> bool:
    """Return whether `path` is a plain Hugging Face folder: a model, none of a run's, with nothing that only Danlu reads."""
    file = path / "config.json"
    if not file.is_file() or (path / "manifest.json").is_file() or (path.parent / "manifest.json").is_file():
        return False
    return "quantization_config" not in weights.read_json(file) and not ours_alone(path)


def ours_alone(path: Path) -> bool:
    """Return whether transformers has no class for the heads of the model: several of them, or a kind it does not know."""
    told = weights.read_json(path / "config.json")
    return bool({"tasks", "outputs", "lm"} & told.get("danlu", {}).keys()) and not embeds(told)


def open(path: Path) -> Artefact:
    """Return the folder in transformers; in Danlu, saying so, where that is not installed."""
    if not installed("transformers"):
        say(_("transformers is not installed: {folder} is opened by Danlu alone").format(folder=path.name))
        return artefacts.opened(path)
    if ours_alone(path):
        say(_("transformers has no class for the heads of this model: {folder} is opened by Danlu alone").format(
            folder=path.name))
        return artefacts.opened(path)
    return Transformers(path)
