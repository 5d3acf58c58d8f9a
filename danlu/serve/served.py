"""What a server offers by name: a model and the adapters on it, each with its tokenizer's template and its tasks."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from danlu import files
from danlu.adapt import folder as adapters
from danlu.adapt.switch import Switch
from danlu.data import chat
from danlu.data.stream import Overlong
from danlu.errors import ConfigError, IncompatibleError
from danlu.evaluate import rows
from danlu.evaluate.subject import Subject, open_subject, recipe_of
from danlu.evaluate.written import template_of
from danlu.generate import endings, writes
from danlu.nn import paths
from danlu.nn.tasks import Head
from danlu.objectives import Embed
from danlu.train import checkpoint
from danlu.words import _

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ENDPOINTS = {"classify": "classify", "tag": "tag", "answer": "answer", "embed": "embeddings"}      # kind of head: /v1/…


@dataclass(frozen=True)
class Served:
    """A model that clients may name."""

    name: str
    adapter: str | None                                  # its name among the Switch's; None: the base, or the only model
    subject: Subject
    sha256: str                                          # of its weights
    writes: bool
    template: chat.Template
    ends: tuple[int, ...]                                # ids that end an answer in a conversation
    tasks: Mapping[str, rows.Task] = field(default_factory=dict)         # by name of the head
    heads: Mapping[str, Head] = field(default_factory=dict)
    created: int = 0

    @property
    def record(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        offers = ["chat.completions", "completions"] if self.writes else []
        offers += dict.fromkeys(ENDPOINTS[head.kind] for head in self.heads.values() if head.kind in ENDPOINTS)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "danlu", "offers": offers,
                "context": self.subject.cfg.context, "sha256": self.sha256,
                "heads": [{"name": name, "kind": head.kind, "labels": list(head.labels)} for name, head in self.heads.items()]}


@dataclass(frozen=True)
class Shelf:
    """All that is offered; the first is what a request without a name gets."""

    models: Mapping[str, Served]
    switch: Switch | None

    @property
    def first(self) -> Served:
        """The model of requests that name none."""
        return next(iter(self.models.values()))

    @property
    def writer(self) -> Served | None:
        """A model that writes, if there is one."""
        return next((one for one in self.models.values() if one.writes), None)


def open_shelf(run: Path, named: Mapping[str, Path], *, device: torch.device, name: str | None = None,
               length: int | None = None, precision: str = "fp32") -> Shelf:
    """Return the model of `run`, and with it each adapter of `named` (name: folder) on the same base.

    If the run is an adapter itself and others stand beside it, its base is in memory once.  Raises ConfigError or
    IncompatibleError for what does not fit.
    """
    how, first = rows.How(length=length, precision=precision), name or _called(run)
    _check_names([first, *named])
    if not named:
        return Shelf({first: _served(first, None, open_subject(run, graph=True), how, device)}, None)
    own = checkpoint.chosen(run)
    given = {first: own} if adapters.is_adapter(own) else {}
    given |= {name: checkpoint.chosen(folder) for name, folder in named.items()}
    base = adapters.describe(own).base if adapters.is_adapter(own) else own
    switch = Switch(base, device=device)
    found: dict[str, Served] = {}
    if not adapters.is_adapter(own):
        subject = replace(open_subject_of(own), model=switch.use(None))
        found[first] = _served(first, None, subject, how, device)
    for one, folder in given.items():
        if not adapters.is_adapter(folder):
            raise ConfigError(_("this is no adapter"), where=f"--adapter {one}={folder}",
                              fix=_("serve a whole model on its own: danlu serve {path}").format(path=folder))
        switch.add(one, folder)
        found[one] = _served(one, one, replace(open_subject_of(folder), model=switch.use(one)), how, device)
    tokenizers = {served.subject.tokenizer.sha256 for served in found.values()}
    if len(tokenizers) > 1:
        raise IncompatibleError(_("the adapters have other tokenizers than their base"), where=str(base),
                                fix=_("serve those with tokens of their own one by one"))
    return Shelf(found, switch)


def open_subject_of(folder: Path) -> Subject:
    """Return what stands beside a model in its folder; the model itself is left to the caller."""
    from danlu.data.tokenizer import Tokenizer

    return Subject(folder, Tokenizer.load(adapters.tokenizer_in(folder)), torch.nn.Module(), recipe_of(folder))


def _called(run: Path) -> str:
    """Return the name of a run: of a checkpoint, its run's; what cannot stand in a name is left out."""
    path = run.resolve()
    kept = path.parent.name if path.name.startswith("checkpoint-") else path.name
    return re.sub(r"[^A-Za-z0-9._-]", "-", kept).lstrip("._-")[:64] or "model"


def _check_names(names: list[str]) -> None:
    for name in names:
        if NAME.fullmatch(name) is None:
            raise ConfigError(_("{name!r} cannot be a model's name: letters, digits, . _ - make one").format(name=name),
                              where="--adapter")
    if len(set(names)) < len(names):
        raise ConfigError(_("two models have the same name"), where="--adapter", fix=_("choose another name"))


def _served(name: str, adapter: str | None, subject: Subject, how: rows.How, device: torch.device) -> Served:
    model: Any = subject.model.to(device).eval()
    able = writes(model)
    heads = {one: subject.head(one) for one in subject.heads}
    tasks = {one: _task(subject, head, replace(how, head=one), device) for one, head in heads.items() if head.kind in ENDPOINTS}
    if not able and not tasks:
        raise IncompatibleError(_("the model neither writes nor does a task"), where=str(subject.folder),
                                fix=_("train it for a task: objective.kind: classify, or another"))
    if able:
        model.use(paths.rule(device, next(model.parameters()).dtype, model.cfg.context, causal=True))
    template = template_of(subject)
    weights = files.digest({p.name: files.sha256(p) for p in sorted(subject.folder.iterdir())
                            if p.suffix in (".safetensors", ".onnx", ".data")})
    return Served(name, adapter, subject, weights, able, template, endings(template, subject.tokenizer) if able else (),
                  tasks, heads, int(time.time()))


def _task(subject: Subject, head: Head, how: rows.How, device: torch.device) -> rows.Task:
    if head.kind != "embed" or subject.run is not None:
        return rows.task_of(subject, how, device)
    # how it was trained does not matter to what its vectors are
    overlong: Overlong = how.overlong or "error"
    return rows.Task(subject, head.name, Embed(name=head.name), how.length or subject.length, overlong, how.precision,
                     how.rows or rows.TOKENS, device)
