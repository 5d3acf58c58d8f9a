"""Time to a loss on tinyshakespeare: our default optimizer and schedule beside the plain fp32 loop of nanoGPT's recipe.

    DANLU_REALDATA=… python -m bench.shakespeare      # the folder that holds shakespeare/input.txt
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.peers import nanogpt_steps
from bench.sizes import write

RECIPES = Path(__file__).parent.parent / "recipes"


def plain(folder: Path, steps: int) -> tuple[float, float]:
    """Return (seconds of training, loss over the whole validation part) of the plain loop."""
    torch.manual_seed(1337)
    loop = nanogpt_steps("a", "fp32", data=str(folder))
    began = time.perf_counter()
    for _step in range(steps):
        loop.step()
    seconds = time.perf_counter() - began
    assert loop.loss is not None
    return seconds, loop.loss()


def danlu(data: Path, out: Path, recipe: str, *more: str) -> list[tuple[int, float, float]]:
    """Return (step, seconds since the first step, loss over the whole validation part) at each evaluation."""
    subprocess.run([sys.executable, "-m", "danlu", "train", str(RECIPES / recipe), f"data={data}", f"out={out}",
                    "every.sample=0", *more], check=True, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval/loss" in line]
    return [(line["step"], line["time"] - measured[0]["time"], line["eval/loss"]) for line in measured]


def main() -> None:
    """Run both and print when each reached the other's loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--recipes", nargs="*", default=["shakespeare-char.yaml", "shakespeare-muon.yaml"])
    arguments = parser.parse_args()
    text = Path(os.environ["DANLU_REALDATA"]) / "shakespeare" / "input.txt"
    folder = Path(tempfile.mkdtemp(prefix="bench-shakespeare-"))
    write(folder, 65, text=text)
    subprocess.run([sys.executable, "-m", "danlu", "prepare", str(RECIPES / "shakespeare.yaml"), f"inputs.0.path={text}",
                    f"out={folder / 'data'}"], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    seconds, loss = plain(folder, arguments.steps)
    print(f"plain fp32 loop: {arguments.steps} steps, {seconds:.1f} s of training, validation loss {loss:.4f}")
    for recipe in arguments.recipes:
        measured = danlu(folder / "data", folder / recipe, recipe)
        step, took, final = measured[-1]
        print(f"{recipe}: {step} steps, {took:.1f} s with its evaluations, validation loss {final:.4f}")
        reached = next(((s, t) for s, t, value in measured if value <= loss), None)
        if reached:
            step, took = reached
            print(f"  reached {loss:.4f} at step {step} after {took:.1f} s: {took / seconds:.2f} of the plain loop, target 0.5")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
