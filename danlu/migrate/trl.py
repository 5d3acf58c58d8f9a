"""What `trl sft --config` reads: SFTConfig, ModelConfig, ScriptArguments and DatasetMixtureConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danlu.migrate import trainer
from danlu.migrate.rules import Given, Said, Table, listed, names, needless, off, plain, quantized, said, to, within
from danlu.words import _

DEFAULTS: dict[str, Any] = trainer.DEFAULTS | {"learning_rate": 2e-5, "max_length": 1024, "packing": False}
LORA: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": None}


def place(path: str, given: Given) -> str:
    """Return a local path as it is, and the name of a hub data set as hf://name."""
    here = path.startswith((".", "/", "~")) or Path(path).exists() or (given.folder / path).exists() or "://" in path
    return path if here or path.count("/") != 1 or Path(path).suffix in (".json", ".jsonl", ".csv",
                                                                         ".parquet") else f"hf://{path}"


def dataset(name: str, value: Any, given: Given) -> Said:
    """Translate the data set, and its test part if the run evaluates."""
    if given.get("datasets"):
        return Said("default", note=_("datasets is given too, and wins"))
    if not value:
        return Said("default", note=_("not set"))
    column = given.get("dataset_text_field", "text")
    one: dict[str, Any] = {"path": place(str(value), given)} | ({"columns": {"text": column}} if column != "text" else {})
    hub = one["path"].startswith("hf://")
    one |= {"subset": given.get("dataset_config")} if hub and given.get("dataset_config") else {}
    learned = one | ({"hub_split": given.get("dataset_train_split")} if hub and given.get("dataset_train_split") else {})
    if given.get("eval_strategy", "no") == "no":
        return Said("translated", {"data": [learned], "held_out": 0.0})
    if not hub:
        return Said("unsupported", {"data": [learned]}, _("name the file of the rows to measure on under `eval`"), essential=True)
    return Said("translated", {"data": [learned], "eval": [one | {"hub_split": given.get("dataset_test_split") or "test"}]})


def part(name: str, value: Any, given: Given) -> Said:
    """Say where a part of the hub data set goes: it stands beside its path."""
    return Said("translated" if value else "default", note=_("beside the path of the data set") if value else "")


def datasets(name: str, value: Any, given: Given) -> Said:
    """Translate a list of data sets; their columns are told by their names."""
    if not value:
        return Said("default", note=_("not set"))
    found: list[dict[str, Any]] = []
    for each in value:
        extra = sorted(key for key in each if key not in ("path", "split", "data_files") and each[key])
        if extra or each.get("split", "train") != "train":
            return Said("unsupported", note=_("only path and data_files are translated, not {names}").format(
                names=", ".join(extra) or "split"), essential=True)
        paths = listed(each["data_files"]) if each.get("data_files") else [place(str(each["path"]), given)]
        found += [{"path": path} for path in paths]
    note = _("sources have equal shares; set data.N.weight to the rows of each for theirs") if len(found) > 1 else ""
    return Said("translated", {"data": found, "held_out": given.get("test_split_size", 0.0)}, note)


def length(name: str, value: Any, given: Given) -> Said:
    """Translate the row; longer texts are cut, in rows wrapped one after another they go on in the next."""
    if value is None:
        return Said("unsupported", note=_("rows need a length; set it to the model's context"), essential=True)
    longer = "split" if given.get("packing") and given.get("packing_strategy") in ("wrapped", "bfd_split") else "cut"
    return said(name, value, {"length": value, "overlong": longer},
                _("theirs for longer texts: {what}; overlong=error would stop at the first").format(what=longer))


def target(name: str, value: Any, given: Given) -> Said:
    """Translate the layers that get an adapter; nothing is theirs for the usual ones of the family, q and v mostly."""
    names = listed(value) if value else []
    if not names:
        return Said("translated", {"adapt.target": ["q_proj", "v_proj"]}, _("what PEFT takes for most families; check it"))
    return Said("translated", {"adapt.target": "all" if names == ["all-linear"] else names})


def peft(name: str, value: Any, given: Given) -> Said:
    """Translate LoRA on or off."""
    return Said("translated", {"adapt.kind": "lora"}) if value else Said("default",
                                                                         note=_("without `adapt` every weight is trained"))


def assistant(name: str, value: Any, given: Given) -> Said:
    """Say what is learned of a conversation: theirs is every turn unless told otherwise, ours the assistant's."""
    return Said("default") if value else Said("translated", {"chat.learn": "all"}, _("on chat rows TRL learns every token"))


