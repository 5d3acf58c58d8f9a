"""Files as the tools' own examples have them, and exactly the recipes they become."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli import danlu

from danlu import cli, config
from danlu.errors import ConfigError
from danlu.migrate.rules import Given
from danlu.migrate.translate import TOOLS, Entry, translate
from danlu.train.recipe import Run

LLAMAFACTORY = """\
### model
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en
dataset_dir: data
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/qwen3-4b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
# eval_dataset: alpaca_en_demo
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B

load_in_8bit: false
load_in_4bit: true
strict: false

datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
  - path: rows.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out

adapter: qlora
lora_model_dir:

sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true

lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - q_proj
  - v_proj

wandb_project:
wandb_entity:

gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002

train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false

gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
logging_steps: 1
flash_attention: true

loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3

warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
fsdp:
special_tokens:
  pad_token: "<|end_of_text|>"
"""

TRL = """\
# Model
model_name_or_path: Qwen/Qwen2-0.5B
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear

# Data
dataset_name: trl-lib/Capybara
assistant_only_loss: true

# Training
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
eos_token: <|im_end|>
eval_strategy: steps
eval_steps: 100
output_dir: Qwen2-0.5B-SFT
"""


def made(tool: str, text: str, tmp_path: Path) -> Any:
    path = tmp_path / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    return translate(tool, path)


def by(entries: list[Entry], status: str) -> dict[str, bool]:
    return {entry.key: entry.essential for entry in entries if entry.status == status}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({
        "identity": {"file_name": "identity.json"}, "alpaca_en": {"hf_hub_url": "llamafactory/alpaca_en"},
        "dpo": {"file_name": "dpo.json", "ranking": True, "formatting": "sharegpt"},
        "odd": {"file_name": "odd.json", "columns": {"prompt": "question_text", "response": "reply_text"}},
        "hub": {"hf_hub_url": "a/b"},
    }))
    return tmp_path


def test_llamafactory(registry: Path) -> None:
    found = made("llamafactory", LLAMAFACTORY, registry)
    assert found.recipe == {
        "out": "saves/qwen3-4b/lora/sft", "start": "Qwen/Qwen3-4B-Instruct-2507",
        "data": [{"path": "data/identity.json#1000"}, {"path": "hf://llamafactory/alpaca_en#1000"}], "held_out": 0.1,
        "objective": {"kind": "causal_lm"}, "adapt": {"kind": "lora", "rank": 8, "alpha": 16, "target": "all"},
        "optim": {"kind": "adamw", "lr": 1e-4, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        "schedule": {"kind": "cosine", "warmup": 0.1}, "clip": 1.0, "precision": "bf16", "epochs": 3.0, "micro_rows": 1,
        "layout": {"micro": 8}, "length": 2048, "pack": False, "overlong": "cut",
        "every": {"log": 10, "save": 500, "evaluate": 500}, "workers": 4, "report": True,
    }
    assert by(found.entries, "unsupported") == {"trust_remote_code": False, "template": False}
    assert {"model_name_or_path", "learning_rate", "num_train_epochs", "warmup_ratio", "bf16"} <= by(found.entries, "same").keys()


def test_axolotl(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    found = made("axolotl", AXOLOTL, tmp_path)
    assert found.recipe == {
        "out": "./outputs/lora-out", "start": "NousResearch/Llama-3.2-1B",
        "data": [{"path": "hf://teknium/GPT4-LLM-Cleaned"}, {"path": "rows.jsonl"}], "held_out": 0.1,
        "objective": {"kind": "causal_lm"},
        "adapt": {"kind": "lora", "base": "nf4", "rank": 16, "alpha": 32, "dropout": 0.05, "target": ["q_proj", "v_proj"]},
        "optim": {"kind": "adamw", "lr": 2e-4, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        "schedule": {"kind": "cosine", "warmup": 10}, "clip": 1.0, "recompute": "full", "epochs": 1, "micro_rows": 2,
        "layout": {"micro": 2}, "length": 2048, "pack": True, "overlong": "drop", "group_by_length": False,
        "every": {"log": 1},
    }
    assert by(found.entries, "unsupported") == {"datasets.0.type": False, "evals_per_epoch": False, "saves_per_epoch": False}


def test_trl(tmp_path: Path) -> None:
    found = made("trl", TRL, tmp_path)
    assert found.recipe == {
        "out": "Qwen2-0.5B-SFT", "start": "Qwen/Qwen2-0.5B", "data": [{"path": "hf://trl-lib/Capybara"}],
        "eval": [{"path": "hf://trl-lib/Capybara", "hub_split": "test"}], "objective": {"kind": "causal_lm"},
        "adapt": {"kind": "lora", "rank": 32, "alpha": 16, "dropout": 0.05, "target": "all"},
        "optim": {"kind": "adamw", "lr": 2e-4, "weight_decay": 0.0, "betas": [0.9, 0.999]}, "schedule": {"kind": "linear"},
        "clip": 1.0, "epochs": 1, "micro_rows": 2, "layout": {"micro": 8}, "length": 1024, "pack": True, "overlong": "cut",
        "every": {"evaluate": 100},
    }
    assert by(found.entries, "unsupported") == {"eos_token": False}
    whole = made("trl", TRL.replace("assistant_only_loss: true\n", "").replace("eval_strategy: steps\n", ""), tmp_path).recipe
    assert whole["chat"] == {"learn": "all"} and whole["held_out"] == 0.0 and "eval" not in whole, "their defaults"


@pytest.mark.parametrize(("tool", "text"), [("llamafactory", LLAMAFACTORY), ("axolotl", AXOLOTL), ("trl", TRL)])
def test_every_line_is_reported_once(tool: str, text: str, registry: Path) -> None:
    entries = [entry for entry in made(tool, text, registry).entries if entry.first is not None]
    told = [line for entry in entries for line in range(entry.first, entry.last + 1)]
    written = [n for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")]
    assert told == written


def test_a_recipe_that_says_all_is_accepted_and_written(tmp_path: Path) -> None:
    text = ("model_name_or_path: models/small\nstage: pt\nfinetuning_type: full\ndataset: rows.jsonl\ncutoff_len: 512\n"
            "output_dir: runs/a\nper_device_train_batch_size: 4\nmax_steps: 100\nlearning_rate: 1e-4\nval_size: 0\n"
            "adam_beta2: 0.95\nseed: 7\nfp16: false\nbf16: false\nmax_grad_norm: 0\nsave_total_limit: 1\n")
    (tmp_path / "theirs.yaml").write_text(text)
    (tmp_path / "rows.jsonl").write_text("")
    ended = danlu("import-config", "--from", "llamafactory", tmp_path / "theirs.yaml", "--out", tmp_path / "ours.yaml").clean()
    assert ended.code == 0, ended.err
    run = config.load(Run, tmp_path / "ours.yaml")
    assert (run.steps, run.epochs, run.pack, run.overlong, run.clip, run.seed) == (100, None, True, "split", None, 7)
    assert (run.optim.betas, run.optim.weight_decay, run.precision, run.every.keep) == ((0.9, 0.95), 0.0, "fp32", 2)
    assert danlu("config", "check", tmp_path / "ours.yaml").code == 0
    again = danlu("import-config", "--from", "llamafactory", tmp_path / "theirs.yaml", "--out", tmp_path / "ours.yaml").clean()
    assert again.code == 2 and "there already" in again.last


def test_what_is_essential_and_missing_is_listed_and_nothing_written(
        registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = registry / "theirs.yaml"
    path.write_text("stage: ppo\nmodel_name_or_path: m\ndataset: dpo,nowhere\nreward_model: r\nfinetuning_type: oft\n"
                    "temprature: 1\n")
    words = ["import-config", "--from", "llamafactory", str(path), "--out", str(registry / "ours.yaml")]
    assert cli.main(words) == 4
    out, err = capsys.readouterr()
    assert not (registry / "ours.yaml").exists()
    for what in ("stage: ppo", "dpo: ", "nowhere: it is not in", "finetuning_type: oft", "3 things"):
        assert what in err
    assert "did you mean temperature?" in out and out.count("NOT SUPPORTED") == 3
    assert cli.main([*words, "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["missing"] == ["stage", "dataset", "finetuning_type"]


@pytest.mark.parametrize(("tool", "text", "missing"), [
    ("axolotl", "base_model: m\nrl: dpo\nlearning_rate: 1e-4\ndatasets: [{path: a.jsonl, type: chatml.intel}]\n",
     ["rl", "datasets.0.type"]),
    ("axolotl", "base_model: m\nlearning_rate: 1e-4\ndatasets:\n  - path: a.jsonl\n    type: {format: '[I] {instruction}'}\n",
     ["datasets.0.type"]),
    ("axolotl", "base_model: m\n", ["", ""]),
    ("axolotl", "base_model: m\nlearning_rate: 1e-4\ndatasets: [{path: a.jsonl}]\nadapter: lora\nrelora: true\n"
     "peft_init_lora_weights: true\nlora_modules_to_save: [embed_tokens]\n", ["relora"]),
    ("trl", "model_name_or_path: m\ndataset_name: a/b\ncompletion_only_loss: false\nloss_type: dft\n",
     ["completion_only_loss", "loss_type"]),
    ("trl", "learning_rate: 1e-4\n", ["", ""]),
    ("llamafactory", "model_name_or_path: m\ndataset: nowhere\n", ["dataset"]),
    ("llamafactory", "model_name_or_path: m\nquantization_bit: 4\ndataset: alpaca_en\ntrain_on_prompt: true\nuse_galore: true\n",
     ["use_galore"]),
])
def test_what_cannot_be_left_out(tool: str, text: str, missing: list[str], registry: Path) -> None:
    assert [entry.key for entry in made(tool, text, registry).missing] == missing


@pytest.mark.parametrize(("text", "key", "value"), [
    ("num_train_epochs: 2\nmax_steps: 50", "steps", 50), ("num_train_epochs: 2\nmax_steps: -1", "epochs", 2),
    ("warmup_steps: 20\nwarmup_ratio: 0.1", "schedule", {"kind": "linear", "warmup": 20}),
    ("optim: adafactor", "optim", {"kind": "adafactor", "lr": 5e-5, "weight_decay": 0.0}),
    ("optim: paged_adamw_8bit", "optim", {"kind": "adamw", "lr": 5e-5, "weight_decay": 0.0, "betas": [0.9, 0.999]}),
    ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}", "schedule",
     {"kind": "cosine", "floor": 0.1}),
    ("neat_packing: true", "pack", True), ("packing: true", "overlong", "drop"), ("cutoff_len: 100", "overlong", "cut"),
    ("lora_rank: 4\nuse_rslora: true\nlora_target: q_proj,v_proj", "adapt",
     {"kind": "lora", "rank": 4, "rslora": True, "alpha": 8, "target": ["q_proj", "v_proj"]}),
    ("lora_alpha: 8\nquantization_bit: 4\npissa_init: true\nloraplus_lr_ratio: 16\nadditional_target: embed_tokens,lm_head\n"
     "adapter_name_or_path: saves/a", "adapt",
     {"kind": "lora", "alpha": 8, "base": "nf4", "init": "pissa", "rate_ratio": 16,
      "modules_to_save": ["embed_tokens", "lm_head"],
      "start": "saves/a", "rank": 8, "target": "all"}),
    ("save_strategy: 'no'\nsave_steps: 5", "every", {"save": 0}),
    ("eval_strategy: steps\nlogging_steps: 7", "every", {"log": 7, "evaluate": 7}),
    ("train_on_prompt: true", "chat", {"learn": "all"}), ("mask_history: true", "chat", {"learn": "last"}),
    ("seed: 1", "held_out", 0.0),
    ("group_by_length: true", "group_by_length", True), ("max_samples: 5\ndataset: hub", "data", [{"path": "hf://a/b#5"}]),
    ("dataset: odd", "data", [{"path": "data/odd.json", "columns": {"instruction": "question_text", "output": "reply_text"}}]),
    ("metric_for_best_model: eval_f1", "metric", "eval/f1"), ("early_stopping_steps: 3", "stop", {"patience": 3}),
    ("interleave_probs: 0.7,0.3\nmix_strategy: interleave_under", "data",
     [{"path": "data/identity.json", "weight": 0.7}, {"path": "hf://llamafactory/alpaca_en", "weight": 0.3}]),
])
def test_values_of_llamafactory_and_the_trainer(text: str, key: str, value: Any, registry: Path) -> None:
    data = "" if "dataset:" in text else "dataset: identity,alpaca_en\n"
    assert made("llamafactory", f"model_name_or_path: m\n{data}{text}\n", registry).recipe[key] == value


def test_columns_of_axolotl(tmp_path: Path) -> None:
    text = """base_model: m
