"""Print what this machine can do at best: matrix products, copying, and the versions that did them.

python -m bench.machine [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPES = ((768, 128, 512), (4096, 384, 1536), (2048, 768, 3072), (2048, 2048, 2048))  # rows, in, out
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def median(work: Callable[[], object], *, rounds: int = 7) -> float:
    """Return the median seconds of one call, repeated inside a round until it takes 20 ms."""
    work()
    start = time.perf_counter()
    work()
    repeat = max(1, int(0.02 / max(1e-6, time.perf_counter() - start)))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _again in range(repeat):
            work()
        times.append((time.perf_counter() - start) / repeat)
    return statistics.median(times)


def product(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """Return GF/s of a linear layer's forward product."""
    x, w = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    return 2e-9 * rows * inner * outer / median(lambda: torch.nn.functional.linear(x, w))


def copying(megabytes: int = 256) -> float:
    """Return GB/s of a copy between two buffers, reads and writes counted."""
    a, b = torch.ones(megabytes << 18), torch.empty(megabytes << 18)
    return 2e-9 * a.nbytes / median(lambda: b.copy_(a))


def faulting(megabytes: int = 100) -> float:
    """Return ms to allocate and fill a buffer; far more than copying it means page faults (see mallopt)."""
    return 1e3 * median(lambda: torch.empty(megabytes << 18).fill_(1.0))


def processor() -> str:
    """Return the processor's name and what it says it can do for low precision."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    values = {k.strip(): v.strip() for k, v in fields.items()}
    known = [
        f
        for f in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8")
        if f in values.get("flags", "").split()
    ]
    name = values.get("model name", platform.processor())
    return f"{name} (family {values.get('cpu family')}, model {values.get('model')}): {' '.join(known)}"


def measure() -> dict[str, Any]:
    """Return everything as JSON-ready values; GEMM peaks are the best shape's."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    for threads in sorted({1, found["cores"]}):
        torch.set_num_threads(threads)
        rates = {
            name: {f"{m}x{k}x{n}": round(product(m, k, n, dtype)) for m, k, n in SHAPES}
            for name, dtype in PRECISIONS.items()
        }
        found[f"threads={threads}"] = {
            **{f"gemm_{name}": max(r.values()) for name, r in rates.items()},
            "copy_gb_s": round(copying(), 1),
            "allocate_100mb_ms": round(faulting(), 1),
            "shapes": rates,
        }
    return found


def report(found: dict[str, Any]) -> None:
    """Print what `measure` found."""
    for name, value in found.items():
        print(name, value) if not isinstance(value, dict) else print(
            name, *(f"\n  {k:18} {v}" for k, v in value.items())
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    found = measure()
    print(json.dumps(found)) if as_json else report(found)


if __name__ == "__main__":
    main()
