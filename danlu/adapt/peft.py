"""Adapters as `peft` stores them: adapter_config.json and the names and shapes of adapter_model.safetensors, both ways.

GPT-2 has queries, keys and values in one matrix, c_attn, and we have three.  Three adapters of rank r are one of rank 3r
whose B has blocks; so they are written, and nothing is lost.  One adapter of rank r that `peft` trained on c_attn is read
as three with equal A.

r rank, I inputs, O outputs, P virtual tokens, L layers, G key heads, K head width.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.adapt import Adapter
from danlu.adapt.ia3 import IA3
from danlu.adapt.lora import LoRA
from danlu.adapt.prompt import Prefix, Prompt, PTuning
from danlu.adapt.targets import Site, kept, matches, sites
from danlu.errors import IncompatibleError
from danlu.models import weights
from danlu.models.build import Config, build
from danlu.words import _

VERSION = "0.21.2"                      # of the layout that is written
VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
TYPES: dict[str, str] = {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING", "ptuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
TASKS = {"lm": "CAUSAL_LM", "classify": "SEQ_CLS", "choose": None, "tag": "TOKEN_CLS", "answer": "QUESTION_ANS",
         "embed": "FEATURE_EXTRACTION"}
# Keys of adapter_config.json that are read, or say nothing that would change what is computed.
READ = frozenset({
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "feedforward_modules",
    "modules_to_save", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "num_virtual_tokens",
    "num_transformer_submodules", "bias", "init_lora_weights"})
HARMLESS = frozenset({
    "task_type", "inference_mode", "revision", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size",
    "init_ia3_weights", "loftq_config", "layers_pattern", "num_attention_heads", "num_layers", "token_dim", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "encoder_hidden_size", "encoder_num_layers",
    "encoder_dropout", "encoder_reparameterization_type", "prefix_projection", "init_weights", "runtime_config",
    "exclude_modules", "ensure_weight_tying"})
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")      # others leave another base behind


def shapes(adapt: Adapter, cfg: Config) -> dict[str, torch.Size]:
    """Return the name and shape of every tensor that belongs to the adapter: what is trained or was added."""
    model = build(cfg)
    adapt.apply(model)
    wanted = set(kept(model, cfg))
    return {name: t.shape for name, t in model.state_dict().items() if name in wanted}


def task_of(cfg: Config) -> str | None:
    """Return PEFT's word for what the model is for, None where it has none."""
    outputs = cfg.model_dump().get("outputs") or (("lm",) if cfg.kind == "decoder" else ())
    return "FEATURE_EXTRACTION" if not outputs else TASKS.get(outputs[0])


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
    config: dict[str, Any] = {"peft_type": TYPES[adapt.kind], "task_type": task_of(cfg), "inference_mode": True, "auto_mapping": None,
                              "revision": None, "peft_version": VERSION}
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


def modules(cfg: Config) -> set[str]:
    """Return all modules with tensors of the Hugging Face model."""
    return {name.theirs.rpartition(".")[0] for name in weights.named(cfg)}


def shortest(wanted: Collection[str], among: Iterable[str]) -> list[str]:
    """Return the shortest endings of paths that mean all of `wanted` and, of `among`, nothing else."""
    others, found = set(among) - set(wanted), set()
    for path in wanted:
        parts = path.split(".")
        endings = (".".join(parts[n:]) for n in range(len(parts) - 1, -1, -1))
        found.add(next(e for e in endings if e == path or not any(o == e or o.endswith(f".{e}") for o in others)))
    return sorted(found)


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
    for site in sites(cfg):
        if not any(f"{ours}.lora_a" in state for ours in site.ours):
            continue
        made, at = _fused(adapt, cfg, site, state), f"base_model.model.{site.theirs}"
        found[site.theirs] = (len(made.a), made.alpha)
        if _embeds(site):
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


def _embeds(site: Site) -> bool:
    return site.ours[0] in ("embed", "position")


def _fused(adapt: LoRA, cfg: Config, site: Site, state: Mapping[str, Tensor]) -> Fused:
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
        a, b = torch.cat([a for a, _b in pairs.values()]), _blocks(cfg, site, {ours: b for ours, (_a, b) in pairs.items()})
    lengths = [state[f"{ours}.magnitude"] for ours in site.ours if f"{ours}.magnitude" in state]
    return Fused(a, b, torch.cat(lengths) if lengths else None, scale * (math.sqrt(len(a)) if adapt.rslora else len(a)))


def _blocks(cfg: Config, site: Site, parts: Mapping[str, Tensor]) -> Tensor:
    """Return B of the fused matrix [O, r]: each part's columns in its own rows, 0 elsewhere."""
    rows = [weights.shapes(cfg)[f"{ours}.weight"][0] for ours in site.ours]
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
        return torch.cat([state[f"blocks.{i}.attention.prefix.{kind}"] for i in range(cfg.layers) for kind in ("keys", "values")], 1)
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


