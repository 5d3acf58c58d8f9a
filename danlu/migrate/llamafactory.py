"""LLaMA-Factory's YAML: its own keys, and those of the Trainer below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danlu.data.columns import ROLES
from danlu.data.detect import registered
from danlu.errors import DanluError
from danlu.migrate import trainer
from danlu.migrate.rules import (
    Given,
    Rule,
    Said,
    Table,
    learned,
    listed,
    names,
    needless,
    off,
    one,
    picked,
    plain,
    said,
    to,
    within,
)
from danlu.words import _

DEFAULTS: dict[str, Any] = trainer.DEFAULTS | {
    "stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "lora_alpha": None, "lora_dropout": 0.0, "lora_target": "all",
    "cutoff_len": 2048, "packing": None, "val_size": 0.0,
}


def stage(name: str, value: Any, given: Given) -> Said:
    """Translate the stage: both that learn from text are one objective."""
    if value in ("pt", "sft", None):
        return Said("translated", {"objective.kind": "causal_lm"})
    return Said("unsupported", note=_("learning from preferences or rewards is not here yet; stages pt and sft are"),
                essential=True)


def method(name: str, value: Any, given: Given) -> Said:
    """Translate full and LoRA fine-tuning."""
    if value in ("lora", None):
        return Said("translated", {"adapt.kind": "lora"})
    if value == "full":
        return Said("default", note=_("without `adapt` every weight is trained"))
    return Said("unsupported", note=_("only lora and full are translated; `danlu config schema` lists what `adapt` can be"),
                essential=True)


def alpha(name: str, value: Any, given: Given) -> Said:
    """Translate lora_alpha; nothing is theirs for twice the rank."""
    return Said("translated", {"adapt.alpha": value or 2 * int(given.get("lora_rank", 8))})


def target(name: str, value: Any, given: Given) -> Said:
    """Translate the layers that get an adapter: all, or names."""
    names = listed(value)
    return Said("translated", {"adapt.target": "all" if names in (["all"], []) else names})


def length(name: str, value: Any, given: Given) -> Said:
    """Translate the row, and what becomes of longer texts: cut, in packed rows dropped, in pretraining split."""
    longer = "split" if given.get("stage") == "pt" else "drop" if packed(given) else "cut"
    return said(name, value, {"length": value, "overlong": longer},
                _("theirs for longer texts: {what}; overlong=error would stop at the first").format(what=longer))


def packed(given: Given) -> bool:
    """Return whether rows are filled: if asked for, and in pretraining unless told not to."""
    return bool(given.get("neat_packing") or given.get("packing", given.get("stage") == "pt"))


def packing(name: str, value: Any, given: Given) -> Said:
    """Translate packing; texts in one row never see each other here."""
    note = _("texts in one row are isolated from each other, as by neat_packing") if packed(given) else ""
    if name == "neat_packing" and not value:
        return Said("default", note=_("see packing"))
    return said(name, value, {"pack": packed(given)}, note)


def dataset(key: str) -> Rule:
    """Return a rule: names in dataset_info.json become files and hub data sets under our `key`."""
    def rule(name: str, value: Any, given: Given) -> Said:
        if not listed(value):
            return Said("default", note=_("not set"))
        found: list[dict[str, Any]] = []
        wrong, notes = [], []                            # problems; sentences
        for each in listed(value):
            source, problem = find(str(each), given)
            found += [source] if source else []
            wrong += [f"{each}: {problem}"] if problem else []
        if wrong:
            return Said("unsupported", {key: found} if found else {}, "; ".join(wrong), essential=True)
        if len(found) > 1 and given.get("mix_strategy", "concat") == "concat":
            notes.append(_("sources have equal shares; set data.N.weight to the rows of each for theirs"))
        if given.get("interleave_probs") is not None and key == "data":
            chances = [float(chance) for chance in listed(given.get("interleave_probs"))]
            found = [one | {"weight": chance} for one, chance in zip(found, chances, strict=False)]
        return Said("translated", {key: found}, "; ".join(notes))
    return rule


def find(name: str, given: Given) -> tuple[dict[str, Any] | None, str]:
    """Return the source that a data set is, by dataset_info.json, or (None, problem); a path stands for itself."""
    folder = Path(str(given.get("dataset_dir", "data")))
    here = next((p for p in (folder, given.folder / folder) if (p / "dataset_info.json").is_file()), None)
    if here is None:
        there = Path(name).suffix and (Path(name).exists() or (given.folder / name).exists())
        return ({"path": taken(name, given)}, "") if there else (
            None, _("there is no {file}; give its file under `data`").format(file=folder / "dataset_info.json"))
    try:
        entry = registered(here, name)
    except DanluError as error:
        return None, error.what
    if entry is None:
        return None, _("it is not in {file}").format(file=here / "dataset_info.json")
    path = entry.path if entry.path.startswith("hf://") else str(folder / Path(entry.path).relative_to(here))
    columns = {role: column for role, column in entry.names.items() if column not in ROLES.get(role, ())}
    part = {key: value for key, value in (("subset", entry.subset), ("hub_split", entry.split)) if value}
    return {"path": taken(path, given, entry.take)} | part | ({"columns": columns} if columns else {}), ""


def taken(path: str, given: Given, most: int | None = None) -> str:
    """Return the path with as many rows of it as the file asks for: `#500`."""
    counts = [count for count in (most, given.get("max_samples")) if count]
    return f"{path}#{min(counts)}" if counts else path


def share(name: str, value: Any, given: Given) -> Said:
    """Translate the share of the rows that is held out."""
    if given.get("eval_dataset"):
        return Said("default", note=_("eval_dataset is given"))
    return said(name, value, {"held_out": float(value or 0)}) if (value or 0) < 1 else Said(
        "unsupported", note=_("a number of rows; set held_out to a share below 1"))


def data() -> Table:
    """Return the rules of what is learned from."""
    images, streamed = _("images, video and sound are not here"), _("files are read in pieces, whatever their size")
    return {
        "template": lambda name, value, given: Said("default" if value in (None, "default") else "unsupported", note=_(
            "the chat template of the model's folder is used, ChatML if it has none; see a row with `danlu inspect`")),
        "dataset": dataset("data"), "eval_dataset": dataset("eval"), "dataset_dir": needless(_("part of the paths under `data`")),
        "cutoff_len": length, "packing": packing, "neat_packing": packing, "val_size": share,
        "train_on_prompt": learned("all"), "mask_history": learned("last"),
        "mix_strategy": plain("concat", "interleave_under", "interleave_over", why=_("shares are data.N.weight")),
        "interleave_probs": lambda name, value, given: Said("translated" if value else "default", {}, _("data.N.weight")),
        **dict.fromkeys(("streaming", "buffer_size", "overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers",
                         "tokenized_path", "data_shared_file_system"), needless(streamed)),
        "max_samples": lambda name, value, given: Said("translated" if value else "default", {}, _("#N after each path")),
        "media_dir": off(images),
        **dict.fromkeys(("image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches", "video_max_pixels",
                         "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video", "audio_sampling_rate",
                         "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"), needless(images)),
        "ignore_pad_token_for_loss": plain(True, why=_("padding is never learned from")),
        "eval_on_each_dataset": off(_("held-out data is measured as one")), "eval_num_beams": off(_("there is no beam search")),
        "tool_format": off(_("tools are written by the chat template")), "default_system": off(
            _("put the system turn into the data"), essential=True),
        "enable_thinking": plain(True, why=_("the chat template of the model's folder decides")),
        "reserved_label_len": needless(_("nothing is cut within an answer unless overlong=cut")),
    }


def adapters() -> Table:
    """Return the rules of what is trained."""
    def lora(rule: Rule) -> Rule:
        return within("finetuning_type", ("lora",), rule, usual="lora")

    low = _("low-rank and block-wise optimizers are not here")
    reward = _("of no effect in stages pt and sft")
    return {
        "stage": stage, "finetuning_type": method, "lora_rank": lora(to("adapt.rank")), "lora_alpha": lora(alpha),
        "lora_dropout": lora(to("adapt.dropout", unset=(None, 0, 0.0))), "lora_target": lora(target),
        "use_rslora": lora(to("adapt.rslora", unset=(None, False))), "use_dora": lora(to("adapt.dora", unset=(None, False))),
        "additional_target": lora(names("adapt.modules_to_save")),
        "loraplus_lr_ratio": lora(to("adapt.rate_ratio")), "pissa_init": lora(picked("adapt.init", {True: "pissa"}, why="")),
        **dict.fromkeys(("loraplus_lr_embedding", "pissa_iter", "pissa_convert"), needless(_("of no effect alone"))),
        "create_new_adapter": off(_("one adapter is trained at a time"), essential=True),
        **dict.fromkeys(("module_dropout", "oft_rank", "oft_block_size", "oft_target"), needless(_("of no effect without oft"))),
        **dict.fromkeys(("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
                        within("finetuning_type", ("freeze",), off(_("see finetuning_type")))),
        **dict.fromkeys(("pref_beta", "pref_ftx", "pref_bco_weight", "pref_loss", "dpo_label_smoothing", "kto_chosen_weight",
                         "kto_rejected_weight", "simpo_gamma", "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target",
                         "ppo_whiten_rewards", "ref_model", "ref_model_adapters", "ref_model_quantization_bit", "reward_model",
                         "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type", "ld_alpha"),
                        needless(reward)),
        **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_llama_pro", "use_mca"),
                        off(low, essential=True)),
        "use_muon": picked("optim.kind", {True: "muon", False: "adamw"}, why=low),
        "use_dft_loss": off(_("this loss is not here"), essential=True),
        "use_asft_loss": off(_("this loss is not here"), essential=True),
        "use_eaft_loss": off(_("this loss is not here"), essential=True), "pure_bf16": off(_("weights stay in fp32")),
        "disable_shuffling": off(_("rows always come in an order drawn from the seed")),
        "early_stopping_steps": to("stop.patience"), "plot_loss": to("report"),
        "compute_accuracy": off(_("held-out loss is measured")),
        "include_effective_tokens_per_second": needless(_("always told")),
    }


def model() -> Table:
    """Return the rules of the model, its memory and what happens after training."""
    tokens, later = _("new tokens are not added; give a folder whose tokenizer has them"), _("of no effect in training")
    return {
        "model_name_or_path": to("start"), "trust_remote_code": off(_("code of a model's folder is never run")),
        "adapter_name_or_path": one("adapt.start", _("one adapter is trained at a time; merge the others first")),
        "adapter_folder": off(_("merge the adapter first"), essential=True), "model_revision": plain(
            "main", why=_("download that revision, and give its folder as `start`"), essential=True),
        "rope_scaling": off(_("set it in the config.json of the model's folder"), essential=True),
        "resize_vocab": off(tokens, essential=True), "add_tokens": off(tokens, essential=True),
        "add_special_tokens": off(tokens, essential=True), "new_special_tokens_config": off(tokens, essential=True),
        "init_special_tokens": needless(tokens), "split_special_tokens": off(_("special tokens are never split")),
        "quantization_bit": within("finetuning_type", ("lora",), picked(
            "adapt.base", {4: "nf4", 8: "int8"}, why=_("4 and 8 bits are there; the base keeps its own precision")),
                                   usual="lora"),
        "train_from_scratch": off(_("describe the model under `model` in place of `start`"), essential=True),
        "mixture_of_depths": off(_("not here"), essential=True),
        "shift_attn": off(_("attention is always whole"), essential=True),
        "disable_gradient_checkpointing": needless(_("recompute=full turns it on")),
        "moe_aux_loss_coef": off(_("mixtures of experts are not here")), "fp8": off(_("bf16 and fp16 only")),
        **dict.fromkeys(("cache_dir", "use_fast_tokenizer", "low_cpu_mem_usage", "flash_attn", "use_unsloth", "use_unsloth_gc",
                         "enable_liger_kernel", "use_reentrant_gc", "upcast_layernorm", "upcast_lmhead_output", "offload_folder",
                         "use_v1_kernels", "print_param_status", "quantization_method", "quantization_type",
                         "double_quantization", "quantization_device_map", "fp8_backend", "fp8_enable_fsdp_float8_all_gather",
                         "hf_hub_token", "ms_hub_token", "om_hub_token", "use_kt", "kt_optimize_rule", "cpu_infer", "chunk_size",
                         "mode"), needless(_("how it is loaded and computed is decided here by `paths` and `layout`"))),
        **dict.fromkeys(("infer_backend", "use_kv_cache", "infer_dtype", "export_dir", "export_size", "export_device",
                         "export_quantization_bit", "export_quantization_dataset", "export_quantization_nsamples",
                         "export_quantization_maxlen", "export_legacy_format", "export_hub_model_id", "vllm_maxlen",
                         "vllm_gpu_util", "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config", "sglang_maxlen",
                         "sglang_mem_fraction", "sglang_tp_size", "sglang_config", "sglang_lora_backend", "kt_maxlen",
                         "kt_use_cuda_graph", "kt_mode", "kt_force_think", "do_sample", "temperature", "top_p", "top_k",
                         "num_beams", "max_length", "max_new_tokens", "repetition_penalty", "length_penalty",
                         "skip_special_tokens", "predict_with_generate", "generation_max_length", "generation_num_beams"),
                        needless(later)),
        **dict.fromkeys(("use_swanlab", "swanlab_project", "swanlab_workspace", "swanlab_run_name", "swanlab_mode",
                         "swanlab_api_key", "swanlab_logdir", "swanlab_lark_webhook_url", "swanlab_lark_secret", "ray_run_name",
                         "ray_storage_path", "ray_num_workers", "ray_init_kwargs", "resources_per_worker", "placement_strategy",
                         "mlflow_tracking_uri"), off(_("trackers and schedulers of other makers are not called"))),
    }


def table() -> Table:
    """Return a rule for each key."""
    return {**trainer.table(), **data(), **adapters(), **model()}


def defaults(given: Given) -> dict[str, Any]:
    """Return what their tool takes for keys that are not in the file, where the recipe must say it."""
    return DEFAULTS
