"""Load a checkpoint under one layout, compare, save it again: `python reshard.py FOLDER`, a program of test_reshard.py.

Imports once and forks the processes of each world; exit code 0 only if every one of them found every tensor as it was.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from danlu import fault
from danlu.layout import Layout
from danlu.models.decoder import Decoder
from danlu.nn import placed
from danlu.objectives.lm import CausalLM
from danlu.optim import AdamW
from danlu.parallel.place import Placed, place
from danlu.parallel.world import World, meshed
from danlu.train import checkpoint
from danlu.train.writer import Writer

MODELS = {
    "llama": Decoder(family="llama", width=16, layers=2, heads=4, kv_heads=2, hidden=24, vocab=64, context=16),
    "gpt2": Decoder(family="gpt2", width=16, layers=2, heads=4, vocab=64, context=9),     # tied, fused, transposed
}
STEP = 2
Case = tuple[str, dict[str, Any], str]                   # loaded from, layout, saved as
FIRST: list[Case] = [("one", {"dp": 2, "shard": "full"}, "two-fsdp"), ("one", {"dp": 2}, "two-copies")]
FOUR: list[Case] = [
    ("two-fsdp", {"dp": 2, "tp": 2, "shard": "full"}, "four-fsdp-tp"),
    ("two-copies", {"dp": 2, "pp": 2, "micro": 2, "shard": "full"}, "four-fsdp-pp"),
    ("four-fsdp-pp", {"dp": 4, "shard": "full"}, "four-uneven"),     # 9 positions over 4: 3, 3, 3 and 0
]
LAST: list[Case] = [("four-fsdp-tp", {"pp": 2, "micro": 2}, "two-pp"), ("four-uneven", {"tp": 2}, "two-tp")]


class Held:
    """What a process has under a layout: its parts of the model, the averaged weights and the optimizer's state."""

    def __init__(self, cfg: Decoder, layout: dict[str, Any]) -> None:
        self.cfg = cfg
        self.world: World = meshed(Layout(**layout), torch.device("cpu"))
        self.model: Placed = place(cfg, self.world, CausalLM(), precision="fp32", length=8, rows=1)
        self.optimizer = AdamW(lr=1e-3).build((leaf.name, leaf.local) for leaf in self.model.leaves())
        self.tensors = dict(self.model.state_dict())
        self.ema = {name: torch.zeros_like(placed.local(t)) for name, t in self.tensors.items()}

    def compare(self, expected: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            same(f"model/{name}", tensor, expected)
            same(f"ema/{name}", placed.like(tensor, self.ema[name]), expected)
        slots = 0
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for slot, value in self.optimizer.state[parameter].items():
                    same(f"{name}/{slot}", placed.like(self.tensors[name], value) if value.ndim else value, expected)
                    slots += 1
        assert slots == 3 * len(self.tensors)

    def snapshot(self, step: int = STEP, copy: Any = None) -> checkpoint.Snapshot:
        return checkpoint.snapshot(step, self.cfg, self.model, self.optimizer, ema=self.ema, state={"best_global_step": step},
                                   facts={}, tokenizer=None, copy=copy)


def same(name: str, tensor: Tensor, expected: dict[str, Tensor]) -> None:
    whole = tensor.detach()
    whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    assert torch.equal(whole, expected[name]), name


def through(folder: Path, case: Case) -> None:
    """Load, compare and save one checkpoint of each model."""
    source, layout, target = case
    for kind, cfg in MODELS.items():
        held = Held(cfg, layout)
        found = checkpoint.agreed(folder / source / kind, held.world)
        assert found is not None
        checkpoint.load(found, held.model, held.optimizer, ema=held.ema)
        held.compare(load_file(folder / f"{kind}.safetensors"))
        writer = Writer(folder / target / kind, done=lambda path: None, group=held.world.saving)
        if held.world.main:
            writer.out.mkdir(parents=True)
        dist.barrier()
        writer.submit(held.snapshot())
        for tensor in held.tensors.values():
            placed.local(tensor).fill_(float("nan"))     # training goes on meanwhile
        writer.wait()
        assert writer.poll() is None and (writer.out / f"checkpoint-{STEP}" / "manifest.json").is_file()


def failing(folder: Path) -> None:
    """A save fails in one process: it fails in all, leaves what was there, and the next one succeeds."""
    held = Held(MODELS["gpt2"], {"dp": 2, "shard": "full"})
    out = folder / "failing"
    writer = Writer(out, done=lambda path: None, group=held.world.saving)
    if held.world.main:
        out.mkdir()
    dist.barrier()
    writer.submit(held.snapshot(1), wait=True)
    assert writer.poll() is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for rank, armed, words in ((1, "", "process 1: .*large"), (1, "ckpt.async:raise", "process 1: planted"),
                               (1, "ckpt.async.mid:enospc", "process 1: .*space"),
                               (0, "ckpt.mid_shard:raise", "process 0: planted"),
                               (0, "ckpt.before_rename:raise", "process 0: planted")):
        if held.world.rank == rank:
            fault.arm(armed)
            if not armed:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        writer.submit(held.snapshot(2, writer.spare), wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = writer.poll()
        dist.barrier()                                # until the first has cleared up
        assert error is not None and re.search(words, str(error)), (words, error)
        assert [p.name for p in out.iterdir()] == ["checkpoint-1"]
        dist.barrier()
    assert writer.failures == 5
    writer.submit(held.snapshot(3, writer.spare), wait=True)
    assert writer.poll() is None and writer.failures == 0
    assert checkpoint.agreed(out, held.world) == out / "checkpoint-3"


def processes(number: int, folder: Path, work: Callable[[], None]) -> None:
    """Run `work` in so many processes of one group; raises SystemExit unless all end well."""
    meeting = folder / f"meeting-{os.urandom(4).hex()}"
    children = []
    for rank in range(number):
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            code = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=number)
                work()
                dist.destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise SystemExit(1)


def main(folder: Path) -> None:
    for number, cases in ((2, FIRST), (4, FOUR), (2, LAST)):
        processes(number, folder, lambda cases=cases: [through(folder, case) for case in cases])     # type: ignore[misc]
    processes(2, folder, lambda: failing(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
