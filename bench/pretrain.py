"""Pretraining speed and memory beside the peers: one run, ratios, the targets they are held to.

    python -m bench.pretrain            # sizes a, b, mlm and c; about 25 minutes on 2 cores
    python -m bench.pretrain a mlm      # some of them

Danlu runs in the precision that `precision: auto` picks here; beside nanoGPT without biases, eager or compiled, whichever is
faster, beside the Trainer with biases; a peer's `bf16` or
`fp32` is what its name says.  A target in bf16 is only fair where bf16 is faster than fp32: both are printed.
"""

from __future__ import annotations

import argparse

import torch

from bench import machine
from bench.race import Result, Worker, race, table
from danlu import parallel

ROUNDS = {"a": (7, 20), "b": (3, 2), "c": (3, 1), "mlm": (5, 2)}
TARGETS: dict[str, list[tuple[str, float]]] = {           # peer: how many times its tokens/s at least
    "a": [("nanogpt:fp32", 1.7), ("trainer:fp32", 1.9)],
    "b": [("nanogpt:bf16", 1.15), ("trainer:bf16", 1.3), ("nanogpt:fp32", 2.0), ("trainer:fp32", 2.0)],
    "c": [("nanogpt:bf16", 1.5), ("trainer:bf16", 1.6), ("nanogpt:fp32", 1.0), ("trainer:fp32", 1.0)],
    "mlm": [("trainer:bf16", 1.5), ("trainer:fp32", 1.0)],
}
MEMORY = {"c": ("trainer:bf16", 0.6)}


def main() -> None:
    """Race each size and print the table and the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(TARGETS), choices=[*TARGETS, []])
    parser.add_argument("--precisions", nargs="*", default=[parallel.fastest(torch.device("cpu"))])
    arguments = parser.parse_args()
    machine.report(machine.measure())
    for size in arguments.sizes:
        rounds, block = ROUNDS[size]
        ours = [f"{name}:{p}" for p in arguments.precisions for name in ("danlu", "danlu+bias", "danlu+compile")]
        if size == "mlm":
            ours = [name for name in ours if "bias" not in name]
        if size == "c":                                  # 3 GB a contender: no more of them fit beside each other
            ours = [name for name in ours if "compile" not in name] + [f"danlu+micro:{p}" for p in arguments.precisions]
        peers = [name for name, _least in TARGETS[size]]
        names = [*peers, *ours] + ([f"bare:{arguments.precisions[0]}"] if size != "c" else [])
        workers = [Worker(name, size, threads=torch.get_num_threads()) for name in names]
        results = race(workers, rounds=rounds, block=block)
        for worker in workers:
            worker.close()
        print(f"\n== size {size}\n{table(results, size)}")
        report(size, results, ours)


def report(size: str, results: dict[str, Result], ours: list[str]) -> None:
    """Print each target beside what was measured."""
    for peer, least in TARGETS[size]:
        rivals = [name for name in ours if peer.startswith("nanogpt") != name.startswith("danlu+bias")] or ours
        best = min(rivals if size != "mlm" else ours, key=lambda name: results[name].median)
        ratio = results[peer].median / results[best].median
        print(f"{best} / {peer}: {ratio:.2f}x, target {least}x: {'met' if ratio >= least else 'NOT met'}")
    for bare in (name for name in results if name.startswith("bare")):
        cost = results[bare.replace("bare", "danlu")].median / results[bare].median - 1
        print(f"engine beside a bare loop of the same model: {cost:+.1%}, target +3%: {'met' if cost <= 0.03 else 'NOT met'}")
    if size in MEMORY:
        peer, most = MEMORY[size]
        name = min((name for name in ours if "compile" not in name), key=lambda name: results[name].peak)
        share = results[name].peak / results[peer].peak
        print(f"peak memory of {name} / {peer}: {share:.2f}, target {most}: {'met' if share <= most else 'NOT met'}")


if __name__ == "__main__":
    main()
