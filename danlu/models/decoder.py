"""Decoders: GPT-2, Llama 2 and 3, Qwen 2 and 3, Mistral, and smaller ones of the same make.

B rows, T tokens, D width, H query heads, G key heads, K head width, F hidden width, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn

from danlu import chance
from danlu.config import Model
from danlu.errors import IncompatibleError
from danlu.nn import attention, head, packed, placed, rounded
from danlu.nn.ahead import Ahead
from danlu.nn.cache import Cache, Past, Step, StepPast
from danlu.nn.candidates import speak
from danlu.nn.collective import Span, Strip, numbered
from danlu.nn.drop import dropout
from danlu.nn.mlp import MLP, Activation
from danlu.nn.norm import RMSNorm
from danlu.nn.paths import Choice
from danlu.nn.position import Scaling, frequencies, turn
from danlu.nn.taps import Taps
from danlu.nn.tasks import Head, Heads, TaskHead, pooled
from danlu.nn.unpadded import real_in
from danlu.words import _

Family = Literal["gpt2", "llama", "qwen2", "qwen3", "mistral"]

# What a family's models have in common where it is not the default of Decoder's fields (which are Llama's).
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"position": "learned", "norm": "layer", "activation": "gelu_tanh", "gated": False, "tied": True,
             "qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_bias": True, "context": 1024},
    "llama": {},
    "qwen2": {"qkv_bias": True, "eps": 1e-6, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "eps": 1e-6, "rope_theta": 1e6},
    "mistral": {},
}

# What a family's Hugging Face classes can hold; a field that is not named is free.
HOLDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {"position": ("learned",), "norm": ("layer",), "gated": (False,), "qk_norm": (False,), "window": (None,)},
    "llama": {"position": ("rotary",), "norm": ("rms",), "gated": (True,), "norm_bias": (False,), "qk_norm": (False,),
              "window": (None,)},
    "qwen2": {"position": ("rotary",), "norm": ("rms",), "gated": (True,), "norm_bias": (False,), "qk_norm": (False,),
              "qkv_bias": (True,), "out_bias": (False,), "mlp_bias": (False,)},
    "qwen3": {"position": ("rotary",), "norm": ("rms",), "gated": (True,), "norm_bias": (False,), "qk_norm": (True,),
              "mlp_bias": (False,)},
    "mistral": {"position": ("rotary",), "norm": ("rms",), "gated": (True,), "norm_bias": (False,), "qk_norm": (False,),
                "qkv_bias": (False,), "out_bias": (False,), "mlp_bias": (False,), "full_layers": (0,)},
}

_LLAMA3 = {"kind": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192}

# Sizes by name.  The vocabulary is the tokenizer's, so no preset has one.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"family": "gpt2", "width": 128, "layers": 4, "heads": 4, "context": 256},
    "mini": {"family": "gpt2", "width": 384, "layers": 6, "heads": 6, "context": 256},
    "gpt2": {"family": "gpt2", "width": 768, "layers": 12, "heads": 12},
    "gpt2-medium": {"family": "gpt2", "width": 1024, "layers": 24, "heads": 16},
    "gpt2-large": {"family": "gpt2", "width": 1280, "layers": 36, "heads": 20},
    "gpt2-xl": {"family": "gpt2", "width": 1600, "layers": 48, "heads": 25},
    "llama-nano": {"family": "llama", "width": 128, "layers": 4, "heads": 4, "context": 256, "tied": True},
    "llama-mini": {"family": "llama", "width": 384, "layers": 6, "heads": 6, "context": 256, "tied": True},
    "llama-110m": {"family": "llama", "width": 768, "layers": 12, "heads": 12, "hidden": 2048, "context": 1024},
    "llama2-7b": {"family": "llama", "width": 4096, "layers": 32, "heads": 32, "hidden": 11008, "context": 4096},
    "llama3-8b": {"family": "llama", "width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "hidden": 14336,
                  "context": 8192, "rope_theta": 5e5},
    "llama3.1-8b": {"family": "llama", "width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "hidden": 14336,
                    "context": 131072, "rope_theta": 5e5, "scaling": _LLAMA3},
    "llama3.2-1b": {"family": "llama", "width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "hidden": 8192,
                    "tied": True, "context": 131072, "rope_theta": 5e5, "scaling": {**_LLAMA3, "factor": 32.0}},
    "qwen2.5-0.5b": {"family": "qwen2", "width": 896, "layers": 24, "heads": 14, "kv_heads": 2, "hidden": 4864,
                     "context": 32768, "tied": True},
    "qwen2.5-7b": {"family": "qwen2", "width": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "hidden": 18944,
                   "context": 131072},
    "qwen3-0.6b": {"family": "qwen3", "width": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "head_width": 128,
                   "hidden": 3072, "context": 40960, "tied": True},
    "qwen3-8b": {"family": "qwen3", "width": 4096, "layers": 36, "heads": 32, "kv_heads": 8, "head_width": 128,
                 "hidden": 12288, "context": 40960},
    "mistral-7b": {"family": "mistral", "width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "hidden": 14336,
                   "context": 32768, "window": 4096},
}

TP = {"q": "col", "k": "col", "v": "col", "o": "row", "up": "col", "gate": "col", "down": "row"}


class Decoder(Model):
    """The shape of a decoder.  Every field is filled in: given, or by the preset, the family or other fields."""

    causal: ClassVar[bool] = True

    kind: Literal["decoder"] = "decoder"
    family: Family = Field("llama", description="The Hugging Face layout that the model is written in.")
    preset: str | None = Field(None, description="A size by name; fields given beside it win.")
    vocab: int | None = Field(None, gt=0, description="Number of token ids; empty: the tokenizer's.")
    width: int = Field(128, gt=0, description="Width of the residual stream.")
    layers: int = Field(4, gt=0, description="Number of blocks.")
    heads: int = Field(4, gt=0, description="Attention heads.")
    kv_heads: int = Field(0, ge=0, description="Heads of keys and values; 0: as many as heads.")
    head_width: int = Field(0, ge=0, description="Width of a head; 0: width / heads.")
    hidden: int = Field(0, ge=0, description="Width inside the feed-forward part; 0: 4 widths, or 8/3 when gated.")
    context: int = Field(2048, gt=0, description="Most tokens that the model reads at once.")
    position: Literal["learned", "rotary"] = Field("rotary", description="How positions are told.")
    rope_theta: float = Field(1e4, gt=1, allow_inf_nan=False, description="Base of the rotary wavelengths.")
    scaling: Scaling | None = Field(None, discriminator="kind", description="Rotary angles for longer contexts.")
    norm: Literal["layer", "rms"] = Field("rms", description="Normalisation before attention and feed-forward.")
    eps: float = Field(1e-5, gt=0, lt=1, allow_inf_nan=False, description="What normalisation adds to the variance.")
    activation: Activation = Field("silu", description="Activation of the feed-forward part.")
    gated: bool = Field(True, description="Multiply the activation by a second projection (SwiGLU).")
    qkv_bias: bool = Field(False, description="Biases in the query, key and value projections.")
    out_bias: bool = Field(False, description="A bias in the output projection of attention.")
    mlp_bias: bool = Field(False, description="Biases in the feed-forward part.")
    norm_bias: bool = Field(False, description="Biases in layer norms.")
    qk_norm: bool = Field(False, description="Normalise queries and keys.")
    tied: bool = Field(False, description="The head shares the token embedding's weights.")
    window: int | None = Field(None, gt=0, description="Tokens that a token sees, itself included; empty: all.")
    full_layers: int = Field(0, ge=0, description="First layers that see everything in spite of window.")
    dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False,
                           description="Share dropped in training after the embedding and each half of a block.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False,
                                     description="Share of attention probabilities dropped in training.")
    init_std: float = Field(0.02, gt=0, allow_inf_nan=False, description="Standard deviation of the first weights.")

    lm: bool = Field(True, description="Whether there is a vocabulary head; heads of tasks may take its place.")
    tasks: Heads = Field(
        (), description="Heads of tasks, such as classify; filled in by the objective and the data.")

    @model_validator(mode="wrap")
    @classmethod
    def _fill(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(given, dict):
            return handler(given)
        name = given.get("preset")
        if name is not None and name not in PRESETS:
            raise ValueError(
                _("there is no preset {name!r}; there are {names}").format(name=name, names=", ".join(PRESETS)))
        sized = PRESETS.get(str(name), {}) | given
        made = handler(FAMILIES.get(str(sized.get("family", "llama")), {}) | sized)
        object.__setattr__(made, "__pydantic_fields_set__", set(given))     # so that a written recipe stays as short
        return made

    @model_validator(mode="after")
    def _derive(self) -> Self:
        problems = []
        if not self.lm:
            object.__setattr__(self, "tied", False)      # there is nothing to tie
        derived = {"kv_heads": self.heads, "head_width": self.width // self.heads,
                   "hidden": 64 * math.ceil(self.width * 8 / 3 / 64) if self.gated else 4 * self.width}
        if not self.head_width and self.width % self.heads:
            problems.append(_("heads={heads} does not divide width={width}").format(heads=self.heads, width=self.width))
        for field, value in derived.items():
            if not getattr(self, field):
                object.__setattr__(self, field, value)
        if self.heads % self.kv_heads:
            problems.append(_("kv_heads={n} does not divide heads={heads}").format(n=self.kv_heads, heads=self.heads))
        if self.position == "rotary" and self.head_width % 2:
            problems.append(_("position=rotary needs an even head_width, not {n}").format(n=self.head_width))
        if self.full_layers > self.layers:
            problems.append(
                _("full_layers={n} is more than layers={layers}").format(n=self.full_layers, layers=self.layers))
        problems += [_("family={family} cannot hold {field}={value}; it takes {allowed}").format(
                         family=self.family, field=field, value=getattr(self, field), allowed=allowed[0])
                     for field, allowed in self._holds().items() if getattr(self, field) not in allowed]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _holds(self) -> dict[str, tuple[Any, ...]]:
        """Return the values that the family's Hugging Face classes can hold."""
        holds = dict(HOLDS[self.family])
        if self.family == "gpt2":
            holds |= {"kv_heads": (self.heads,), "head_width": (self.width // self.heads,), "scaling": (None,)}
        elif self.family in ("llama", "qwen3"):
            holds["out_bias"] = (self.qkv_bias,)
        return holds

    def filled(self, *, vocab: int, heads: Sequence[str] = ("lm",), pad: int | None = None) -> Decoder:
        """Return the config with the vocabulary's size, where it was left open.  A decoder has the head "lm" alone.

        Its weights know nothing of padding, so `pad` changes nothing.
        """
        unknown = set(heads) - {"lm"} - {t.name for t in self.tasks}
        if unknown:
            raise IncompatibleError(_("a decoder has no head {heads}").format(heads=", ".join(sorted(unknown))),
                                    fix=_("set model.kind=encoder, or objective.kind=causal_lm"))
        return self if self.vocab is not None else self.model_copy(update={"vocab": vocab})

    def with_heads(self, heads: Sequence[str]) -> Decoder:
        """Return the config with `heads` alone, of those there are.  Raises IncompatibleError for others."""
        held = [*(["lm"] if self.lm else []), *(t.name for t in self.tasks)]
        if lacking := set(heads) - set(held):
            raise IncompatibleError(_("the model has no head {name}; it has {heads}").format(
                name=min(lacking), heads=", ".join(held)))
        return self.with_tasks([t for t in self.tasks if t.name in heads], outputs=[name for name in heads if name == "lm"])

    def with_tasks(self, tasks: Sequence[Head], *, outputs: Sequence[str] = ()) -> Decoder:
        """Return the config with these heads of tasks, and the vocabulary's if `outputs` names it."""
        return Decoder.model_validate(self.model_dump() | {"tasks": tuple(tasks), "lm": "lm" in outputs})


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, cfg: Decoder) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.norm1 = _norm(cfg)
        self.attention = attention.Attention(
            cfg.width, cfg.heads, kv_heads=cfg.kv_heads, head_width=cfg.head_width, qkv_bias=cfg.qkv_bias,
            out_bias=cfg.out_bias, qk_norm=cfg.eps if cfg.qk_norm else None, dropout=cfg.attention_dropout)
        self.norm2 = _norm(cfg)
        self.mlp = MLP(cfg.width, cfg.hidden, activation=cfg.activation, gated=cfg.gated, bias=cfg.mlp_bias)

    def forward(self, x: Tensor, see: attention.Sight, rotary: tuple[Tensor, Tensor] | None = None,
                past: Past | StepPast | None = None) -> Tensor:
        """Return x [B, T, D] with what this block adds to it."""
        x = x + dropout(self.attention(self.norm1(x), see, rotary=rotary, past=past), self.dropout, self.training)
        return x + dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


def _norm(cfg: Decoder) -> nn.Module:
    if cfg.norm == "rms":
        return RMSNorm(cfg.width, cfg.eps)
    return nn.LayerNorm(cfg.width, cfg.eps, bias=cfg.norm_bias)


class DecoderModel(nn.Module):
    """A decoder with its weights.  Made by `models.build.build`, filled by `init` or by a folder."""

    def __init__(self, cfg: Decoder) -> None:
        super().__init__()
        assert cfg.vocab is not None, "the vocabulary is filled in before the model is built"
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.width)
        self.position = nn.Embedding(cfg.context, cfg.width) if cfg.position == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg) for _layer in range(cfg.layers))
        self.norm = _norm(cfg)
        self.head = nn.Linear(cfg.width, cfg.vocab, bias=False) if cfg.lm and not cfg.tied else None
        self.heads = nn.ModuleDict({t.name: TaskHead(t, cfg.width, dropout=0.0 if t.kind == "classify" else cfg.dropout,
                                                     bias=t.kind != "classify") for t in cfg.tasks})
        self.last = True                                 # False in all but the last stage of a pipeline
        self.span: Span | None = None                    # set under context parallelism
        self.strip = Strip()                             # … and under sequence parallelism
        self.ahead = Ahead()                             # set by an adapter
        self.unpadded = False                            # True: padding is left out of all but attention
        self.taps = Taps()                               # opened where a student learns from the inside
        self.speaks: nn.Module | None = None             # the vocabulary's head as `decode.pack` lays it out
        # No buffer: `to_empty` would leave it without content.
        self.angles, self.sharpen = frequencies(cfg.head_width, cfg.rope_theta, cfg.scaling)

    def forward(self, ids: Tensor, *, positions: Tensor | None = None, segments: Tensor | None = None,
                types: Tensor | None = None, labels: Tensor | None = None, weights: Tensor | None = None,
                ends: Tensor | None = None, starts: Tensor | None = None, candidates: Tensor | None = None,
                soften: Tensor | None = None, cache: Cache | Step | None = None, last: bool = False, most: int = 0) -> Any:
        """Return {"logits" [B, T, V], "hidden" [B, T, D]}, or with labels [B, T] {"lm": Scores}.

        ids, positions, segments [B, T]; weights [B, T], 0 where nothing is learned.  candidates, soften, most: see
        nn/candidates.py.  `last`: only the last token's logits, [B, 1, V].  Heads of tasks stand under their names:
        classify [B, K], tag [B, T, K], answer [B, T, 2], choose [B, P], embed [B, P, D], all but tag of whole rows under
        context parallelism; ends [B] or [B, P]: the last token of the row, or of each stretch.  `types` and `starts` are an
        encoder's and not used.
        """
        skip = self.ahead.tokens if cache is None or not cache.length else 0
        x = self.enter(ids, positions, cache)
        x = self.through(x, positions, segments, cache)
        return self.leave(x[:, skip:], labels, weights, last=last, segments=segments, ends=ends, candidates=candidates,
                          soften=soften, most=most) if self.last else x

    def enter(self, ids: Tensor, positions: Tensor | None, cache: Cache | Step | None) -> Tensor:
        """Return the embedded ids [B, T, D]; in a later stage of a pipeline `ids` are that already."""
        if ids.is_floating_point():
            return ids
        cfg, tokens, past = self.cfg, ids.shape[1], 0 if cache is None else cache.length
        if past + tokens + self.ahead.room(past) > cfg.context:
            raise IncompatibleError(
                _("{n} tokens do not fit the model's context of {context}").format(
                    n=past + tokens + self.ahead.room(past), context=cfg.context),
                fix=_("shorten the text, or use a model with a longer context"))
        x = self.embed(ids)
        if not past:
            x = self.ahead.join(x)
        if self.position is not None:
            x = x + self.position(self._places(x.shape[1], ids.device, positions, cache))
        return self.strip.cut(dropout(x, cfg.dropout, self.training))

    def through(self, x: Tensor, positions: Tensor | None, segments: Tensor | None, cache: Cache | Step | None) -> Tensor:
        """Return what the last block makes of x [B, T, D]."""
        assert cache is None or segments is None, "a cache holds one document a row"
        cfg, tokens, past = self.cfg, x.shape[1] * self.strip.size, 0 if cache is None else cache.length
        rotary = None if cfg.position == "learned" else turn(self._places(tokens, x.device, positions, cache), self.angles,
                                                             self.sharpen, attention.working_dtype(x))
        known = self.ahead.segments(segments)
        sights = [self.ahead.see(attention.sight(tokens, causal=True, device=x.device, dtype=attention.working_dtype(x),
                                                 window=window, segments=known, past=past, span=self.span,
                                                 lengths=None if cache is None else cache.lengths), x)
                  for window in ((cfg.window, None) if cfg.window is not None and cfg.full_layers else (cfg.window,))]
        alone = real_in(self, known)
        if alone is not None:
            x, sights = alone.collect(x), [see._replace(real=alone) for see in sights]
            rotary = None if rotary is None else (alone.collect(rotary[0]), alone.collect(rotary[1]))
        for i, block in numbered(self.blocks):
            see = sights[0] if i >= cfg.full_layers else sights[-1]
            x = self.taps.take(i, block(x, see, rotary, None if cache is None else cache.layers[i]))
        return x if alone is None else alone.spread(x)

    def leave(self, x: Tensor, labels: Tensor | None, weights: Tensor | None, *, last: bool = False,
              segments: Tensor | None = None, ends: Tensor | None = None, candidates: Tensor | None = None,
              soften: Tensor | None = None, most: int = 0) -> dict[str, Any]:
        """Return what `forward` does, from what the last block put out."""
        x = self.strip.join(x)
        said = {t.name: self._say(t, x, segments, ends) for t in self.cfg.tasks}
        said |= self.taps.let_out(self.strip, self.ahead.tokens)
        if not self.cfg.lm:
            return said if said else {"hidden": self.norm(x)}
        return said | self._speak(x, labels, weights, last=last, candidates=candidates, soften=soften, most=most)

    def _say(self, task: Head, x: Tensor, segments: Tensor | None, ends: Tensor | None) -> Tensor:
        """Return what the head of a task says of x [B, T, D]."""
        head: Any = self.heads[task.name]
        if task.kind == "tag":
            return head(self.norm(x))                                                   # type: ignore[no-any-return]
        x = x if self.span is None else self.span.whole(x)
        if task.kind == "answer":
            return head(self.norm(x))                                                   # type: ignore[no-any-return]
        if task.kind == "embed":
            return pooled(self.norm(x), segments, 1 if ends is None or ends.ndim == 1 else ends.shape[1])
        places = torch.full((x.shape[0], 1), x.shape[1] - 1, device=x.device) if ends is None else ends.reshape(x.shape[0], -1)
        said: Tensor = head(self.norm(x.gather(1, places[:, :, None].expand(-1, -1, x.shape[-1]))))     # [B, P, K]
        return said[:, 0] if task.kind == "classify" else said[..., 0]

    def _speak(self, x: Tensor, labels: Tensor | None, weights: Tensor | None, *, last: bool, **of: Any) -> dict[str, Any]:
        """Return what the vocabulary's head says of x [B, T, D]."""
        table = self.embed if self.head is None else self.head
        if labels is None:
            x = self.norm(x[:, -1:] if last else x)
            return {"logits": self._all(x, table), "hidden": x}
        index = head.learned(labels if weights is None else weights, everything=weights is None)
        x = self.norm(head.select(x.flatten(0, 1), index))                      # [N, D]
        return speak("lm", x, rounded.seen(table), labels, weights, index=index, **of)

    def _all(self, x: Tensor, table: Any) -> Tensor:
        """Return all logits [B, T, V]."""
        if self.speaks is not None:
            return self.speaks(x)                                                       # type: ignore[no-any-return]
        return packed.multiplied(x, table, None) if packed.is_packed(table) else head.logits(x, rounded.seen(table))

    def _places(self, tokens: int, device: torch.device, positions: Tensor | None, cache: Cache | Step | None) -> Tensor:
        """Return the places of the tokens in their documents, [B or 1, T]."""
        if positions is not None:
            return self.ahead.positions(positions)
        if self.span is not None:
            return self.span.mine[None] + self.ahead.keys
        past = 0 if cache is None else cache.length if cache.lengths is None else cache.lengths[:, None]
        return torch.arange(tokens, device=device)[None] + past + self.ahead.keys

    def use(self, choice: Choice) -> Self:
        """Compute by the paths of `choice` from now on."""
        for _i, block in numbered(self.blocks):
            block.attention.path, block.mlp.path = choice.attention, choice.gelu
        return self

    @torch.no_grad()
    def init(self, seed: int) -> Self:
        """Fill in random weights: normal, and in GPT-2 smaller where added to the residual stream (Radford, 2019).

        Each weight has a generator of its own, by its name, so that it does not depend on layout or device.
        """
        for name, p in self.named_parameters():
            module, _dot, kind = name.rpartition(".")
            if "norm" in module:
                placed.local(p).fill_(1.0 if kind == "weight" else 0.0)
            elif kind == "bias":
                placed.local(p).zero_()
            else:
                added = self.cfg.family == "gpt2" and module.endswith((".o", ".down"))
                std = self.cfg.init_std / math.sqrt(2 * self.cfg.layers) if added else self.cfg.init_std
                placed.fill(p, partial(_normal, p.shape, std, chance.torch_seed(seed, f"init/{name}")))
        return self

    def flops(self, length: int) -> float:
        """Return the FLOPs of training on one token in rows of `length`: 6 for each weight; attention in full."""
        cfg = self.cfg
        assert cfg.vocab is not None
        attending = 2 * cfg.head_width * (cfg.heads + cfg.kv_heads) * cfg.width         # q and o, k and v
        forward = (3 if cfg.gated else 2) * cfg.width * cfg.hidden
        products = cfg.layers * (attending + forward) + cfg.vocab * cfg.width
        return 6.0 * products + 12.0 * cfg.layers * cfg.heads * cfg.head_width * length


def _normal(shape: torch.Size, std: float, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=source)
