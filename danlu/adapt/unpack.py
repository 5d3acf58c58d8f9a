"""What `peft` has stored as an adapter of ours: its config and its tensors, to the last name and shape.

One adapter of rank r that `peft` trained on GPT-2's c_attn is read as three with equal A; what `pack` wrote is read as it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from danlu.adapt import Adapter
from danlu.adapt.ia3 import IA3
from danlu.adapt.lora import LoRA
from danlu.adapt.peft import TYPES, VIRTUAL, embeds, modules, shapes, shortest
from danlu.adapt.prompt import Prefix, Prompt, PTuning
from danlu.adapt.targets import sites
from danlu.errors import IncompatibleError
from danlu.models import weights
from danlu.models.build import Config
from danlu.words import _

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
        name = (lacking or left or sorted(state.keys() - wanted.keys()))[0]
        raise IncompatibleError(
            _("no tensor of the adapter gives {name}").format(name=name) if lacking
            else _("the adapter's tensor {name} belongs to nothing in this model").format(name=name), where=where,
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
    state: dict[str, Tensor] = {}
    sizes = weights.shapes(cfg)
    for name in weights.named(cfg):
        if name.theirs in rest and name.ours and all(ours in wanted for ours in name.ours):
            tensor = rest.pop(name.theirs)
            parts = torch.split(tensor.mT if name.turned else tensor, [sizes[ours][0] for ours in name.ours])
            state.update(zip(name.ours, parts, strict=True))
    return state


def _unpack_lora(cfg: Config, rest: dict[str, Tensor], wanted: Mapping[str, torch.Size], *, own: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    sizes = weights.shapes(cfg)
    for site in sites(cfg):
        at, kinds = site.theirs, ("lora_embedding_A", "lora_embedding_B") if embeds(site) else ("lora_A.weight", "lora_B.weight")
        here = [ours for ours in site.ours if f"{ours}.lora_a" in wanted]
        if not here or any(f"{at}.{kind}" not in rest for kind in kinds):
            continue
        a, b = (rest.pop(f"{at}.{kind}") for kind in kinds)
        row = column = 0
        for ours in site.ours:
            height = sizes[f"{ours}.weight"][0]
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
    return {f"{ours}.lora_a": a[:half], f"{ours}.lora_b": b[:, :half],
            f"{ours}.lora_a0": a[half:], f"{ours}.lora_b0": -b[:, half:]}


def _unpack_ia3(cfg: Config, rest: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    state, rows = {}, weights.shapes(cfg)
    for site in sites(cfg):
        inputs, at = f"{site.ours[0]}.scale_in", f"{site.theirs}.ia3_l"
        if at in rest and inputs in wanted:
            state[inputs] = rest.pop(at).flatten()
        elif at in rest and any(f"{ours}.scale_out" in wanted for ours in site.ours):
            parts = torch.split(rest.pop(at).flatten(), [rows[f"{ours}.weight"][0] for ours in site.ours])
            named = {f"{ours}.scale_out": part for ours, part in zip(site.ours, parts, strict=True)}
            state |= {name: part for name, part in named.items() if name in wanted}
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
