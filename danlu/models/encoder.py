"""Encoders: BERT (Devlin et al., 2019) and RoBERTa (Liu et al., 2019), with heads for hidden tokens, sentence pairs and tasks.

B rows, T tokens, N positions that are learned from, D width, F hidden width, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn

from danlu import chance
from danlu.config import Model
from danlu.errors import IncompatibleError
from danlu.models.names import Name, rows, task_names
from danlu.nn import attention, head, packed, placed, rounded
from danlu.nn.ahead import Ahead
from danlu.nn.candidates import speak
from danlu.nn.collective import Span, Strip, numbered
from danlu.nn.drop import dropout
from danlu.nn.mlp import MLP, Activation, activate
from danlu.nn.paths import Choice
from danlu.nn.taps import Taps
from danlu.nn.tasks import Head, Heads, TaskHead, pooled
from danlu.nn.unpadded import real_in
from danlu.words import _

Family = Literal["bert", "roberta"]
Output = Literal["mlm", "nsp", "sop"]

# What a family's models have in common where it is not the default of Encoder's fields (which are BERT's).
FAMILIES: dict[str, dict[str, Any]] = {"bert": {}, "roberta": {"types": 1, "eps": 1e-5, "pad": 1}}

# Sizes by name (the small ones: Turc et al., 2019).  The vocabulary is the tokenizer's, so no preset has one.
PRESETS: dict[str, dict[str, Any]] = {
    "bert-tiny": {"width": 128, "layers": 2, "heads": 2},
    "bert-mini": {"width": 256, "layers": 4, "heads": 4},
    "bert-small": {"width": 512, "layers": 4, "heads": 8},
    "bert-medium": {"width": 512, "layers": 8, "heads": 8},
    "bert-base": {"width": 768, "layers": 12, "heads": 12},
    "bert-large": {"width": 1024, "layers": 24, "heads": 16},
    "roberta-base": {"family": "roberta", "width": 768, "layers": 12, "heads": 12},
    "roberta-large": {"family": "roberta", "width": 1024, "layers": 24, "heads": 16},
}

TP = {"q": "col", "k": "col", "v": "col", "o": "row", "up": "col", "down": "row"}

# Our names in a block and theirs, in both families.
NAMES = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norm2": "output.LayerNorm",
}


class Encoder(Model):
    """The shape of an encoder.  Every field is filled in: given, or by the preset, the family or other fields."""

    causal: ClassVar[bool] = False

    kind: Literal["encoder"] = "encoder"
    family: Family = Field("bert", description="The Hugging Face layout that the model is written in.")
    preset: str | None = Field(None, description="A size by name; fields given beside it win.")
    vocab: int | None = Field(None, gt=0, description="Number of token ids; empty: the tokenizer's.")
    width: int = Field(128, gt=0, description="Width of the residual stream.")
    layers: int = Field(4, gt=0, description="Number of blocks.")
    heads: int = Field(4, gt=0, description="Attention heads.")
    hidden: int = Field(0, ge=0, description="Width inside the feed-forward part; 0: 4 widths.")
    context: int = Field(512, gt=0, description="Most tokens that the model reads at once.")
    types: int = Field(2, gt=0, description="Kinds of stretches that are told apart (sentence A, sentence B).")
    pad: int = Field(0, ge=0, description="Id of the padding token; RoBERTa counts positions from the number after it.")
    eps: float = Field(1e-12, gt=0, lt=1, allow_inf_nan=False, description="What normalisation adds to the variance.")
    activation: Activation = Field("gelu", description="Activation of the feed-forward part.")
    dropout: float = Field(0.1, ge=0, lt=1, allow_inf_nan=False, description="Share of activations dropped in training "
                           "after embedding and each half of a block.")
    attention_dropout: float = Field(0.1, ge=0, lt=1, allow_inf_nan=False,
                                     description="Share of attention probabilities dropped in training.")
    pooler: bool | None = Field(None, description="A layer over the first token; empty: if nsp or sop reads it, or if "
                                "the model has no head at all.")
    outputs: tuple[Output, ...] | None = Field(
        None, description="Heads: mlm, nsp, sop; empty: those the objective needs.")
    tasks: Heads = Field(
        (), description="Heads of tasks, such as classify; filled in by the objective and the data.")
    init_std: float = Field(0.02, gt=0, allow_inf_nan=False, description="Standard deviation of the first weights.")

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
        made = handler(FAMILIES.get(str(sized.get("family", "bert")), {}) | sized)
        object.__setattr__(made, "__pydantic_fields_set__", set(given))     # so that a written recipe stays as short
        return made

    @model_validator(mode="after")
    def _derive(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                _("heads={heads} does not divide width={width}").format(heads=self.heads, width=self.width))
        if not self.hidden:
            object.__setattr__(self, "hidden", 4 * self.width)
        if self.outputs is not None:
            object.__setattr__(self, "outputs", tuple(o for o in ("mlm", "nsp", "sop") if o in self.outputs))
            pairs = {"nsp", "sop"} & set(self.outputs)
            if pairs and self.family == "roberta":
                raise ValueError(_("family=roberta has no head {name}; set model.family=bert").format(name=min(pairs)))
            if self.pooler is None:
                object.__setattr__(self, "pooler", bool(pairs) or self._pools or not (self.outputs or self.tasks))
            if pairs and not self.pooler:
                raise ValueError(_("the head {name} reads the pooler; leave pooler empty").format(name=min(pairs)))
        return self

    @property
    def _pools(self) -> bool:
        """Whether a task reads the pooler: BERT's classes of rows do, and in both families choices."""
        return any(t.kind == "choose" or (t.kind == "classify" and self.family == "bert") for t in self.tasks)

    def filled(self, *, vocab: int, heads: Sequence[str] = ("mlm",), pad: int | None = None) -> Encoder:
        """Return the config with vocabulary, heads and padding id, where they were left open."""
        heads = [name for name in heads if name not in {t.name for t in self.tasks}]
        unknown = set(heads) - {"mlm", "nsp", "sop"}
        if unknown:
            raise IncompatibleError(_("an encoder has no head {heads}").format(heads=", ".join(sorted(unknown))),
                                    fix=_("set model.kind=decoder, or objective.kind=masked_lm"))
        lacking = set(heads) - set(heads if self.outputs is None else self.outputs)
        if lacking:
            raise IncompatibleError(
                _("the objective needs the head {name}, which the model lacks").format(name=min(lacking)),
                fix=_("leave model.outputs empty, or name it there"))
        given = self.model_dump(include=self.model_fields_set)
        given |= {"vocab": vocab} if self.vocab is None else {}
        given |= {"pad": pad} if pad is not None and "pad" not in self.model_fields_set else {}
        given |= {"outputs": tuple(heads)} if self.outputs is None else {}
        return Encoder.model_validate(given)

    @property
    def tied(self) -> bool:
        """Whether the last layer reads the token embedding, too: the masked head's vocabulary is that."""
        return "mlm" in (self.outputs or ())

    def with_heads(self, heads: Sequence[str]) -> Encoder:
        """Return the config with `heads` alone, of those there are.  Raises IncompatibleError for others."""
        tasks = tuple(t for t in self.tasks if t.name in heads)
        heads, held = [name for name in heads if name not in {t.name for t in tasks}], self.outputs or ()
        lacking = set(heads) - set(held)
        if lacking:
            raise IncompatibleError(_("the model has no head {name}; it has {heads}").format(
                name=min(lacking), heads=", ".join(held) or "-"))
        if "nsp" in held and "sop" in heads and "nsp" not in heads:
            raise IncompatibleError(_("the head sop of this model comes with nsp; name both"))  # or takes its place
        pooler = self.pooler and (not (heads or tasks) or bool({"nsp", "sop"} & set(heads)) or self._pools)
        return Encoder.model_validate(self.model_dump() | {"outputs": tuple(heads), "tasks": tasks, "pooler": pooler})

    def with_tasks(self, tasks: Sequence[Head], *, outputs: Sequence[str] = ()) -> Encoder:
        """Return the config with these heads of tasks, and of the others only `outputs`; the pooler as they need it."""
        made = {"outputs": tuple(outputs), "tasks": tuple(tasks), "pooler": None}
        return Encoder.model_validate(self.model_dump() | made)