def unpack(adapt: Adapter, cfg: Config, tensors: Mapping[str, Tensor], *, own: bool, where: str) -> dict[str, Tensor]:
    """Return a file's tensors under our names: exactly those of `shapes`.  Raises IncompatibleError for any other set.

    own: Danlu wrote them, so a fused matrix has its blocks; otherwise its parts share one A.
    """
    wanted, rest = shapes(adapt, cfg), dict(tensors)
    state: dict[str, Tensor] = {}
    if adapt.kind not in TYPES:
        state, rest = rest, {}
    else:
        prefix = "base_model." if TYPES[adapt.kind] in VIRTUAL else "base_model.model."
        rest = {_spelt(cfg, key, prefix): tensor for key, tensor in rest.items()}
        state = _unpack_whole(cfg, rest, wanted)
        if isinstance(adapt, LoRA):
            state |= _unpack_lora(cfg, rest, wanted, own=own)
        elif isinstance(adapt, IA3):
            state |= _unpack_ia3(cfg, rest, wanted)
        elif "prompt_embeddings" in rest:
            state |= _unpack_virtual(adapt, cfg, rest, own=own)
    left, lacking = sorted(rest), sorted(wanted.keys() - state.keys())
    if left or lacking or state.keys() - wanted.keys():
        name = (left or lacking or sorted(state.keys() - wanted.keys()))[0]
        raise IncompatibleError(
            _("the adapter's tensor {name} belongs to nothing in this model").format(name=name) if left or not lacking
            else _("no tensor of the adapter gives {name}").format(name=name), where=where,
            fix=_("check that the adapter and its config belong to this base"))
    for name, tensor in state.items():
        if tensor.shape != wanted[name]:
            raise IncompatibleError(_("the weight {name} has shape {found}, and the model asks for {wanted}").format(
                name=name, found=tuple(tensor.shape), wanted=tuple(wanted[name])), where=where)
    return state


def _spelt(cfg: Config, key: str, prefix: str) -> str:
    """Return a key without PEFT's prefix, the module's path as this model's folder has it."""
    path = key.removeprefix(prefix)
    return path if path == "prompt_embeddings" or path.startswith("ahead.") else weights.modern(cfg, path)


