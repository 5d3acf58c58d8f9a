"""config.json of decoder families: read by closed tables into a Decoder, and written so that transformers opens it.

Nothing of `transformers` is asked, no code is loaded, and a key that no table names is refused: it might change what
the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from danlu.errors import IncompatibleError
from danlu.models import tasks
from danlu.models.decoder import FAMILIES, Decoder
from danlu.nn import position
from danlu.nn.tasks import Kind
from danlu.words import _

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}

# The ends of the names of the classes that have one head of a task, by its kind.
TASKS: dict[str, Kind] = {"ForSequenceClassification": "classify", "ForTokenClassification": "tag",
                          "ForQuestionAnswering": "answer"}

_COMMON = {"vocab_size": "vocab", "tie_word_embeddings": "tied", "initializer_range": "init_std"}
_LLAMA = _COMMON | {
    "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "head_dim": "head_width", "intermediate_size": "hidden",
    "max_position_embeddings": "context", "rms_norm_eps": "eps", "hidden_act": "activation",
    "attention_dropout": "attention_dropout",
}
FIELDS: dict[str, dict[str, str]] = {           # their key -> our field
    "gpt2": _COMMON | {
        "n_embd": "width", "n_layer": "layers", "n_head": "heads", "n_inner": "hidden", "n_positions": "context",
        "layer_norm_epsilon": "eps", "activation_function": "activation", "resid_pdrop": "dropout",
        "attn_pdrop": "attention_dropout",
    },
    "llama": _LLAMA | {"attention_bias": "qkv_bias", "mlp_bias": "mlp_bias"},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"attention_bias": "qkv_bias"},
    "mistral": _LLAMA | {"sliding_window": "window"},
}

# What their classes assume where config.json is silent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
             "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1,
             "attn_pdrop": 0.1, "tie_word_embeddings": True},
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
              "rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768,
              "rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 28},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-6, "sliding_window": 4096},
}

# Keys that must say this, because the model computes nothing else.
FIXED: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True), "add_cross_attention": (False,), "is_encoder_decoder": (False,),
    "is_decoder": (False, True), "pruned_heads": ({}, None), "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,), "auto_map": (None,),
}

# Keys that change no logit.
HARMLESS = frozenset({
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path",
    "name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "decoder_start_token_id", "pretraining_tp", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "n_ctx", "task_specific_params", "id2label", "label2id",
    "num_labels", "problem_type", "finetuning_task", "tokenizer_class", "prefix", "return_dict",
    "output_hidden_states", "output_attentions", "return_dict_in_generate", "output_scores", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward",
    "tie_encoder_decoder", "cross_attention_hidden_size", "gradient_checkpointing", "predict_special_tokens",
    "attn_implementation", "_attn_implementation", "original_max_position_embeddings",
})
_OWN = ("dropout", "qkv_bias", "out_bias", "mlp_bias", "norm_bias", "lm", "tasks")     # their config.json has no word for these
_WINDOWED = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu",
                "swish": "silu", "relu": "relu", "relu2": "relu2"}
_THEIR_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "silu": "silu", "relu": "relu", "relu2": "relu2"}


def read(data: Mapping[str, Any], *, where: str) -> Decoder:
    """Return the Decoder that `data` (a config.json) describes.  Raises IncompatibleError for what it does not know."""
    family = data["model_type"]
    _check_keys(family, data, where)
    told = DEFAULTS[family] | dict(data)
    fields = {ours: told[theirs] for theirs, ours in FIELDS[family].items()
              if theirs in told and (told[theirs] is not None or ours == "window")}
    activation = _ACTIVATIONS.get(str(fields.get("activation", "silu")))
    if activation is None:
        raise IncompatibleError(_("the activation {name!r} is not known").format(name=fields["activation"]),
                                where=where)
    fields |= {"family": family, "activation": activation}
    if family == "gpt2":
        if told["embd_pdrop"] != told["resid_pdrop"]:
            raise IncompatibleError(_("embd_pdrop and resid_pdrop differ, and this model has one dropout"), where=where,
                                    fix=_("make them equal in config.json; they matter to training alone"))
    else:
        fields |= _read_rope(told, where)
    if family in ("llama", "qwen3"):
        fields["out_bias"] = fields.get("qkv_bias", False)
    if family in ("qwen2", "qwen3"):
        fields |= _read_windows(told, where)
    fields |= _read_tasks(family, data, where)
    own = data.get("danlu", {})
    if "tasks" in own:
        own = own | {"tasks": tuple(tasks.restore(own["tasks"], where=where))}
    try:
        return Decoder.model_validate(fields | own, strict=True)
    except ValidationError as error:
        raise IncompatibleError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()),
                                where=where) from None


def write(cfg: Decoder) -> dict[str, Any]:
    """Return the config.json of `cfg`.  Rotary settings are spelled as older readers expect; newer ones take both."""
    told, kept = tasks.write(cfg.tasks)
    single = not cfg.lm and len(cfg.tasks) == 1 and cfg.tasks[0].kind in TASKS.values()
    base = ARCHITECTURES[cfg.family]
    if single:
        base = base.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + next(
            end for end, kind in TASKS.items() if kind == cfg.tasks[0].kind)
    data: dict[str, Any] = {"architectures": [base], "model_type": cfg.family, **told}
    data |= {theirs: getattr(cfg, ours) for theirs, ours in FIELDS[cfg.family].items()}
    if cfg.family == "gpt2":
        data |= {"activation_function": _THEIR_ACTIVATIONS[cfg.activation], "embd_pdrop": cfg.dropout}
    else:
        data |= {"hidden_act": _THEIR_ACTIVATIONS[cfg.activation], **_write_rope(cfg)}
    if cfg.family in ("qwen2", "qwen3"):
        sliding = cfg.window is not None
        data |= {"use_sliding_window": sliding, "sliding_window": cfg.window,
                 "max_window_layers": cfg.full_layers if sliding else cfg.layers}
    own = {field: getattr(cfg, field) for field in _OWN if field not in ("lm", "tasks")
           and field not in FIELDS[cfg.family].values() and getattr(cfg, field) != _assumed(cfg, field)}
    if not single:
        own |= ({"tasks": kept or [t.model_dump(mode="json") for t in cfg.tasks]} if cfg.tasks else {})
        own |= {} if cfg.lm else {"lm": False}
    elif kept:
        own |= {"tasks": kept}
    return data | ({"danlu": own} if own else {})


def _read_tasks(family: str, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a class with a task's head in place of the vocabulary's."""
    named = str(next(iter(data.get("architectures") or ()), ""))
    kind = next((kind for end, kind in TASKS.items() if named.endswith(end)), None)
    if kind is None:
        return {}
    return {"lm": False, "tied": False, "tasks": (tasks.read(kind, data, where=where),)}


