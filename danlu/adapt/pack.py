"""Adapters as `peft` stores them: adapter_config.json, and the names and shapes of adapter_model.safetensors.

GPT-2 has queries, keys and values in one matrix, c_attn, and we have three.  Three adapters of rank r are one of rank 3r
whose B has blocks; so they are written, and nothing is lost.

r rank, I inputs, O outputs, P virtual tokens, L layers, G key heads, K head width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.adapt import Adapter
from danlu.adapt.ia3 import IA3
from danlu.adapt.lora import LoRA
from danlu.adapt.peft import TYPES, VERSION, VIRTUAL, embeds, modules, shortest, task_of
from danlu.adapt.prompt import Prefix, Prompt, PTuning
from danlu.adapt.targets import Site, sites
from danlu.models import weights
from danlu.models.build import Config


class Fused(NamedTuple):
    """What `peft` has for one module of the Hugging Face model."""

    a: Tensor                           # [r, I]
    b: Tensor                           # [O, r]
    magnitude: Tensor | None            # [O]
    alpha: float


def pack(adapt: Adapter, cfg: Config, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return (adapter_config.json without the base's name, tensors under PEFT's names, tensors that PEFT has no word for).

    state: what `shapes` names.  The last are under our names.
    """
    if adapt.kind not in TYPES:
        return {"task_type": task_of(cfg), "inference_mode": True}, dict(state), {}
    config: dict[str, Any] = {"peft_type": TYPES[adapt.kind], "task_type": task_of(cfg), "inference_mode": True,
                              "auto_mapping": None, "revision": None, "peft_version": VERSION}
    prefix = "base_model." if TYPES[adapt.kind] in VIRTUAL else "base_model.model."
    whole = _whole(cfg, state)
    config["modules_to_save"] = shortest({name.rpartition(".")[0] for name in whole}, modules(cfg)) or None
    tensors = {f"{prefix}{name}": tensor for name, tensor in whole.items()}
    rest: dict[str, Tensor] = {}
    if isinstance(adapt, LoRA):
        more, packed = _pack_lora(adapt, cfg, state)
    elif isinstance(adapt, IA3):
        more, packed = _pack_ia3(cfg, state)
    else:
        made = _virtual(adapt, cfg, state)
        rest = {name: t for name, t in state.items() if name.startswith("ahead.")} if isinstance(adapt, PTuning) else {}
        more, packed = _virtual_config(adapt, cfg), {"prompt_embeddings": made}
    return config | more, tensors | packed, rest


