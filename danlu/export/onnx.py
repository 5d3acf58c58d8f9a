"""ONNX: a folder that onnxruntime serves by itself, laid out as `optimum` does (extra `onnx`).

model.onnx (int8: model_quantized.onnx)   config.json   generation_config.json   the tokenizer's files

B rows, T tokens, K classes, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from danlu import files
from danlu.errors import ConfigError
from danlu.evaluate.subject import Subject
from danlu.export import source
from danlu.export.beside import Beside, Spoken
from danlu.export.graph import Graph, graph_of, said, shapes
from danlu.models import session
from danlu.models.build import Network
from danlu.models.session import INT8, PLAIN
from danlu.words import _

if TYPE_CHECKING:
    from danlu.export.table import Options

OPSET = 18                                   # onnxruntime 1.14 and TensorRT 8.6 read it
ONE_FILE = 1_800_000_000                     # bytes of weights; a protobuf file ends at 2 GiB
Quantize = Literal["int8"]


def require() -> None:
    """Raise ConfigError unless the libraries are there."""
    session.require("onnx", "onnxruntime", "onnxscript", where="--to onnx")


def export(subject: Subject, folder: Path, options: Options) -> None:
    """Write a subject into an existing, empty `folder`, with all that onnxruntime and optimum need."""
    require()
    if options.dtype not in (None, "fp32") or options.quantize not in (None, "int8"):
        raise ConfigError(_("ONNX is written in fp32, or with --quantize int8"), where="--to onnx")
    model = source.merged(subject)
    write(folder, model, quantize=options.quantize)                 # type: ignore[arg-type]  # it was just looked at
    source.leave(subject, folder, model)


def holds(path: Path) -> bool:
    """Return whether `path` is a folder with a graph."""
    return session.file_in(path) is not None


def write(folder: Path, model: Network, *, cache: bool | None = None, quantize: Quantize | None = None) -> Path:
    """Write `model` as a graph into an existing `folder` and return its path.

    Batch and length may be of any size there, up to the model's context.  cache: whether a decoder takes keys and values of
    past tokens and gives those of all; None: if it writes.  quantize int8: weights of matrix products and embeddings, by row,
    7 bits of range (which no processor saturates); activations at run time.
    """
    require()
    cfg = model.cfg
    writes = cfg.kind == "decoder" and cfg.lm
    graph = graph_of(model.cpu().float().eval(), cache=writes if cache is None else cache)
    path = folder / PLAIN
    _trace(graph, path)
    if quantize is not None:
        path = _quantized(path)
    for one in folder.glob("*.onnx*"):
        files.flush(one)
    return path


def _trace(graph: Graph, path: Path) -> None:
    """Write the graph as ONNX; weights stand in a file of their own where one file cannot hold them."""
    import onnx

    with torch.no_grad(), _quiet():
        program = torch.onnx.export(graph.module, tuple(graph.inputs.values()), dynamo=True, dynamic_shapes=shapes(graph),
                                    input_names=list(graph.inputs), output_names=list(graph.outputs), opset_version=OPSET,
                                    verbose=False)
    assert program is not None
    apart = sum(p.nbytes for p in graph.module.parameters()) > ONE_FILE
    program.save(str(path), external_data=apart)
    proto = onnx.load(str(path), load_external_data=False)
    for each, axes in [*zip(proto.graph.input, graph.axes.values(), strict=True),
                       *zip(proto.graph.output, graph.outputs.values(), strict=True)]:
        for at, name in axes.items():            # the tracer calls some of them s53
            each.type.tensor_type.shape.dim[at].dim_param = name
    del proto.graph.value_info[:]                # spoke of the old names
    onnx.save(proto, str(path))
    onnx.checker.check_model(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's notes about libraries that are not needed to itself."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _quantized(path: Path) -> Path:
    """Put the int8 graph in the place of the plain one, and return its path."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = path.with_name(INT8)
    log, level = logging.getLogger(), logging.getLogger().level
    log.setLevel(logging.ERROR)                  # it asks for a preprocessing that changes nothing here
    try:
        quantize_dynamic(path, out, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
                         use_external_data_format=bool(list(path.parent.glob(f"{PLAIN}.data"))))
    finally:
        log.setLevel(level)
    for one in path.parent.glob(f"{PLAIN}*"):
        one.unlink()
    return out


class Onnx(Spoken):
    """A folder of ONNX in onnxruntime."""

    def __init__(self, folder: Path, *, provider: str = "cpu", threads: int | None = None) -> None:
        """Open it.  provider: cpu, cuda or tensorrt.  Raises ConfigError if onnxruntime has not that one here, DataError."""
        path = session.file_in(folder)
        if path is None:
            raise ConfigError(_("the folder holds no {file}").format(file=PLAIN), where=str(folder))
        self.session = session.session_of(path, provider=provider, threads=threads)
        self.folder, self.name = folder, f"{folder.name} (onnxruntime, {self.session.get_providers()[0]})"
        self.kind = "onnx" if path.name == PLAIN else "quantized"
        self.inputs = {one.name: one.shape for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.text = Beside(folder, writes="position_ids" in self.inputs)

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None, *, past: Mapping[str, np.ndarray] | None = None,
            types: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return every output by its name.

        ids [B, T], of choices [B, P, T]; mask likewise, 1 for real tokens, those of `past` (a former answer) included.
        """
        held = self.held(ids, past)
        seen = next((x.shape[2] for x in held.values()), 0)
        mask = np.ones((*ids.shape[:-1], seen + ids.shape[-1]), np.int64) if mask is None else mask
        feed = {"input_ids": ids, "attention_mask": mask, **held}
        if "token_type_ids" in self.inputs:
            feed["token_type_ids"] = np.zeros_like(ids) if types is None else types
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)[:, seen:]
        return dict(zip(self.outputs, self.session.run(None, feed), strict=True))

    def held(self, ids: np.ndarray, past: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Return what goes in as keys and values of past tokens: those of a former answer, or none of no token."""
        found = {}
        for name, shape in self.inputs.items():
            if name.startswith("past_key_values."):
                empty = np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
                found[name] = empty if past is None else past[name.replace("past_key_values", "present")]
        return found

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return what is said of one row: [T, V] of a language model, [K], [T, K] or [T, 2] of a task, [D] of a text's vector."""
        row = np.array(ids, np.int64)[None]
        out = self.run(row[:, None] if len(self.inputs["input_ids"]) == 3 else row)
        return said({name: told[0] for name, told in out.items()}, self.head)
