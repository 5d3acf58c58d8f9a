"""The keys of transformers' TrainingArguments, which LLaMA-Factory and TRL take too."""

from __future__ import annotations

from typing import Any

from danlu.migrate.rules import Given, Rule, Said, Table, needless, off, picked, plain, said, to
from danlu.words import _

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
             "inverse_sqrt": "inverse_sqrt", "polynomial": "polynomial", "cosine_with_min_lr": "cosine",
             "warmup_stable_decay": "wsd"}
PLAIN = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw": "adamw",
         "adafactor": "adafactor", "sgd": "sgd", "rmsprop": "rmsprop", "adagrad": "adagrad", "muon": "muon"}
SMALL = {"adamw_8bit": "adamw", "adamw_bnb_8bit": "adamw", "paged_adamw_8bit": "adamw", "paged_adamw_32bit": "adamw",
         "paged_adamw": "adamw", "adamw_torch_8bit": "adamw", "adamw_torch_4bit": "adamw", "lion_8bit": "lion",
         "lion_32bit": "lion", "paged_lion_8bit": "lion", "paged_lion_32bit": "lion"}
DEFAULTS: dict[str, Any] = {                             # of TrainingArguments, where the recipe must say something
    "optim": "adamw_torch_fused", "learning_rate": 5e-5, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "lr_scheduler_type": "linear", "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "max_grad_norm": 1.0,
}


def optimizer(name: str, value: Any, given: Given) -> Said:
    """Translate the optimizer's name; kinds that keep their state in 8 bits become the same ones in 32."""
    if value in SMALL:
        return Said("translated", {"optim.kind": SMALL[value]},
                    _("its state is kept in 32 bits here: the same steps, more memory"))
    if value in PLAIN:
        return said(name, value, {"optim.kind": PLAIN[value]})
    return Said("default", note=_("not set")) if value is None else Said(
        "unsupported", note=_("this optimizer is not here; `danlu config schema` lists those of `optim`"), essential=True)


def schedule(name: str, value: Any, given: Given) -> Said:
    """Translate the schedule's name."""
    if value in SCHEDULES:
        return said(name, value, {"schedule.kind": SCHEDULES[value]})
    return Said("default", note=_("not set")) if value is None else Said(
        "unsupported", note=_("this schedule is not here; `danlu config schema` lists those of `schedule`"), essential=True)


def schedule_parts(name: str, value: Any, given: Given) -> Said:
    """Translate lr_scheduler_kwargs: the rate at the end, the power, the last fall."""
    if not value:
        return Said("default", note=_("not set"))
    names = {"min_lr_rate": "schedule.floor", "power": "schedule.power", "num_decay_steps": "schedule.decay",
             "timescale": "schedule.timescale"}
    if not isinstance(value, dict) or value.keys() - names.keys():
        return Said("unsupported", note=_("known here: {names}").format(names=", ".join(names)), essential=True)
    return Said("translated", {names[key]: item for key, item in value.items()})


def warmup(name: str, value: Any, given: Given) -> Said:
    """Translate either form of the warm-up; warmup_steps above 0 wins over warmup_ratio, as there."""
    if not value:
        return Said("default", note=_("no warm-up"))
    if name == "warmup_ratio" and given.get("warmup_steps", 0):
        return Said("default", note=_("warmup_steps is given too, and wins"))
    if (value >= 1 and value != int(value)) or (name == "warmup_ratio" and value >= 1):
        return Said("unsupported", note=_("{value} is neither whole steps nor a share below 1").format(value=value),
                    essential=True)
    return said(name, value, {"schedule.warmup": int(value) if value >= 1 else float(value)})


def epochs(name: str, value: Any, given: Given) -> Said:
    """Translate passes over the data; max_steps above 0 wins over them, as there."""
    if (given.get("max_steps", -1) or -1) > 0:
        return Said("default", note=_("max_steps is given too, and wins"))
    return said(name, value, {"epochs": value})