def _whole(cfg: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that are trained in full, under Hugging Face's names."""
    found = {}
    for name in weights.named(cfg):
        if name.ours and not name.copy and all(ours in state for ours in name.ours):
            tensor = torch.cat([state[ours] for ours in name.ours])
            found[name.theirs] = tensor.mT if name.turned else tensor
    return found


def _pack_lora(adapt: LoRA, cfg: Config, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    found: dict[str, tuple[int, float]] = {}
    rows = weights.shapes(cfg)
    for site in sites(cfg):
        if not any(f"{ours}.lora_a" in state for ours in site.ours):
            continue
        made, at = _fused(adapt, rows, site, state), f"base_model.model.{site.theirs}"
        found[site.theirs] = (len(made.a), made.alpha)
        if embeds(site):
            tensors |= {f"{at}.lora_embedding_A": made.a, f"{at}.lora_embedding_B": made.b}
        else:
            tensors |= {f"{at}.lora_A.weight": made.a, f"{at}.lora_B.weight": made.b}
        if made.magnitude is not None:
            tensors[f"{at}.lora_magnitude_vector"] = made.magnitude
    usual = Counter(found.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "r": usual[0], "lora_alpha": _plain(usual[1]), "lora_dropout": adapt.dropout, "use_rslora": adapt.rslora,
        "use_dora": adapt.dora, "bias": "none", "fan_in_fan_out": cfg.family == "gpt2", "init_lora_weights": True,
        "target_modules": shortest(found, modules(cfg)), "rank_pattern": {}, "alpha_pattern": {}}
    for unusual in set(found.values()) - {usual}:
        for pattern in shortest({path for path, each in found.items() if each == unusual}, found):
            config["rank_pattern"][pattern], config["alpha_pattern"][pattern] = unusual[0], _plain(unusual[1])
    return config, tensors


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _fused(adapt: LoRA, sizes: Mapping[str, torch.Size], site: Site, state: Mapping[str, Tensor]) -> Fused:
    """Return one adapter that does what those of the site's modules do."""
    pairs, scale = {}, 1.0
    for ours in site.ours:
        if f"{ours}.lora_a" in state:
            a, b = state[f"{ours}.lora_a"], state[f"{ours}.lora_b"]
            if f"{ours}.lora_a0" in state:               # B·A - B₀·A₀
                a, b = torch.cat((a, state[f"{ours}.lora_a0"])), torch.cat((b, -state[f"{ours}.lora_b0"]), 1)
            pairs[ours], scale = (a, b), adapt.of(ours, site.theirs)[1]
    if len(site.ours) == 1:
        a, b = pairs[site.ours[0]]
    else:
        a, b = torch.cat([a for a, _b in pairs.values()]), _blocks(sizes, site, {ours: b for ours, (_a, b) in pairs.items()})
    lengths = [state[f"{ours}.magnitude"] for ours in site.ours if f"{ours}.magnitude" in state]
    return Fused(a, b, torch.cat(lengths) if lengths else None, scale * (math.sqrt(len(a)) if adapt.rslora else len(a)))


def _blocks(sizes: Mapping[str, torch.Size], site: Site, parts: Mapping[str, Tensor]) -> Tensor:
    """Return B of the fused matrix [O, r]: each part's columns in its own rows, 0 elsewhere."""
    rows = [sizes[f"{ours}.weight"][0] for ours in site.ours]
    like = next(iter(parts.values()))
    b = like.new_zeros(sum(rows), sum(part.shape[1] for part in parts.values()))
    row = column = 0
    for ours, height in zip(site.ours, rows, strict=True):
        if ours in parts:
            b[row : row + height, column : column + parts[ours].shape[1]] = parts[ours]
            column += parts[ours].shape[1]
        row += height
    return b


def _pack_ia3(cfg: Config, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, found, inputs, rows = {}, set(), set(), weights.shapes(cfg)
    for site in sites(cfg):
        at = f"base_model.model.{site.theirs}.ia3_l"
        if f"{site.ours[0]}.scale_in" in state:
            tensors[at] = state[f"{site.ours[0]}.scale_in"][None]
            inputs.add(site.theirs)
        elif any(f"{ours}.scale_out" in state for ours in site.ours):
            parts = [state.get(f"{ours}.scale_out", torch.ones(rows[f"{ours}.weight"][0])) for ours in site.ours]
            tensors[at] = torch.cat(parts)[:, None]
        else:
            continue
        found.add(site.theirs)
    return {"target_modules": shortest(found, modules(cfg)), "feedforward_modules": shortest(inputs, modules(cfg)),
            "fan_in_fan_out": cfg.family == "gpt2", "init_ia3_weights": True}, tensors


def _virtual(adapt: Adapter, cfg: Config, state: Mapping[str, Tensor]) -> Tensor:
    """Return `prompt_embeddings`: [P, D], or for a prefix [P, L·2·G·K]."""
    if isinstance(adapt, Prefix):
        names = [f"blocks.{i}.attention.prefix.{kind}" for i in range(cfg.layers) for kind in ("keys", "values")]
        return torch.cat([state[name] for name in names], 1)
    x = state["ahead.prompt.weight"]
    if isinstance(adapt, PTuning):
        for number, name in enumerate(("first", "second", "third")):
            x = F.linear(F.relu(x) if number else x, *(state[f"ahead.prompt.{name}.{kind}"] for kind in ("weight", "bias")))
    return x


def _virtual_config(adapt: Adapter, cfg: Config) -> dict[str, Any]:
    assert isinstance(adapt, Prompt | PTuning | Prefix)
    own = cfg.model_dump()
    heads = own.get("kv_heads", cfg.heads) if isinstance(adapt, Prefix) else cfg.heads
    width = heads * own.get("head_width", cfg.width // cfg.heads) if isinstance(adapt, Prefix) else cfg.width
    more: dict[str, Any] = {"num_virtual_tokens": adapt.tokens, "num_layers": cfg.layers, "num_attention_heads": heads,
                            "token_dim": width, "num_transformer_submodules": 1}
    if isinstance(adapt, Prompt):
        return more | {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    if isinstance(adapt, Prefix):
        return more | {"prefix_projection": False, "encoder_hidden_size": width}
    return more | {"encoder_hidden_size": adapt.hidden, "encoder_reparameterization_type": "MLP", "encoder_dropout": 0.0,
                   "encoder_num_layers": 2}


