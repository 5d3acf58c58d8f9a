"""Checkpoints that are whole or absent, verified before use, and open as Hugging Face folders.

checkpoint-N/  model.safetensors config.json tokenizer.json …   the model, in Hugging Face names
               optimizer.safetensors   `parameter/slot`           ema/ a second folder, if weights are averaged
               trainer_state.json      everything else as JSON    manifest.json   sizes and SHA-256, written last

Of several processes, which each hold parts, the same; only that `shards/` stands for optimizer.safetensors, where each
writes its own.  Every checkpoint is read under every layout: a process takes from the files what it holds.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu import files, tensorfile
from danlu.adapt import QAT
from danlu.adapt import folder as adapters
from danlu.adapt.targets import kept
from danlu.errors import ConfigError, IncompatibleError
from danlu.fault import fault
from danlu.log import say
from danlu.models import formed, hub
from danlu.nn import placed
from danlu.nn.forms import Table
from danlu.parallel import World
from danlu.train.shards import Crew, Parts, sizes, wrap, write
from danlu.words import _

NAME = re.compile(r"^checkpoint-(\d+)$")
SCHEMA = 1


@dataclass
class Snapshot:
    """A copy of a run's state at one step, which training can no longer change."""

    step: int
    config: Any                                          # the model's config object
    model: dict[str, Tensor]                             # our names; of several processes, each one's part (DTensor)
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]                                # JSON-ready
    facts: dict[str, Any]                                # what the manifest says beside the hashes
    tokenizer: Path | None = None
    adapter: adapters.Stored | None = None               # then `model` is only what belongs to it
    rounding: QAT | None = None                          # how the weights were rounded while they learned
    table: Table = field(default_factory=list)           # forms of layers that are not as the config says
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)


