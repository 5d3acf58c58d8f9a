"""What several processes cost and bring on one machine's CPU: N processes of one thread beside one process of N threads.

    python -m bench.layouts --size b --rounds 3             # data parallel (DDP), sharded (FSDP2), tensor, pipeline; gloo

The same rows a step, the same model; blocks of steps in turns, medians, ratios of one run.  On a CPU the processes share
one memory bus and gloo copies through it: the figures show overhead, not what accelerators with links of their own gain.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from bench.sizes import SIZES
from danlu import parallel
from danlu.layout import Layout
from danlu.models.decoder import Decoder
from danlu.nn import paths
from danlu.objectives.lm import CausalLM
from danlu.optim import AdamW
from danlu.parallel.place import place
from danlu.train.step import Engine

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 0}, "fsdp": {"dp": 0, "shard": "full"}, "tp": {"tp": 0}, "pp": {"pp": 0, "micro": 4}, "cp": {"cp": 0},
}


def serve(size: str, fields: dict[str, int | str], threads: int) -> None:
    """Be one process of a layout: step as standard input asks, answer in JSON lines (the first process alone)."""
    device = parallel.start(threads=threads, device="cpu")
    world = parallel.join(Layout.model_validate(fields), device)
    shape, layout = SIZES[size], world.layout
    cfg = Decoder(family="gpt2", activation="gelu", vocab=shape.vocabulary, width=shape.width, layers=shape.layers,
                  heads=shape.heads, context=shape.length, tied=layout.pp == 1)
    rows = shape.rows // layout.dp
    objective = CausalLM()
    model = place(cfg, world, objective, precision="fp32", length=shape.length, rows=rows // layout.micro)
    model.init(0).use(paths.rule(device, torch.float32, shape.length)).train().begin()
    engine = Engine(model, objective, precision="fp32", clip=1.0, seed=0)
    optimizer = AdamW(lr=1e-3).build((leaf.name, leaf.local) for leaf in engine.leaves)
    ids = torch.randint(0, shape.vocabulary, (rows, shape.length + 1), generator=torch.Generator().manual_seed(world.index("dp")))
    batch = {"ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "weights": torch.ones(rows, shape.length)}
    for number, line in enumerate(sys.stdin):
        began = time.perf_counter()
        for _step in range(int(line)):
            engine.forward_backward(batch, step=number)
            engine.update(optimizer, 1e-3, allow=lambda norm: True)
        if world.main:
            print(json.dumps((time.perf_counter() - began) / int(line)), flush=True)
    parallel.leave()


class Group:
    """The processes of one layout."""

    def __init__(self, size: str, fields: dict[str, int | str], threads: int) -> None:
        count = Layout.model_validate(fields).world
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if count > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        spec = json.dumps([size, fields, threads])
        self.processes = [subprocess.Popen([sys.executable, "-m", "bench.layouts", "--serve", spec], text=True,
                                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                           env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}))
                          for rank in range(count)]

    def run(self, steps: int) -> float:
        """Take that many steps; return the seconds of one."""
        for process in self.processes:
            assert process.stdin is not None
            print(steps, file=process.stdin, flush=True)
        assert self.processes[0].stdout is not None
        return float(json.loads(self.processes[0].stdout.readline()))

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait()


def main() -> None:
    """Take turns, print medians and ratios to one process of all threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--size", default="b", choices=[size for size in SIZES if not SIZES[size].encoder])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*json.loads(arguments.serve))
        return
    cores = len(os.sched_getaffinity(0))
    groups = {f"1 process × {cores} threads": Group(arguments.size, {}, cores)}
    for name in arguments.layouts:
        fields = {key: cores if value == 0 else value for key, value in LAYOUTS[name].items()}
        groups[f"{name}: {cores} processes × 1 thread"] = Group(arguments.size, fields, 1)
    taken: dict[str, list[float]] = {name: [] for name in groups}
    for number in range(arguments.rounds + 1):
        for name, group in groups.items():
            seconds = group.run(arguments.block)
            if number:                                   # the first round warms up
                taken[name].append(seconds)
    for group in groups.values():
        group.close()
    first = statistics.median(next(iter(taken.values())))
    shape = SIZES[arguments.size]
    for name, values in taken.items():
        median = statistics.median(values)
        print(f"{name:32} {median * 1e3:9.1f} ms/step  {shape.tokens / median:8.0f} tokens/s  {first / median:5.2f}x")


if __name__ == "__main__":
    main()