def steps(name: str, value: Any, given: Given) -> Said:
    """Translate the number of updates; -1 is theirs for none."""
    return said(name, value, {"steps": value}) if value is not None and value > 0 else Said("default", note=_("not set"))


def every(key: str, strategy: str, otherwise: str) -> Rule:
    """Return a rule for a period in steps that counts only if their `strategy` is steps."""
    def rule(name: str, value: Any, given: Given) -> Said:
        if value is None:
            return Said("default", note=_("not set"))
        if given.get(strategy, otherwise) != "steps":
            return Said("default", note=_("of no effect without {key}={value}").format(key=strategy, value="steps"))
        if isinstance(value, float) and value < 1:
            return Said("unsupported", note=_("a share of the run; set {key} to a number of steps").format(key=key))
        return said(name, value, {key: int(value)})
    return rule


def moment(key: str, period: str, usual: int | None) -> Rule:
    """Return a rule for when something happens: never, every so many steps, or (not here) every epoch.

    usual: steps of their tool where `period` is not given; None: as often as it logs.
    """
    def rule(name: str, value: Any, given: Given) -> Said:
        value = {False: "no", None: "no"}.get(value, value) if not isinstance(value, str) else value
        if value == "no":
            return Said("translated", {key: 0})
        if value == "steps":
            if given.get(period) is not None:
                return Said("default", note=_("see {key}").format(key=period))
            return Said("translated", {key: usual or int(given.get("logging_steps", 500))})
        if value == "best":
            return Said("default", note=_("the best checkpoint is always written"))
        return Said("unsupported", note=_("not by epochs; set {key} to a number of steps").format(key=key))
    return rule


def keep(name: str, value: Any, given: Given) -> Said:
    """Translate the number of checkpoints kept; two at least, so that a damaged one has a sound one before it."""
    if value is None:
        return Said("default", note=_("not set"))
    return said(name, value, {"every.keep": value}) if value >= 2 else Said(
        "translated", {"every.keep": 2}, _("two are kept at least: if the last is damaged, there is one before it"))


def clip(name: str, value: Any, given: Given) -> Said:
    """Translate the largest norm; 0 is theirs for no limit."""
    return said(name, value, {"clip": value}) if value else Said("translated", {"clip": None})


def precision(name: str, value: Any, given: Given) -> Said:
    """Translate bf16 and fp16, of which one may be true."""
    other = given.get("fp16" if name == "bf16" else "bf16")
    if value in (True, "true"):
        return said(name, value, {"precision": name})
    if value == "auto" or (value is None and not other):
        return Said("default", note=_("the fastest arithmetic of the device is chosen"))
    if not value and name == "bf16" and not other and value is not None:
        return Said("translated", {"precision": "fp32"})
    return Said("default", note=_("off, as here"))


def recompute(name: str, value: Any, given: Given) -> Said:
    """Translate gradient checkpointing, kept on the device."""
    if value in (None, True, False):
        return Said("default", note=_("off, as here")) if not value else said(name, value, {"recompute": "full"})
    return Said("translated", {"recompute": "full"}, _("nothing is moved to the host: activations are recomputed"))


def trackers(name: str, value: Any, given: Given) -> Said:
    """Translate where metrics go; TensorBoard is the one tracker here."""
    names = [each for each in ([value] if not isinstance(value, list) else value) if each not in (None, "none")]
    if not names:
        return Said("default", note=_("metrics.jsonl is always written"))
    if names == ["tensorboard"]:
        return said(name, value, {"trackers": ["tensorboard"]})
    note = _("metrics.jsonl and TensorBoard only; send the lines of metrics.jsonl to the tracker yourself")
    return Said("unsupported", {"trackers": ["tensorboard"]} if "tensorboard" in names else {}, note)


def betas(name: str, value: Any, given: Given) -> Said:
    """Translate one of Adam's two decays; the other is theirs or their default."""
    return Said("default") if value is None else Said("translated", {f"optim.betas.{int(name == 'adam_beta2')}": value})


