"""A model as a plain function of tensors, as other runtimes take it: what goes in, what comes out, which sizes may change.

B rows, T tokens, S tokens that can be seen (past ones included), P choices, D width, H query heads, G key heads, K head width
or classes, V vocabulary.  Names of inputs and outputs are those of `transformers` and `optimum`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import IncompatibleError
from danlu.models.build import Network
from danlu.models.decoder import Decoder, DecoderModel
from danlu.models.encoder import Encoder, EncoderModel
from danlu.nn import attention
from danlu.nn.position import turn
from danlu.words import _

ROWS, TOKENS, BEFORE, CHOICES = 2, 3, 4, 2       # of the example: no two that may change alike, and none is 0 or 1
Axes = dict[int, str]                            # which dimensions may change, and what they are called


class Graph(NamedTuple):
    """A module whose forward takes `inputs` in order and returns the outputs in order."""

    module: nn.Module
    inputs: dict[str, Tensor]                    # examples
    axes: dict[str, Axes]                        # of each input
    outputs: dict[str, Axes]
    limits: dict[str, int]                       # largest size of an axis, where the model has one
    past: int                                    # how many of the inputs, at the end, are keys and values of past tokens


def graph_of(model: Network, *, cache: bool = False) -> Graph:
    """Return what is exported of `model`; cache: of a decoder that writes, with keys and values of past tokens.

    Raises IncompatibleError for a model that has adapters which are no part of its weights, or is no family of ours.
    """
    if not isinstance(model, DecoderModel | EncoderModel):
        raise IncompatibleError(_("a model of {family} is not exported by Danlu").format(family=model.cfg.family),
                                fix=_("export its folder with optimum-cli, which knows every model of transformers"))
    if model.ahead.prompt is not None or model.ahead.keys:
        raise IncompatibleError(_("an adapter that puts something before the tokens is no part of the weights"),
                                fix=_("use LoRA, which can be merged, or serve the run folder"))
    if isinstance(model, DecoderModel) and model.cfg.lm:
        return _writer(model, cache=cache)
    if cache:
        raise IncompatibleError(_("only a decoder that writes has a cache of past tokens"))
    return _reader(model)


def shapes(graph: Graph) -> tuple[Any, ...]:
    """Return the dynamic shapes of the graph's inputs, as torch.export takes them."""
    sizes: dict[str, Any] = {}
    for axes in graph.axes.values():
        for name in axes.values():               # a total follows from its parts
            sizes[name] = torch.export.Dim.DYNAMIC if name.startswith("total_") else torch.export.Dim(
                name, min=1, max=graph.limits.get(name))
    given = [{at: sizes[name] for at, name in graph.axes[each].items()} for each in graph.inputs]
    return (*given[: len(given) - graph.past], *([tuple(given[len(given) - graph.past :])] if graph.past else []))


