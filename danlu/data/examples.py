"""Rows that somebody labelled to prepared data: read, understood, made ids, and stored as shards, with a count of everything.

Every row of a source becomes a stored row, or is counted under a reason in `audit.json` and listed in `rejects.jsonl`.
Which rows are held out depends on their content alone, and each class gives its share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from danlu import files
from danlu.data import detect, records, shards, suspect
from danlu.data.blocks import Reject
from danlu.data.encode import Encoder, Made, encode
from danlu.data.example import Asked, Chosen, Content, Labelled, Similar, Tagged, Unusable
from danlu.data.inputs import ROW_BYTES, Input, resolve
from danlu.data.split import Split
from danlu.errors import DataError
from danlu.words import _

FIRST = 64                                               # rows that the format is told from
SHOWN = 5                                                # examples of what is wrong


@dataclass
class Seen:
    """What a first reading of a source tells: its rows by key, their classes, and what cannot be used."""

    keys: list[int] = field(default_factory=list)        # of each usable row, by its content
    labels: list[tuple[str, ...]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)      # columns that nothing is taken from
    read: int = 0

    def reject(self, file: str, line: int, reason: str, detail: str) -> None:
        """Count a row that cannot be used, and keep where it stands."""
        self.reasons[reason] += 1
        self.rejects.append({"file": file, "line": line, "reason": reason, "detail": detail})


def contents(item: Input, want: str, names: Mapping[str, str], seen: Seen, *,
             unlabelled: bool = False) -> Iterator[tuple[records.Record, Content]]:
    """Yield every row that can be understood, with what it says; the others go to `seen`.  Raises DataError.

    unlabelled: rows may lack what a model is to say of them.
    """
    def rejected(file: str, reject: Reject) -> None:
        seen.read += 1
        seen.reject(file, *reject)

    rows = records.read(item, on_reject=rejected, row_bytes=ROW_BYTES)
    first = list(islice(rows, FIRST))
    if not first:
        why = "; ".join(f"{r['file']}:{r['line']}: {r['detail']}" for r in seen.rejects[:SHOWN])
        raise DataError(_("no row can be read: {why}").format(why=why or _("the file is empty")), where=item.path)
    columns = list(dict.fromkeys(name for row in first for name in row.columns))
    try:
        understand = detect.reader(columns, [row.columns for row in first], want, names, unlabelled=unlabelled)
    except DataError as error:
        raise DataError(error.what, where=error.where or item.path, fix=error.fix) from None
    for row in _chained(first, rows):
        seen.read += 1
        try:
            content = understand(row.columns)
        except Unusable as error:
            seen.reject(row.file, row.line, error.reason, error.detail)
            continue
        except DataError as error:                       # a column that no row had before makes them something else
            raise DataError(error.what, where=error.where or f"{row.file}:{row.line}", fix=error.fix) from None
        yield row, content
    seen.unread = understand.unread


def _chained(first: list[records.Record], rest: Iterator[records.Record]) -> Iterator[records.Record]:
    yield from first
    yield from rest


def survey(item: Input, want: str, names: Mapping[str, str], seed: int) -> Seen:
    """Return what a first reading of a source tells."""
    seen = Seen()
    for _row, content in contents(item, want, names, seen):
        seen.keys.append(key(content, seed))
        seen.labels.append(classes(content))
    return seen


def key(content: Content, seed: int) -> int:
    """Return a number of 64 bits that stands for what a row says, its label left out; of questions, for their context."""
    said: Any = content
    if isinstance(content, Labelled):
        said = content.parts
    elif isinstance(content, Tagged):
        said = content.words
    elif isinstance(content, Asked):
        said = content.context
    elif isinstance(content, Chosen):
        said = content[:2]
    elif isinstance(content, Similar):
        said = content.texts
    return int.from_bytes(blake2b(repr((seed, said)).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def classes(content: Content) -> tuple[str, ...]:
    """Return the names of the classes that a row bears."""
    if isinstance(content, Labelled) and isinstance(content.label, str | tuple):
        return (content.label,) if isinstance(content.label, str) else content.label
    if isinstance(content, Tagged) and content.tags is not None:
        return content.tags
    return ()


def rank(label: str) -> tuple[int, float, str]:
    """Order numbers before names, each in their own order."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def held_out(seen: Seen, share: float) -> Callable[[int, tuple[str, ...]], bool]:
    """Return whether a row (its key, its classes) is held out: of each class `share`, to the nearest row."""
    if not share:
        return lambda key, labels: False
    split = Split(val=share)
    groups: dict[Any, list[int]] = {}
    single = all(len(labels) == 1 for labels in seen.labels)
    for number, labels in zip(seen.keys, seen.labels, strict=True):
        groups.setdefault(labels if single else (), []).append(number)
    bounds = {name: split.exact(np.array(sorted(set(found)), np.uint64)) for name, found in groups.items()}
    return lambda key, labels: bool(split.place(np.array([key], np.uint64), bounds[labels if single else ()])[0])


