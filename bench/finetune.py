"""Fine-tuning speed beside the Hugging Face Trainer: the same encoder, rows, batch and optimizer; one run, ratios.

    python -m bench.finetune --model MODEL --data train.tsv          # all-MiniLM-L6-v2 on SST-2: 10 minutes on 2 cores
    python -m bench.finetune --model MODEL --data train.tsv --lora
    python -m bench.finetune --model MODEL --data train.tsv --inside      # what a step of Danlu spends its time on, alone

MODEL is a folder of a BERT; the file holds `text<TAB>label` rows.  Samples a second over whole blocks of steps, for steps take
as long as their rows are; blocks take turns, so that a slow phase of the machine hits all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.peers import Contender, gated
from bench.race import ELSEWHERE, Worker, busy

ROWS, LENGTH = 16, 128
TARGETS = {"trainer padded fp32": 8.0, "trainer dynamic bf16": 1.8, "trainer grouped bf16": 1.3,
           "trainer lora dynamic fp32": 2.3}


def rows_of(data: str) -> tuple[list[str], list[int]]:
    """Return texts and labels."""
    pairs = [line.rpartition("\t") for line in Path(data).read_text(encoding="utf-8").splitlines() if line]
    return [text for text, _tab, _label in pairs], [int(label) for _text, _tab, label in pairs]


def trainer_steps(mode: str, precision: str, *, model: str, data: str) -> Contender:
    """Return the Trainer in one of its ways: padded (to 128, as tutorials do), dynamic, grouped (by length), lora (dynamic)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    if mode == "lora":
        from peft import LoraConfig, TaskType, get_peft_model

        network = get_peft_model(network, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16,
                                                     target_modules=["query", "value"]))
    texts, labels = rows_of(data)
    told = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length" if mode == "padded" else False)
    table = [{"input_ids": ids, "attention_mask": mask, "labels": label}
             for ids, mask, label in zip(told["input_ids"], told["attention_mask"], labels, strict=True)]
    scratch = tempfile.mkdtemp(prefix="bench-trainer-")
    more: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if mode == "grouped" else {}
    arguments = TrainingArguments(
        scratch, per_device_train_batch_size=ROWS, num_train_epochs=3, learning_rate=1e-4, weight_decay=0.01,
        bf16=precision == "bf16", use_cpu=True, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        seed=0, **more)
    return gated(scratch, model=network, train_dataset=table, data_collator=DataCollatorWithPadding(tokenizer), args=arguments)


def danlu_steps(mode: str, precision: str, *, model: str, data: str) -> Contender:
    """Return the loop of `danlu train`, without its files and its live line; mode full or lora."""
    from danlu import parallel
    from danlu.config import validate
    from danlu.train import setup
    from danlu.train.feed import Steps, batches
    from danlu.train.guard import Guard
    from danlu.train.intake import taken_in
    from danlu.train.recipe import Run

    adapt = {"adapt": {"kind": "lora", "rank": 8, "alpha": 16, "target": ["q", "v"]}} if mode == "lora" else {}
    run = taken_in(validate(Run, {
        "out": tempfile.mkdtemp(prefix="bench-danlu-"), "start": model, "data": [{"path": data}], "rows": ROWS, "epochs": 3.0,
        "objective": {"kind": "classify"}, "optim": {"kind": "adamw", "lr": 1e-4, "weight_decay": 0.01},
        "schedule": {"kind": "linear"}, "length": LENGTH, "held_out": 0.0, "overlong": "cut", "precision": precision, **adapt}))
    world = parallel.join(run.layout, parallel.start(threads=None, device="cpu"))
    opened = setup.open_data(run)
    run, choice = setup.settle(run, opened, world, None)
    work = setup.assemble(run, opened, setup.make_model(run, choice, world))
    feed = batches(Steps(work.rows, run.objective, opened.tokenizer.special, per_step=ROWS, length=LENGTH, seed=0,
                         position=work.progress.position, tight=run.tight), workers=0)
    guard, number = Guard(max_skips=3, spike=6.0), 0

    def step() -> None:
        nonlocal number
        batch, _position = next(feed)
        losses = work.engine.forward_backward(batch, step=number)
        loss = float((losses * work.engine.scales).sum())
        work.engine.update(work.optimizer, 1e-4, allow=lambda norm: guard.allow(loss, norm, step=number))
        number += 1

    return Contender(step)


