"""Peak memory of fine-tuning GPT-2 124 M: all weights against LoRA, each in a process of its own.

    python -m bench.memory                   # 4 rows of 512 tokens, fp32; a minute or two on 2 cores, 6 GB
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.peers import Contender
from bench.race import Worker

ROWS, LENGTH = 4, 512
TARGET = 0.5
LORA = {"adapt": {"kind": "lora", "rank": 8, "target": ["q", "k", "v"]}}
WAYS: dict[str, dict[str, Any]] = {
    "full": {}, "lora": LORA, "lora, recomputed": LORA | {"recompute": "full"},
    "full, returned": {"allocator": "return"}, "lora, returned": LORA | {"allocator": "return"},
}


def made(folder: Path) -> None:
    """Write a GPT-2 with random weights, a small tokenizer and rows of text into `folder`."""
    from danlu.data.kinds import BPE
    from danlu.data.tokenizer import train
    from danlu.models import weights
    from danlu.models.build import build
    from danlu.models.decoder import Decoder

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=5)) for _word in range(900)]
    texts = [" ".join(draw.choices(words, k=2 * LENGTH)) for _row in range(64)]
    tokenizer = train(texts, BPE(vocab=1000))
    tokenizer.save(folder / "tokenizer")
    model = build(Decoder(preset="gpt2", vocab=50257)).to_empty(device="cpu").init(0)
    weights.save(folder / "model", model, tokenizer=folder / "tokenizer")
    (folder / "rows.txt").write_text("\n".join(texts), encoding="utf-8")


def danlu_steps(way: str, precision: str, *, folder: str) -> Contender:
    """Return the loop of `danlu train` in one of the ways."""
    from danlu import parallel
    from danlu.config import validate
    from danlu.train import setup
    from danlu.train.feed import Steps, batches
    from danlu.train.intake import taken_in
    from danlu.train.recipe import Run

    place = Path(folder)
    run = taken_in(validate(Run, {
        "out": str(place / way.replace(", ", "-")), "start": str(place / "model"), "data": [{"path": str(place / "rows.txt")}],
        "objective": {"kind": "causal_lm"}, "optim": {"kind": "adamw", "lr": 1e-4}, "schedule": {"kind": "constant"},
        "rows": ROWS, "steps": 9, "length": LENGTH, "overlong": "split", "held_out": 0.0, "precision": precision, **WAYS[way]}))
    world = parallel.join(run.layout, parallel.start(threads=None, device="cpu", allocator=run.allocator))
    data = setup.open_data(run)
    run, choice = setup.settle(run, data, world, None)
    work = setup.assemble(run, data, setup.make_model(run, choice, world))
    feed = batches(Steps(work.rows, run.objective, data.tokenizer.special, per_step=ROWS, length=LENGTH, seed=0,
                         position=work.progress.position), workers=0)
    number = 0

    def step() -> None:
        nonlocal number
        work.engine.forward_backward(next(feed)[0], step=number)
        work.engine.update(work.optimizer, 1e-4, allow=lambda norm: True)
        number += 1

    return Contender(step)


def main() -> None:
    """Take three steps each way, one way after the other, and print peaks and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        made(Path(folder))
        peaks = {}
        for way in WAYS:
            what = f"bench.memory:danlu_steps:{arguments.precision}"
            worker = Worker(what, way, threads=torch.get_num_threads(), folder=folder)
            peaks[way] = worker.run(3)["peak"]
            worker.close()
            print(f"{way:20} {peaks[way]:8.0f} MB  {peaks[way] / peaks['full']:.2f} of full")
    print(f"LoRA against full: {peaks['lora'] / peaks['full']:.2f} (at most {TARGET})")


if __name__ == "__main__":
    main()
