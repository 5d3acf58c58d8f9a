"""Axolotl's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from danlu.data.columns import ROLES
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
    quantized,
    said,
    to,
    within,
)
from danlu.migrate.trl import place
from danlu.words import _

DEFAULTS: dict[str, Any] = {
    "optimizer": "adamw_torch_fused", "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "lr_scheduler": "cosine",
    "num_epochs": 1.0, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "sequence_len": 512,
    "sample_packing": False, "val_set_size": 0.0, "warmup_ratio": 0.03, "output_dir": "model-out",
}
LORA: dict[str, Any] = {"lora_dropout": 0.0}
TYPES = ("alpaca", "chat_template", "sharegpt", "completion", "input_output", "alpaca_w_system", "pretrain")
DETAILS: dict[str, tuple[Any, ...]] = {                  # of a data set: what is understood, or is as here
    "split": ("train",), "ds_type": ("json", "jsonl", "csv", "parquet", "text"), "shards": (), "revision": (),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "roles_to_train": (["assistant"], ["gpt"], ["gpt", "assistant"], ["assistant", "gpt"]),
    "train_on_eos": ("turn",),
    "roles": ({"user": ["human", "user"], "assistant": ["gpt", "assistant"], "system": ["system"], "tool": ["tool"]},
              {"assistant": ["gpt", "assistant"], "user": ["human", "user"]}, {"assistant": ["gpt"], "user": ["human"]},
              {"user": ["user"], "assistant": ["assistant"]}),
    "message_field_training": ("train", "loss", "weight"), "message_field_training_detail": ("train_detail",),
    "trust_remote_code": (False,), "drop_system_message": (False,), "conversation": ("chatml",),
    "chat_template": ("tokenizer_default", "chatml", "tokenizer_default_fallback_chatml"),
}


FIELDS = {"field_messages": "messages", "field_tools": "tools", "field": "text", "text_column": "text", "field_system": "system",
          "field_instruction": "instruction", "field_input": "input", "field_output": "output",
          "message_field_role": "role_tag", "message_field_content": "content_tag"}     # of a data set: our roles of columns
USUAL = {"role_tag": ("role", "from"), "content_tag": ("content", "value")}


def method(name: str, value: Any, given: Given) -> Said:
    """Translate the adapter; qlora is LoRA on a base of few bits, which load_in_4bit asks for."""
    if value in (None, ""):
        return Said("default", note=_("without `adapt` every weight is trained"))
    if value in ("lora", "qlora"):
        return Said("translated", {"adapt.kind": "lora"})
    return Said("unsupported", note=_("only lora is translated; `danlu config schema` lists what `adapt` can be"), essential=True)


def lora(rule: Rule) -> Rule:
    """Return the rule of a key that counts only with an adapter."""
    return within("adapter", ("lora", "qlora"), rule)


def target(name: str, value: Any, given: Given) -> Said:
    """Translate the layers that get an adapter; lora_target_linear is theirs for all."""
    if given.get("lora_target_linear"):
        return Said("default", note=_("lora_target_linear takes them all"))
    names = listed(value) if value else []
    return Said("translated", {"adapt.target": "all" if names == ["all-linear"] else names}) if names else Said("default")


def linear(name: str, value: Any, given: Given) -> Said:
    """Translate all linear layers."""
    return Said("translated", {"adapt.target": "all"}) if value else Said("default", note=_("off, as here"))


def datasets(key: str) -> Rule:
    """Return a rule: a list of data sets becomes sources under our `key`."""
    def rule(name: str, value: Any, given: Given) -> Said:
        if not value:
            return Said("default", note=_("not set"))
        found: list[dict[str, Any]] = []
        for each in [{"path": value}] if isinstance(value, str) else value:
            names = listed(each["data_files"]) if each.get("data_files") else [place(str(each.get("path")), given)]
            found += [{"path": path} | part(each, path) | columns(each) for path in names]
        note = _("sources have equal shares; set data.N.weight to the rows of each for theirs") if len(found) > 1 else ""
        return Said("translated", {key: found}, note)
    return rule


def part(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return which part of a hub data set is meant, as a source says it."""
    given = {"subset": entry.get("name"), "hub_split": entry.get("split")}
    return {key: value for key, value in given.items() if value} if path.startswith("hf://") else {}


