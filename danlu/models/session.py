"""A graph of ONNX in onnxruntime (extra `onnx`), in the place of the model that it was made of: it does tasks, and never learns.

B rows, T tokens, P stretches of a row, K classes, D width.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.models import weights
from danlu.nn.tasks import Head
from danlu.nn.unpadded import cuts
from danlu.words import _

PLAIN, INT8 = "model.onnx", "model_quantized.onnx"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
CALL = 24                                               # tokens that take as long as a further call


def require(*names: str, where: str) -> None:
    """Raise ConfigError unless the libraries are there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(_("ONNX needs {names}, which is not installed").format(names=", ".join(missing)),
                          where=where, fix='pip install "danlu[onnx]"')


def file_in(folder: Path) -> Path | None:
    """Return the graph in a folder, None if there is none."""
    return next((path for path in (folder / PLAIN, folder / INT8) if path.is_file()), None)


def session_of(path: Path, *, provider: str = "cpu", threads: int | None = None) -> Any:
    """Return an InferenceSession of a graph.  provider: cpu, cuda or tensorrt.

    Raises ConfigError if onnxruntime has not that provider here, DataError for a file that it cannot read.
    """
    require("onnxruntime", where=str(path))
    import onnxruntime

    if PROVIDERS.get(provider) not in onnxruntime.get_available_providers():
        raise ConfigError(_("onnxruntime has no {provider} here").format(provider=PROVIDERS.get(provider, provider)),
                          where="--provider", fix=_("install onnxruntime-gpu, or use the provider cpu"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(dict.fromkeys(
            (PROVIDERS[provider], PROVIDERS["cpu"]))))
    except Exception as error:                           # the library raises classes that it does not export
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path)) from None


class SessionModel(nn.Module):
    """What a folder of ONNX says of texts, asked and answering as the model in PyTorch does."""

    def __init__(self, folder: Path) -> None:
        """Open it on as many threads as PyTorch has.  Raises IncompatibleError for a graph that does no task of texts."""
        super().__init__()
        path = file_in(folder)
        assert path is not None, "who asks has seen the graph"
        self.folder, self.cfg = folder, weights.read_config(folder)
        refused = [head.kind for head in self.cfg.tasks if head.kind == "choose"]
        if not self.cfg.tasks or refused:
            raise IncompatibleError(_("a graph is used here for what it says of texts, and this one does not"), where=str(path),
                                    fix=_("use the folder that it was exported from"))
        self.session = session_of(path, threads=torch.get_num_threads())
        self.inputs = {one.name for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]

    def use(self, choice: object) -> None:
        """Let the graph compute as it does: it has one path."""

    def forward(self, ids: Tensor, *, segments: Tensor | None = None, types: Tensor | None = None,
                **_rest: Tensor) -> dict[str, Tensor]:
        """Return what each head says: [B, K] of a class, [B, T, K] of tags, [B, T, 2] of answers, [B, P, D] of vectors.

        ids, segments (0 for padding; of vectors the number of the text), types [B, T].  Vectors have length 1.
        """
        texts = 1 if segments is None else int(segments.max())
        if segments is None or texts == 1:
            mask = torch.ones_like(ids) if segments is None else segments.to(ids.dtype)
            return self._apart(ids, mask, types) if len(ids) > 1 else self._said(ids, mask, types)
        parts = [self._said(*_of_stretch(ids, segments, number), None) for number in range(1, 1 + texts)]
        return {head.name: torch.cat([part[head.name] for part in parts], 1) for head in self.cfg.tasks if head.kind == "embed"}

    def _apart(self, ids: Tensor, mask: Tensor, types: Tensor | None) -> dict[str, Tensor]:
        """Return what is said of rows that end in padding; those of like length are computed together."""
        sizes = mask.sum(-1)
        order = sizes.argsort(descending=True, stable=True)
        lengths, tokens = sizes[order].tolist(), ids.shape[1]
        found: dict[str, Tensor] = {}
        for first, last in itertools.pairwise([0, *cuts(lengths, int, CALL), len(lengths)]):
            rows, most = order[first:last], lengths[first]
            part = self._said(ids[rows, :most], mask[rows, :most], None if types is None else types[rows, :most])
            for head in self.cfg.tasks:
                by_token, said = head.kind in ("tag", "answer"), part[head.name]
                if head.name not in found:
                    found[head.name] = said.new_zeros(len(ids), *((tokens, *said.shape[2:]) if by_token else said.shape[1:]))
                if by_token:
                    found[head.name][rows, :most] = said
                else:
                    found[head.name][rows] = said
        return found

    def _said(self, ids: Tensor, mask: Tensor, types: Tensor | None) -> dict[str, Tensor]:
        feed = {"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy()}
        if "token_type_ids" in self.inputs:
            feed["token_type_ids"] = np.zeros_like(feed["input_ids"]) if types is None else types.cpu().numpy()
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.maximum(feed["attention_mask"].cumsum(-1) - 1, 0)
        out = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        several = len(self.cfg.tasks) + len(getattr(self.cfg, "outputs", None) or ()) > 1
        return {head.name: _of_head(head, f"{head.name}_" if several else "", out).to(ids.device) for head in self.cfg.tasks}


def _of_stretch(ids: Tensor, segments: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, t] of text `number` of each row, at their rows' starts; of a row without it, one token."""
    inside = segments == number
    sizes = inside.sum(-1)
    mask = torch.arange(max(1, int(sizes.max())), device=ids.device) < sizes.clamp(min=1)[:, None]
    found = torch.zeros_like(mask, dtype=ids.dtype)
    found[mask & (sizes > 0)[:, None]] = ids[inside]
    return found, mask.to(ids.dtype)


def _of_head(head: Head, before: str, out: dict[str, Any]) -> Tensor:
    if head.kind == "answer":
        return torch.from_numpy(np.stack([out[f"{before}start_logits"], out[f"{before}end_logits"]], -1))
    if head.kind == "embed":
        return torch.from_numpy(out[f"{before}sentence_embedding"])[:, None]
    return torch.from_numpy(out[f"{before}logits"])
