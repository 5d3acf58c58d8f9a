"""Accuracy of fine-tuning beside the Hugging Face Trainer: one recipe, several seeds, dev and test rows.

    python -m bench.sst2 --model MODEL --data DIR               # all-MiniLM-L6-v2 on SST-2, 3 seeds each: 20 minutes on 2 cores
    python -m bench.sst2 --model MODEL --data DIR --lora
    python -m bench.sst2 --model MODEL --data DIR --only Danlu

MODEL is a folder of a BERT; DIR holds train.tsv, dev.tsv and test.tsv, `text<TAB>label`.  Both take the passes, rows, rate,
decay and length of the recipe, evaluate as often and keep the best checkpoint by accuracy on dev.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.finetune import rows_of
from danlu import yamls

RECIPES = Path(__file__).parents[1] / "recipes"
Scores = dict[str, float]                                # accuracy on dev and test, and minutes of training


def ours(recipe: Path, *, model: Path, data: Path, seed: int, epochs: int, out: Path) -> Scores:
    """Return what `danlu train` and `danlu eval` tell."""
    def danlu(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "danlu", *map(str, words)], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

    began = time.perf_counter()
    danlu("train", recipe, "--out", out, f"start={model}", f"data={data / 'train.tsv'}", f"eval={data / 'dev.tsv'}",
          f"seed={seed}", f"epochs={epochs}")
    found = {"minutes": (time.perf_counter() - began) / 60}
    for part in ("dev", "test"):
        danlu("eval", out, "--data", data / f"{part}.tsv", "--out", out / f"{part}.json")
        found[part] = json.loads((out / f"{part}.json").read_text())["results"][part]["accuracy,none"]
    return found


def theirs(recipe: Path, *, model: Path, data: Path, seed: int, epochs: int, out: Path) -> Scores:
    """Return the Trainer's, with dynamic padding."""
    import numpy as np
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    told, _lines = yamls.read(recipe)
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    if "adapt" in told:
        from peft import LoraConfig, TaskType, get_peft_model

        network = get_peft_model(network, LoraConfig(
            task_type=TaskType.SEQ_CLS, r=told["adapt"]["rank"], lora_alpha=told["adapt"]["alpha"],
            target_modules=["query", "value"]))

    def rows(part: str) -> list[dict[str, Any]]:
        texts, labels = rows_of(str(data / f"{part}.tsv"))
        made = tokenizer(texts, truncation=True, max_length=told["length"])
        return [{"input_ids": ids, "attention_mask": mask, "labels": label}
                for ids, mask, label in zip(made["input_ids"], made["attention_mask"], labels, strict=True)]

    steps = told["every"]["evaluate"]
    trainer = Trainer(
        model=network, train_dataset=rows("train"), eval_dataset=rows("dev"), data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda said: {"accuracy": float((np.argmax(said.predictions, -1) == said.label_ids).mean())},
        args=TrainingArguments(
            str(out), per_device_train_batch_size=told["rows"], per_device_eval_batch_size=64, num_train_epochs=epochs,
            learning_rate=float(told["optim"]["lr"]), weight_decay=told["optim"]["weight_decay"], lr_scheduler_type="linear",
            use_cpu=True, eval_strategy="steps", eval_steps=steps, save_strategy="steps", save_steps=steps, save_total_limit=1,
            load_best_model_at_end=True, metric_for_best_model="accuracy", report_to=[], disable_tqdm=True, seed=seed,
            logging_strategy="no"))
    began = time.perf_counter()
    trainer.train()
    found = {"minutes": (time.perf_counter() - began) / 60}
    return found | {part: trainer.evaluate(rows(part))["eval_accuracy"] for part in ("dev", "test")}      # type: ignore[arg-type]


def main() -> None:
    """Train both with each seed and print means, standard errors and differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--only", choices=["Danlu", "Trainer"], help="one of the two; without their difference")
    arguments = parser.parse_args()
    recipe = RECIPES / ("sst2-lora.yaml" if arguments.lora else "sst2.yaml")
    ways = {name: way for name, way in (("Danlu", ours), ("Trainer", theirs)) if arguments.only in (None, name)}
    found: dict[str, list[Scores]] = {name: [] for name in ways}
    for seed in arguments.seeds:
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(prefix="bench-sst2-") as folder:
                scores = way(recipe, model=arguments.model, data=arguments.data, seed=seed, epochs=arguments.epochs,
                             out=Path(folder) / "run")
            found[name].append(scores)
            print(f"{name} seed {seed}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()), flush=True)
    count = len(arguments.seeds)
    for part in ("dev", "test"):
        mean = {name: statistics.fmean(s[part] for s in scores) for name, scores in found.items()}
        spread = {name: statistics.stdev(s[part] for s in scores) / math.sqrt(count) if count > 1 else math.nan
                  for name, scores in found.items()}
        told = ", ".join(f"{name} {mean[name]:.4f} ± {spread[name]:.4f}" for name in found)
        apart = "" if arguments.only else (f"; difference {mean['Danlu'] - mean['Trainer']:+.4f} ± "
                                           f"{math.hypot(*spread.values()):.4f}")
        print(f"{part}: {told}{apart}")
    if arguments.only:
        return
    print(f"minutes of training: Trainer / Danlu = "
          f"{sum(s['minutes'] for s in found['Trainer']) / sum(s['minutes'] for s in found['Danlu']):.2f}")


if __name__ == "__main__":
    main()
