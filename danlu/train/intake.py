"""Rows as they are, to prepared folders inside the run: what `data` and `eval` name, read, understood and stored once.

Training alone, before any process group exists; a folder that was made from the same files by the same settings is used
again, by every process of the run and when it goes on.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danlu import files
from danlu.adapt import folder as adapters
from danlu.data import chat, detect, examples
from danlu.data.encode import Encoder
from danlu.data.inputs import Input, resolve, split_take
from danlu.data.progress import alone
from danlu.data.shards import read_manifest
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, DataError
from danlu.log import count, say
from danlu.models import weights
from danlu.objectives import Answer
from danlu.objectives.protocol import Objective
from danlu.objectives.tasks import single
from danlu.train import checkpoint
from danlu.train.recipe import Run
from danlu.train.sources import Source
from danlu.words import _

Place = Callable[[int, tuple[str, ...]], str]
Surveys = dict[tuple[str, int], examples.Seen]           # first readings of sources, by the key of the recipe and the place there


LEARNED = ("data", "continual.replay.data", "continual.ewc.data")


def taken_in(run: Run) -> Run:
    """Return `run` with every source that is not prepared yet prepared in `out/data`.  Raises ConfigError, DataError."""
    if not any(source.raw for sources in run.named.values() for source in sources):
        return run
    files.check_writable(run.out / "data")
    with alone(run.out / "data", wait=True):             # of several processes the first makes what all then find
        return _taken_in(run)


def located(run: Run) -> Run:
    """Return `run` with the folder of weights that its `start` means, which may be a run or a name on a hub."""
    return run if run.start is None else run.model_copy(update={"start": checkpoint.chosen(run.start)})


def _taken_in(run: Run) -> Run:
    tokenizer, folder = _tokenizer(run)
    found: Surveys = {}
    for key in LEARNED:
        for number, source in enumerate(run.named[key]):
            if source.raw:
                want = single(run.objective, source.task).wants
                item, names = _named(source, want)
                found[key, number] = seen = examples.survey(item, want, names, run.seed)
                refuse_rejects(source.path, seen.read, seen.reasons, seen.rejects, run.guard.rejects)
    by = {task: _encoder(run, task, tokenizer, folder, {
        (key, n): seen for (key, n), seen in found.items() if run.named[key][n].task == task}) for task in _tasks(run)}
    return run.naming({key: tuple(
        _made(run, by[source.task], source, found.get((key, number)), _share(run, key)) for number, source in enumerate(sources))
        for key, sources in run.named.items()})


def _tasks(run: Run) -> list[str | None]:
    """Return the tasks that sources name, each once."""
    return list(dict.fromkeys(source.task for sources in run.named.values() for source in sources))


def _share(run: Run, key: str) -> float:
    """Return the share that is held out of the sources under a key: what measures the new and the old, if nothing else does."""
    others = {"data": run.eval, "continual.replay.data": run.named["continual.old"]}
    return run.held_out if key in others and not others[key] else 0.0


def _made(run: Run, by: Encoder, source: Source, seen: examples.Seen | None, share: float) -> Source:
    """Return the source as a prepared folder; `seen`: a first reading of it, None where it is for evaluation."""
    if not source.raw:
        return source
    item, names = _named(source, single(run.objective, source.task).wants)
    if seen is None:
        made = Maker(run, by, 0.0, "val").folder(source, item, names, lambda key, labels: "val")
        return source.model_copy(update={"split": "val", "prepared": made})
    made = Maker(run, by, share).folder(source, item, names, _placed(examples.held_out(seen, share)))
    return source.model_copy(update={"split": "train", "prepared": made})


def _encoder(run: Run, task: str | None, tokenizer: Tokenizer, folder: Path, found: Surveys) -> Encoder:
    """Return what makes ids of the rows of a task."""
    objective = single(run.objective, task)
    room, _overlap, reserve = objective.room(run.length)
    template = chat.Template.load(tokenizer, run.chat.template or folder) if objective.wants == "chat" else None
    by = Encoder(tokenizer, length=room - reserve, overlong=run.overlong, learn=run.chat.learn, template=template,
                 several=objective.wants == "labels", stride=objective.stride if isinstance(objective, Answer) else 0)
    return _with_labels(run, objective, by, found)


def _placed(apart: Callable[[int, tuple[str, ...]], bool]) -> Place:
    return lambda key, labels: "val" if apart(key, labels) else "train"


@dataclass(frozen=True)
class Maker:
    """Makes the prepared folder of a source, or finds it."""

    run: Run
    by: Encoder
    share: float
    into: str = "train"                                  # where rows go that are not held out

    def folder(self, source: Source, item: Input, names: dict[str, str], place: Place) -> Path:
        """Return the folder, which now holds the rows of `source`."""
        run, by, objective = self.run, self.by, single(self.run.objective, source.task)
        stamp = [[f.path, f.size, f.mtime] for f in resolve([item])]
        settings = {"want": objective.wants, "names": names, "length": by.length, "overlong": by.overlong,
                    "share": self.share, "into": self.into, "seed": run.seed, "labels": by.labels, "learn": by.learn,
                    "stride": by.stride, "tokenizer": by.tokenizer.sha256,
                    "template": by.template.text if by.template is not None else None}
        key = files.digest({"files": stamp, "input": item.model_dump(mode="json"), **settings})
        folder = run.out / "data" / f"{Path(source.path.partition('#')[0]).stem or 'rows'}-{key[:12]}"
        if (folder / "manifest.json").is_file():         # an audit may have made it, which allows any share
            told = files.read_json(folder / "audit.json")
            refuse_rejects(source.path, told["read"], Counter(told["rejected"]), told["examples"], run.guard.rejects)
            return folder
        shutil.rmtree(folder, ignore_errors=True)        # one that was refused
        told = examples.make(folder, item, objective.wants, names, by, place=place, seed=run.seed,
                             facts={"task": {"kind": objective.kind, "want": objective.wants}, "config": settings})
        try:
            refuse_rejects(source.path, told["read"], Counter(told["rejected"]), told["examples"], run.guard.rejects)
        except DataError:
            (folder / "manifest.json").unlink()          # it is not used, and stays to be looked at
            raise
        _tell(source.path, told)
        return folder


def _tell(name: str, told: dict[str, Any]) -> None:
    for split, counts in sorted(told["splits"].items()):
        say(_("{name}: {split} {rows} rows, {tokens} tokens, {learned} learned from").format(
            name=name, split=split, rows=counts["rows"], tokens=count(counts["tokens"]), learned=count(counts["learned"])))
        if counts["cut"]:
            say(_("{name}: {split} {n} rows were cut, {tokens} tokens lost").format(
                name=name, split=split, n=counts["cut"], tokens=counts["lost"]))
    if told["unread"]:
        say(_("{name}: columns that nothing is taken from: {columns}").format(name=name, columns=", ".join(told["unread"])))
    for reason, number in sorted(told["rejected"].items()):
        say(_("{name}: {n} rows left out: {reason}").format(name=name, n=number, reason=reason))


def refuse_rejects(name: str, read: int, reasons: Counter[str], rejects: Sequence[dict[str, Any]], share: float) -> None:
    """Raise DataError if more rows of a source are unusable than the recipe allows; `dropped` ones it has asked for."""
    bad = sum(n for reason, n in reasons.items() if reason != "dropped")
    if bad <= share * read:
        return
    first = [r for r in rejects if r["reason"] != "dropped"]
    told = "\n".join(f"  {r['file']}:{r['line']}: {r['reason']}: {r['detail']}" for r in first[: examples.SHOWN])
    raise DataError(_("{n} of {read} rows cannot be used ({reasons}):\n{first}").format(
        n=bad, read=read, reasons=", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())), first=told), where=name,
        fix=_("mend the rows; for rows that are too long set length or overlong: cut, drop or split; or allow a share of rows "
              "to be left out with guard.rejects"))


def _tokenizer(run: Run) -> tuple[Tokenizer, Path]:
    folder = run.tokenizer
    if folder is None and run.start is not None:
        start = checkpoint.chosen(run.start)
        folder = start if (start / "tokenizer.json").is_file() else None
    if folder is None and run.frozen:
        folder = adapters.tokenizer_in(checkpoint.chosen(next(iter(run.frozen.values()))))
    prepared = next((source.folder / "tokenizer" for source in run.data if not source.raw), None)
    folder = folder or prepared
    if folder is None:
        raise ConfigError(_("rows that are not prepared need a tokenizer"), where="tokenizer",
                          fix=_("name its folder under `tokenizer`, or start from a model that has one"))
    return Tokenizer.load(folder), folder


def _named(source: Source, want: str) -> tuple[Input, dict[str, str]]:
    """Return what to read of a source, and its columns by role: the recipe's, else those of a dataset_info.json."""
    names = {role: str(column) for role, column in source.columns.items()}
    item = split_take(Input(path=source.path, format=source.format, encoding=source.encoding, header=source.header,
                            delimiter=source.delimiter, subset=source.subset, hub_split=source.hub_split))
    if source.prepared is None and source.split != "train":
        raise ConfigError(_("rows that are not prepared have no split {split!r}").format(split=source.split), where=source.path,
                          fix=_("name the file of the rows that are meant; of a hub data set, set hub_split"))
    if os.path.sep in item.path or not Path(item.path).exists():
        registered = detect.registered(Path(item.path).parent, Path(item.path).name)
        if registered is not None:
            names = {**registered.names, **names}
            item = item.model_copy(update={"path": registered.path, "take": item.take or registered.take,
                                           "subset": item.subset or registered.subset,
                                           "hub_split": registered.split or item.hub_split})
    return item, names