def columns(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return {columns: …} for a data set whose columns have names that are not found by themselves."""
    named = dict.fromkeys(FIELDS.values()) | {ours: entry[theirs] for theirs, ours in FIELDS.items() if entry.get(theirs)}
    mapped = entry.get("message_property_mappings") or {}
    named |= {f"{key}_tag": mapped.get(key) or named[f"{key}_tag"] for key in ("role", "content")}
    odd = {role: column for role, column in named.items() if column and column not in USUAL.get(role, ROLES.get(role, ()))}
    return {"columns": odd} if odd else {}


def detail(name: str, value: Any, entry: Mapping[str, Any]) -> Said:
    """Say what a key of one data set means: its place, its form, or a setting that readers find out themselves."""
    if name == "path":
        return Said("default", note=_("data_files names the files")) if entry.get("data_files") else Said("translated")
    if name == "data_files":
        return Said("translated")
    if name in ("split", "name") and isinstance(value, str) and (name, value) != ("split", "train") and (
            "[" not in value and not entry.get("data_files")):
        return Said("translated", note=_("beside the path of the data set"))
    if name == "train_on_eos" and value in ("all", "last"):
        return Said("unsupported", note=_("the end of every answer is learned, and of nothing else"))
    if name == "type" and isinstance(value, str) and value.split(".")[0].startswith("alpaca"):
        return Said("unsupported", note=_("prompts are written by the model's chat template, not as Alpaca's"))
    if name in FIELDS and columns({name: value}):
        return Said("translated", note=_("under `columns` of the source"))
    if name in FIELDS or value is None or (name in DETAILS and any(value == each for each in DETAILS[name])):
        return Said("default", note=_("found by its columns"))
    if name == "message_property_mappings" and isinstance(value, dict) and not value.keys() - {"role", "content"}:
        return Said("translated", note=_("under `columns` of the source"))
    if name == "type" and isinstance(value, dict):
        odd = {k: v for k, v in value.items() if k not in FIELDS and v is not None}
        return Said("default") if not odd else Said("unsupported", note=_(
            "prompts of one's own are not written here; turn the rows into messages: {names}").format(
                names=", ".join(odd)), essential=True)
    if name == "type":
        known = isinstance(value, str) and value.split(".")[0] in TYPES
        return Said("default", note=_("found by its columns")) if known else Said("unsupported", note=_(
            "rows of this form are not known; turn them into messages"), essential=True)
    if name in ("chat_template", "chat_template_jinja"):
        return Said("unsupported", note=_("the chat template of the model's folder is used, ChatML if it has none"))
    fix = _("rename the columns in the file") if name.startswith(("field", "message_")) else _("prepare a file that has it so")
    return Said("unsupported", note=_("not here; {fix}").format(fix=fix), essential=True)


def length(name: str, value: Any, given: Given) -> Said:
    """Translate the row; longer texts are dropped unless the file says otherwise."""
    longer = {"truncate": "cut", "raise": "error"}.get(str(given.get("excess_length_strategy")), "drop")
    longer = "split" if given.get("pretraining_dataset") else longer
    return said(name, value, {"length": value, "overlong": longer},
                _("theirs for longer texts: {what}; overlong=error would stop at the first").format(what=longer))


def batch(name: str, value: Any, given: Given) -> Said:
    """Translate the total number of rows: so many micro-batches."""
    if given.get("gradient_accumulation_steps") is not None or not value:
        return Said("default", note=_("gradient_accumulation_steps is given too, and wins") if value else "")
    micro = int(given.get("micro_batch_size", 1))
    return Said("translated", {"layout.micro": value // micro}) if value % micro == 0 else Said(
        "unsupported", note=_("micro_batch_size does not divide it"), essential=True)


def share(name: str, value: Any, given: Given) -> Said:
    """Translate the share of the rows that is held out."""
    if given.get("test_datasets"):
        return Said("default", note=_("test_datasets is given"))
    return said(name, value, {"held_out": float(value or 0)}) if (value or 0) < 1 else Said(
        "unsupported", note=_("a number of rows; set held_out to a share below 1"))


def per_epoch(key: str) -> Rule:
    """Return a rule for events so many times an epoch: the steps of an epoch are not known from the file."""
    return lambda name, value, given: Said("unsupported" if value else "default", note=_(
        "set {key} to a number of steps; `danlu train` says how many there are").format(key=key) if value else "")


def special(name: str, value: Any, given: Given) -> Said:
    """Say what special tokens mean: the tokenizer's own folder decides."""
    odd = [key for key, token in (value or {}).items() if token and key not in ("pad_token", "unk_token")]
    return Said("default", note=_("padding is never learned from") if value else "") if not odd else Said(
        "unsupported", note=_("the tokenizer's folder decides; see that its tokenizer_config.json says the same: {names}").format(
            names=", ".join(odd)))


def data() -> Table:
    """Return the rules of what is learned from."""
    tokens = _("new tokens are not added; give a folder whose tokenizer has them")
    read = _("files are read in pieces, by all cores")
    return {
        "datasets": datasets("data"), "test_datasets": datasets("eval"), "pretraining_dataset": datasets("data"),
        "sequence_len": length, "sample_packing": to("pack"),
        "excess_length_strategy": needless(_("see sequence_len")), "val_set_size": share, "special_tokens": special,
        "train_on_inputs": learned("all"),
        "chat_template": plain("tokenizer_default", "chatml", "tokenizer_default_fallback_chatml", why=_(
            "the chat template of the model's folder is used, ChatML if it has none; see a row with `danlu inspect`")),
        "chat_template_jinja": off(_("put the template into the model's folder as chat_template.jinja"), essential=True),
        "default_system_message": off(_("put the system turn into the data"), essential=True),
        "tokens": off(tokens, essential=True), "added_tokens_overrides": off(tokens, essential=True),
        "eot_tokens": off(_("the chat template says where a turn ends")),
        "curriculum_sampling": off(_("rows come in an order drawn from the seed"), essential=True),
        "min_sample_len": off(_("short texts are learned from; `danlu prepare` can drop them")),
        "dataset_exact_deduplication": off(_("the audit names duplicates; `danlu prepare` drops them with dedup: exact")),
        **dict.fromkeys(("shuffle_merged_datasets", "shuffle_before_merging_datasets"), plain(
            True, why=_("rows always come in an order drawn from the seed"))),
        **dict.fromkeys(("dataset_prepared_path", "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory",
                         "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_drop_last", "remove_unused_columns",
                         "skip_prepare_dataset", "sample_packing_group_size", "sample_packing_bin_size", "multipack_real_batches",
                         "sample_packing_sequentially", "eval_sample_packing", "pad_to_sequence_len", "batch_flattening",
                         "pretrain_multipack_buffer_size", "pretrain_multipack_attn", "pretraining_sample_concatenation",
                         "max_prompt_len", "streaming", "hf_use_auth_token"), needless(read)),
        **dict.fromkeys(("dataset_shard_num", "dataset_shard_idx", "push_dataset_to_hub"), off(_("prepare the file beforehand"))),
    }


def parts() -> Table:
    """Return the rules of the model and of what of it is trained."""
    reward = _("learning from preferences or rewards is not here yet")
    kernels = _("kernels are chosen by `paths`, and the loss never holds all logits")
    return {
        "base_model": to("start"), "adapter": method, "lora_r": lora(to("adapt.rank")), "lora_alpha": lora(to("adapt.alpha")),
        "lora_dropout": lora(to("adapt.dropout", unset=(None, 0, 0.0))), "lora_target_modules": lora(target),
        "lora_target_linear": lora(linear), "peft_use_dora": lora(to("adapt.dora", unset=(None, False))),
        "peft_use_rslora": lora(to("adapt.rslora", unset=(None, False))),
        "lora_model_dir": one("adapt.start", _("one adapter is trained at a time; merge the others first")),
        "lora_modules_to_save": lora(names("adapt.modules_to_save")),
        **dict.fromkeys(("lora_target_parameters", "peft_layers_to_transform", "peft_layers_pattern", "peft_layer_replication",
                         "peft_trainable_token_indices", "peft", "relora", "unfrozen_parameters"),
                        off(_("not translated; see `adapt` in `danlu config schema`"), essential=True)),
        "peft_init_lora_weights": lora(picked("adapt.init", {True: "default", "pissa": "pissa"}, why=_(
            "see `adapt` in `danlu config schema`"), essential=True)), "loraplus_lr_ratio": lora(to("adapt.rate_ratio")),
        "load_in_8bit": lora(quantized("int8")), "load_in_4bit": lora(quantized("nf4")),
        "gptq": off(_("weights that are quantized already are not read"), essential=True),
        **dict.fromkeys(("loraplus_lr_embedding", "lora_fan_in_fan_out", "lora_on_cpu", "qlora_sharded_model_loading",
                         "merge_lora",
                         "bnb_config_kwargs", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
                         "peft_autocast_adapter_dtype",
                         "relora_prune_ratio", "relora_cpu_offload"), needless(_("of no effect here"))),
        **dict.fromkeys(("rl", "reward_model", "process_reward_model"), off(reward, essential=True)),
        **dict.fromkeys(("trl", "vllm", "dpo_use_weighting", "orpo_alpha", "rpo_alpha", "simpo_gamma", "cpo_alpha", "rl_beta",
                         "kto_desirable_weight", "kto_undesirable_weight", "dpo_use_logits_to_keep"), needless(reward)),
        "num_labels": off(_("labels are read from the data"), essential=True), "revision_of_model": off(
            _("download that revision, and give its folder as `start`"), essential=True),
        "trust_remote_code": off(_("code of a model's folder is never run")), "tokenizer_config": off(
            _("put the tokenizer into the model's folder"), essential=True),
        "overrides_of_model_config": off(_("set them in the config.json of the model's folder"), essential=True),
        **dict.fromkeys(("model_type", "tokenizer_type", "base_model_config", "tokenizer_use_fast", "tokenizer_legacy",
                         "processor_type", "cls_model_config", "is_llama_derived_model", "is_mistral_derived_model",
                         "is_qwen_derived_model", "is_falcon_derived_model", "low_cpu_mem_usage", "device_map", "max_memory",
                         "gpu_memory_limit", "embeddings_skip_upcast"), needless(_("read from the model's folder"))),
        **dict.fromkeys(("xformers_attention", "sdp_attention", "flex_attention", "flash_attention", "flash_attn_cross_entropy",
                         "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "eager_attention",
                         "attn_implementation",
                         "unsloth_cross_entropy_loss", "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o",
                         "unsloth_rms_norm",
                         "unsloth_rope", "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
                         "liger_fused_linear_cross_entropy", "cut_cross_entropy", "chunked_cross_entropy"), needless(kernels)),
        "s2_attention": off(_("attention is always whole"), essential=True), "use_pose": off(_("not here"), essential=True),
        "noisy_embedding_alpha": off(_("noise on embeddings is not here; the run learns without it")),
        **dict.fromkeys(("qat", "fp8", "quantization"), off(_("not here; leave it out"))), "plugins": off(
            _("plugins are not loaded; kernels are chosen by `paths`")),
        **dict.fromkeys(("resize_token_embeddings_to_32x", "shrink_embeddings"), off(_("the vocabulary keeps its size"))),
        "mean_resizing_embeddings": needless(_("the vocabulary keeps its size")), "fix_untrained_tokens": off(
            _("rows of the word table are left as they are")),
    }


def training() -> Table:
    """Return the rules that differ from the Trainer's, of the same or other names."""
    return {
        "micro_batch_size": to("micro_rows"), "batch_size": batch, "num_epochs": trainer.epochs, "optimizer": trainer.optimizer,
        "lr_scheduler": trainer.schedule, "cosine_min_lr_ratio": to("schedule.floor"),
        "early_stopping_patience": to("stop.patience"),
        "eval_batch_size": needless(_("evaluation takes what fits; its size changes nothing")),
        "evals_per_epoch": per_epoch("every.evaluate"), "saves_per_epoch": per_epoch("every.save"),
        "eval_steps": trainer.every("every.evaluate", "eval_strategy", "steps"),
        "bfloat16": off(_("weights stay in fp32; bf16: true computes in it")),
        "float16": off(_("weights stay in fp32; fp16: true computes in it")),
        "float32": lambda name, value, given: Said("translated", {"precision": "fp32"}) if value else Said("default"),
        **dict.fromkeys(("lr_quadratic_warmup", "cosine_constant_lr_ratio", "lr_groups", "embedding_lr", "embedding_lr_scale",
                         "adam_epsilon2", "adam_beta3"), off(_("not here; leave it out"), essential=True)),
        "auto_resume_from_checkpoints": needless(_("a run goes on from the newest good checkpoint of its folder")),
        "use_tensorboard": lambda name, value,
        given: Said("translated", {"trackers": ["tensorboard"]}) if value else Said("default"),
        **dict.fromkeys(("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model",
                         "wandb_mode",
                         "use_wandb", "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "use_comet",
                         "comet_project_name",
                         "hf_mlflow_log_artifacts"), off(_("metrics.jsonl and TensorBoard only"))),
        **dict.fromkeys(("strict", "axolotl_config_path", "is_preprocess", "device", "world_size", "ddp", "gc_steps",
                         "profiler_steps",
                         "total_num_tokens", "include_tokens_per_second", "experimental_skip_move_to_device", "gradio_title"),
                        needless(_("of no effect here"))),
        **dict.fromkeys(("loss_watchdog_threshold", "loss_watchdog_patience"), needless(
            _("the guard stops a run whose loss leaves its history; see `guard`"))),
        "sequence_parallel_degree": off(_("set layout.cp")), "context_parallel_size": off(_("set layout.cp")),
        "tensor_parallel_size": off(_("set layout.tp")), "fsdp_version": needless(_("see fsdp")),
        "fsdp_final_state_dict_type": needless(_("checkpoints are written whole")),
        **dict.fromkeys(("do_causal_lm_eval", "do_bench_eval", "eval_table_size", "eval_max_new_tokens"), off(
            _("held-out loss is measured; danlu eval does the rest"))),
        **dict.fromkeys(("eval_causal_lm_metrics", "bench_dataset", "bench_split"), needless(_("of no effect alone"))),
    }


def table() -> Table:
    """Return a rule for each key."""
    return {**trainer.table(), **data(), **parts(), **training()}


def defaults(given: Given) -> dict[str, Any]:
    """Return what their tool takes for keys that are not in the file, where the recipe must say it."""
    taken = DEFAULTS | (LORA if given.get("adapter") in ("lora", "qlora") else {})
    if given.get("batch_size") is not None:
        taken.pop("gradient_accumulation_steps")
    if given.get("warmup_steps") is not None:
        taken.pop("warmup_ratio")
    return taken