class Block(nn.Module):
    """Attention and feed-forward, each normalised after it is added to the stream."""

    def __init__(self, cfg: Encoder) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.attention = attention.Attention(cfg.width, cfg.heads, qkv_bias=True, out_bias=True,
                                             dropout=cfg.attention_dropout)
        self.norm1 = nn.LayerNorm(cfg.width, cfg.eps)
        self.mlp = MLP(cfg.width, cfg.hidden, activation=cfg.activation, bias=True)
        self.norm2 = nn.LayerNorm(cfg.width, cfg.eps)

    def forward(self, x: Tensor, see: attention.Sight) -> Tensor:
        """Return the next x [B, T, D]."""
        x = self.norm1(x + dropout(self.attention(x, see), self.dropout, self.training))
        return self.norm2(x + dropout(self.mlp(x), self.dropout, self.training))      # type: ignore[no-any-return]


class MaskedHead(nn.Module):
    """What stands between the last block and the vocabulary, whose weights are the token embedding's."""

    def __init__(self, cfg: Encoder) -> None:
        super().__init__()
        assert cfg.vocab is not None, "the vocabulary is filled in before the model is built"
        self.activation: Activation = cfg.activation if cfg.family == "bert" else "gelu"
        self.dense = nn.Linear(cfg.width, cfg.width)
        self.norm = nn.LayerNorm(cfg.width, cfg.eps)
        self.bias = nn.Parameter(torch.zeros(cfg.vocab))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor shaped like x [..., D]."""
        return self.norm(activate(self.dense(x), self.activation))      # type: ignore[no-any-return]


class EncoderModel(nn.Module):
    """An encoder with its weights.  Made by `models.build.build`, filled by `init` or by a folder."""

    def __init__(self, cfg: Encoder) -> None:
        super().__init__()
        assert cfg.vocab is not None and cfg.outputs is not None, "vocabulary and heads are filled in first"
        self.cfg = cfg
        self.first = cfg.pad + 1 if cfg.family == "roberta" else 0      # row of `position` for the first token
        self.embed = nn.Embedding(cfg.vocab, cfg.width)
        self.position = nn.Embedding(self.first + cfg.context, cfg.width)
        self.types = nn.Embedding(cfg.types, cfg.width)
        self.embed_norm = nn.LayerNorm(cfg.width, cfg.eps)
        self.blocks = nn.ModuleList(Block(cfg) for _layer in range(cfg.layers))
        self.pooler = nn.Linear(cfg.width, cfg.width) if cfg.pooler else None
        self.head = MaskedHead(cfg) if "mlm" in cfg.outputs else None
        self.pairs = nn.ModuleDict({name: nn.Linear(cfg.width, 2) for name in cfg.outputs if name != "mlm"})
        self.heads = nn.ModuleDict({t.name: TaskHead(t, cfg.width, dropout=cfg.dropout,
                                                     dense=t.kind == "classify" and cfg.family == "roberta") for t in cfg.tasks})
        self.last = True                                 # False in all but the last stage of a pipeline
        self.span: Span | None = None                    # set under context parallelism
        self.strip = Strip()                             # … and under sequence parallelism
        self.ahead = Ahead()                             # set by an adapter
        self.unpadded = False                            # True: padding is left out of all but attention
        self.taps = Taps()                               # opened where a student learns from the inside

    def forward(self, ids: Tensor, *, positions: Tensor | None = None, segments: Tensor | None = None,
                types: Tensor | None = None, labels: Tensor | None = None, weights: Tensor | None = None,
                ends: Tensor | None = None, starts: Tensor | None = None, candidates: Tensor | None = None,
                soften: Tensor | None = None, most: int = 0) -> Any:
        """Return {"hidden" [B, T, D], "logits" [B, T, V], "pooled" [B, D], "nsp" [B, 2], "sop" [B, 2]}, what there is.

        With labels [B, T] there is {"mlm": Scores} in place of "hidden" and "logits": the head then reads only the N
        positions whose weight is not 0.  ids, positions, segments, types [B, T].  What is said of pairs is read off the
        first token of each row.  candidates, soften, most: see nn/candidates.py.  Heads of tasks stand under their names:
        classify [B, K], tag [B, T, K], answer [B, T, 2], choose [B, P], embed [B, P, D]; starts [B, P]: the first token of each
        stretch.  `ends` is a decoder's and not used.  Under context parallelism answer, choose and embed are of whole rows.
        """
        x = self.through(self.enter(ids, positions, types), segments)
        return self.leave(x, labels, weights, segments=segments, starts=starts, candidates=candidates, soften=soften,
                          most=most) if self.last else x

    def enter(self, ids: Tensor, positions: Tensor | None, types: Tensor | None) -> Tensor:
        """Return the embedded ids [B, T, D]; in a later stage of a pipeline `ids` are that already."""
        if ids.is_floating_point():
            return ids
        cfg, tokens = self.cfg, ids.shape[1]
        if tokens + self.ahead.room() > cfg.context:
            raise IncompatibleError(
                _("{n} tokens do not fit the model's context of {context}").format(
                    n=tokens + self.ahead.room(), context=cfg.context),
                fix=_("shorten the text, or use a model with a longer context"))
        if positions is None:
            positions = torch.arange(tokens, device=ids.device)[None] if self.span is None else self.span.mine[None]    # [1, T]
        x, positions, types = self.ahead.enter(self.embed(ids), positions, types)
        x = x + self.position(positions + self.first)
        x = x + (self.types.weight[0] if types is None else self.types(types))
        return self.strip.cut(dropout(self.embed_norm(x), cfg.dropout, self.training))

    def through(self, x: Tensor, segments: Tensor | None) -> Tensor:
        """Return what the last block makes of x [B, T, D]."""
        known = self.ahead.segments(segments)
        see = attention.sight(x.shape[1] * self.strip.size, causal=False, device=x.device, segments=known,
                              dtype=attention.working_dtype(x), span=self.span)
        see = self.ahead.see(see, x)._replace(real=real_in(self, known))
        x = x if see.real is None else see.real.collect(x)
        for i, block in numbered(self.blocks):
            x = self.taps.take(i, block(x, see))
        return x if see.real is None else see.real.spread(x)

    def leave(self, x: Tensor, labels: Tensor | None, weights: Tensor | None, *, segments: Tensor | None = None,
              starts: Tensor | None = None, **of: Any) -> dict[str, Any]:
        """Return what `forward` does, from what the last block put out."""
        x = self.strip.join(x)
        skip = self.ahead.tokens                         # but what is said of a row is read off what comes first, whatever it is
        out: dict[str, Any] = {t.name: self._say(t, x if t.kind == "classify" else x[:, skip:], segments, starts)
                               for t in self.cfg.tasks}
        if self.pooler is not None:
            out["pooled"] = torch.tanh(self.pooler(x[:, 0]))
            out |= {name: pair(out["pooled"]) for name, pair in self.pairs.items()}
        x = x[:, skip:]
        out |= self.taps.let_out(self.strip, skip)
        if labels is None:
            out["hidden"] = x
            if self.head is not None:
                x = self.head(x)
                out["logits"] = (packed.multiplied(x, self.embed, self.head.bias) if packed.is_packed(self.embed) else
                                 head.logits(x, rounded.seen(self.embed), self.head.bias))
        elif self.head is not None:
            index = head.learned(labels if weights is None else weights, everything=weights is None)
            picked = self.head(head.select(x.flatten(0, 1), index))                         # [N, D]
            out |= speak("mlm", picked, rounded.seen(self.embed), labels, weights, bias=self.head.bias, index=index, **of)
        return out

    def _say(self, task: Head, x: Tensor, segments: Tensor | None, starts: Tensor | None) -> Tensor:
        """Return what the head of a task says of x [B, T, D]."""
        head: Any = self.heads[task.name]
        if task.kind not in ("tag", "classify") and self.span is not None:
            x = self.span.whole(x)
        if task.kind in ("tag", "answer"):
            return head(x)                                                              # type: ignore[no-any-return]
        if task.kind == "embed":
            return pooled(x, segments, 1 if starts is None else starts.shape[1])
        first = x[:, 0] if task.kind == "classify" or starts is None else x.gather(
            1, starts[:, :, None].expand(-1, -1, x.shape[-1]))                          # [B, D] or [B, P, D]
        if self.pooler is not None:
            first = torch.tanh(self.pooler(first))
        said: Tensor = head(first)
        return said[..., 0] if task.kind == "choose" else said

    def read(self, ids: Tensor, positions: Tensor | None = None, segments: Tensor | None = None,
             types: Tensor | None = None) -> Tensor:
        """Return what the last block says of each token, [B, T, D].  Raises IncompatibleError for too many tokens."""
        return self.through(self.enter(ids, positions, types), segments)

    def use(self, choice: Choice) -> Self:
        """Compute by the paths of `choice` from now on."""
        for _i, block in numbered(self.blocks):
            block.attention.path, block.mlp.path = choice.attention, choice.gelu
        return self

    @torch.no_grad()
    def init(self, seed: int) -> Self:
        """Fill in random weights as the papers' code does: normal, BERT's cut off at two deviations.

        Each weight has a generator of its own, by its name, so that it does not depend on layout or device.
        """
        for name, p in self.named_parameters():
            module, _dot, kind = name.rpartition(".")
            if "norm" in module:
                placed.local(p).fill_(1.0 if kind == "weight" else 0.0)
            elif kind == "bias":
                placed.local(p).zero_()
            else:
                placed.fill(p, partial(self._fresh, p.shape, chance.torch_seed(seed, f"init/{name}")))
        return self

    def _fresh(self, shape: torch.Size, seed: int) -> Tensor:
        source, std = torch.Generator().manual_seed(seed), self.cfg.init_std
        fresh = torch.empty(shape, dtype=torch.float32, device="cpu")
        if self.cfg.family == "bert":
            return nn.init.trunc_normal_(fresh, 0.0, std, -2 * std, 2 * std, generator=source)
        return fresh.normal_(0.0, std, generator=source)

    def flops(self, length: int) -> float:
        """Return the FLOPs of training on one token in rows of `length`, 6 a weight that multiplies it.

        The vocabulary head is left out: it reads only the hidden tokens, and how many those are is the objective's.
        """
        cfg = self.cfg
        products = cfg.layers * (4 * cfg.width**2 + 2 * cfg.width * cfg.hidden)
        return 6.0 * products + 12.0 * cfg.layers * cfg.width * length


def names(cfg: Encoder) -> Iterator[Name]:
    """Yield the Hugging Face name of every weight; heads that the model lacks may be there and are not read."""
    assert cfg.outputs is not None, "heads are filled in before weights are named"
    prefix = f"{cfg.family}." if cfg.outputs or cfg.tasks else ""
    listed = list(_both({"embed_norm": f"{prefix}embeddings.LayerNorm"}, True))
    for ours, theirs in (("embed", "word"), ("position", "position"), ("types", "token_type")):
        listed.append(Name(f"{prefix}embeddings.{theirs}_embeddings.weight", (f"{ours}.weight",)))
    listed.append(Name(f"{prefix}embeddings.position_ids", ()))                     # old files hold it
    layer = f"{prefix}encoder.layer.{{i}}"
    listed += _both({f"blocks.{{i}}.{ours}": f"{layer}.{theirs}" for ours, theirs in NAMES.items()}, True)
    listed += _both({"pooler": f"{prefix}pooler.dense"}, bool(cfg.pooler))
    masked = "mlm" in cfg.outputs
    top = {"bert": "cls.predictions", "roberta": "lm_head"}[cfg.family]
    dense, norm = ("transform.dense", "transform.LayerNorm") if cfg.family == "bert" else ("dense", "layer_norm")
    listed += _both({"head.dense": f"{top}.{dense}", "head.norm": f"{top}.{norm}"}, masked)
    listed.append(Name(f"{top}.bias", ("head.bias",) if masked else ()))
    for ours, theirs in (("embed.weight", "weight"), ("head.bias", "bias")):        # tied
        listed.append(Name(f"{top}.decoder.{theirs}", (ours,) if masked else (), copy=masked))
    if cfg.family == "bert":
        pairs = [name for name in ("nsp", "sop") if name in cfg.outputs]        # the first goes where BERT has its own
        listed += _both({f"pairs.{pairs[0] if pairs else 'nsp'}": "cls.seq_relationship"}, bool(pairs))
        listed += _both({"pairs.sop": "cls.sentence_order"}, len(pairs) > 1)
    return rows([*listed, *task_names(cfg.tasks, {"classify": ("dense", "out_proj")} if cfg.family == "roberta" else {})],
                cfg.layers)


def _both(table: dict[str, str], read: bool) -> Iterator[Name]:
    for ours, theirs in table.items():
        for kind in ("weight", "bias"):
            yield Name(f"{theirs}.{kind}", (f"{ours}.{kind}",) if read else ())


def modern(cfg: Encoder, name: str) -> str:
    """Return what `names` calls a tensor that an older folder, or one with other heads, calls `name`."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    name = name.removeprefix(f"{cfg.family}.")
    if (cfg.outputs or cfg.tasks) and name.startswith(("embeddings.", "encoder.", "pooler.")):
        return f"{cfg.family}.{name}"
    return name
