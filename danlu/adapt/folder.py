"""Folders that hold an adapter and name its base: read, checked against that base, written as `peft` does.

adapter_config.json  adapter_model.safetensors  README.md   as PEFT has them, where it has the kind
danlu_adapter.json   what PEFT has no word for: our adapter, the model's config, the hashes of the base's weights
danlu_adapter.safetensors   tensors that PEFT has no name for (the network of P-tuning), if there are any

Beside a whole model danlu_adapter.json alone says how its weights were rounded while they learned (QAT).

A folder that `peft` wrote has only the first three, and is opened, too.  Nothing that could run is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from danlu import files, tensorfile
from danlu.adapt import Adapter, Adapters, peft
from danlu.adapt.layers import LoRAEmbedding
from danlu.adapt.lora import LoRA
from danlu.adapt.pack import pack
from danlu.adapt.qat import QAT
from danlu.adapt.quantize import pack_all
from danlu.adapt.unpack import adapter_of, unpack
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.models import weights
from danlu.models.build import Config, Network, build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.models.foreign_config import Foreign
from danlu.nn import placed
from danlu.nn.tasks import Head, Kind
from danlu.words import _

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OURS, REST = "danlu_adapter.json", "danlu_adapter.safetensors"
_HEADS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "SEQ_CLS": ("classify", ("classifier", "classifier.out_proj", "score")), "TOKEN_CLS": ("tag", ("classifier", "score")),
    "QUESTION_ANS": ("answer", ("qa_outputs",))}


class Base(NamedTuple):
    """What an adapter was trained on."""

    folder: Path
    sha256: dict[str, str]              # of each file of weights

    @classmethod
    def of(cls, folder: Path) -> Base:
        """Return the base in `folder`, hashed."""
        folder = folder.resolve()
        shards = sorted(p for p in folder.glob("*.safetensors"))
        return cls(folder, {p.name: _hashed(p, p.stat().st_mtime_ns, p.stat().st_size) for p in shards})


@cache
def _hashed(path: Path, changed: int, size: int) -> str:
    """Return the hash of a file, once a process for each state of it (`changed`, `size`)."""
    return files.sha256(path)


class Stored(NamedTuple):
    """What a checkpoint needs to know to hold an adapter alone."""

    adapt: Adapter
    base: Base


class Opened(NamedTuple):
    """An adapter's folder, understood but for its tensors."""

    folder: Path
    adapt: Adapter
    cfg: Config                         # of the model with the adapter's tasks
    base: Path
    own: bool                           # Danlu wrote it


def is_adapter(folder: str | Path) -> bool:
    """Return whether `folder` holds an adapter and not a model."""
    return (Path(folder) / CONFIG).is_file()


def describe(folder: str | Path, *, base: Path | None = None) -> Opened:
    """Return what the adapter in `folder` is.  base: the model's folder, if it is not where the adapter says.

    Raises ConfigError if the base is not there, IncompatibleError if it is another or the adapter is of an unknown make.
    """
    folder = Path(folder)
    told = weights.read_json(folder / CONFIG)
    named = str(told.get("base_model_name_or_path") or "")
    base = base or Path(named)
    if not named and base == Path():
        raise ConfigError(_("the adapter does not say what its base is"), where=str(folder / CONFIG),
                          fix=_("name it: base_model_name_or_path"))
    if not base.is_dir():
        raise ConfigError(_("the base of the adapter, {base}, is not there").format(base=base), where=str(folder),
                          fix=_("put it there, or name its folder in {file}: base_model_name_or_path").format(file=CONFIG))
    if not (folder / OURS).is_file():
        cfg = _with_task(weights.read_config(base), told, folder)
        return Opened(folder, adapter_of(told, cfg, where=str(folder / CONFIG)), cfg, base, False)
    record = weights.read_json(folder / OURS)
    try:
        adapt: Adapter = TypeAdapter(Adapters).validate_python(record["adapt"])
        kinds: dict[str, type[Config]] = {"decoder": Decoder, "encoder": Encoder, "foreign": Foreign}
        cfg = kinds[record["model"]["kind"]].model_validate(record["model"])
        expected = dict(record["base"]["sha256"])
    except (ValidationError, KeyError, TypeError) as error:
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=str(error).splitlines()[0]),
                        where=str(folder / OURS)) from None
    if Base.of(base).sha256 != expected:
        raise IncompatibleError(
            _("the weights of the base {base} are not those that the adapter was trained on").format(base=base),
            where=str(folder), fix=_("put the old base back, or train the adapter again"))
    return Opened(folder, adapt, cfg, base, True)


