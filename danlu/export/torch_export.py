"""`torch.export`: the model as one program without Python, in a .pt2 (a zip) that holds JSON and raw numbers and no pickle."""

from __future__ import annotations

import ast
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from danlu import files
from danlu.errors import ConfigError, DataError, SecurityError
from danlu.evaluate.subject import Subject
from danlu.export import source
from danlu.export.beside import Beside, Spoken
from danlu.export.graph import graph_of, said, shapes
from danlu.models.build import Network
from danlu.words import _

if TYPE_CHECKING:
    from danlu.export.table import Options

FILE = "model.pt2"
OPERATION = re.compile(r"torch\.ops\.(aten|prims|higher_order)\.[\w.]+|_operator\.\w+|math\.\w+|torch\._?sym_\w+")
NAME = re.compile(r"[A-Za-z]\w*")
OF_SIZES = frozenset({"Symbol", "Integer", "Add", "Mul", "Pow", "Mod", "PythonMod", "Max", "Min", "FloorDiv", "CleanDiv",
                      "CeilToInt", "FloorToInt", "ModularIndexing"})


def export(subject: Subject, folder: Path, options: Options) -> None:
    """Write a subject into an existing, empty `folder`."""
    if options.dtype not in (None, "fp32") or options.quantize is not None:
        raise ConfigError(_("a program of torch.export is written in fp32"), where="--to torch-export")
    model = source.merged(subject)
    write(folder, model)
    source.leave(subject, folder, model)


def holds(path: Path) -> bool:
    """Return whether `path` is a folder with a program."""
    return (path / FILE).is_file()


def write(folder: Path, model: Network) -> Path:
    """Write `model` as a program into an existing `folder` and return its path.

    Inputs and outputs are those of ONNX without a cache, in the same order; batch and length may be of any size up to the
    model's context.
    """
    graph = graph_of(model.cpu().float().eval())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=shapes(graph))
        program._example_inputs = None           # type: ignore[assignment]  # or they would be pickled into the file
        named = {"inputs": list(graph.inputs), "outputs": list(graph.outputs), "dimensions": graph.inputs["input_ids"].ndim}
        torch.export.save(program, folder / FILE, extra_files={"danlu.json": json.dumps(named)})
    check(folder / FILE)
    files.flush(folder / FILE)
    return folder / FILE


def check(path: Path) -> None:
    """Raise SecurityError if torch.export.load would unpickle anything of the file, DataError if it is no such file.

    It does so for example inputs, for tensors that are marked so, for objects among the constants and for the layout of older
    files, each of which may run code.  So may sizes, which sympy evaluates as Python, and functions that are no operations.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for one in archive.infolist():
                kept = one.filename.split("/", 1)[-1]
                odd = kept.endswith((".pt", ".pkl")) and one.file_size > 0
                odd |= "custom_obj" in kept or "opaque_obj" in kept or kept in ("version", "serialized_exported_program.json")
                if kept.endswith("_config.json"):
                    odd |= _pickles(json.loads(archive.read(one)))
                if "models/" in kept and kept.endswith(".json"):
                    odd |= any(_evaluates(name, text) for name, text in _texts(json.loads(archive.read(one))))
                if odd:
                    raise SecurityError(_("{file} in it is a format that can run code, and is not opened").format(file=kept),
                                        where=str(path), fix=_("export the model again with Danlu"))
    except (OSError, zipfile.BadZipFile, ValueError, AttributeError) as error:
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path)) from None


def _pickles(config: Any) -> bool:
    """Return whether a table of tensors says of one that it is pickled."""
    return any(one.get("use_pickle") is not False for one in config.get("config", {}).values())


def _texts(program: Any) -> Iterator[tuple[str, str]]:
    """Yield what a program says of sizes and operations, as (key, text)."""
    for key, value in program.items() if isinstance(program, dict) else ():
        if isinstance(value, str) and key in ("expr_str", "target"):
            yield key, value
    for value in program.values() if isinstance(program, dict) else program if isinstance(program, list) else ():
        yield from _texts(value)


def _evaluates(key: str, text: str) -> bool:
    """Return whether a text is more than a size, or another operation than PyTorch's."""
    if key == "target":
        return OPERATION.fullmatch(text) is None
    try:
        return not _size(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True


def _size(node: ast.expr) -> bool:
    """Return whether an expression is made of numbers, names of sizes and the functions of sizes alone."""
    if isinstance(node, ast.Call):
        inner = [*node.args, *(word.value for word in node.keywords)]
        known = isinstance(node.func, ast.Name) and node.func.id in OF_SIZES
        named = known and node.func.id == "Symbol" and len(node.args) == 1    # type: ignore[attr-defined]
        if named and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            return NAME.fullmatch(node.args[0].value) is not None and all(map(_size, inner[1:]))
        return known and all(map(_size, inner))
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Pow):
        return _size(node.left) and _size(node.right)
    if isinstance(node, ast.UnaryOp):
        return _size(node.operand)
    if isinstance(node, ast.Name):
        return NAME.fullmatch(node.id) is not None
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


class Exported(Spoken):
    """A folder with a program of torch.export, run by PyTorch."""

    kind = "torch-export"

    def __init__(self, folder: Path) -> None:
        """Open it.  Raises ConfigError, DataError, and SecurityError before anything is opened that could run code."""
        path = folder / FILE
        if not path.is_file():
            raise ConfigError(_("the folder holds no {file}").format(file=FILE), where=str(folder))
        check(path)
        told = {"danlu.json": ""}
        try:
            self.program = torch.export.load(path, extra_files=told)
            named = json.loads(told["danlu.json"])
            self.inputs, self.outputs = list(named["inputs"]), list(named["outputs"])
            self.chooses = named["dimensions"] > 2
        except (RuntimeError, ValueError, KeyError, AssertionError) as error:
            raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path)) from None
        self.module = self.program.module()
        self.name, self.text = f"{folder.name} (torch.export)", Beside(folder, writes="position_ids" in self.inputs)

    @torch.no_grad()
    def run(self, ids: torch.Tensor, mask: torch.Tensor | None = None, *,
            types: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return every output by its name.  ids [B, T], of choices [B, P, T]; mask and types likewise."""
        mask = torch.ones_like(ids) if mask is None else mask
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
                "token_type_ids": torch.zeros_like(ids) if types is None else types}
        return dict(zip(self.outputs, self.module(*(feed[name] for name in self.inputs)), strict=True))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return what is said of one row: [T, V] of a language model, [K], [T, K] or [T, 2] of a task, [D] of a text's vector."""
        row = torch.tensor([list(ids)])
        return said({name: told[0].numpy() for name, told in self.run(row[:, None] if self.chooses else row).items()}, self.head)