def _unpack_whole(cfg: Config, rest: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    state, sizes = {}, weights.shapes(cfg)
    for name in weights.named(cfg):
        if name.theirs in rest and name.ours and all(ours in wanted for ours in name.ours):
            tensor = rest.pop(name.theirs)
            parts = torch.split(tensor.mT if name.turned else tensor, [sizes[ours][0] for ours in name.ours])
            state.update(zip(name.ours, parts, strict=True))
    return state


def _unpack_lora(cfg: Config, rest: dict[str, Tensor], wanted: Mapping[str, torch.Size], *, own: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for site in sites(cfg):
        at, kinds = site.theirs, ("lora_embedding_A", "lora_embedding_B") if _embeds(site) else ("lora_A.weight", "lora_B.weight")
        here = [ours for ours in site.ours if f"{ours}.lora_a" in wanted]
        if not here or any(f"{at}.{kind}" not in rest for kind in kinds):
            continue
        a, b = (rest.pop(f"{at}.{kind}") for kind in kinds)
        row = column = 0
        for ours in site.ours:
            height = wanted[f"{ours}.lora_b"][0] if ours in here else weights.shapes(cfg)[f"{ours}.weight"][0]
            rows = slice(row, row + height) if len(site.ours) > 1 else slice(None)
            row += height
            if ours not in here:
                continue
            rank = wanted[f"{ours}.lora_a"][0] * (2 if f"{ours}.lora_a0" in wanted else 1)
            mine = slice(column, column + rank) if own or len(site.ours) == 1 else slice(None)
            column += rank
            state |= _halves(ours, a[mine], b[rows, mine], wanted)
            if f"{ours}.magnitude" in wanted and f"{at}.lora_magnitude_vector" in rest:
                state[f"{ours}.magnitude"] = rest[f"{at}.lora_magnitude_vector"][rows]
        if f"{here[0]}.magnitude" in wanted:
            rest.pop(f"{at}.lora_magnitude_vector", None)
    return state


def _halves(ours: str, a: Tensor, b: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    if f"{ours}.lora_a0" not in wanted:
        return {f"{ours}.lora_a": a, f"{ours}.lora_b": b}
    half = len(a) // 2
    return {f"{ours}.lora_a": a[:half], f"{ours}.lora_b": b[:, :half], f"{ours}.lora_a0": a[half:], f"{ours}.lora_b0": -b[:, half:]}


def _unpack_ia3(cfg: Config, rest: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    state, rows = {}, weights.shapes(cfg)
    for site in sites(cfg):
        inputs, at = f"{site.ours[0]}.scale_in", f"{site.theirs}.ia3_l"
        if at in rest and inputs in wanted:
            state[inputs] = rest.pop(at).flatten()
        elif at in rest and any(f"{ours}.scale_out" in wanted for ours in site.ours):
            parts = torch.split(rest.pop(at).flatten(), [rows[f"{ours}.weight"][0] for ours in site.ours])
            state |= {f"{ours}.scale_out": part for ours, part in zip(site.ours, parts, strict=True) if f"{ours}.scale_out" in wanted}
    return state


def _unpack_virtual(adapt: Adapter, cfg: Config, rest: dict[str, Tensor], *, own: bool) -> dict[str, Tensor]:
    made = rest.pop("prompt_embeddings")
    if isinstance(adapt, PTuning):
        assert own, "another's P-tuning is read as a prompt"
        return {name: rest.pop(name) for name in list(rest) if name.startswith("ahead.")}
    if isinstance(adapt, Prompt):
        return {"ahead.prompt.weight": made}
    parts = made.chunk(2 * cfg.layers, 1)
    return {f"blocks.{i}.attention.prefix.{kind}": parts[2 * i + n].contiguous()
            for i in range(cfg.layers) for n, kind in enumerate(("keys", "values"))}


def adapter_of(config: Mapping[str, Any], cfg: Config, *, where: str) -> Adapter:
    """Return the adapter that an adapter_config.json of `peft` describes.  Raises IncompatibleError for what is not known."""
    kind = str(config.get("peft_type"))
    empty: tuple[Any, ...] = (None, False, {}, [], "", "none")
    for key, value in config.items():
        if key not in READ | HARMLESS and value not in empty:
            raise IncompatibleError(_("{key}={value} is not known").format(key=key, value=value), where=where)
    if config.get("bias") not in (None, "none"):
        raise IncompatibleError(_("{key}={value} is not known").format(key="bias", value=config["bias"]), where=where)
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise IncompatibleError(
            _("init_lora_weights={value} has left another base behind").format(value=config["init_lora_weights"]), where=where,
            fix=_("save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"))
    saved = tuple(p for p in dict.fromkeys(config.get("modules_to_save") or ())
                  if p not in ("classifier", "score", "qa_outputs"))      # heads are trained anyway
    if kind in VIRTUAL:
        if config.get("num_transformer_submodules") not in (None, 1):
            raise IncompatibleError(_("{key}={value} is not known").format(
                key="num_transformer_submodules", value=config["num_transformer_submodules"]), where=where)
        made: type[Prefix | Prompt] = Prefix if kind == "PREFIX_TUNING" else Prompt
        return made(tokens=config["num_virtual_tokens"], modules_to_save=saved)
    if kind not in ("LORA", "IA3"):
        raise IncompatibleError(_("the adapter {kind} is not known").format(kind=kind), where=where,
                                fix=_("use one of {kinds}").format(kinds=", ".join(TYPES.values())))
    found = {site.theirs: site for site in sites(cfg) if _targeted(config.get("target_modules") or (), site.theirs)}
    target = tuple(shortest(found, modules(cfg)))
    if kind == "IA3":
        inputs = [path for path in found if _targeted(config.get("feedforward_modules") or (), path)]
        return IA3(target=target, feedforward=tuple(shortest(inputs, modules(cfg))), modules_to_save=saved)
    return LoRA(rank=config["r"], alpha=float(config["lora_alpha"]), dropout=config.get("lora_dropout") or 0.0, target=target,
                rslora=bool(config.get("use_rslora")), dora=bool(config.get("use_dora")), modules_to_save=saved,
                ranks=_patterns(config.get("rank_pattern"), found), alphas=_patterns(config.get("alpha_pattern"), found))


def _targeted(target: str | Collection[str], path: str) -> bool:
    """Return whether PEFT means the module at `path`: a regular expression, or endings."""
    if isinstance(target, str):
        return re.fullmatch(target, path) is not None
    return any(path == each or path.endswith(f".{each}") for each in target)


def _patterns(given: Mapping[str, Any] | None, paths: Iterable[str]) -> dict[str, Any]:
    """Return PEFT's patterns, which are regular expressions, as the paths they mean."""
    return {path: value for path in paths for pattern, value in reversed(list((given or {}).items()))
            if re.match(rf"(.*\.)?({pattern})$", path)}


def same(a: Adapter, b: Adapter) -> bool:
    """Return whether two adapters are of the same make, whatever they are called and however they are trained."""
    left = {"start", "dropout", "rate_ratio", "thaw", "base"}
    return a.kind == b.kind and a.model_dump(exclude=left) == b.model_dump(exclude=left)


__all__ = ["adapter_of", "matches", "pack", "same", "shapes", "shortest", "task_of", "unpack"]
