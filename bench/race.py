"""Run training loops in turns and print what a step of each costs.

    python -m bench.race --size a --rounds 7 --block 20 nanogpt:fp32 nanogpt:bf16 trainer:fp32

Every contender lives in a process of its own, so that none inherits another's allocator settings, threads or memory,
and waits asleep while the others run.  Rounds alternate, so a slow phase of the machine hits all.  A block during which
other programs used more than 0.15 of a core is run again.  `module:function:precision` names a contender of one's own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.sizes import SIZES

NAMES = {"nanogpt": "bench.peers:nanogpt_steps", "trainer": "bench.peers:trainer_steps",
         "danlu": "bench.ours:danlu_steps", "danlu+bias": "bench.ours:biased_steps",
         "danlu+micro": "bench.ours:thrifty_steps", "danlu+compile": "bench.ours:compiled_steps", "bare": "bench.ours:bare_steps"}
ELSEWHERE = 0.15  # cores


def busy() -> float:
    """Return the seconds all cores have worked since the machine started, stolen time included."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def peak() -> float:
    """Return the largest resident memory of this process so far, MB.  (ru_maxrss would count the parent's, too.)"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def serve(spec: dict[str, Any]) -> None:
    """Build one contender and step it as standard input asks; answer in JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    import torch

    torch.set_num_threads(spec["threads"])
    module, function = spec["what"].split(":")
    contender = getattr(importlib.import_module(module), function)(spec["size"], spec["precision"], **spec["more"])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start, cpu, seconds = time.perf_counter(), time.process_time(), []
        for _ in range(asked.get("steps", 0)):
            contender.step()
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        answer = {"seconds": seconds, "cpu": time.process_time() - cpu, "peak": peak()}
        if asked.get("loss"):
            answer["loss"] = contender.loss()
        print(json.dumps(answer), file=answers, flush=True)
    contender.close()


class Worker:
    """A contender in its own process."""

    def __init__(self, name: str, size: str, *, threads: int, **more: Any) -> None:
        what, _colon, precision = name.rpartition(":")
        spec = {"what": NAMES.get(what, what), "size": size, "precision": precision, "threads": threads, "more": more}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.race", "--serve", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, steps: int, *, loss: bool = False) -> dict[str, Any]:
        """Take that many steps; return {"seconds": of each, "cpu", "peak": MB, "loss": if asked for}."""
        assert self.process.stdin is not None
        print(json.dumps({"steps": steps, "loss": loss}), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Result:
    """What the clean blocks of one contender took: the median step of each, seconds."""

    blocks: list[float] = field(default_factory=list)
    disturbed: int = 0
    peak: float = 0.0

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.blocks)


def race(workers: list[Worker], *, rounds: int, block: int, warm: int = 2, retries: int = 3) -> dict[str, Result]:
    """Return each contender's result over `rounds` rounds of `block` steps, after `warm` steps that do not count.

    A block disturbed `retries` times over is kept after all, and counted in `disturbed`.
    """
    results = {w.name: Result() for w in workers}
    for worker in workers:
        worker.run(warm)
    for number in range(rounds):
        for worker in workers[number % len(workers) :] + workers[: number % len(workers)]:
            for attempt in range(retries + 1):
                before, start = busy(), time.perf_counter()
                answer = worker.run(block)
                elsewhere = (busy() - before - answer["cpu"]) / (time.perf_counter() - start)
                if elsewhere <= ELSEWHERE or attempt == retries:
                    break
            result = results[worker.name]
            result.blocks.append(statistics.median(answer["seconds"]))
            result.disturbed += elsewhere > ELSEWHERE
            result.peak = answer["peak"]
    return results


def table(results: dict[str, Result], size: str) -> str:
    """Return the results as text, ratios to the first contender (above 1 = faster than it)."""
    shape = SIZES[size]
    first = next(iter(results.values())).median
    lines = [
        f"{'':28} {'ms/step':>9} {'min-max':>17} {'tokens/s':>9} {'GF/s':>6} {'ratio':>6} {'peak MB':>8} disturbed"
    ]
    for name, r in results.items():
        spread = f"{min(r.blocks) * 1e3:.1f}-{max(r.blocks) * 1e3:.1f}"
        lines.append(
            f"{name:28} {r.median * 1e3:9.1f} {spread:>17} {shape.tokens / r.median:9.0f} "
            f"{shape.flops / r.median / 1e9:6.0f} {first / r.median:6.2f} {r.peak:8.0f} {r.disturbed}/{len(r.blocks)}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, race, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", help="nanogpt:fp32, trainer:bf16, module:function:precision …")
    parser.add_argument("--size", choices=SIZES, default="a")
    parser.add_argument("--data", help="folder with train.bin and val.bin (default: random ids)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=int, default=20, help="steps of one contender before the next takes over")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return
    more = {"data": arguments.data} if arguments.data else {}
    workers = [Worker(name, arguments.size, threads=arguments.threads, **more) for name in arguments.contenders]
    print(table(race(workers, rounds=arguments.rounds, block=arguments.block), arguments.size))
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
