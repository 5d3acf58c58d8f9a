"""Hugging Face's names of a decoder's weights, family by family."""

from __future__ import annotations

from collections.abc import Iterator

from danlu.models.decoder import Decoder
from danlu.models.names import THEIRS, Name, rows, task_names


def names(cfg: Decoder) -> Iterator[Name]:
    """Yield the Hugging Face name of every weight."""
    if cfg.family == "gpt2":
        listed = _gpt2(cfg)
    else:
        listed = [Name(theirs, (ours,)) for ours, theirs in _LLAMA.items() if _has(cfg, ours)]
        listed.append(Name("model.layers.{i}.self_attn.rotary_emb.inv_freq", ()))       # old files hold it
    own = ("embed.weight" if cfg.tied else "head.weight",) if cfg.lm else ()
    listed.append(Name("lm_head.weight", own, copy=cfg.tied))
    if _turned(cfg):
        listed = [name._replace(theirs=name.theirs.replace("model.", "transformer.", 1)) for name in listed]
    theirs = THEIRS | {"classify": "score"} | ({} if cfg.family == "gpt2" else {"tag": "score"})
    biased = {head.name for head in cfg.tasks if head.kind != "classify"}
    return rows([*listed, *task_names(cfg.tasks, {}, theirs=theirs, biased=lambda head: head.name in biased)], cfg.layers)


def _turned(cfg: Decoder) -> bool:
    """Return whether the body stands under `transformer.` in place of `model.`, as their classes for answers have it."""
    return cfg.family in ("llama", "qwen2", "qwen3") and not cfg.lm and [t.kind for t in cfg.tasks] == ["answer"]


_LLAMA = {
    "embed.weight": "model.embed_tokens.weight",
    "blocks.{i}.norm1.weight": "model.layers.{i}.input_layernorm.weight",
    **{f"blocks.{{i}}.attention.{x}.{kind}": f"model.layers.{{i}}.self_attn.{x}_proj.{kind}"
       for x in "qkvo" for kind in ("weight", "bias")},
    "blocks.{i}.attention.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks.{i}.attention.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "blocks.{i}.norm2.weight": "model.layers.{i}.post_attention_layernorm.weight",
    **{f"blocks.{{i}}.mlp.{x}.{kind}": f"model.layers.{{i}}.mlp.{x}_proj.{kind}"
       for x in ("gate", "up", "down") for kind in ("weight", "bias")},
    "norm.weight": "model.norm.weight",
}


def _has(cfg: Decoder, ours: str) -> bool:
    if ours.endswith(".bias"):
        part = ours.split(".")[-2]
        return cfg.mlp_bias if "mlp" in ours else cfg.out_bias if part == "o" else cfg.qkv_bias
    return cfg.qk_norm or not ours.endswith(("q_norm.weight", "k_norm.weight"))


def _gpt2(cfg: Decoder) -> list[Name]:
    """Return GPT-2's names: its projections are stored transposed, and queries, keys and values in one tensor."""
    d, f = cfg.width, cfg.hidden
    at, layer = "blocks.{i}.", "transformer.h.{i}."
    listed = [Name("transformer.wte.weight", ("embed.weight",)), Name("transformer.wpe.weight", ("position.weight",))]
    qkv = [f"{at}attention.{x}" for x in "qkv"]
    for theirs, ours, biased, size in (
        ("attn.c_attn", qkv, cfg.qkv_bias, 3 * d), ("attn.c_proj", [f"{at}attention.o"], cfg.out_bias, d),
        ("mlp.c_fc", [f"{at}mlp.up"], cfg.mlp_bias, f), ("mlp.c_proj", [f"{at}mlp.down"], cfg.mlp_bias, d),
    ):
        listed.append(Name(f"{layer}{theirs}.weight", tuple(f"{x}.weight" for x in ours), turned=True))
        listed.append(_bias(f"{layer}{theirs}", ours, biased, size))
    for theirs, norm in ((f"{layer}ln_1", f"{at}norm1"), (f"{layer}ln_2", f"{at}norm2"), ("transformer.ln_f", "norm")):
        listed += [Name(f"{theirs}.weight", (f"{norm}.weight",)), _bias(theirs, [norm], cfg.norm_bias, d)]
    return [*listed, Name(f"{layer}attn.bias", ()), Name(f"{layer}attn.masked_bias", ())]       # masks in old files


def _bias(theirs: str, ours: list[str], biased: bool, size: int) -> Name:
    """Return the name of a bias; where ours has none, theirs is zero."""
    return Name(f"{theirs}.bias", tuple(f"{x}.bias" for x in ours) if biased else (), zeros=None if biased else (size,))


def modern(cfg: Decoder, name: str) -> str:
    """Return what `names` calls a tensor that a file of the bare model, or one with other heads, calls `name`."""
    if name.startswith(("lm_head.", "heads.", "score.", "classifier.", "qa_outputs.")):
        return name
    prefix = "transformer." if cfg.family == "gpt2" or _turned(cfg) else "model."
    return prefix + name.removeprefix("transformer.").removeprefix("model.")