def _assumed(cfg: Decoder, field: str) -> Any:
    """Return what `read` takes a field for that config.json does not mention."""
    if field == "out_bias" and cfg.family in ("llama", "qwen3"):
        return cfg.qkv_bias
    return FAMILIES[cfg.family].get(field, Decoder.model_fields[field].default)


def _check_keys(family: str, data: Mapping[str, Any], where: str) -> None:
    special = {"gpt2": frozenset({"embd_pdrop"}), "qwen2": _WINDOWED | _ROPE, "qwen3": _WINDOWED | _ROPE}
    known = HARMLESS | FIELDS[family].keys() | special.get(family, _ROPE) | {"danlu"}
    for key, value in data.items():
        if key in FIXED and value not in FIXED[key]:
            raise IncompatibleError(_("{key}={value} is not supported").format(key=key, value=value), where=where)
        if key not in known and key not in FIXED:
            raise IncompatibleError(
                _("the setting {key} of a {family} model is not known").format(key=key, family=family), where=where,
                fix=_("remove it if it does not change what the model computes"))
    own = data.get("danlu", {})
    strange = own.keys() - set(_OWN) if isinstance(own, dict) else {"…"}
    if strange:
        raise IncompatibleError(_("the setting {key} of a {family} model is not known").format(
            key=f"danlu.{min(strange)}", family=family), where=where)


def _read_rope(told: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = [told.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    rope = {k: v for part in given if isinstance(part, dict) for k, v in part.items()}
    theta = rope.pop("rope_theta", told.get("rope_theta", 10000.0))
    kind = str(rope.pop("rope_type", rope.get("type", "default")))
    rope.pop("type", None)
    share = rope.pop("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise IncompatibleError(
            _("{key}={value} is not supported").format(key="partial_rotary_factor", value=share), where=where)
    if kind == "default":
        return {"rope_theta": theta}
    table = {
        "linear": {"factor": "factor"},
        "llama3": {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high",
                   "original_max_position_embeddings": "original"},
        "yarn": {"factor": "factor", "original_max_position_embeddings": "original", "beta_fast": "fast",
                 "beta_slow": "slow", "attention_factor": "attention", "truncate": "truncate"},
    }.get(kind)
    if table is None or rope.keys() - table.keys():
        raise IncompatibleError(
            _("the rotary scaling {kind} with {keys} is not known").format(kind=kind, keys=", ".join(sorted(rope))),
            where=where)
    scaling = {table[key]: value for key, value in rope.items() if value is not None}
    if "original" in table.values():
        scaling.setdefault("original", told["max_position_embeddings"])
    return {"rope_theta": theta, "scaling": {"kind": kind, **scaling}}


def _write_rope(cfg: Decoder) -> dict[str, Any]:
    scaling = cfg.scaling
    told: dict[str, Any] | None = None
    if isinstance(scaling, position.Linear):
        told = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, position.Llama3):
        told = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original}
    elif isinstance(scaling, position.Yarn):
        told = {"rope_type": "yarn", "factor": scaling.factor, "original_max_position_embeddings": scaling.original,
                "beta_fast": scaling.fast, "beta_slow": scaling.slow, "truncate": scaling.truncate}
        if scaling.attention is not None:
            told["attention_factor"] = scaling.attention
    return {"rope_theta": cfg.rope_theta, "rope_scaling": told}


def _read_windows(told: Mapping[str, Any], where: str) -> dict[str, Any]:
    layers, most, window = told["num_hidden_layers"], told["max_window_layers"], told.get("sliding_window")
    if not (isinstance(layers, int) and isinstance(most, int)):
        return {"full_layers": most}                            # the config's own check says what is wrong
    sliding = bool(told.get("use_sliding_window")) and window is not None
    full = min(most, layers) if sliding else layers
    kinds = told.get("layer_types")
    if isinstance(kinds, list):
        full = next((i for i, kind in enumerate(kinds) if kind != "full_attention"), layers)
        ordered = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        if kinds != ordered or (full < layers and not sliding):
            raise IncompatibleError(
                _("these layer_types are not known: full layers must come before sliding ones"), where=where)
    return {"window": window, "full_layers": full} if full < layers else {"window": None}