class Store:
    """Writes rows into the shards of splits, and counts what goes in."""

    def __init__(self, folder: Path, *, dtype: str, weighted: bool) -> None:
        self.folder, self.dtype, self.weighted = folder, dtype, weighted
        self.held: dict[str, list[tuple[Made, int, int, int]]] = {}
        self.entries: dict[str, list[shards.Entry]] = {}
        self.sizes: Counter[str] = Counter()
        self.texts: dict[str, TextIO] = {}

    def tell(self, split: str, text: Mapping[str, Any]) -> None:
        """Keep what a row of the source said, beside its shards."""
        if split not in self.texts:
            self.texts[split] = (self.folder / shards.TEXTS.format(split=split)).open("w", encoding="utf-8")
        self.texts[split].write(json.dumps(text, ensure_ascii=False) + "\n")

    def add(self, split: str, made: Made, *, bytes: int, file: int, line: int) -> None:
        """Take in a row; a full shard is written."""
        self.held.setdefault(split, []).append((made, bytes, file, line))
        self.sizes[split] += len(made.ids)
        if self.sizes[split] >= shards.TOKENS or len(self.held[split]) >= shards.DOCUMENTS:
            self.flush(split)

    def flush(self, split: str) -> None:
        """Write the rows that wait as one shard."""
        rows = self.held.pop(split, [])
        if not rows:
            return
        made = [row[0] for row in rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(one.ids) for one in made], out=offsets[1:])
        arrays: dict[str, np.ndarray] = {
            "ids": np.concatenate([one.ids for one in made]).astype(self.dtype), "offsets": offsets,
            "bytes": np.array([row[1] for row in rows], np.int32), "file": np.array([row[2] for row in rows], np.int32),
            "line": np.array([row[3] for row in rows], np.int64)}
        if self.weighted:
            arrays["weights"] = np.concatenate([
                np.ones(len(one.ids), np.float16) if one.weights is None else one.weights.astype(np.float16) for one in made])
        if all(one.tags is not None for one in made):
            arrays["tags"] = np.concatenate([one.tags for one in made if one.tags is not None])
        for name in set.intersection(*(set(one.columns) for one in made)):
            arrays[name] = _stacked([one.columns[name] for one in made])
        (self.folder / split).mkdir(parents=True, exist_ok=True)
        entries = self.entries.setdefault(split, [])
        entries.append(shards.write(self.folder / split, len(entries), arrays))
        self.sizes[split] = 0

    def close(self) -> dict[str, list[shards.Entry]]:
        """Write what waits; return the shards of each split."""
        for split in list(self.held):
            self.flush(split)
        for file in self.texts.values():
            file.close()
            files.flush(Path(file.name))
        return self.entries


def _stacked(values: Sequence[Any]) -> np.ndarray:
    """Return the values as one array; lists of unequal length (the stretches of rows) end with zeros."""
    if np.ndim(values[0]) == 0 or len({len(value) for value in values}) == 1:
        return np.stack(values)
    out = np.zeros((len(values), max(len(value) for value in values)), values[0].dtype)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return out