class Grown:
    """Keys and values of past tokens, to which a layer adds its own; nothing is changed in place."""

    def __init__(self, past: tuple[Tensor, Tensor] | None, share: int) -> None:
        self.past, self.share = past, share      # [B, G, S, K] twice; query heads of one key head
        self.now: tuple[Tensor, ...] = ()

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values [B, S, H, K], each repeated for the heads that share it, after k, v [B, T, G, K]."""
        new = k.transpose(1, 2), v.transpose(1, 2)
        self.now = new if self.past is None else tuple(torch.cat(pair, 2) for pair in zip(self.past, new, strict=True))
        k, v = (x.transpose(1, 2) for x in self.now)
        return (k, v) if self.share == 1 else (k.repeat_interleave(self.share, 2), v.repeat_interleave(self.share, 2))


def _seen(mask: Tensor, tokens: int, window: int | None) -> attention.Sight:
    """Return what the last `tokens` of mask [B, S] see: real tokens before them, and themselves, or padding would see nothing."""
    key = torch.arange(mask.shape[1], device=mask.device)[None]
    query = torch.arange(tokens, device=mask.device)[:, None] + (mask.shape[1] - tokens)
    allowed = key <= query                                                              # [T, S]
    if window is not None:
        allowed = allowed & (key > query - window)
    allowed = (allowed[None] & (mask > 0)[:, None]) | (key == query)[None]              # [B, T, S]
    bias = torch.zeros(allowed.shape, device=mask.device).masked_fill(~allowed, -torch.inf)
    return attention.Sight(False, None, bias[:, None])


def _through(model: DecoderModel, ids: Tensor, mask: Tensor, positions: Tensor,
             past: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
    """Return what the last block says [B, T, D], and all keys and values [B, G, S, K], layer by layer."""
    cfg = model.cfg
    x = model.embed(ids)
    if model.position is not None:
        x = x + model.position(positions)
    rotary = None if cfg.position == "learned" else turn(positions, model.angles, model.sharpen, x.dtype)
    windowed, full = (_seen(mask, ids.shape[1], window) for window in (cfg.window, None))
    present: list[Tensor] = []
    for i, block in enumerate(model.blocks):
        held = Grown((past[2 * i], past[2 * i + 1]) if past else None, cfg.heads // cfg.kv_heads)
        x = block(x, full if i < cfg.full_layers else windowed, rotary, held)
        present += held.now
    return x, present


class Writer(nn.Module):
    """A decoder with its vocabulary's head."""

    def __init__(self, model: DecoderModel, cache: bool) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Return logits [B, T, V] and, with a cache, keys and values of all tokens [B, G, S, K], layer by layer.

        ids, positions [B, T], mask [B, S]: 1 for real tokens, past ones included; padding may stand at either end.
        """
        x, present = _through(self.model, input_ids, attention_mask, position_ids, past)
        logits = self.model.leave(x, None, None)["logits"]
        return (logits, *present) if self.cache else (logits,)


def _writer(model: DecoderModel, *, cache: bool) -> Graph:
    cfg = model.cfg
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % (cfg.vocab or 1)
    seen = BEFORE if cache else 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones(ROWS, seen + TOKENS, dtype=torch.int64),
              "position_ids": torch.arange(seen, seen + TOKENS).expand(ROWS, -1).contiguous()}
    batch: Axes = {0: "batch_size"}
    axes = {"input_ids": batch | {1: "sequence_length"}, "position_ids": batch | {1: "sequence_length"},
            "attention_mask": batch | {1: "total_sequence_length" if cache else "sequence_length"}}
    outputs = {"logits": batch | {1: "sequence_length"}}
    places = list(_places(cfg)) if cache else []
    for place in places:
        inputs[f"past_key_values.{place}"] = torch.zeros(ROWS, cfg.kv_heads, BEFORE, cfg.head_width)
        axes[f"past_key_values.{place}"] = batch | {2: "past_sequence_length"}
        outputs[f"present.{place}"] = batch | {2: "total_sequence_length"}
    limits = {name: cfg.context for name in ("sequence_length", "past_sequence_length")}
    return Graph(Writer(model, cache).eval(), inputs, axes, outputs, limits, len(places))


def _places(cfg: Decoder) -> Iterator[str]:
    for layer in range(cfg.layers):
        yield from (f"{layer}.key", f"{layer}.value")


class Reader(nn.Module):
    """A model that says something of texts: an encoder, or a decoder with heads of tasks."""

    def __init__(self, model: EncoderModel | DecoderModel) -> None:
        super().__init__()
        self.model = model
        self.chooses = [t.kind for t in model.cfg.tasks] == ["choose"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what `names` names.  ids, mask (1 for real tokens) and types [B, T]; of choices [B, P, T]."""
        if not self.chooses:
            return tuple(said for _name, said in self._say(input_ids, attention_mask, token_type_ids))
        choices = input_ids.shape[1]
        flat = [None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, token_type_ids)]
        return tuple(said.reshape(-1, choices) for _name, said in self._say(*flat))

    def _say(self, ids: Any, mask: Any, types: Any) -> Iterator[tuple[str, Tensor]]:
        model, cfg = self.model, self.model.cfg
        if isinstance(model, DecoderModel):
            counted = (mask.cumsum(-1) - 1).clamp(min=0)
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
            x, _present = _through(model, ids, mask, counted)
            out = model.leave(x, None, None, segments=mask, ends=last)
        else:                                    # RoBERTa counts real tokens alone
            counted = (mask.cumsum(-1) - 1).clamp(min=0) if cfg.family == "roberta" else None
            out = model(ids, positions=counted, segments=mask, types=types)
        several = len(cfg.tasks) + len(getattr(cfg, "outputs", None) or ()) > 1
        for task in cfg.tasks:
            yield from named(task.name if several else "", task.kind, out[task.name])
        yield from ((theirs, out[ours]) for ours, theirs in _outputs(cfg))

    def names(self) -> dict[str, Axes]:
        """Return the outputs' names and which of their dimensions may change."""
        cfg, found = self.model.cfg, dict[str, Axes]()
        several = len(cfg.tasks) + len(getattr(cfg, "outputs", None) or ()) > 1
        second = {"tag": "sequence_length", "answer": "sequence_length", "choose": "num_choices"}
        for task in cfg.tasks:
            axes = {0: "batch_size"} | ({1: second[task.kind]} if task.kind in second else {})
            said = named(task.name if several else "", task.kind, torch.zeros(1, 1, 2))
            found |= dict.fromkeys((name for name, _x in said), axes)
        by_token_too = ("logits", "prediction_logits", "last_hidden_state")
        return found | {theirs: {0: "batch_size"} | ({1: "sequence_length"} if theirs in by_token_too else {})
                        for _ours, theirs in _outputs(cfg)}


