"""This machine measured once: matrix products, memory, the link between two processes, the disk, and what a process is before
any tensor.  Later plans read it from the user's cache folder."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from danlu import files, parallel, tensorfile
from danlu.errors import ResourceError
from danlu.parallel import DTYPES
from danlu.planner.hardware import Measured
from danlu.words import _

SHAPES = ((2048, 256, 1024), (1024, 768, 768), (4096, 512, 2048))      # rows, inputs, outputs of a layer
MEGABYTES = 256                                          # of what is copied, written and sent


def measure() -> Measured:
    """Return what this machine does; takes about a minute."""
    parallel.start(threads=None, device="cpu")
    return Measured(date=time.strftime("%Y-%m-%d"), torch=torch.__version__, threads=torch.get_num_threads(),
                    processor=processor(), flops={name: products(name) for name in ("fp32", "bf16", "fp16")},
                    bandwidth=copying(), link=link(),
                    disk=writing(), base=base())


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds(work: Callable[[], object], *, rounds: int = 5) -> float:
    """Return the median seconds of one call."""
    work()
    taken = []
    for _round in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def products(precision: str) -> float:
    """Return the FLOP/s of a layer's three products, forward and backward, over a few shapes: all FLOPs by all seconds."""
    flops = taken = 0.0
    for rows, inner, outer in SHAPES:
        x, w, g = (torch.randn(shape).to(DTYPES[precision]) for shape in ((rows, inner), (outer, inner), (rows, outer)))
        for work in (lambda x=x, w=w: x @ w.mT, lambda g=g, w=w: g @ w, lambda g=g, x=x: g.mT @ x):
            flops, taken = flops + 2.0 * rows * inner * outer, taken + seconds(work, rounds=3)
    return flops / taken


def copying() -> float:
    """Return the bytes/s of copying, reads and writes counted."""
    a = torch.ones(MEGABYTES << 18)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a))


def writing() -> float:
    """Return the bytes/s at which a checkpoint is written, hashed and made durable."""
    tensors = {"t": torch.ones(MEGABYTES << 18)}
    with tempfile.TemporaryDirectory(prefix="danlu-calibrate-") as folder:
        return tensors["t"].nbytes / seconds(lambda: tensorfile.write(Path(folder) / "t.safetensors", tensors), rounds=2)


def link() -> float | None:
    """Return the bytes/s between two processes of this machine, as an all-reduce reaches it; None if they fail to meet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [sys.executable, "-m", "danlu.planner.calibrate", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    two = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
           for rank in range(2)]
    try:
        told = [one.communicate(timeout=120)[0] for one in two]
        return float(told[0].strip().splitlines()[-1]) if not any(one.returncode for one in two) else None
    except (subprocess.TimeoutExpired, IndexError):
        return None
    finally:
        for one in two:
            one.kill()


def talk(port: int, rank: int) -> float:
    """Return the bytes/s of all-reduces, as one of the two processes that `link` starts: each sends its tensor once."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensor = torch.ones(MEGABYTES << 16)
    rate = tensor.nbytes / seconds(lambda: dist.all_reduce(tensor))
    dist.destroy_process_group()
    return rate


def base() -> int:
    """Return the bytes of a process before any tensor: the peak of a real run whose model and rows are next to nothing."""
    from danlu.data.kinds import BPE
    from danlu.data.tokenizer import train

    with tempfile.TemporaryDirectory(prefix="danlu-calibrate-") as folder:
        place = Path(folder)
        texts = [f"row {n} of {n * n}" for n in range(64)]
        train(texts, BPE(vocab=300)).save(place / "tokenizer")
        (place / "rows.txt").write_text("\n".join(texts), encoding="utf-8")
        recipe = {"out": str(place / "run"), "data": [{"path": str(place / "rows.txt")}], "tokenizer": str(place / "tokenizer"),
                  "model": {"kind": "decoder", "width": 16, "layers": 1, "heads": 1, "context": 64}, "length": 64, "rows": 1,
                  "objective": {"kind": "causal_lm"}, "optim": {"kind": "adamw"}, "schedule": {"kind": "constant"}, "steps": 3,
                  "precision": "fp32", "device": "cpu", "overlong": "split", "audit": {"stop": []}}
        files.write_json(place / "recipe.json", recipe)
        done = subprocess.run([sys.executable, "-m", "danlu", "train", str(place / "recipe.json")], capture_output=True,
                              text=True, check=False)
        if done.returncode:
            raise ResourceError(_("a run of next to nothing failed: {why}").format(why=done.stderr.strip()[-300:]))
        return int(files.read_json(place / "run" / "run.json")["measured"]["peak"]["step"])


def write(found: Measured, path: Path) -> Path:
    """Write the measurements where later plans look for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, json.loads(found.model_dump_json()))
    return path


if __name__ == "__main__":
    print(talk(int(sys.argv[1]), int(sys.argv[2])))