learning_rate: 1e-4
train_on_inputs: true
datasets:
  - path: a.jsonl
    type: chat_template
    field_messages: talk
    message_property_mappings: {role: who, content: words}
  - path: b.jsonl
    type: completion
    field: body
"""
    found = made("axolotl", text, tmp_path)
    assert found.recipe["data"] == [
        {"path": "a.jsonl", "columns": {"messages": "talk", "role_tag": "who", "content_tag": "words"}},
        {"path": "b.jsonl", "columns": {"text": "body"}}]
    assert found.recipe["chat"] == {"learn": "all"} and found.recipe["held_out"] == 0.0 and not found.missing


def test_keys_of_an_adapter_count_only_with_one(registry: Path) -> None:
    full = made("axolotl", "base_model: m\nlearning_rate: 1e-4\ndatasets: [{path: a.jsonl}]\nlora_r: 8\nlora_alpha: 16\n",
                registry)
    assert "adapt" not in full.recipe and by(full.entries, "default").keys() >= {"lora_r", "lora_alpha"}
    full = made("trl", "model_name_or_path: m\ndataset_name: a/b\nlora_r: 8\n", registry)
    assert "adapt" not in full.recipe
    full = made("llamafactory", "model_name_or_path: m\ndataset: hub\nfinetuning_type: full\nlora_rank: 8\n", registry)
    assert "adapt" not in full.recipe


def test_deepspeed_says_what_to_do_and_secrets_are_not_shown(registry: Path) -> None:
    found = made("llamafactory", "model_name_or_path: m\ndataset: odd\ndeepspeed: examples/deepspeed/ds_z2_config.json\n"
                 "hf_hub_token: hf_secret\n", registry)
    notes = {entry.key: entry.note for entry in found.entries}
    assert "layout.shard=grads" in notes["deepspeed"]
    assert "hf_secret" not in json.dumps([entry._asdict() for entry in found.entries])


def test_the_tables_know_every_field_of_trl_and_transformers() -> None:
    trl = pytest.importorskip("trl")
    from transformers import TrainingArguments
    from trl.scripts.utils import DatasetMixtureConfig

    known = TOOLS["trl"].table().keys()
    for cls in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, DatasetMixtureConfig):
        assert [field.name for field in dataclasses.fields(cls) if field.name not in known] == [], cls.__name__
    for tool in TOOLS.values():
        assert [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in tool.table()] == []


def test_their_defaults_that_are_written_out_are_theirs() -> None:
    trl = pytest.importorskip("trl")
    from danlu.migrate.trl import DEFAULTS, LORA

    fields = {field.name: field.default for cls in (trl.SFTConfig, trl.ModelConfig) for field in dataclasses.fields(cls)}
    assert {name: fields[name] for name in DEFAULTS} == DEFAULTS and {name: fields[name] for name in LORA} == LORA


@pytest.mark.parametrize("tool", TOOLS)
def test_same_is_what_a_recipe_of_ours_would_take(tool: str, tmp_path: Path) -> None:
    """A key told to be the same may be copied: loaded under its own name it gives what the rule says."""
    base = {"out": "o", "start": "m", "data": ["d"], "objective": "causal_lm", "optim": {"kind": "adamw"},
            "schedule": {"kind": "linear"},
            "epochs": 1, "micro_rows": 2, "length": 64, "every": {"evaluate": 5}}
    values = {"learning_rate": 1e-4, "max_steps": 9, "num_train_epochs": 2, "num_epochs": 2, "per_device_train_batch_size": 2,
              "micro_batch_size": 2, "logging_steps": 3, "save_steps": 4, "seed": 5, "max_length": 128, "cutoff_len": 128,
              "warmup_steps": 6, "lr_scheduler_type": "cosine", "lr_scheduler": "cosine", "bf16": True,
              "gradient_checkpointing": True,
              "max_grad_norm": 0.5, "weight_decay": 0.1, "save_total_limit": 3, "plot_loss": True, "packing": True}
    table, seen = TOOLS[tool].table(), 0
    for name, value in values.items():
        if name not in table or (said := table[name](name, value, Given({name: value}, tmp_path))).status != "same":
            continue
        seen += 1
        ours = {key: item for key, item in base.items() if not (key == "epochs" and name == "max_steps")}
        ours = {key: item for key, item in ours.items() if key not in said.ours and f"{key}.kind" not in said.ours}
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(ours | {name: value}))
        loaded = config.dump(config.load(Run, tmp_path / "a.yaml"))
        for key, item in said.ours.items():
            place: Any = loaded
            for part in key.split("."):
                place = place[part]
            assert place == item, (name, key)
    assert seen >= 8


@pytest.mark.parametrize(("text", "why"), [
    ("- a\n", "must hold keys and values"), ("seed: 1\nseed: 2\n", "stands twice"),
    ("max_steps: [1]\n", "not one this key can have"),
])
def test_what_is_no_such_file(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        made("llamafactory", text, tmp_path)