def _with_task(cfg: Config, told: Mapping[str, Any], folder: Path) -> Config:
    """Return the base's config with the head that PEFT's task type means, as large as the adapter's tensors are."""
    task = told.get("task_type")
    if task not in _HEADS or cfg.tasks:
        return cfg
    kind, names = _HEADS[task]
    sizes = {key: len(t) for key, t in _file(folder / TENSORS).items() if any(key.endswith(f".{n}.weight") for n in names)}
    if not sizes:
        return cfg
    size = next(iter(sizes.values()))
    labels = tuple(f"LABEL_{i}" for i in range(size)) if kind != "answer" and size > 1 else ()
    head = Head(kind=kind, labels=labels, problem="regression" if kind == "classify" and size == 1 else "single")
    return cfg.with_tasks((head,))


def _file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(_("the folder holds no {file}").format(file=path.name), where=str(path.parent))
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path),
                        fix=_("copy or download it again")) from None


def tensors(opened: Opened) -> dict[str, Tensor]:
    """Return all that belongs to the adapter, under our names.  Raises IncompatibleError for a missing or left-over one."""
    found = _file(opened.folder / TENSORS)
    if (opened.folder / REST).is_file() and opened.own:
        found |= _file(opened.folder / REST)
    copies = {key: t for key, t in found.items() if key.endswith(".base_layer.weight")}     # PEFT keeps adapted embeddings
    if copies:
        _check_copies(opened, copies)
    return unpack(opened.adapt, opened.cfg, {key: t for key, t in found.items() if key not in copies}, own=opened.own,
                       where=str(opened.folder))


def _check_copies(opened: Opened, copies: Mapping[str, Tensor]) -> None:
    base = {weights.modern(opened.cfg, name): t for name, t in weights.read_tensors(opened.base).items()}
    for key, tensor in copies.items():
        name = weights.modern(opened.cfg, key.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if name not in base or not torch.equal(base[name].to(tensor.dtype), tensor):
            raise IncompatibleError(_("the adapter's tensor {name} is not the base's").format(name=key), where=str(opened.folder),
                                    fix=_("the vocabulary was changed in training: use the base with that vocabulary"))


def rounding(folder: str | Path) -> QAT | None:
    """Return how the whole model in `folder` rounded its weights while they learned; None if it did not."""
    if is_adapter(folder) or not (Path(folder) / OURS).is_file():
        return None
    try:
        return QAT.model_validate(weights.read_json(Path(folder) / OURS)["adapt"])
    except (ValidationError, KeyError) as error:
        raise DataError(_("the file is damaged or cannot be read: {why}").format(why=str(error).splitlines()[0]),
                        where=str(Path(folder) / OURS)) from None


def mark(folder: Path, adapt: QAT) -> None:
    """Say in the folder of a whole model how its weights were rounded while they learned."""
    files.write_json(folder / OURS, {"schema": 1, "adapt": adapt.model_dump(mode="json")})


def read_config(folder: str | Path) -> Config:
    """Return the config of the model in `folder`, a whole one or an adapter."""
    return describe(folder).cfg if is_adapter(folder) else weights.read_config(folder)


def tokenizer_in(folder: Path) -> Path:
    """Return where the tokenizer of the model in `folder` is: there, or where the base of an adapter is."""
    if not is_adapter(folder) or (folder / "tokenizer.json").is_file():
        return folder
    return describe(folder).base


def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
         merged: bool = False) -> Network:
    """Return the model of `folder` with its weights; of an adapter, its base with the adapter on it, or `merged` into it.

    A model that learned to be rounded has the rounded weights.
    """
    if not is_adapter(folder):
        whole = weights.load(folder, device=device, dtype=dtype)
        if (trained := rounding(folder)) is not None:
            trained.apply(whole)
            trained.merge(whole)
        return whole
    opened = describe(folder)
    if merged:
        check_merges(opened, folder)
    model, stored = build(opened.cfg), tensors(opened)
    opened.adapt.apply(model)
    state = {**base_state(opened.cfg, opened.base, beside=stored), **stored}
    if isinstance(opened.adapt, LoRA) and opened.adapt.base is not None:        # as it was trained
        packed = pack_all(model, state, opened.adapt.base, device)
        state = {name: t for name, t in state.items() if name not in packed}
    model.load_state_dict({name: t.to(device, dtype).contiguous() for name, t in state.items()}, strict=True, assign=True)
    if merged:
        untied(model)
        opened.adapt.merge(model)
    return model


