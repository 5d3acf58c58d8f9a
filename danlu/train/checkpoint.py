"""Checkpoints that are whole or absent, verified before use, and open as Hugging Face folders.

checkpoint-N/  model.safetensors config.json tokenizer.json …   the model, in Hugging Face names
               optimizer.safetensors   `parameter/slot`           ema/ a second folder, if weights are averaged
               trainer_state.json      everything else as JSON    manifest.json   sizes and SHA-256, written last
"""

from __future__ import annotations

import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu import files, tensorfile
from danlu.errors import ConfigError, IncompatibleError
from danlu.fault import fault
from danlu.log import say
from danlu.models import weights
from danlu.words import _

NAME = re.compile(r"^checkpoint-(\d+)$")
SCHEMA = 1


@dataclass
class Snapshot:
    """A copy of a run's state at one step, which training can no longer change."""

    step: int
    config: Any                                          # the model's config object
    model: dict[str, Tensor]                             # our names
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]                                # JSON-ready
    facts: dict[str, Any]                                # what the manifest says beside the hashes
    tokenizer: Path | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)


def flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state as `name/slot` tensors and the rest as JSON-ready values."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                (tensors if isinstance(value, Tensor) else rest)[f"{name}/{slot}"] = value
    return tensors, rest


def unflatten(optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put a flattened state back.  Raises IncompatibleError if it is another optimizer's or another model's."""
    slots: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **rest}.items():
        name, _slash, slot = key.rpartition("/")
        slots.setdefault(name, {})[slot] = value
    state, number = {}, 0
    for group in optimizer.param_groups:
        for name in group["names"]:
            if name in slots:
                state[number] = slots.pop(name)
            number += 1
    if slots:
        raise IncompatibleError(_("the optimizer state has no place for {names}").format(names=", ".join(list(slots)[:3])))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def snapshot(step: int, config: Any, module: nn.Module, optimizer: Optimizer, *, ema: dict[str, Tensor] | None,
             state: dict[str, Any], facts: dict[str, Any], tokenizer: Path | None,
             copy: Snapshot | None = None, own: bool = True) -> Snapshot:
    """Return the state of a run.  `own=False` refers to the live tensors (for a save that training waits for);
    otherwise they are copied, into the buffers of `copy` when an older snapshot can be overwritten."""
    slots, rest = flatten(optimizer)
    groups = {"model": dict(module.state_dict()), "optimizer": slots, "ema": ema}
    buffers = copy.buffers if copy is not None else {}
    if own:
        for group, tensors in groups.items():
            groups[group] = tensors and {n: _into(buffers, f"{group}:{n}", t) for n, t in tensors.items()}
    return Snapshot(step, config, groups["model"] or {}, groups["optimizer"] or {}, groups["ema"],
                    {**state, "optimizer": rest}, facts, tokenizer, buffers)


def _into(buffers: dict[str, Tensor], name: str, source: Tensor) -> Tensor:
    buffer = buffers.get(name)
    if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
        buffer = buffers[name] = torch.empty(source.shape, dtype=source.dtype, device="cpu")
    return buffer.copy_(source.detach())


def needed(snap: Snapshot) -> int:
    """Return the bytes a checkpoint of `snap` will take, with a little to spare."""
    tensors = [*snap.model.values(), *snap.optimizer.values(), *(snap.ema or {}).values()]
    return int(sum(t.numel() * t.element_size() for t in tensors) * 1.01) + (4 << 20)


def save(out: Path, snap: Snapshot) -> Path:
    """Write `out`/checkpoint-N and return it.  Whatever happens, either it is whole or it is not there."""
    files.check_space(out, needed(snap))
    path = out / f"checkpoint-{snap.step}"
    temporary = out / f".tmp-{path.name}-{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    try:
        _write(temporary, snap)
        fault("ckpt.before_rename")
        if path.exists():
            path.rename(out / f".trash-{path.name}-{secrets.token_hex(4)}")
        temporary.rename(path)
        files.fsync_dir(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fault("ckpt.after_rename")
    return path


def _write(folder: Path, snap: Snapshot) -> None:
    records: dict[str, tensorfile.Written] = {}
    fault("ckpt.before_shard")
    records |= weights.write_folder(folder, snap.config, weights.to_hf(snap.config, snap.model), tokenizer=snap.tokenizer)
    fault("ckpt.async.mid")
    records["optimizer.safetensors"] = tensorfile.write(folder / "optimizer.safetensors", snap.optimizer)
    if snap.ema is not None:
        (folder / "ema").mkdir()
        inner = weights.write_folder(folder / "ema", snap.config, weights.to_hf(snap.config, snap.ema), tokenizer=snap.tokenizer)
        records |= {f"ema/{name}": written for name, written in inner.items()}
    files.write_json(folder / "trainer_state.json", snap.state)
    fault("ckpt.before_manifest")
    listed = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        known = records.get(name)
        listed[name] = {"bytes": path.stat().st_size, "sha256": known.sha256 if known else files.sha256(path)}
    files.write_json(folder / "manifest.json", {"schema": SCHEMA, "step": snap.step, **snap.facts, "files": listed})
    files.fsync_dir(folder)


def verify(path: Path, *, hashes: bool = True) -> list[str]:
    """Return what is wrong with a checkpoint, file by file; an empty list means it is whole."""
    try:
        manifest = files.read_json(path / "manifest.json")
        listed = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return [_("{file}: missing or unreadable").format(file="manifest.json")]
    wrong = []
    for name, record in listed:
        file = files.inside(path, name)
        if not file.is_file():
            wrong.append(_("{file}: missing or unreadable").format(file=name))
        elif file.stat().st_size != record["bytes"]:
            wrong.append(_("{file}: {n} bytes instead of {m}").format(file=name, n=file.stat().st_size, m=record["bytes"]))
        elif hashes and files.sha256(file) != record["sha256"]:
            wrong.append(_("{file}: its content has changed (SHA-256)").format(file=name))
    return wrong


def listing(out: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first."""
    found = [(int(m[1]), p) for p in (out.iterdir() if out.is_dir() else ()) if (m := NAME.match(p.name)) and p.is_dir()]
    return [path for _step, path in sorted(found)]


def newest(out: Path, *, hashes: bool = True) -> Path | None:
    """Return the newest whole checkpoint; damaged ones are set aside as `….corrupt`, and said."""
    for path in reversed(listing(out)):
        wrong = verify(path, hashes=hashes)
        if not wrong:
            return path
        say(_("{checkpoint} is damaged and set aside: {why}").format(checkpoint=path.name, why="; ".join(wrong)))
        path.rename(path.with_name(f"{path.name}.corrupt-{secrets.token_hex(2)}"))
    return None


def _told_damage(path: Path) -> bool:
    """Return whether a checkpoint is damaged, having said so."""
    wrong = verify(path)
    if wrong:
        say(_("{checkpoint} is damaged and not used: {why}").format(checkpoint=path.name, why="; ".join(wrong)))
    return bool(wrong)


def chosen(path: Path) -> Path:
    """Return the folder with weights that `path` means: itself, or of a run the best checkpoint, else the newest.

    Averaged weights are preferred where a run has them.  Raises IncompatibleError if it is damaged.
    """
    if not (path / "config.json").is_file():
        whole = [each for each in reversed(listing(path)) if not _told_damage(each)]
        if not whole:
            raise ConfigError(_("no whole checkpoint and no model is there"), where=str(path))
        best = path / f"checkpoint-{files.read_json(whole[0] / 'trainer_state.json')['best_global_step']}"
        path = best if best in whole else whole[0]
    elif (path / "manifest.json").is_file() and (wrong := verify(path)):
        raise IncompatibleError(_("the checkpoint is damaged: {why}").format(why="; ".join(wrong)), where=str(path))
    return path / "ema" if (path / "ema").is_dir() else path


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Return the model of a run (its best checkpoint), a checkpoint or a Hugging Face folder, ready to evaluate."""
    return weights.load(chosen(Path(path)), device=device).eval()


def load(path: Path, module: nn.Module, optimizer: Optimizer | None = None, *,
         ema: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Fill the module, the optimizer and the averaged weights from a verified checkpoint; return its state."""
    config = weights.read_config(path)
    module.load_state_dict(weights.from_hf(config, weights.read_tensors(path)), strict=True)
    state: dict[str, Any] = files.read_json(path / "trainer_state.json")
    if optimizer is not None:
        unflatten(optimizer, load_file(path / "optimizer.safetensors"), state["optimizer"])
    if ema is not None:
        for name, tensor in weights.from_hf(config, weights.read_tensors(path / "ema")).items():
            if name in ema:
                ema[name].copy_(tensor)
    return state


def prune(out: Path, *, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best; each is renamed to `.trash-…` first."""
    for path in listing(out)[:-keep]:
        if path != best:
            trash = out / f".trash-{path.name}-{secrets.token_hex(4)}"
            fault("ckpt.before_prune")
            path.rename(trash)
            fault("ckpt.mid_prune")
            shutil.rmtree(trash)


def sweep(out: Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for path in out.iterdir() if out.is_dir() else ():
        if path.name.startswith((".tmp-checkpoint-", ".trash-checkpoint-")):
            shutil.rmtree(path, ignore_errors=True)


class Writer:
    """Saves in a thread of its own.  A failure is told at the next step; the run goes on without that save."""

    def __init__(self, out: Path, *, done: Callable[[Path], None]) -> None:
        self.out, self.done = out, done
        self.thread: threading.Thread | None = None
        self.spare: Snapshot | None = None
        self.error: BaseException | None = None
        self.failures = 0

    def submit(self, snap: Snapshot, *, wait: bool = False) -> None:
        """Begin to write `snap` once the save before it has ended; `wait` returns when it is on disk."""
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(snap,), name="danlu-checkpoint")
        self.thread.start()
        if wait:
            self.wait()

    def _run(self, snap: Snapshot) -> None:
        try:
            fault("ckpt.async")
            self.done(save(self.out, snap))
            self.failures = 0
        except BaseException as error:                   # a thread has nobody to raise to: poll() tells it
            self.error = error
            self.failures += 1
        self.spare = snap

    def wait(self) -> None:
        """Return when no save is under way."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def poll(self) -> BaseException | None:
        """Return the error of a save that failed since the last call."""
        error, self.error = self.error, None
        return error