def flatten(optimizer: Optimizer, held: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state as `name/slot` tensors and the rest as JSON-ready values.

    held: the model's tensors.  Where such a one is cut (DTensor) the optimizer has a plain tensor for the local part, and
    its state is returned as what it is: a part.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            whole = (held or {}).get(name, parameter)
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{slot}"] = wrap(whole, value)
                else:
                    rest[f"{name}/{slot}"] = value
    return tensors, rest


def unflatten(optimizer: Optimizer, saved: Parts, rest: Mapping[str, Any], held: Mapping[str, Tensor],
              known: Collection[str] = ()) -> None:
    """Put a flattened state back, of the tensors in `held` what this process has of them.

    known: names that another process may hold.  Raises IncompatibleError if it is another optimizer's or another model's.
    """
    slots: dict[str, list[str]] = {}
    for key in (*saved, *rest):
        name, _slash, slot = key.rpartition("/")
        slots.setdefault(name, []).append(slot)
    state, number = {}, 0
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            found = {slot: f"{name}/{slot}" for slot in slots.pop(name, ())}
            if found:
                state[number] = {slot: rest[key] if key in rest else _slot(saved, key, held.get(name, parameter), parameter)
                                 for slot, key in found.items()}
            number += 1
    left = [name for name in slots if name in held or name not in known]
    if left:
        raise IncompatibleError(_("the optimizer state has no place for {names}").format(names=", ".join(left[:3])))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _slot(saved: Parts, key: str, whole: Tensor, parameter: Tensor) -> Tensor:
    """Return what of a saved slot belongs to the local part of `whole`, which is `parameter`."""
    shape = tuple(saved.like[key].shape)
    if shape == tuple(whole.shape):
        _whole, offset, shape = placed.extent(whole)
        value = saved.part(key, offset, shape)
    elif shape and placed.cuts(whole) > 1:
        raise IncompatibleError(_("{name} has shape {found}, which this layout cannot cut like {wanted}").format(
            name=key, found=shape, wanted=tuple(whole.shape)))
    else:
        value = saved[key]
    # What stays where it is would keep the file mapped, and its space taken after it is deleted.
    return value.clone() if parameter.device.type == "cpu" or not value.ndim else value


def snapshot(step: int, config: Any, module: Any, optimizer: Optimizer, *, ema: dict[str, Tensor] | None,
             state: dict[str, Any], facts: dict[str, Any], tokenizer: Path | None,
             copy: Snapshot | None = None, own: bool = True, adapter: adapters.Stored | None = None,
             rounding: QAT | None = None, table: Table = ()) -> Snapshot:
    """Return the state of a run.  `own=False` refers to the live tensors (for a save that training waits for);
    otherwise they are copied, into the buffers of `copy` when an older snapshot can be overwritten."""
    held = dict(module.state_dict())
    if adapter is not None:
        held = {name: held[name] for name in kept(module, config)}
    slots, rest = flatten(optimizer, held)
    groups = {"model": held, "optimizer": slots, "ema": ema and {n: wrap(held[n], t) for n, t in ema.items()}}
    buffers = copy.buffers if copy is not None else {}
    if own:
        for group, tensors in groups.items():
            groups[group] = tensors and {n: _into(buffers, f"{group}:{n}", t) for n, t in tensors.items()}
    return Snapshot(step, config, groups["model"] or {}, groups["optimizer"] or {}, groups["ema"],
                    {**state, "optimizer": rest}, facts, tokenizer, adapter, rounding, table, buffers)


def _into(buffers: dict[str, Tensor], name: str, source: Tensor) -> Tensor:
    part = placed.local(source)
    buffer = buffers.get(name)
    if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
        buffer = buffers[name] = torch.empty(part.shape, dtype=part.dtype, device="cpu")
    return wrap(source, buffer.copy_(part))


def needed(snap: Snapshot, crew: Crew) -> int:
    """Return the bytes a checkpoint of `snap` will take while it is written, with a little to spare."""
    models = {f"{group}/{name}": t for group in ("model", "ema") for name, t in (getattr(snap, group) or {}).items()}
    copies = 1 if crew.size == 1 else 2                  # parts, before they are put together
    return int((sum(sizes(models, crew).values()) * copies + sum(sizes(snap.optimizer, crew).values())) * 1.01) + (4 << 20)


def save(out: Path, snap: Snapshot, *, group: dist.ProcessGroup | None = None) -> Path:
    """Write `out`/checkpoint-N and return it.  Whatever happens, either it is whole or it is not there.

    group: the processes that hold parts of the state, all of which call this at the same time and see the same `out`.
    """
    crew = Crew(group)
    space = needed(snap, crew)
    crew.first(lambda: files.check_space(out, space))
    path = out / f"checkpoint-{snap.step}"
    temporary = out / crew.first(lambda: _begun(out, path.name))
    try:
        records = _whole(temporary, snap) if group is None else _parts(temporary, snap, crew)
        crew.first(lambda: _finish(temporary, path, snap, records, world=crew.size))
    except BaseException:
        if crew.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    crew.all(lambda: fault("ckpt.after_rename"))
    return path


def _begun(out: Path, name: str) -> str:
    temporary = out / f".tmp-{name}-{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    return temporary.name


Records = dict[str, tensorfile.Written]


def _whole(folder: Path, snap: Snapshot) -> Records:
    """Write the tensors of a process that is alone."""
    fault("ckpt.before_shard")
    records = _model(folder, snap, snap.model)
    fault("ckpt.async.mid")
    records["optimizer.safetensors"] = tensorfile.write(folder / "optimizer.safetensors", snap.optimizer)
    if snap.ema is not None:
        records |= _averaged(folder, snap, snap.ema)
    files.write_json(folder / "trainer_state.json", snap.state)
    return records


def _parts(folder: Path, snap: Snapshot, crew: Crew) -> Records:
    """Write the tensors of several processes: each its parts; the first puts the models together, tensor by tensor."""
    crew.all(lambda: fault("ckpt.before_shard"))
    parts = folder / ".parts"
    write(parts / "model", snap.model, crew)
    crew.all(lambda: fault("ckpt.async.mid"))
    records = {f"shards/{name}": record for name, record in write(folder / "shards", snap.optimizer, crew).items()}
    if snap.ema is not None:
        write(parts / "ema", snap.ema, crew)
    rest = {name: value for each in crew.all(lambda: snap.state["optimizer"]) for name, value in each.items()}

    def put_together() -> Records:
        whole = Parts(parts / "model")
        put = _model(folder, snap, whole, whole.like)
        if snap.ema is not None:
            whole = Parts(parts / "ema")
            put |= _averaged(folder, snap, whole, whole.like)
        del whole                                        # or the files stay mapped
        shutil.rmtree(parts)
        files.write_json(folder / "trainer_state.json", {**snap.state, "optimizer": rest})
        return put

    return records | crew.first(put_together)


def _model(folder: Path, snap: Snapshot, state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> Records:
    if snap.adapter is not None:
        return adapters.write(folder, snap.config, snap.adapter.adapt, state, base=snap.adapter.base, tokenizer=snap.tokenizer)
    if snap.rounding is not None:
        adapters.mark(folder, snap.rounding)
    return formed.write(folder, snap.config, state, table=snap.table, like=like, tokenizer=snap.tokenizer)


def _averaged(folder: Path, snap: Snapshot, state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> Records:
    (folder / "ema").mkdir()
    return {f"ema/{name}": written for name, written in _model(folder / "ema", snap, state, like).items()}


def _finish(folder: Path, path: Path, snap: Snapshot, records: Records, *, world: int) -> None:
    """List all files in the manifest, and let the checkpoint appear."""
    fault("ckpt.before_manifest")
    listed = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        known = records.get(name)
        listed[name] = {"bytes": file.stat().st_size, "sha256": known.sha256 if known else files.sha256(file)}
    files.write_json(folder / "manifest.json",
                     {"schema": SCHEMA, "step": snap.step, **snap.facts, "world_size": world, "files": listed})
    files.fsync_dir(folder)
    fault("ckpt.before_rename")
    if path.exists():
        path.rename(path.with_name(f".trash-{path.name}-{secrets.token_hex(4)}"))
    folder.rename(path)
    files.fsync_dir(path.parent)


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


def agreed(out: Path, world: World, *, hashes: bool = True) -> Path | None:
    """Return the newest whole checkpoint, the same in every process.  The first one sweeps, verifies and sets aside."""
    def search() -> Path | None:
        sweep(out)
        return newest(out, hashes=hashes)

    return Crew(world.saving).first(search)


def _told_damage(path: Path) -> bool:
    """Return whether a checkpoint is damaged, having said so."""
    if wrong := verify(path):
        say(_("{checkpoint} is damaged and not used: {why}").format(checkpoint=path.name, why="; ".join(wrong)))
    return bool(wrong)


def chosen(path: Path) -> Path:
    """Return the folder with weights that `path` means: itself, or of a run the best checkpoint, else the newest.

    A name on a hub is fetched.  Averaged weights are preferred where a run has them.  IncompatibleError: it is damaged.
    """
    if hub.is_name(path):
        return hub.fetch(path.as_posix())
    if not (path / "config.json").is_file() and not adapters.is_adapter(path):
        whole = [each for each in reversed(listing(path)) if not _told_damage(each)]
        if not whole:
            raise ConfigError(_("no whole checkpoint and no model is there"), where=str(path))
        mean = path / "averaged"                         # of the run's end, unless it has gone on since
        if mean.is_dir() and not _told_damage(mean) and files.read_json(mean / "manifest.json")["of"] == whole[0].name:
            return mean
        best = path / f"checkpoint-{files.read_json(whole[0] / 'trainer_state.json')['best_global_step']}"
        path = best if best in whole else whole[0]
    elif (path / "manifest.json").is_file() and (wrong := verify(path)):
        raise IncompatibleError(_("the checkpoint is damaged: {why}").format(why="; ".join(wrong)), where=str(path))
    return path / "ema" if (path / "ema").is_dir() else path


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Return the model of a run (its best checkpoint), a checkpoint or a Hugging Face folder, ready to evaluate."""
    return adapters.load(chosen(Path(path)), device=device).eval()


def load(path: Path, module: Any, optimizer: Optimizer | None = None, *,
         ema: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Fill the module, the optimizer and the averaged weights from a verified checkpoint; return its state.

    module: anything with a `state_dict` of our names, whose tensors may be parts of the whole (DTensor), and which may
    hold only some of them (a stage).  A process reads what it holds and needs no other.
    """
    config = adapters.read_config(path)
    held = dict(module.state_dict())
    known = {*formed.names(config, formed.table_of(path)), *_fill(held, config, path, module)}
    state: dict[str, Any] = files.read_json(path / "trainer_state.json")
    if optimizer is not None:
        single = path / "optimizer.safetensors"
        unflatten(optimizer, Parts(single if single.is_file() else path / "shards"), state["optimizer"], held,
                  known=known)
    if ema is not None:
        _fill({name: wrap(held[name], tensor) for name, tensor in ema.items()}, config, path / "ema", module)
    return state


def _fill(held: Mapping[str, Tensor], config: Any, path: Path, module: Any) -> set[str]:
    """Fill in what a folder stores: a model, or an adapter alone.  Return the names of the latter's tensors."""
    if not adapters.is_adapter(path):
        formed.fill(held, config, path)
        return set()
    stored = adapters.tensors(adapters.describe(path))
    adapters.put({name: held[name] for name in kept(module, config)}, stored, where=str(path))
    return set(stored)


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
