"""run.json: what a run was made from, by content hash, so that lineage can be walked back."""

from __future__ import annotations

import platform
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

import danlu
from danlu import config, files
from danlu.adapt import folder as adapters
from danlu.models import weights
from danlu.parallel import launched
from danlu.train.recipe import Run
from danlu.words import _

HARMLESS = {"out", "every", "workers", "allocator", "trackers", "report", "resume", "verify", "guard", "stop"}


@cache
def code() -> str:
    """Return the hash of the package's source files."""
    root = Path(danlu.__file__).parent
    return files.digest({p.relative_to(root).as_posix(): files.sha256(p) for p in sorted(root.rglob("*.py"))})


def machine() -> dict[str, Any]:
    """Return what makes results repeat to the bit: versions, device, threads."""
    cuda = torch.cuda.is_available()
    return {"danlu": danlu.__version__, "code": code(), "torch": torch.__version__, "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if cuda else platform.machine(), "world_size": launched(),
            "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def same_machine(found: Path | None, run: Run) -> bool:
    """Return whether a resumed run may be held to the recorded losses: same versions, threads and settings.

    On a GPU some kernels add in no fixed order, unless PyTorch is told not to use them: there nothing repeats to the bit.
    """
    if found is None or (run.device != "cpu" and torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled()):
        return False
    manifest = files.read_json(found / "manifest.json")
    return all(manifest.get(k) == v for k, v in machine().items()) and not differences(manifest["run"], config.dump(run))


def differences(then: dict[str, Any], now: dict[str, Any], under: str = "") -> list[str]:
    """Return the settings that differ and matter for the result, as text."""
    found = []
    for key in sorted(then.keys() | now.keys()):
        before, after = then.get(key), now.get(key)
        if before == after or (not under and key in HARMLESS):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{under}{key}.")
        else:
            found.append(_("{key}: {then} then, {now} now").format(key=under + key, then=before, now=after))
    return found


def elsewhere(then: dict[str, Any]) -> list[str]:
    """Return what of versions, device and threads is not as a manifest tells, as text; hashes by their beginning."""
    now = {name: str(value)[:24] for name, value in machine().items()}
    return differences({name: str(then.get(name))[:24] for name in now}, now)


STAMPED = ("config.json", "generation_config.json", "manifest.json", "parity.json", adapters.OURS, *weights.TOKENIZER_FILES)


def stamp(folder: Path) -> dict[str, Any]:
    """Return what stands for a folder of weights in receipts: where it is, and the hash of every file that makes the model.

    Of averaged weights (a checkpoint's `ema`) the manifest beside them is told, too, as ../manifest.json.
    """
    found = adapters.Base.of(folder)
    told = {name: files.sha256(folder / name) for name in STAMPED if (folder / name).is_file()}
    above = folder.parent / "manifest.json"
    if folder.name == "ema" and above.is_file():
        told["../manifest.json"] = files.sha256(above)
    return {"path": str(found.folder), "sha256": {**found.sha256, **told}}


def began_with(run: Run) -> dict[str, Any]:
    """Return what receipts tell of the weights that a run begins with: `start`, and the adapter that goes on learning."""
    adapter = run.adapt.model_dump().get("start") if run.adapt is not None else None
    given = {"start": run.start, "adapter": adapter}
    return {name: stamp(Path(path)) for name, path in given.items() if path is not None}


def begin(run: Run, *, data_records: list[dict[str, Any]], tokenizer: str, parameters: int, choice: dict[str, str],
          audit: dict[str, Any]) -> None:
    """Write run.json and recipe.yaml."""
    again = run if run.start is None else run.model_copy(update={"model": None})      # it is that of `start`
    files.write_text(run.out / "recipe.yaml", config.to_yaml(again))
    files.write_json(run.out / "run.json", {
        "schema": 1, "kind": "train", "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "run": config.dump(run),
        **began_with(run), "data": data_records, "tokenizer": tokenizer, "parameters": parameters, "choice": choice,
        "audit": audit, "machine": machine(),
    })


def finish(out: Path, metrics: dict[str, Any]) -> None:
    """Add the result to run.json."""
    add(out, {"ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "metrics": metrics})


def add(out: Path, more: dict[str, Any]) -> None:
    """Add keys to run.json."""
    files.write_json(out / "run.json", {**files.read_json(out / "run.json"), **more})
