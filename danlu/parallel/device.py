"""The process is made ready: threads, memory, device; and what arithmetic the device is fast at."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from danlu.errors import ConfigError
from danlu.words import _

Precision = Literal["fp32", "bf16", "fp16"]
Allocator = Literal["keep", "return"]
SWITCHES = (-3, -1, -2)                                  # of mallopt: mmap threshold, trim threshold, top pad
SIZES: dict[Allocator, tuple[int, int, int]] = {"keep": (1 << 30, (1 << 31) - 1, 64 << 20),
                                                "return": (2 << 20, 256 << 20, 16 << 20)}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start(*, threads: int | None, device: str, allocator: Allocator = "keep") -> torch.device:
    """Make the process ready: threads, memory allocator, device.  Returns the device; ConfigError if it is absent."""
    if threads is not None:
        torch.set_num_threads(threads)
    _manage_memory(allocator)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(_("no CUDA device is visible"), where="device", fix=_("set device=cpu or auto"))
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.cuda.set_device(_own_gpu(torch.cuda.device_count()))
        return torch.device("cuda", torch.cuda.current_device())
    _bound_memory()
    return torch.device("cpu")


def _own_gpu(visible: int) -> int:
    """Return which of the visible GPUs is this process's: one each.  ConfigError if there are fewer than processes."""
    place = int(told) if (told := os.environ.get("LOCAL_RANK")) else torch.cuda.current_device()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))
    if place and visible == 1 and os.environ.get("SLURM_PROCID"):        # srun --gpus-per-task=1 shows each its own
        return 0
    if place >= visible:
        raise ConfigError(_("{n} processes on this machine, and {m} GPUs can be seen").format(n=here, m=visible), where="layout",
                          fix=_("give each process a GPU of its own, or set device=cpu"))
    return place


def _bound_memory() -> None:
    """Let an allocation fail that the machine cannot back, so that the run ends with advice and not by the kernel's hand.

    Only private memory counts (RLIMIT_DATA): mapped data sets may be larger than the machine.
    """
    if sys.platform != "linux":
        return
    words = {line.split(":")[0]: line.split()[1] for file in ("/proc/self/status", "/proc/meminfo")
             for line in Path(file).read_text().splitlines() if line.startswith(("VmData", "MemAvailable"))}
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = (int(words["VmData"]) + int(words["MemAvailable"])) * 1024
    if soft == resource.RLIM_INFINITY or bound < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))


def _manage_memory(allocator: Allocator) -> None:
    """Tell glibc what to do with freed blocks.

    keep: they stay for the next, because page faults of fresh ones cost 6 times the fill itself (measured, see LOG.md).  But
    blocks of unlike sizes leave holes, so the process grows beyond what it ever holds, by a share that nobody can foretell.
    return: a block of 2 MB or more is a mapping of its own, in large pages where the system has them, and goes back at once.
    """
    if sys.platform != "linux":
        return
    if allocator == "return":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"         # PyTorch reads it when it makes its first tensor
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):                 # another libc (musl) has no such switch
        return
    for switch, size in zip(SWITCHES, SIZES[allocator], strict=True):
        mallopt(ctypes.c_int(switch), ctypes.c_int(size))


def give_back() -> None:
    """Give what glibc keeps of freed blocks back to the system.

    Called where one kind of work ends and another begins, so that none holds what only the one before it needed: the pages of
    an evaluation's blocks would stay with the process through all steps that follow.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):       # another libc (musl) gives back by itself
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def old_objects_apart() -> Iterator[None]:
    """Let collections of garbage look only at what is made from now on: all objects of a process take 0.2 s each time."""
    first = gc.get_freeze_count() == 0
    gc.collect()                                         # or garbage of before would stay until the end
    gc.freeze()
    try:
        yield
    finally:
        if first:
            gc.unfreeze()


def fastest(device: torch.device) -> Precision:
    """Return bf16 where its matrix products are clearly faster than those of fp32 on this device, else fp32.

    Measured, because it is not a matter of the instruction set: with AVX512-BF16 but without AMX, one chip gains 2.2
    times and another loses half.
    """
    return "bf16" if peak(device, "bf16") > 1.2 * peak(device, "fp32") else "fp32"


@cache
def peak(device: torch.device, precision: str, size: int = 768) -> float:
    """Return the FLOP/s of matrix products of this size, measured in some milliseconds: the denominator of MFU."""
    if device.type != "cpu":
        size = 4096
    a = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    best = 0.0
    for _repeat in range(5):
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context under which forward passes run in `precision`."""
    if precision in ("fp32", "fp64"):
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
