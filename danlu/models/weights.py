"""Folders of weights as Hugging Face lays them out: config.json, safetensors in shards, and nothing that could run.

What is written opens in `transformers` unchanged; what is read is checked to the last name and shape.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from danlu import files, tensorfile
from danlu.errors import ConfigError, DataError, IncompatibleError, SecurityError
from danlu.fault import fault
from danlu.models import (
    decoder,
    decoder_config,
    decoder_names,
    encoder,
    encoder_config,
    foreign,
    foreign_config,
    names,
    sentences,
)
from danlu.models.build import Config, Network, build
from danlu.nn import forms, packed, placed
from danlu.words import _

SHARD_BYTES = 5_000_000_000
PACKED, METHOD = "packed.safetensors", "danlu"           # of weights in other forms: their file, and quant_method in config.json
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


class _Family(NamedTuple):
    """Where a model type's names and config.json are known."""

    names: Callable[[Any], Iterator[names.Name]]
    modern: Callable[[Any, str], str]
    read: Callable[..., Any]
    write: Callable[[Any], dict[str, Any]]


_DECODER = _Family(decoder_names.names, decoder_names.modern, decoder_config.read, decoder_config.write)
_ENCODER = _Family(encoder.names, encoder.modern, encoder_config.read, encoder_config.write)
_FOREIGN = _Family(foreign.names, foreign.modern, foreign_config.read, foreign_config.write)
_TYPES = dict.fromkeys(decoder.FAMILIES, _DECODER) | dict.fromkeys(encoder.FAMILIES, _ENCODER)


def _family(cfg: Config) -> _Family:
    return {"decoder": _DECODER, "encoder": _ENCODER, "foreign": _FOREIGN}[cfg.kind]


def named(cfg: Config) -> Iterator[names.Name]:
    """Yield every tensor of a Hugging Face folder of the model that `cfg` describes, and what of ours it is."""
    return _family(cfg).names(cfg)


def modern(cfg: Config, name: str) -> str:
    """Return what `named` calls a tensor that an older folder, or one with other heads, calls `name`."""
    return _family(cfg).modern(cfg, name)