def check_merges(opened: Opened, where: str | Path) -> None:
    """Raise ConfigError for an adapter that is no part of weights."""
    if not opened.adapt.merges:
        raise ConfigError(_("the adapter {kind} is no part of any weight and cannot be merged").format(kind=opened.adapt.kind),
                          where=str(where), fix=_("use it as it is: eval and generate open it"))


def untied(model: Any) -> Config:
    """Return the config of `model` merged.  An adapted token embedding and the head that read its base part ways."""
    cfg: Config = model.cfg
    if cfg.kind == "foreign" or not isinstance(model.embed, LoRAEmbedding) or not cfg.tied:
        return cfg
    if not isinstance(cfg, Decoder):
        raise ConfigError(_("the head reads the base's token embedding, and an encoder's folder has no word for two of them"),
                          where="adapt.target", fix=_("use it as it is: eval opens it"))
    cfg = cfg.model_copy(update={"tied": False})
    model.head = torch.nn.Linear(cfg.width, cfg.vocab or 0, bias=False)
    model.head.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    model.cfg = cfg
    return cfg


def base_state(cfg: Config, base: Path, *, beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's weights under our names; those that come from the adapter, `beside`, may be missing."""
    same = weights.read_config(base).tasks == cfg.tasks
    return weights.from_hf(cfg, weights.read_tensors(base), where=str(base), fresh=beside.__contains__, heads=same)


def put(held: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, where: str) -> None:
    """Copy into each tensor of `held` its part of the stored one.  Raises IncompatibleError where one lacks or differs."""
    for name, tensor in held.items():
        if name not in stored or stored[name].shape != tensor.shape:
            raise IncompatibleError(_("no tensor of the adapter gives {name}").format(name=name), where=where)
        whole = stored[name]
        placed.fill(tensor, lambda whole=whole: whole)          # type: ignore[misc]


def write(folder: Path, cfg: Config, adapt: Adapter, state: Mapping[str, Tensor], *, base: Base,
          tokenizer: Path | None = None) -> dict[str, tensorfile.Written]:
    """Write an adapter into an existing `folder`; state: what `peft.shapes` names.  Returns size and hash of the tensors."""
    config, packed, rest = pack(adapt, cfg, {name: state[name].detach().to("cpu") for name in state})
    written = {TENSORS: tensorfile.write(folder / TENSORS, packed, metadata={"format": "pt"})}
    if rest:
        written[REST] = tensorfile.write(folder / REST, rest, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, dict(sorted({**config, "base_model_name_or_path": str(base.folder)}.items())))
    files.write_json(folder / OURS, {
        "schema": 1, "adapt": adapt.model_dump(mode="json"), "model": cfg.model_dump(mode="json"),
        "base": {"path": str(base.folder), "sha256": base.sha256}})
    files.write_text(folder / "README.md", _card(adapt, base))
    if tokenizer is not None:
        weights.copy_tokenizer(tokenizer, folder)
    return written


def _card(adapt: Adapter, base: Base) -> str:
    known = adapt.kind in peft.TYPES
    front = ["---", f"base_model: {base.folder}", *(["library_name: peft"] if known else []), "tags:", "- danlu",
             f"- {adapt.kind}", "---"]
    text = ("An adapter in PEFT's layout." if known else
            "An adapter of a kind that PEFT does not have: its tensors stand under Danlu's names, and Danlu opens it.")
    return "\n".join([*front, "", f"# {adapt.kind}", "", text, ""])