def named(prefix: str, kind: str, said: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a task's head says under the names that transformers has for it; prefix: the head's, where there are several."""
    before = f"{prefix}_" if prefix else ""
    if kind == "answer":
        yield f"{before}start_logits", said[..., 0]
        yield f"{before}end_logits", said[..., 1]
    elif kind == "embed":
        yield f"{before}sentence_embedding", F.normalize(said[:, 0], dim=-1)
    else:
        yield f"{before}logits", said


SUFFIXES = ("_start_logits", "_end_logits", "_sentence_embedding", "_logits")
PRETRAINING = ("prediction", "seq_relationship", "sentence_order")         # heads of pretraining, which are no tasks


def heads_of(outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the tasks of a graph that has several, by its outputs."""
    found = [next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), "") for name in outputs]
    tasks = tuple(dict.fromkeys(name for name in found if name and name not in ("start", "end", *PRETRAINING)))
    return tasks if len(tasks) > 1 else ()


def said(out: Mapping[str, np.ndarray], head: str = "") -> np.ndarray:
    """Return what a graph says of one row, from its outputs without their first dimension, in float64.

    head: of several; the first if none is named.
    """
    if head:
        out = {name.removeprefix(f"{head}_"): value for name, value in out.items() if name.startswith(f"{head}_")}
    if "start_logits" in out:
        return np.stack([out["start_logits"], out["end_logits"]], -1).astype(np.float64)
    told = next((out[name] for name in ("logits", "sentence_embedding") if name in out), next(iter(out.values())))
    return np.asarray(told, np.float64)


def _outputs(cfg: Encoder | Decoder) -> list[tuple[str, str]]:
    """Return (our name, theirs) of what an encoder says beside its tasks."""
    if isinstance(cfg, Decoder):
        return [] if cfg.tasks else [("hidden", "last_hidden_state")]
    heads = cfg.outputs or ()
    if [t.kind for t in cfg.tasks] == ["embed"] or not (heads or cfg.tasks):
        return [("hidden", "last_hidden_state"), *([("pooled", "pooler_output")] if cfg.pooler and not cfg.tasks else [])]
    pair = {"mlm": ("logits", "logits" if heads == ("mlm",) else "prediction_logits"),
            "nsp": ("nsp", "logits" if heads == ("nsp",) else "seq_relationship_logits"), "sop": ("sop", "sentence_order_logits")}
    return [pair[name] for name in heads]


def _reader(model: EncoderModel | DecoderModel) -> Graph:
    cfg, module = model.cfg, Reader(model).eval()
    size: tuple[int, ...] = (ROWS, TOKENS)
    axes: Axes = {0: "batch_size", 1: "sequence_length"}
    if module.chooses:
        size, axes = (ROWS + 1, CHOICES, TOKENS + 1), {0: "batch_size", 1: "num_choices", 2: "sequence_length"}
    ids = torch.arange(torch.Size(size).numel()).view(size) % (cfg.vocab or 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(cfg, Encoder) and cfg.types > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return Graph(module, inputs, dict.fromkeys(inputs, axes), module.names(), {"sequence_length": cfg.context}, 0)