def _with_labels(run: Run, objective: Objective, by: Encoder, found: Surveys) -> Encoder:
    """Return the encoder with the classes: those of the recipe, else of the model that goes on learning, else of all rows."""
    if objective.wants not in ("label", "labels", "tags"):
        return by
    named = tuple(getattr(objective, "labels", ()))
    told = {label for seen in found.values() for labels in seen.labels for label in labels}
    if not named and run.continual is not None and run.start is not None:
        named = _known(run.start, objective, told)
    if not named and not found:                          # all that is learned is prepared already
        ready = [s for key in LEARNED for s in run.named[key] if not s.raw and single(run.objective, s.task) is objective]
        named = tuple(read_manifest(ready[0].folder).get("labels") or ()) if ready else ()
    if not named:
        named = tuple(sorted(told, key=examples.rank))
    if len(named) < 2 and objective.wants == "label":
        first = next((run.named[key][number].path for key, number in found), None)
        raise DataError(_("the rows have {n} classes, and one or none cannot be told apart: {names}").format(
            n=len(named), names=", ".join(named)), where=first)
    return replace(by, labels=named)


def _known(start: Path, objective: Objective, told: set[str]) -> tuple[str, ...]:
    """Return the classes of the head that the model to start from has for this, if they hold all that rows tell."""
    names = {head.name for head in objective.tasks()}
    heads = [head for head in weights.read_config(checkpoint.chosen(start)).tasks if head.name in names]
    return heads[0].labels if heads and told <= set(heads[0].labels) else ()
