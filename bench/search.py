"""Seconds that a search over plans takes: `python -m bench.search`, GPT-3's shape on 8, 64 and 1,024 devices, a process each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from danlu.planner.hardware import parse
from danlu.planner.public import pretraining, public
from danlu.planner.search import search


def looked(model: str, hardware: str) -> dict[str, object]:
    """Return what a search looked at, and its seconds, of the clock and of the processor."""
    run = pretraining(public(model).config.model_copy(update={"vocab": 50304}), length=2048, rows=1536)
    began, used = time.perf_counter(), time.process_time()
    found = search(run, parse(hardware), steps=100_000)
    return {"hardware": hardware, "looked": found.looked, "traced": found.traced,
            "seconds": round(time.perf_counter() - began, 2), "processor_seconds": round(time.process_time() - used, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt3-175b")
    parser.add_argument("--hardware", nargs="+", default=["8xH100", "64xH100", "1024xA100"])
    given = parser.parse_args()
    if len(given.hardware) == 1:
        print(json.dumps(looked(given.model, given.hardware[0])))
        return
    for one in given.hardware:
        subprocess.run([sys.executable, "-m", "bench.search", "--model", given.model, "--hardware", one], check=True)


if __name__ == "__main__":
    main()
