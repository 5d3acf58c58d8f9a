"""Rows as a model of a task reads them, with what stands in the file: from raw files or a prepared folder, none left out.

n ids of a row, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from danlu.data import detect, records
from danlu.data.blocks import Reject
from danlu.data.columns import Columns
from danlu.data.encode import Encoder, Made, encode
from danlu.data.example import Asked, Chosen, Content, Labelled, Similar, Tagged, Unusable
from danlu.data.examples import FIRST
from danlu.data.inputs import HUB, Input, kind, split_take
from danlu.data.shards import Shards
from danlu.data.stream import Overlong
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.objectives.protocol import Objective
from danlu.train.feed import stream
from danlu.train.sources import Source
from danlu.words import _

Row = dict[str, np.ndarray]
TARGETS = {"label": "label", "labels": "label", "score": "score", "tags": "tags", "answer": "answers", "choice": "choice",
           "similar": "score"}


class Line(NamedTuple):
    """One row of the data: where it stands, what it says, and the rows [n] that a model reads of it."""

    file: str
    line: int
    columns: dict[str, Any]                              # as they stand in the file; of prepared data there are none
    text: Any                                            # one text, or a list of them
    label: Any                                           # as people write it; None where there is none
    content: Content | None = None
    rows: tuple[Row, ...] = ()
    bytes: int = 0
    cut: int = 0                                         # ids that the policy took away
    kept: Mapping[str, Any] | None = None                # what judging needs of the row where it is several rows of ids
    reason: str = ""                                     # why there are no rows, as a word for counting, …
    detail: str = ""                                     # … and what is wrong


@dataclass(frozen=True)
class Reading:
    """How raw rows are read.

    want: a form of data/detect.py.  names: columns by role that the user named; usual: those of the recipe, which hold
    where there are such columns.  unlabelled: rows to be predicted.
    """

    want: str
    by: Encoder
    names: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, str] = field(default_factory=dict)
    unlabelled: bool = False


def source(path: str, first: Source | None, *, format: str | None = None, encoding: str | None = None,
           split: str | None = None) -> Input:
    """Return what to read at `path`: as the recipe reads `first`, where the user does not say otherwise.

    split: of a hub data set; ConfigError for files, which have none.
    """
    if split is not None and not path.startswith(HUB):
        raise ConfigError(_("files of rows have no parts, as prepared folders and hub data sets do"), where="--split",
                          fix=_("name the file of the rows that are meant"))
    like = first if first is not None and first.raw else None
    chosen = format or "auto"
    if format is None and path == "-":
        chosen = "jsonl"
    elif format is None and like is not None and not kind(path.partition("#")[0])[0] and not path.startswith(HUB):
        chosen = like.format
    told: dict[str, Any] = {"path": path, "format": chosen}
    if like is not None:
        told |= {"encoding": like.encoding, "header": like.header}
        told |= {"delimiter": like.delimiter} if kind(path)[0] == kind(like.path)[0] else {}
    told |= {"encoding": encoding} if encoding is not None else {}
    told |= {"hub_split": split} if split is not None else {}
    return split_take(Input.model_validate(told))


def read(item: Input, reading: Reading) -> Iterator[Line]:
    """Yield every row of an input in the order of the file; one that cannot be used has no rows, and a reason.

    Raises DataError for files that cannot be read and columns that do not fit.
    """
    faults: list[tuple[str, Reject]] = []

    def before(file: str | None, line: int) -> Iterator[Line]:
        while faults and (faults[0][0] != file or faults[0][1].line < line):
            name, reject = faults.pop(0)
            yield Line(name, reject.line, {}, None, None, reason=reject.reason, detail=reject.detail)

    found = records.read(item, on_reject=lambda file, reject: faults.append((file, reject)))
    first = list(islice(found, FIRST))
    understand = _understood([row.columns for row in first], item, reading) if first else None
    for row in chain(first, found):
        assert understand is not None
        yield from before(row.file, row.line)
        yield line_of(row, understand, reading)
    yield from before(None, 0)


def _understood(first: Sequence[dict[str, Any]], item: Input, reading: Reading) -> detect.Reader:
    names = list(dict.fromkeys(name for row in first for name in row))
    usual = {role: name for role, name in reading.usual.items() if name in names}
    if reading.unlabelled:                               # a label that stands there all the same is not looked at
        target = TARGETS.get(reading.want, "")
        usual.pop(target, None)
        found = Columns(tuple(names), tuple(first), {**reading.usual, **usual}).find(target) if target else None
        names = [name for name in names if name != found or name in {*usual.values(), *reading.names.values()}]
    try:
        return detect.reader(names, first, reading.want, {**usual, **reading.names}, unlabelled=reading.unlabelled)
    except DataError as error:
        raise DataError(error.what, where=error.where or item.path, fix=error.fix) from None


def line_of(row: records.Record, understand: detect.Reader, reading: Reading) -> Line:
    """Return what a model reads of a record."""
    line = Line(row.file, row.line, row.columns, None, None, bytes=row.bytes)
    try:
        content = understand(row.columns)
        line = line._replace(content=content, text=text_of(content), label=None if reading.unlabelled else label_of(content))
        made = encode(_bare(content) if reading.unlabelled else content, reading.by)
    except Unusable as error:
        return line._replace(reason=error.reason, detail=error.detail)
    if not reading.unlabelled and line.label is None and not isinstance(content, Similar):
        return line._replace(reason="missing", detail="the row has no label")
    return line._replace(rows=tuple(map(row_of, made)), cut=sum(one.cut for one in made), kept=made[0].text)


def row_of(made: Made) -> Row:
    """Return a row as Stream.read gives it."""
    n = len(made.ids)
    weights = np.ones(n, np.float32) if made.weights is None else made.weights.astype(np.float32)
    row: Row = {"ids": made.ids.astype(np.int64), "weights": weights, "segments": np.ones(n, np.int32),
                "documents": np.zeros(1, np.int64), "key": np.zeros(4, np.int64)}
    row |= {"tags": made.tags} if made.tags is not None else {}
    return row | {name: np.asarray(column) for name, column in made.columns.items()}


def _bare(content: Content) -> Content:
    """Return what a row says without its label, which may be one that the model does not know."""
    if isinstance(content, Labelled | Chosen):
        return content._replace(label=None)
    if isinstance(content, Tagged):
        return content._replace(tags=None)
    if isinstance(content, Similar):
        return content._replace(score=None)
    return content._replace(answers=()) if isinstance(content, Asked) else content


def text_of(content: Content) -> Any:
    """Return the text of a row as it is shown, or the list of its texts."""
    if isinstance(content, Labelled):
        return content.parts[0] if len(content.parts) == 1 else list(content.parts)
    if isinstance(content, Tagged):
        return list(content.words)
    if isinstance(content, Asked):
        return [content.question, content.context]
    if isinstance(content, Chosen):
        return [content.text, *content.choices]
    return list(content.texts) if isinstance(content, Similar) else None


def label_of(content: Content) -> Any:
    """Return what is true of a row as people write it, JSON-ready; None where the row does not say."""
    if isinstance(content, Labelled):
        return list(content.label) if isinstance(content.label, tuple) else content.label
    if isinstance(content, Tagged):
        return None if content.tags is None else list(content.tags)
    if isinstance(content, Asked):
        return [text for text, _place in content.answers]
    if isinstance(content, Chosen):
        return None if content.label is None else content.choices[content.label]
    return content.score if isinstance(content, Similar) else None


def prepared(folder: Path, split: str, tokenizer: Tokenizer, objective: Objective, *, length: int,
             overlong: Overlong) -> tuple[Iterator[Line], dict[str, int]]:
    """Return the rows of a prepared folder, and how many were cut or left out.

    Raises IncompatibleError if another tokenizer made it or it is no data of this task, DataError for a class the model lacks.
    """
    shards = Shards(folder, split, verify=True)
    if shards.manifest["tokenizer"] != tokenizer.sha256:
        raise IncompatibleError(
            _("the data was prepared with another tokenizer: {data}, the model's is {model}").format(
                data=shards.manifest["tokenizer"][:12], model=tokenizer.sha256[:12]),
            where=str(folder), fix=_("give the rows themselves: they are tokenised for this model"))
    want = shards.manifest.get("task", {}).get("want")
    if want != objective.wants:
        raise IncompatibleError(_("the data holds rows of {found}, and the model's task wants {want}").format(
            found=want or "text", want=objective.wants), where=str(folder), fix=_("give the rows themselves"))
    if not shards.documents:
        raise DataError(_("there is no row to evaluate"), where=f"{folder}:{split}")
    table = _numbers(shards, objective)
    rows = stream(shards, objective, length=length, overlong=overlong, pack=False, seed=None)

    kept = shards.texts()

    def read_rows() -> Iterator[tuple[int, Row]]:
        for plan, _after in islice(rows.plans(rows.begin()), rows.rows(0)):
            yield plan.pieces[0][0], _renumbered(rows.read(plan), table, shards, plan.pieces[0][0])

    def lines() -> Iterator[Line]:
        for _example, group in groupby(read_rows(), lambda at: int(at[1]["example"])):      # windows of a row follow each other
            found = list(group)
            document, row = found[0]
            file, _colon, number = shards.where(document).rpartition(":")
            line = Line(file, int(number), {}, None, None, rows=tuple(one for _document, one in found))
            if kept:
                text = kept[int(row["example"])]
                words = text["words"] if "words" in text else [text["question"], text["context"]]
                yield line._replace(text=words, label=text["tags"] if "tags" in text else text["answers"], kept=text)
                continue
            borders = np.cumsum(row["parts"])[:-1] if "parts" in row else np.zeros(0, np.int64)
            said = [tokenizer.decode(part, special=False) for part in np.split(row["ids"], borders) if len(part)]
            yield line._replace(text=said[0] if len(said) == 1 else said, label=_name(row, objective))

    return lines(), rows.counts


def _numbers(shards: Shards, objective: Objective) -> np.ndarray | None:
    """Return the model's number of each class of the folder [K], -1 for one that it lacks; None if they are the same."""
    theirs, ours = shards.manifest.get("labels") or [], list(getattr(objective, "labels", ()))
    if theirs == ours or not theirs:
        return None
    return np.array([ours.index(name) if name in ours else -1 for name in theirs], np.int64)


def _renumbered(row: Row, table: np.ndarray | None, shards: Shards, document: int) -> Row:
    if table is None:
        return row
    column = "tags" if "tags" in row else "label"
    old = row[column]
    if column == "label" and old.ndim == 1:
        there = np.flatnonzero(old)
        new = np.isin(np.arange(max(len(table), int(table.max()) + 1)), table[there]).astype(np.uint8)
        wrong = table[there]
    else:
        new = np.where(old >= 0, table[np.maximum(old, 0)], old)
        wrong = new[old >= 0]
    if (wrong < 0).any():
        raise DataError(_("the row has a label that does not stand in the training data"), where=shards.where(document),
                        fix=_("leave such rows out, or train with them"))
    return row | {column: new}


def _name(row: Row, objective: Objective) -> Any:
    """Return the label of a stored row as people write it."""
    labels = getattr(objective, "labels", ())
    if "label" not in row:
        return None
    label = row["label"]
    if label.ndim:
        return [name for name, there in zip(labels, label, strict=True) if there]
    return labels[int(label)] if labels else label.item()


def named(path: str) -> str:
    """Return what the figures of a file are called: its name without the suffix."""
    return Path(path.partition("#")[0]).stem or path
