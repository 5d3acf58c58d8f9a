"""What a model can be exported to: how each is written, told from others, and opened again in its own runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from danlu.config import Model
from danlu.evaluate.subject import Subject
from danlu.export import gguf, gguf_read, hf, onnx, peft, torch_export
from danlu.export.protocol import Artefact


class Options(Model):
    """What the command line says of the way an artefact is written."""

    dtype: str | None = None                             # fp32, bf16, fp16; None: as the weights are
    quantize: str | None = None                          # None: not at all


class Exporter(NamedTuple):
    """One kind of artefact.  Nothing heavy is imported before one of the functions is called."""

    write: Callable[[Subject, Path, Options], None]      # into an existing, empty folder
    holds: Callable[[Path], bool]                        # whether a path is such an artefact
    open: Callable[[Path], Artefact]                     # in the runtime it was made for; ConfigError names the missing extra


EXPORTERS: dict[str, Exporter] = {                       # the first that `holds` a path opens it
    "onnx": Exporter(onnx.export, onnx.holds, onnx.Onnx),
    "gguf": Exporter(gguf.export, gguf.holds, gguf_read.opened),
    "torch-export": Exporter(torch_export.export, torch_export.holds, torch_export.Exported),
    "peft": Exporter(peft.write, peft.holds, peft.open),
    "hf": Exporter(hf.write, hf.holds, hf.open),
}


def opened(path: Path, kind: str | None = None) -> Artefact | None:
    """Return the artefact at `path` in its own runtime, of that kind if one is said; None: no exporter knows it."""
    for name, exporter in EXPORTERS.items():
        if name == kind or (kind is None and exporter.holds(path)):
            return exporter.open(path)
    return None