def text(name: str, value: Any, given: Given) -> Said:
    """Translate the text's column: `text` is found by itself."""
    return Said("default") if value in (None, "text") else Said("translated", note=_("under `columns` of the source"))


def own() -> Table:
    """Return the rules of SFTConfig's own fields."""
    tokens = _("chat turns end as the template says; for other rows set it in tokenizer_config.json of the model's folder")
    return {
        "model_init_kwargs": off(_("how a model is loaded is decided here"), essential=True),
        "trust_remote_code": off(_("code of a model's folder is never run")),
        "router_aux_loss_coef": off(_("mixtures of experts are not here")),
        "chat_template_path": to("chat.template"),
        "dataset_text_field": text, "dataset_kwargs": off(_("rows are read by their columns"), essential=True),
        "dataset_num_proc": needless(_("files are read in pieces, by all cores")), "eos_token": off(tokens),
        "pad_token": needless(_("padding is never learned from")), "max_length": length,
        "truncation_mode": plain("keep_start", why=_("overlong=cut keeps the start")),
        "shuffle_dataset": needless(_("rows always come in an order drawn from the seed")), "packing": to("pack"),
        "packing_strategy": plain("bfd", "bfd_split", "wrapped", why=_("rows are filled best first"),
                                  note=_("texts in one row are isolated from each other")),
        "padding_free": needless(_("pack=true fills rows; nothing is padded then")),
        "pad_to_multiple_of": needless(_("rows have one length")), "eval_packing": needless(_("packing does not change a loss")),
        "completion_only_loss": plain(True, why=_("prompts are never learned; mark turns with \"loss\": true in the data"),
                                      essential=True),
        "assistant_only_loss": assistant,
        "loss_type": plain("nll", why=_("this loss is not here"), essential=True),
        "activation_offloading": needless(_("recompute=full saves the same memory")),
    }


def model() -> Table:
    """Return the rules of ModelConfig's fields."""
    def lora(rule: Any) -> Any:
        return within("use_peft", (True,), rule)

    return {
        "model_name_or_path": to("start"), "model_revision": plain(
            "main", why=_("download that revision, and give its folder as `start`"), essential=True),
        **dict.fromkeys(("dtype", "torch_dtype"),
                        needless(_("weights are trained in fp32; `precision` is that of the computation"))),
        "attn_implementation": needless(_("kernels are chosen by `paths`")), "use_peft": peft,
        "lora_r": lora(to("adapt.rank")), "lora_alpha": lora(to("adapt.alpha")), "lora_dropout": lora(to("adapt.dropout")),
        "lora_target_modules": lora(target),
        "lora_target_parameters": lora(off(_("bare parameters get no adapter"), essential=True)),
        "lora_modules_to_save": lora(names("adapt.modules_to_save")),
        "lora_task_type": lora(plain("CAUSAL_LM", why=_("only causal language models are translated"), essential=True)),
        "use_rslora": lora(to("adapt.rslora", unset=(None, False))), "use_dora": lora(to("adapt.dora", unset=(None, False))),
        "load_in_8bit": lora(quantized("int8")), "load_in_4bit": lora(quantized("nf4")),
        "bnb_4bit_quant_type": plain("nf4", why=_("nf4 is the 4-bit type there is")),
        **dict.fromkeys(("use_bnb_nested_quant", "bnb_4bit_quant_storage"), needless(
            _("of no effect without quantization"))),
    }


def table() -> Table:
    """Return a rule for each key."""
    return {
        **trainer.table(), **own(), **model(), "dataset_name": dataset, "datasets": datasets,
        "dataset_config": part, "dataset_train_split": part, "dataset_test_split": part,
        **dict.fromkeys(("dataset_streaming", "streaming"), needless(_("files are read in pieces, whatever their size"))),
        "test_split_size": lambda name, value, given: Said("translated" if value else "default", {}, _("held_out")),
        "ignore_bias_buffers": needless(_("processes are started and watched by `layout` and `guard`")),
    }


def defaults(given: Given) -> dict[str, Any]:
    """Return what their tool takes for keys that are not in the file, where the recipe must say it."""
    chat = {} if given.get("assistant_only_loss") else {"assistant_only_loss": False}
    return DEFAULTS | (LORA if given.get("use_peft") else {}) | chat | {"output_dir": "trainer_output"}
