"""Rows as they are, to prepared folders inside the run: what `data` and `eval` name, read, understood and stored once.

Training alone, before any process group exists; a folder that was made from the same files by the same settings is used
again, by every process of the run and when it goes on.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu import files
from danlu.data import chat, detect, examples
from danlu.data.encode import Encoder
from danlu.data.inputs import Input, resolve, split_take
from danlu.data.progress import alone
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, DataError
from danlu.log import count, say
from danlu.train import checkpoint
from danlu.train.recipe import Run, Source
from danlu.words import _

Place = Callable[[int, tuple[str, ...]], str]


def taken_in(run: Run) -> Run:
    """Return `run` with every source that is not prepared yet prepared in `out/data`.  Raises ConfigError, DataError."""
    if not any(source.raw for source in (*run.data, *run.eval)):
        return run
    files.check_writable(run.out / "data")
    with alone(run.out / "data", wait=True):             # of several processes the first makes what all then find
        return _taken_in(run)


def _taken_in(run: Run) -> Run:
    tokenizer, folder = _tokenizer(run)
    want = run.objective.wants
    by = Encoder(tokenizer, length=_room(run), overlong=run.overlong, learn=run.chat.learn, several=want == "labels",
                 template=chat.Template.load(tokenizer, run.chat.template or folder) if want == "chat" else None)
    given = [_named(source, run.objective.wants) for source in run.data]
    found = [examples.survey(item, run.objective.wants, names, run.seed) if source.raw else None
             for source, (item, names) in zip(run.data, given, strict=True)]
    for source, seen in zip(run.data, found, strict=True):
        if seen is not None:
            refuse_rejects(source.path, seen.read, seen.reasons, seen.rejects, run.guard.rejects)
    by = _with_labels(run, by, [seen for seen in found if seen is not None])
    share = 0.0 if run.eval else run.held_out
    data = []
    for source, (item, names), seen in zip(run.data, given, found, strict=True):
        if seen is None:
            data.append(source)
            continue
        made = Maker(run, by, share).folder(source, item, names, _placed(examples.held_out(seen, share)))
        data.append(source.model_copy(update={"split": "train", "prepared": made}))
    held = []
    for source in run.eval:
        if not source.raw:
            held.append(source)
            continue
        item, names = _named(source, run.objective.wants)
        made = Maker(run, by, 0.0, "val").folder(source, item, names, lambda key, labels: "val")
        held.append(source.model_copy(update={"split": "val", "prepared": made}))
    return run.model_copy(update={"data": tuple(data), "eval": tuple(held)})


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
        run, by = self.run, self.by
        stamp = [[f.path, f.size, f.mtime] for f in resolve([item])]
        settings = {"want": run.objective.wants, "names": names, "length": by.length, "overlong": by.overlong,
                    "share": self.share, "into": self.into, "seed": run.seed, "labels": by.labels, "learn": by.learn,
                    "tokenizer": by.tokenizer.sha256, "template": by.template.text if by.template is not None else None}
        key = files.digest({"files": stamp, "input": item.model_dump(mode="json"), **settings})
        folder = run.out / "data" / f"{Path(source.path.partition('#')[0]).stem or 'rows'}-{key[:12]}"
        if (folder / "manifest.json").is_file():         # an audit may have made it, which allows any share
            told = files.read_json(folder / "audit.json")
            refuse_rejects(source.path, told["read"], Counter(told["rejected"]), told["examples"], run.guard.rejects)
            return folder
        shutil.rmtree(folder, ignore_errors=True)        # one that was refused
        told = examples.make(folder, item, run.objective.wants, names, by, place=place, seed=run.seed,
                             facts={"task": {"kind": run.objective.kind, "want": run.objective.wants}, "config": settings})
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
    prepared = next((source.folder / "tokenizer" for source in run.data if not source.raw), None)
    folder = folder or prepared
    if folder is None:
        raise ConfigError(_("rows that are not prepared need a tokenizer"), where="tokenizer",
                          fix=_("name its folder under `tokenizer`, or start from a model that has one"))
    return Tokenizer.load(folder), folder


def _room(run: Run) -> int:
    """Return how many ids of a document a row has room for."""
    room, _overlap, reserve = run.objective.room(run.length)
    return room - reserve


def _named(source: Source, want: str) -> tuple[Input, dict[str, str]]:
    """Return what to read of a source, and its columns by role: the recipe's, else those of a dataset_info.json."""
    names = {role: str(column) for role, column in source.columns.items()}
    path = source.path
    if os.path.sep in path or not Path(path).exists():
        registered = detect.registered(Path(path).parent, Path(path).name)
        if registered is not None:
            path, told = registered.path, registered.names
            names = {**told, **names}
    return split_take(Input(path=path, format=source.format, encoding=source.encoding, header=source.header,
                            delimiter=source.delimiter)), names


def _with_labels(run: Run, by: Encoder, found: list[examples.Seen]) -> Encoder:
    """Return the encoder with the classes: those of the recipe, else of all training rows."""
    if run.objective.wants not in ("label", "labels", "tags"):
        return by
    named = tuple(getattr(run.objective, "labels", ()))
    told = {label for seen in found for labels in seen.labels for label in labels}
    if not named:
        named = tuple(sorted(told, key=examples.rank))
    if len(named) < 2 and run.objective.wants == "label":
        raise DataError(_("the rows have {n} classes, and one or none cannot be told apart: {names}").format(
            n=len(named), names=", ".join(named)), where=run.data[0].path)
    return Encoder(by.tokenizer, by.length, by.overlong, named, by.template, by.learn, by.several)