def best(name: str, value: Any, given: Given) -> Said:
    """Translate the metric that decides which checkpoint is best."""
    if value is None:
        return Said("default", note=_("not set"))
    word = "eval/" + str(value).removeprefix("eval_").removeprefix("eval/")
    return Said("default") if word == "eval/loss" else Said("translated", {"metric": word})


def resume(name: str, value: Any, given: Given) -> Said:
    """Translate resuming: here it is what a run does when its folder holds checkpoints."""
    if value in (None, True, "true"):
        return Said("default", note=_("a run goes on from the newest good checkpoint of its folder"))
    if value is False:
        return said(name, value, {"resume": False})
    return Said("unsupported", note=_("their checkpoints cannot be resumed; give the folder as `start` to begin from it"),
                essential=True)


def sharding(name: str, value: Any, given: Given) -> Said:
    """Say what a DeepSpeed or FSDP configuration asks for: it needs the number of devices, which is not in the file."""
    if value in OFF_ZERO:
        return Said("default", note=_("off, as here"))
    text = str(value).lower()
    kind = "grads" if any(word in text for word in ("z2", "zero2", "zero-2", "shard_grad_op", "'stage': 2")) else (
        "none" if any(word in text for word in ("z0", "z1", "zero1", "no_shard")) else "full")
    shard = "" if kind == "none" else f" layout.shard={kind}"
    note = _("how many devices there are is not in this file; add layout.dp=N{shard}, N the devices").format(shard=shard)
    return Said("unsupported", note=note)


OFF_ZERO: tuple[Any, ...] = (None, False, "", [], {})


def optimization() -> Table:
    """Return the rules of optimizer, schedule and arithmetic."""
    slow = _("not here; leave it out")
    return {
        "learning_rate": to("optim.lr"), "weight_decay": to("optim.weight_decay"), "adam_beta1": betas, "adam_beta2": betas,
        "adam_epsilon": to("optim.eps"), "optim": optimizer,
        "optim_args": off(_("give them under `optim`; `danlu config schema` lists them"), essential=True),
        "optim_target_modules": off(_("low-rank optimizers are not here"), essential=True),
        "lr_scheduler_type": schedule, "lr_scheduler_kwargs": schedule_parts, "warmup_steps": warmup, "warmup_ratio": warmup,
        "max_grad_norm": clip, "num_train_epochs": epochs, "max_steps": steps,
        "per_device_train_batch_size": to("micro_rows"), "gradient_accumulation_steps": to("layout.micro"),
        "auto_find_batch_size": off(_("`danlu rehearse` says what fits into memory; set micro_rows")),
        "average_tokens_across_devices": plain(
            True, why=_("the loss is always divided by the tokens of all devices; means of means are wrong on uneven batches")),
        "label_smoothing_factor": to("objective.smoothing", unset=(None, 0, 0.0)),
        "bf16": precision, "fp16": precision, "bf16_full_eval": needless(_("evaluation has the precision of training")),
        "fp16_full_eval": needless(_("evaluation has the precision of training")),
        "tf32": needless(_("PyTorch's setting is left as it is")),
        "gradient_checkpointing": recompute, "activation_checkpointing": recompute,
        "gradient_checkpointing_kwargs": needless(_("recomputation is never reentrant")),
        "activation_checkpointing_kwargs": needless(_("recomputation is never reentrant")),
        "torch_compile": to("compile", unset=(None, False)), "torch_compile_backend": off(_("PyTorch's own backend is used")),
        "torch_compile_mode": off(_("the default mode is used")),
        "use_liger_kernel": needless(_("the loss never holds all logits; kernels are chosen by `paths`")),
        "liger_kernel_config": needless(_("kernels are chosen by `paths`")), "use_cache": needless(_("no cache in training")),
        "neftune_noise_alpha": off(_("noise on embeddings is not here; the run learns without it")),
        "torch_empty_cache_steps": needless(_("PyTorch's allocator is left alone")),
        "use_cpu": picked("device", {True: "cpu", False: "auto"}, why=slow),
    }