def inside(mode: str, precision: str, *, model: str, data: str) -> None:
    """Print how long a step takes, and how much of that the matrix products of linear layers do."""
    from torch.profiler import ProfilerActivity, profile

    one, steps = danlu_steps(mode, precision, model=model, data=data), 60
    for _step in range(20):
        one.step()
    began = time.perf_counter()
    for _step in range(steps):
        one.step()
    whole = (time.perf_counter() - began) / steps
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _step in range(steps):
            one.step()
    products = sum(each.self_cpu_time_total for each in watched.key_averages() if each.key in {"aten::mm", "aten::addmm"})
    print(f"danlu {mode} {precision}: a step takes {whole * 1e3:.0f} ms, {products / steps / 1e3:.0f} of it in linear layers")


def race(workers: list[Worker], *, rounds: int, block: int) -> dict[str, list[float]]:
    """Return each contender's samples a second in each round; a disturbed block is run again, three times at most."""
    found: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for worker in workers:
        worker.run(4)
    for number in range(rounds):
        for worker in workers[number % len(workers) :] + workers[: number % len(workers)]:
            for attempt in range(4):
                before, start = busy(), time.perf_counter()
                answer = worker.run(block)
                elsewhere = (busy() - before - answer["cpu"]) / (time.perf_counter() - start)
                if elsewhere <= ELSEWHERE or attempt == 3:
                    break
            found[worker.name].append(ROWS * block / sum(answer["seconds"]))
    return found


def main() -> None:
    """Race and print the table and the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--lora", action="store_true", help="adapters alone")
    parser.add_argument("--inside", action="store_true", help="no race: where the time of a step of Danlu goes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=int, default=24, help="steps of one contender before the next takes over")
    parser.add_argument("--precisions", nargs="*", default=["fp32"], help="of Danlu")
    arguments = parser.parse_args()
    more: dict[str, Any] = {"model": arguments.model, "data": arguments.data}
    threads = torch.get_num_threads()
    if arguments.inside:
        inside("lora" if arguments.lora else "full", arguments.precisions[0], **more)
        return
    machine.report(machine.measure())
    peers = {"trainer lora dynamic fp32": ("lora", "fp32")} if arguments.lora else {
        "trainer padded fp32": ("padded", "fp32"), "trainer dynamic fp32": ("dynamic", "fp32"),
        "trainer dynamic bf16": ("dynamic", "bf16"), "trainer grouped fp32": ("grouped", "fp32"),
        "trainer grouped bf16": ("grouped", "bf16")}
    workers = []
    for name, (mode, precision) in peers.items():
        workers.append(Worker(f"bench.finetune:trainer_steps:{precision}", mode, threads=threads, **more))
        workers[-1].name = name
    for precision in arguments.precisions:
        mode = "lora" if arguments.lora else "full"
        workers.append(Worker(f"bench.finetune:danlu_steps:{precision}", mode, threads=threads, **more))
        workers[-1].name = f"danlu {'lora ' if arguments.lora else ''}{precision}"
    found = race(workers, rounds=arguments.rounds, block=arguments.block)
    for worker in workers:
        worker.close()
    speeds = {name: statistics.median(blocks) for name, blocks in found.items()}
    for name, blocks in found.items():
        print(f"{name:28} {speeds[name]:8.1f} samples/s ({min(blocks):.1f}-{max(blocks):.1f})")
    best = max((name for name in speeds if name.startswith("danlu")), key=lambda name: speeds[name])
    for name, least in TARGETS.items():
        if name in speeds:
            print(f"{best} against {name}: {speeds[best] / speeds[name]:.2f}x (at least {least}x)")


if __name__ == "__main__":
    main()