def make(folder: Path, item: Input, want: str, names: Mapping[str, str], by: Encoder, *,
         place: Callable[[int, tuple[str, ...]], str], seed: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the rows of a source as a prepared folder, and return its account; `rejects.jsonl` lists what is not in it.

    place: the split of a row, from its key and classes.  facts: what the manifest says beside.
    """
    seen, named, account = Seen(), dict[str, int](), Account()
    with files.appearing(folder) as temporary:
        weighted = want in ("chat", "text")
        store = Store(temporary, dtype=by.tokenizer.dtype, weighted=weighted)
        for row, content in contents(item, want, names, seen):
            try:
                rows = encode(content, by)
            except Unusable as error:
                seen.reject(row.file, row.line, error.reason, error.detail)
                continue
            split = place(key(content, seed), classes(content))
            number = named.setdefault(row.file, len(named))
            if rows[0].text is not None:
                store.tell(split, rows[0].text)
            for made in rows:
                made.columns.setdefault("example", np.int64(account.rows[split]))
                store.add(split, made, bytes=row.bytes, file=number, line=row.line)
                account.add(split, made)
            account.end(split, content, f"{row.file}:{row.line}")
        entries = store.close()
        told = account.record() | {"read": seen.read, "rejected": dict(seen.reasons), "examples": seen.rejects[:SHOWN],
                                   "unread": seen.unread}
        files.rewrite_lines(temporary / "rejects.jsonl", seen.rejects)
        files.write_json(temporary / "audit.json", told)
        by.tokenizer.save(temporary / "tokenizer")
        if by.template is not None:
            by.template.save(temporary / "tokenizer")
        shards.write_manifest(temporary, {
            "tokenizer": by.tokenizer.sha256, "dtype": by.tokenizer.dtype, "splits": entries, "files": list(named),
            "texts": {split: files.sha256(Path(file.name)) for split, file in store.texts.items()}, "inputs": _inputs(item),
            "counts": told, "labels": list(by.labels), **facts})
    return told


def _inputs(item: Input) -> list[dict[str, Any]]:
    """Return what the manifest says of each file that was read: its size and hash, null for what cannot be read again."""
    return [{"path": file.path, "bytes": file.size, "sha256": None if file.size is None else files.sha256(Path(file.path))}
            for file in resolve([item])]


def _learned(made: Made) -> int:
    """Return how many tokens of a row carry loss."""
    if made.tags is not None:
        return int((made.tags >= 0).sum())
    return len(made.ids) if made.weights is None else int((made.weights > 0).sum())


@dataclass
class Flaw:
    """Rows whose texts look wrong, and the first of them."""

    rows: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: str, text: str) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.examples) < SHOWN:
            self.examples.append({"where": where, "text": text})


@dataclass
class Account:
    """What was stored of each split."""

    rows: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    learned: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    flaws: dict[str, dict[str, Flaw]] = field(default_factory=dict)
    labels: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, split: str, made: Made) -> None:
        """Count a stored row."""
        self.documents[split] += 1
        self.tokens[split] += len(made.ids)
        self.learned[split] += _learned(made)
        self.cut[split] += made.cut > 0
        self.lost[split] += made.cut

    def end(self, split: str, content: Content, where: str) -> None:
        """Count a row of the source, with what looks wrong in its texts."""
        self.rows[split] += 1
        self.labels.setdefault(split, Counter()).update(classes(content))
        for name, text in suspect.flaws(content):
            self.flaws.setdefault(split, {}).setdefault(name, Flaw()).add(where, text)

    def record(self) -> dict[str, Any]:
        """Return the counts as JSON-ready values, by split."""
        names = ("rows", "documents", "tokens", "learned", "cut", "lost")
        return {"splits": {split: {name: int(getattr(self, name)[split]) for name in names}
                           | {"labels": dict(self.labels.get(split, {})),
                              "flaws": {name: asdict(flaw) for name, flaw in self.flaws.get(split, {}).items()}}
                           for split in self.rows}}