def occasions() -> Table:
    """Return the rules of logging, evaluating and saving."""
    quiet, hub = _("the live line and metrics.jsonl say it"), _("nothing is sent to a hub; upload the checkpoint folder yourself")
    whole = _("evaluation sums on the device; nothing is gathered")
    return {
        "logging_strategy": moment("every.log", "logging_steps", 500),
        "logging_steps": every("every.log", "logging_strategy", "steps"),
        **dict.fromkeys(("logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm",
                         "logging_dir",
                         "include_num_input_tokens_seen", "skip_memory_metrics", "run_name", "project"), needless(quiet)),
        "logging_nan_inf_filter": plain(True, False, why="", note=_("bad numbers are written down, and the guard stops the run")),
        "report_to": trackers, **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), off(hub)),
        "eval_strategy": moment("every.evaluate", "eval_steps", None),
        "eval_steps": every("every.evaluate", "eval_strategy", "no"),
        "evaluation_strategy": moment("every.evaluate", "eval_steps", None),
        "eval_delay": off(_("evaluation begins at the start")), "eval_on_start": needless(_("always done")),
        "per_device_eval_batch_size": needless(_("evaluation takes what fits; its size changes nothing")),
        **dict.fromkeys(("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
                         "include_for_metrics", "batch_eval_metrics"), needless(whole)),
        "save_strategy": moment("every.save", "save_steps", 500), "save_steps": every("every.save", "save_strategy", "steps"),
        "save_total_limit": keep, "save_only_model": plain(
            False, why=_("checkpoints always hold the optimizer, so that every run can go on")),
        **dict.fromkeys(("save_on_each_node", "enable_jit_checkpoint", "overwrite_output_dir"),
                        needless(_("checkpoints are written once, whole, and never over others"))),
        "save_safetensors": plain(True, why=_("weights are always safetensors")),
        **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_always_push", "hub_revision"),
                        off(hub)),
        "hub_strategy": needless(hub),
        "load_best_model_at_end": needless(_("the best checkpoint is kept, and verbs that take a run folder say which they use")),
        "metric_for_best_model": best, "greater_is_better": needless(_("known by the metric's name")),
        "output_dir": to("out"),
    }


def machinery() -> Table:
    """Return the rules of data loading, processes and the rest."""
    loader = _("batches are made by this program's own reader")
    ddp = _("processes are started and watched by `layout` and `guard`")
    return {
        "seed": to("seed"), "data_seed": off(_("one seed draws everything; set seed")), "full_determinism": needless(
            _("runs repeat to the bit on one machine, with `threads` set")),
        "ignore_data_skip": plain(False, why=_("a resumed run always goes on at its own row")),
        "restore_callback_states_from_checkpoint": needless(_("always done")), "resume_from_checkpoint": resume,
        "dataloader_num_workers": to("workers"), "remove_unused_columns": needless(loader), "label_names": needless(loader),
        **dict.fromkeys(("dataloader_drop_last", "dataloader_pin_memory", "dataloader_persistent_workers",
                         "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
                         "length_column_name"), needless(loader)),
        "train_sampling_strategy": picked("group_by_length", {"random": False, "group_by_length": True}, why=_(
            "the order is always a random one, drawn from the seed")), "group_by_length": to("group_by_length"),
        **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
                         "ddp_backend", "ddp_timeout", "local_rank", "accelerator_config"), needless(ddp)),
        "parallelism_config": off(_("say it under `layout`")), "fsdp": sharding, "fsdp_config": needless(_("see fsdp")),
        "deepspeed": sharding, "debug": off(_("--debug shows tracebacks")),
        "do_train": plain(True, why=_("this file does not train: danlu eval and danlu generate do what it asks for"),
                          essential=True),
        "do_eval": needless(_("evaluation runs wherever rows are held out")),
        "do_predict": off(_("danlu generate, or danlu eval --samples, after training")),
    }


def table() -> dict[str, Rule]:
    """Return a rule for each key of TrainingArguments."""
    return {**optimization(), **occasions(), **machinery()}
