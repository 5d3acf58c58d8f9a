"""What is judged or used: a model with its tokenizer, and the recipe it was trained by, if it has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from danlu import config, files
from danlu.adapt import folder as adapters
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, IncompatibleError
from danlu.models import session
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.models.foreign_config import Foreign
from danlu.nn.tasks import Head
from danlu.objectives import Answer, CausalLM, Choose, Classify, Mixture, Objective, Regress, Tag, Tasks
from danlu.objectives.tasks import single
from danlu.train import checkpoint
from danlu.train.recipe import Run
from danlu.train.sources import Source
from danlu.words import _

LENGTH = 2048                                            # longest row where neither the user nor a recipe says one


@dataclass
class Subject:
    """What is judged: a model with its tokenizer, and the recipe it was trained by, if it has one."""

    folder: Path
    tokenizer: Tokenizer
    model: nn.Module
    run: Run | None

    @property
    def cfg(self) -> Decoder | Encoder | Foreign:
        """The shape of the model."""
        cfg: Any = self.model.cfg
        assert isinstance(cfg, Decoder | Encoder | Foreign)
        return cfg

    def place(self, source: Source) -> Path:
        """Return the folder of a source's prepared rows: as the recipe says, else within the run's, which may have moved."""
        beside = (home / "data" / source.folder.name for home in (self.folder, *list(self.folder.parents)[:2]))
        return source.folder if source.folder.is_dir() else next((one for one in beside if one.is_dir()), source.folder)

    def held_out(self) -> list[tuple[str, str]]:
        """Return the (folder, split) that the recipe holds out.  Raises ConfigError if there is none."""
        if self.run is None:
            raise ConfigError(_("there is nothing to evaluate on"), where=str(self.folder),
                              fix="danlu eval RUN --data heldout.txt")
        named: list[tuple[str, str]] = [(str(self.place(s)), s.split) for s in self.run.eval]
        return named or [(str(self.place(s)), "val") for s in self.run.data]

    @property
    def length(self) -> int:
        """Tokens in a row: the recipe's, or the model's context within reason."""
        return self.run.length if self.run is not None else min(LENGTH, self.cfg.context)

    @property
    def heads(self) -> list[str]:
        """Names of the heads of tasks that may be used: those that the recipe trained, else all."""
        trained = () if self.run is None else self.run.objective.heads
        known = [head.name for head in self.cfg.tasks]
        return [name for name in known if name in trained] or known

    def head(self, name: str | None) -> Head:
        """Return the head of that name, or the only one.  Raises ConfigError."""
        names = ", ".join(self.heads)
        if not names:
            raise IncompatibleError(_("the model has no head of a task"), where=str(self.folder),
                                    fix=_("train one with objective.kind: classify, or another task"))
        if name is None and len(self.heads) > 1:
            raise ConfigError(_("the model has several heads of tasks: {names}").format(names=names), where=str(self.folder),
                              fix=f"--head {self.heads[0]}")
        if name not in (None, *self.heads):
            raise ConfigError(_("the model has no head called {name!r}; it has {names}").format(name=name, names=names),
                              where="--head")
        return next(head for head in self.cfg.tasks if head.name == (name or self.heads[0]))

    def sources(self, head: str | None = None) -> list[Source]:
        """Return what the recipe trained the head on, or all that it trained on."""
        if self.run is None:
            return []
        several = isinstance(self.run.objective, Tasks) and head is not None
        return [source for source in self.run.data if not several or source.task == head]

    def objective_of(self, head: Head) -> Objective:
        """Return what a head was trained on, every row counting alike."""
        if self.run is None:
            return objective_of(head, str(self.folder))
        objective: Any = single(self.run.objective, head.name)
        if isinstance(objective, Classify | Tag):
            return objective.model_copy(update={"labels": objective.labels or head.labels, "class_weights": "none"})
        return objective                                 # type: ignore[no-any-return]

    @property
    def objective(self) -> Objective:
        """What is measured: a decoder's plain cross-entropy, an encoder's objective as it was trained on."""
        if isinstance(self.cfg, Decoder) or self.cfg.causal:
            return CausalLM.model_validate({})
        if self.run is not None:
            return self.run.objective
        known = {"mlm": "masked_lm", "nsp": "next_sentence", "sop": "sentence_order"}
        parts = [{"objective": {"kind": known[name]}} for name in self.cfg.outputs or ()]
        if not parts:
            raise IncompatibleError(_("the model has no head that could be evaluated"), where=str(self.folder))
        return Mixture.model_validate({"parts": tuple(parts)})


def objective_of(head: Head, where: str) -> Objective:
    """Return the objective that a head without a recipe was made for.  Raises IncompatibleError."""
    if head.kind == "tag":
        return Tag(name=head.name, labels=head.labels)
    if head.kind in ("answer", "choose"):
        return (Answer if head.kind == "answer" else Choose)(name=head.name)
    if head.kind != "classify":
        raise IncompatibleError(_("what a head of kind {kind} was trained on is not known without its run").format(
            kind=head.kind), where=where, fix=_("give the run folder"))
    if head.problem != "regression":
        return Classify(name=head.name, several=head.problem == "multi", labels=head.labels)
    if head.size > 1:
        raise IncompatibleError(_("a regression of {n} numbers is not supported").format(n=head.size), where=where)
    return Regress(name=head.name)


def open_subject(path: Path, *, graph: bool = False) -> Subject:
    """Return the model of a run (its best checkpoint), of a checkpoint or of a Hugging Face folder.

    graph: an exported graph will do, too; without, ConfigError for one.
    """
    folder = checkpoint.chosen(path)
    tokenizer = Tokenizer.load(adapters.tokenizer_in(folder))
    if session.file_in(folder) is None:
        return Subject(folder, tokenizer, adapters.load(folder), recipe_of(folder))
    if not graph:
        raise ConfigError(_("a graph in ONNX has no weights to work on"), where=str(folder), fix=_(
            "use the folder that it was exported from; danlu eval, predict and serve take the graph itself"))
    return Subject(folder, tokenizer, session.SessionModel(folder), None)


def recipe_of(folder: Path) -> Run | None:
    """Return the recipe that the model in `folder` was trained by, None if it does not say."""
    manifest = next((f / "manifest.json" for f in (folder, folder.parent) if (f / "manifest.json").is_file()), None)
    told = files.read_json(manifest)["run"] if manifest is not None else None
    if told is not None and told.get("start") is not None:
        told = told | {"model": None}                    # filled in by the run, and beside it a recipe may not say it
    return config.validate(Run, told) if told is not None else None
