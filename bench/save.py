"""Saving 124 M parameters with AdamW's state: Danlu's checkpoint (hashed, synced) beside `torch.save`; and the pause.

    python -m bench.save --folder DIR       # DIR on the disk that is meant; needs about 3 GB there and 6 GB of memory
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from danlu import parallel
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.optim import AdamW
from danlu.train import checkpoint


def seconds(do: Callable[[], object]) -> float:
    """Return what one call takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def main() -> None:
    """Take turns and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    out = arguments.folder / "bench-save"
    out.mkdir(parents=True)
    parallel.start(threads=None, device="cpu")
    cfg = Decoder(preset="gpt2", vocab=50304)
    model = build(cfg)
    model.to_empty(device="cpu")
    model.init(0)
    optimizer = AdamW(lr=1e-3).build(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def snapshot(own: bool, copy: checkpoint.Snapshot | None = None) -> checkpoint.Snapshot:
        return checkpoint.snapshot(1, cfg, model, optimizer, ema=None, state={}, facts={}, tokenizer=None, copy=copy, own=own)

    def ours() -> None:
        shutil.rmtree(checkpoint.save(out, snapshot(False)))

    def theirs() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "x.pt")
        (out / "x.pt").unlink()

    tensors = [*model.state_dict().values(), *checkpoint.flatten(optimizer)[0].values()]
    kept = snapshot(True)
    buffers = [torch.empty_like(t) for t in tensors]
    times: dict[str, list[float]] = {"torch.save": [], "checkpoint": [], "copy in memory": [], "pause": []}
    for _round in range(arguments.rounds):
        times["torch.save"].append(seconds(theirs))
        times["checkpoint"].append(seconds(ours))
        times["copy in memory"].append(seconds(lambda: [b.copy_(t) for b, t in zip(buffers, tensors, strict=True)]))
        times["pause"].append(seconds(lambda: snapshot(True, kept)))
    shutil.rmtree(out)
    median = {name: statistics.median(values) for name, values in times.items()}
    size = sum(t.numel() * t.element_size() for t in tensors)
    for name, value in median.items():
        print(f"{name:16} {value:7.2f} s  {size / value / 1e9:5.2f} GB/s")
    print(f"checkpoint / torch.save: {median['checkpoint'] / median['torch.save']:.2f}, target 1.2")
    print(f"pause / copy in memory: {median['pause'] / median['copy in memory']:.2f}, target 1.5")


if __name__ == "__main__":
    main()