def to_hf(cfg: Config, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face's name, tensor) for all of `state` (our names): the inverse of `from_hf`, bit for bit."""
    return names.to_hf(_family(cfg).names(cfg), state)


def from_hf(cfg: Config, tensors: Mapping[str, Tensor], *, where: str | None = None,
            fresh: Callable[[str], bool] = lambda name: False, heads: bool = True) -> dict[str, Tensor]:
    """Return the weights under our names, mostly views.  IncompatibleError names a missing, left-over or misshapen one.

    fresh: our names that may be missing.  heads: whether those of tasks are read, for they are the same tasks.
    """
    family = _family(cfg)
    tensors = {family.modern(cfg, name): tensor for name, tensor in tensors.items()}
    for name in family.names(cfg) if not heads else ():
        if any(ours.startswith("heads.") for ours in name.ours):
            tensors.pop(name.theirs, None)
    return names.from_hf(family.names(cfg), tensors, shapes(cfg), where=where, fresh=fresh)


def shapes(cfg: Config) -> dict[str, torch.Size]:
    """Return the name and shape of every weight of the whole model."""
    return {name: tensor.shape for name, tensor in build(cfg).state_dict().items()}


def read_config(folder: str | Path) -> Config:
    """Return the config of the model in `folder`.  Raises ConfigError, DataError or IncompatibleError; runs no code."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise ConfigError(_("there is no such folder"), where=str(folder),
                          fix=_("give the path of a folder with config.json"))
    if not path.is_file():
        raise ConfigError(_("the folder holds no config.json"), where=str(folder))
    data = read_json(path)
    if forms_in(data) is not None:
        data = {key: value for key, value in data.items() if key != "quantization_config"}
    kind = data.get("model_type")
    if not isinstance(kind, str):
        raise IncompatibleError(_("the architecture {kind!r} is not known").format(kind=kind), where=str(path),
                                fix=_("use one of {kinds}").format(kinds=", ".join(_TYPES)))
    cfg: Config = _TYPES.get(kind, _FOREIGN).read(data, where=str(path))
    return cfg


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Return every tensor of a folder's safetensors files, under Hugging Face's names.

    They are mapped from the files: what nobody looks at is never read.
    """
    tensors: dict[str, Tensor] = {}
    for path, wanted in _shards(Path(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                found = set(file.keys())
                if wanted is not None and found != wanted:
                    name = min(found ^ wanted)
                    raise IncompatibleError(
                        _("the index and the file do not agree on {name}").format(name=name), where=str(path))
                tensors.update((name, file.get_tensor(name)) for name in sorted(found))
        except (SafetensorError, OSError) as error:
            raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path),
                            fix=_("copy or download it again")) from None
    return tensors


def _shards(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """Return the safetensors files and, where there is an index, the names each must hold."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise DataError(_("the index has no weight_map"), where=str(index))
        wanted: dict[Path, set[str]] = {}
        for name, file in listed.items():
            path = files.inside(folder, file)
            if path.suffix != ".safetensors" or path.parent != folder.resolve():
                raise SecurityError(_("the name {name!r} leaves its folder").format(name=file), where=str(index))
            wanted.setdefault(path, set()).add(name)
        return list(wanted.items())
    if single.is_file():
        return [(single, None)]
    if (folder / PACKED).is_file():
        raise IncompatibleError(_("the weights are packed, in fewer bits or numbers, and whole ones are needed here"),
                                where=str(folder), fix=_("use the model that they were packed from"))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise SecurityError(
            _("the weights in {file} are a format that can run code, and are not opened").format(file=pickles[0]),
            where=str(folder), fix=_("use the model's safetensors files"))
    raise ConfigError(_("the folder holds no model.safetensors"), where=str(folder))


def read_json(path: Path) -> dict[str, Any]:
    """Return the keys and values of a JSON file.  Raises DataError if it holds anything else."""
    try:
        data = files.read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path)) from None
    if not isinstance(data, dict):
        raise DataError(_("the file must hold keys and values"), where=str(path))
    return data


def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
         heads: Sequence[str] | None = None) -> Network:
    """Return the model of `folder` with its weights.  heads: an encoder's, if only these; others are left out."""
    cfg = read_config(folder)
    if heads is None and (Path(folder) / PACKED).is_file():
        return _load_packed(Path(folder), cfg, device=device, dtype=dtype)
    if heads is not None and not isinstance(cfg, decoder.Decoder):
        cfg = cfg.with_heads(heads)
    elif heads is not None:
        cfg = cfg.filled(vocab=cfg.vocab or 0, heads=heads)
    state = from_hf(cfg, read_tensors(folder), where=str(folder))
    model = build(cfg)
    state = {name: t.to(device, dtype if t.is_floating_point() else t.dtype).contiguous() for name, t in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def forms_in(told: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the forms of layers that a config.json tells, as `packed.groups_of` gives them; None: the weights are whole."""
    given = told.get("quantization_config")
    return given.get("forms", []) if isinstance(given, dict) and given.get("quant_method") == METHOD else None


def read_packed(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder whose weights are packed, under our names; mapped from the file."""
    try:
        with safe_open(folder / PACKED, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(folder / PACKED),
                        fix=_("copy or download it again")) from None


def _load_packed(folder: Path, cfg: Config, *, device: str | torch.device, dtype: torch.dtype) -> Network:
    """Return the model of a folder whose weights are packed; those that are whole have `dtype`, parts keep their own."""
    try:
        table = packed.table_of(forms_in(read_json(folder / "config.json")) or [])
        model = build(cfg)
        packed.install(model, table)
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=str(error).splitlines()[0]),
                        where=str(folder / "config.json")) from None
    state = read_packed(folder)
    own = {name for name, _buffer in model.named_buffers()}
    for name, form in table:
        if isinstance(form, forms.Bits):                # so it is stored, and whole it is computed with
            parts = {part: state.pop(f"{name}.{part}") for part in ("mask", "values") if f"{name}.{part}" in state}
            state[f"{name}.weight"] = form.dense(parts, model.get_submodule(name).in_features)      # type: ignore[arg-type]
    # copied out of the mapped file: where a tensor begins in memory decides how its products are rounded
    state = {name: t.to(device, t.dtype if name in own or not t.is_floating_point() else dtype, copy=True).contiguous()
             for name, t in state.items()}
    found = model.state_dict()
    wrong = sorted(state.keys() ^ found.keys()) or [name for name, t in state.items() if t.shape != found[name].shape]
    if wrong:
        raise IncompatibleError(_("config.json and {file} do not agree on {name}").format(file=PACKED, name=wrong[0]),
                                where=str(folder), fix=_("copy or download it again"))
    model.load_state_dict(state, strict=True, assign=True)
    return model


def write_packed(folder: Path, cfg: Config, state: Mapping[str, Tensor], *, table: forms.Table, tokenizer: Path | None = None,
                 dtype: Mapping[str, torch.dtype] | None = None) -> dict[str, tensorfile.Written]:
    """Write a model with layers in the forms of `table` into an existing `folder`; Danlu opens it, `transformers` does not.

    dtype: of single weights by our name, where it is another.  The tensors stand under our names.
    """
    state = dict(state)
    for name, form in table:
        if isinstance(form, forms.Bits):
            state |= {f"{name}.{part}": tensor for part, tensor in form.pack(state.pop(f"{name}.weight")).items()}
    tensors = {name: t if dtype is None else t.to(dtype.get(name, t.dtype)) for name, t in state.items()}
    written = tensorfile.write(folder / PACKED, tensors, metadata={"format": "pt"})
    special = {} if tokenizer is None else _special(tokenizer)
    told = {"quant_method": METHOD, "version": 1, "forms": packed.groups_of(table)}
    files.write_json(folder / "config.json", {**_family(cfg).write(cfg), **({} if cfg.kind == "foreign" else special),
                                              "quantization_config": told})
    files.write_json(folder / "generation_config.json", special)
    sentences.write(folder, cfg)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    return {PACKED: written}


def fill(held: Mapping[str, Tensor], cfg: Config, folder: str | Path, *,
         fresh: Callable[[str], bool] = lambda name: False) -> list[str]:
    """Copy the weights of `folder` into `held` (our names), of which each may be a part of the whole (DTensor).

    No more is read than that, but the folder must hold the whole model, and every name and shape of it is checked.
    fresh: names that may be missing, or of another head; those of them that were not filled are returned.
    """
    tensors, there = read_tensors(folder), read_config(folder)
    kept: dict[str, Tensor] = {}
    if other := there.tasks != cfg.tasks:                # heads of both are kept, whatever their weights are called there
        named = {_family(there).modern(there, name): name for name in tensors}
        both = tuple(f"heads.{task.name}." for task in there.tasks if task in cfg.tasks)
        for each in _family(there).names(there):
            if each.theirs in named and any(ours.startswith("heads.") for ours in each.ours):
                tensor = tensors.pop(named[each.theirs])
                kept |= {each.ours[0]: tensor} if each.ours[0].startswith(both) else {}
    state = from_hf(cfg, tensors, where=str(folder), fresh=fresh, heads=not other) | kept
    lacking = []
    for name, tensor in held.items():
        if name not in state and fresh(name):
            lacking.append(name)
            continue
        found = tuple(state[name].shape) if name in state else None
        if found is None:
            raise IncompatibleError(_("no tensor gives the weight {name}").format(name=name), where=str(folder))
        if found != tuple(tensor.shape):
            raise IncompatibleError(_("the weight {name} has shape {found}, and the model asks for {wanted}").format(
                name=name, found=found, wanted=tuple(tensor.shape)), where=str(folder))
        placed.fill(tensor, partial(state.__getitem__, name))
    return lacking


def lacking(cfg: Config, folder: str | Path) -> list[str]:
    """Return our names of the weights that `cfg` has and the model in `folder` has not; heads of other tasks are not its."""
    here = {modern(cfg, name) for name in read_tensors(folder)}
    other = read_config(folder).tasks != cfg.tasks
    return [ours for name in named(cfg) if not name.copy for ours in name.ours
            if name.theirs not in here or (other and ours.startswith("heads."))]


def save(folder: str | Path, model: nn.Module, *, dtype: torch.dtype | None = None, tokenizer: Path | None = None,
         shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model` as a new folder that `transformers` opens, whole or not at all.  ConfigError if it exists."""
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(_("the folder exists already"), where=str(folder), fix=_("choose another name, or remove it"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    cfg: Any = model.cfg
    with files.appearing(folder) as temporary:
        write_folder(temporary, cfg, model.state_dict(), dtype=dtype, tokenizer=tokenizer, shard_bytes=shard_bytes)


def write_folder(folder: Path, cfg: Config, state: Mapping[str, Tensor], *, like: Mapping[str, Tensor] | None = None,
                 dtype: torch.dtype | None = None, tokenizer: Path | None = None,
                 shard_bytes: int = SHARD_BYTES) -> dict[str, tensorfile.Written]:
    """Write weights, config.json, generation_config.json and the tokenizer's files into an existing `folder`.

    state: our names; each tensor is asked for once, when it is written, and let go.  like: the same on the meta device,
    for a `state` that makes its tensors when asked.  Returns size and hash of each file of weights.
    """
    if like is None:
        like = {name: tensor.to("meta") for name, tensor in state.items()}
    specs = [tensorfile.Spec(name, dtype or t.dtype, tuple(t.shape)) for name, t in to_hf(cfg, like)]
    tensors = (t if dtype is None else t.to(dtype) for _name, t in to_hf(cfg, state))
    shards: list[tuple[Path, list[str], tensorfile.Written]] = []
    for number, cut in enumerate(_cut(specs, shard_bytes)):
        path = folder / f".shard-{number}"
        record = tensorfile.stream(path, cut, itertools.islice(tensors, len(cut)), metadata={"format": "pt"})
        shards.append((path, [spec.name for spec in cut], record))
    single = len(shards) == 1
    written, listed = {}, {}
    for number, (path, held, record) in enumerate(shards):
        name = "model.safetensors" if single else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / name)
        written[name] = record
        listed.update(dict.fromkeys(held, name))
    if not single:
        index = {"metadata": {"total_size": sum(record.bytes for record in written.values())}, "weight_map": listed}
        files.write_json(folder / "model.safetensors.index.json", index)
    fault("weights.before_config")
    kinds = {spec.dtype for spec in specs}
    write_config(folder, cfg, dtype=kinds.pop() if len(kinds) == 1 else None, tokenizer=tokenizer)
    sentences.write(folder, cfg)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    return written


def write_config(folder: Path, cfg: Config, *, dtype: torch.dtype | None = None, tokenizer: Path | None = None) -> None:
    """Write config.json and generation_config.json.  dtype: that of all weights; tokenizer: whose special ids they name."""
    special = {} if tokenizer is None else _special(tokenizer)
    if isinstance(cfg, encoder.Encoder):
        encoder_config.check_pad(cfg, special.get("pad_token_id", cfg.pad))
    kind = {} if dtype is None else {"torch_dtype": str(dtype).removeprefix("torch.")}
    files.write_json(folder / "config.json", {**_family(cfg).write(cfg), **kind, **({} if cfg.kind == "foreign" else special)})
    files.write_json(folder / "generation_config.json", special)


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy the tokenizer's files from one folder to another, durably."""
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
            files.flush(folder / name)


def _cut(specs: Iterable[tensorfile.Spec], most: int) -> Iterator[list[tensorfile.Spec]]:
    """Yield groups of at most `most` bytes; a larger tensor stands alone."""
    group: list[tensorfile.Spec] = []
    size = 0
    for spec in specs:
        if group and size + spec.bytes > most:
            yield group
            group, size = [], 0
        group.append(spec)
        size += spec.bytes
    yield group


def _special(tokenizer: Path) -> dict[str, int | None]:
    """Return the ids of the tokenizer's bos, eos and pad tokens, null where it has none, from its files."""
    said = read_json(tokenizer / "special_tokens_map.json") if (tokenizer / "special_tokens_map.json").is_file() else {}
    ids = {t["content"]: t["id"] for t in read_json(tokenizer / "tokenizer.json").get("added_tokens", [])}
    tokens = {key: said.get(f"{key}_token") for key in ("bos", "eos", "pad")}
    contents = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()}
    return {f"{key}_token_id": ids.get(content) for key, content in contents.items()}
