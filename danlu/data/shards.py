"""Prepared data on disk: shards of documents under a manifest that knows their hashes.

    DIR/manifest.json              what there is, from which inputs, under which fingerprint
    DIR/{train,val,test}/00000.safetensors …
        ids [tokens], weights [tokens] (optional), offsets [documents + 1]: document i is ids[offsets[i]:offsets[i + 1]]
        tags [tokens] (optional): a class of each token
        one number per document, or row of numbers, in each further column: bytes (size as UTF-8), file (index in
        manifest["files"]), line …
    DIR/{train,val,test}.jsonl (optional): what judging needs of the rows as they were
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from danlu import files
from danlu.data import mapped
from danlu.errors import DataError
from danlu.words import _

SCHEMA = 1
COLUMNS: Mapping[str, str] = {"bytes": "int32", "file": "int32", "line": "int64"}
TOKENS = 1 << 25                # in a shard, before the next one begins
DOCUMENTS = 1 << 20             # likewise
TEXTS = "{split}.jsonl"         # beside the folder of a split's shards: what judging needs of the rows as they were
BASIC = ("ids", "weights", "tags", "offsets")
ANSWERS = ("tags", "label", "parts", "answer", "example", "window")      # what rows carry beside their ids


class Entry(NamedTuple):
    """What the manifest says of one shard; `top` is the greatest id in it, -1 when there is none."""

    file: str
    sha256: str
    bytes: int
    documents: int
    tokens: int
    top: int


class Document(NamedTuple):
    """One document: ids [n], weights [n] or None for all 1, and its number in each column."""

    ids: np.ndarray
    weights: np.ndarray | None
    columns: dict[str, int | float]


class Writer:
    """Turns documents into shards `folder/00000.safetensors …`; holds at most one shard in memory.

    A shard is on disk, whole and durable, once its Entry stands in `entries`.  `first` numbers the first shard, for a
    preparation that goes on where it stopped.
    """

    def __init__(self, folder: Path, *, dtype: str, weights: str | None = None, columns: Mapping[str, str] = COLUMNS,
                 tokens: int = TOKENS, first: int = 0) -> None:
        if dtype not in ("uint16", "uint32") or weights not in (None, "float16", "uint8"):
            raise ValueError(f"no shard has ids as {dtype} and weights as {weights}")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.number, self.limit = folder, first, tokens
        self.dtype, self.weights, self.columns = np.dtype(dtype), weights, dict(columns)
        self.top = int(np.iinfo(self.dtype).max)
        self.entries: list[Entry] = []
        self._clear()

    def add(self, ids: np.ndarray, *, weights: np.ndarray | None = None, **values: float) -> None:
        """Append one document, with a value for each column.  Raises ValueError for what the shard cannot hold."""
        if values.keys() != self.columns.keys() or (weights is None) != (self.weights is None):
            raise ValueError(f"a document needs {sorted(self.columns)}, weights={self.weights}; got {sorted(values)}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= self.top:
            raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit {self.dtype}")
        if weights is not None:
            kept = np.asarray(weights).astype(self.weights)
            if kept.shape != np.shape(ids) or (self.weights == "uint8" and not np.array_equal(kept, weights)):
                raise ValueError(f"{len(ids)} ids need as many weights that fit {self.weights}")
            self._weights.append(kept)
        self._ids.append(np.asarray(ids).astype(self.dtype))
        for name, value in values.items():
            self._values[name].append(value)    # type: ignore[arg-type]
        self._size += len(ids)
        self._sizes.append(len(ids))
        if self._size >= self.limit or len(self._sizes) >= DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard as one; does nothing when that is nothing."""
        if not self._sizes:
            return
        offsets = np.zeros(len(self._sizes) + 1, np.int64)
        np.cumsum(np.frombuffer(self._sizes, np.int64), out=offsets[1:])
        ids = np.concatenate(self._ids)
        arrays = {"ids": ids, "offsets": offsets}
        if self.weights:
            arrays["weights"] = np.concatenate(self._weights)
        for name, kind in self.columns.items():
            wide = np.array(self._values[name])
            arrays[name] = wide.astype(kind)
            if np.dtype(kind).kind in "iu" and not np.array_equal(arrays[name], wide):
                raise ValueError(f"column {name!r} does not fit {kind}")
        self.entries.append(write(self.folder, self.number, arrays))
        self.number += 1
        self._clear()

    def close(self) -> list[Entry]:
        """Write the rest; return the entries of every shard written."""
        self.flush()
        return self.entries

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _clear(self) -> None:
        self._ids: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._sizes, self._size = array("q"), 0
        self._values = {n: array("q" if np.dtype(k).kind in "iu" else "d") for n, k in self.columns.items()}


def write(folder: Path, number: int, arrays: Mapping[str, np.ndarray]) -> Entry:
    """Write one shard, whole and durable, from its ids, offsets and columns; return its entry."""
    name, ids = f"{number:05d}.safetensors", arrays["ids"]
    size, sha256 = mapped.write(folder / name, arrays)
    top = int(ids.max()) if ids.size else -1
    return Entry(f"{folder.name}/{name}", sha256, size, len(arrays["offsets"]) - 1, len(ids), top)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write DIR/manifest.json, after which the prepared data is complete; return it with schema and fingerprint.

    `content` has tokenizer (SHA-256), dtype, splits {name: [Entry …]}, files, inputs, counts and config.  The hashes of the
    tokenizer's files are told, too.
    """
    splits = {name: [Entry(*entry)._asdict() for entry in entries] for name, entries in content["splits"].items()}
    beside = {p.name: files.sha256(p) for p in sorted((folder / "tokenizer").glob("*")) if p.is_file()}
    manifest = {"schema": SCHEMA, **content, **({"tokenizer_files": beside} if beside else {}), "splits": splits}
    manifest["fingerprint"] = fingerprint(manifest)
    files.write_json(folder / "manifest.json", manifest)
    return manifest


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Return the hash over all that a manifest says, and so over every shard and input."""
    return files.digest({key: value for key, value in manifest.items() if key != "fingerprint"})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return DIR/manifest.json.  Raises DataError when it is missing, unfinished, damaged or of another version."""
    path = folder / "manifest.json"
    if not path.exists():
        unfinished = (folder / "progress.json").exists()
        raise DataError(
            _("the preparation of this folder was not finished") if unfinished else _("there is no prepared data here"),
            where=str(folder), fix=_("run `danlu prepare`; it goes on where it stopped"))
    try:
        manifest = files.read_json(path)
        schema, own = manifest["schema"], manifest["fingerprint"]
        if schema == SCHEMA and own == fingerprint(manifest) and {"tokenizer", "dtype", "files"} <= manifest.keys():
            manifest["splits"] = {n: [Entry(**e) for e in entries] for n, entries in manifest["splits"].items()}
            return dict(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(_("the manifest is damaged: {why}").format(why=error), where=str(path)) from None
    if schema != SCHEMA:
        raise DataError(_("the data was prepared by another version (schema {found}, needed {needed})").format(
            found=schema, needed=SCHEMA), where=str(path), fix=_("run `danlu prepare` again"))
    raise DataError(_("the manifest was changed: its fingerprint does not fit"), where=str(path),
                    fix=_("run `danlu prepare` again"))


class Shards:
    """One split of prepared data, mapped into memory.  Sizes of files are always checked, hashes with `verify`."""

    def __init__(self, folder: Path | str, split: str = "train", *, verify: bool = False) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise DataError(_("there is no split {split!r}; there are {names}").format(
                split=split, names=sorted(self.manifest["splits"])), where=str(self.folder))
        self.entries: list[Entry] = self.manifest["splits"][split]
        self._arrays = [self._open(entry) for entry in self.entries]
        self._first: list[int] = np.cumsum([0, *(entry.documents for entry in self.entries)]).tolist()
        if verify:
            self.verify()

    @staticmethod
    def has(folder: Path | str, split: str) -> bool:
        """Tell whether the prepared folder has documents in that split."""
        entries: list[Entry] = read_manifest(Path(folder))["splits"].get(split, [])
        return any(entry.documents for entry in entries)

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def documents(self) -> int:
        """How many documents the split has."""
        return self._first[-1]

    @property
    def name(self) -> str:
        """Folder and split, as messages name it."""
        return f"{self.folder}:{self.split}"

    @cached_property
    def bytes(self) -> int:
        """The size of all texts of the split as UTF-8, for losses in bits per byte."""
        return int(self.column("bytes").sum(dtype=np.int64))

    def record(self) -> dict[str, Any]:
        """Return what identifies the split, JSON-ready, for receipts."""
        return {"path": str(self.folder), "split": self.split, "fingerprint": self.fingerprint,
                "documents": self.documents, "tokens": self.tokens}

    @property
    def tokens(self) -> int:
        """How many ids the split has."""
        return sum(entry.tokens for entry in self.entries)

    @property
    def weighted(self) -> bool:
        """Whether some tokens of the split may weigh more or less than others."""
        return any("weights" in arrays for arrays in self._arrays)

    @property
    def top(self) -> int:
        """The greatest id in the split, which a model's vocabulary must exceed; -1 when there is none."""
        return max((entry.top for entry in self.entries), default=-1)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every document has."""
        return tuple(sorted(set.intersection(*(set(a) for a in self._arrays)) - set(BASIC))) if self._arrays else ()

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the whole prepared data and of the split's name."""
        return files.digest([self.manifest["fingerprint"], self.split])

    def verify(self) -> None:
        """Raise DataError naming the first file whose content is not what was written."""
        kept = self.manifest.get("texts", {})
        texts = [(TEXTS.format(split=self.split), kept[self.split])] if self.split in kept else []
        for name, sha256 in (*((entry.file, entry.sha256) for entry in self.entries), *texts):
            path = files.inside(self.folder, name)
            if not path.is_file() or files.sha256(path) != sha256:
                raise DataError(_("the file is damaged: its SHA-256 does not fit the manifest"), where=str(path),
                                fix=_("delete the folder and run `danlu prepare` again"))

    def lengths(self) -> np.ndarray:
        """Return the number of ids of each document [documents] int64."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(arrays["offsets"]) for arrays in self._arrays)])

    def signatures(self) -> np.ndarray:
        """Return a number for each document [documents] uint64 that equal documents share: of length, first, middle, last id."""
        found = [np.zeros(0, np.uint64)]
        for arrays in self._arrays:
            starts, stops = arrays["offsets"][:-1], arrays["offsets"][1:]
            full = stops > starts
            mixed = (stops - starts).astype(np.uint64)
            for place in (starts, (starts + stops) // 2, stops - 1):
                mixed[full] = mixed[full] * np.uint64(0x9E3779B97F4A7C15) + arrays["ids"][place[full]].astype(np.uint64)
            found.append(mixed)
        return np.concatenate(found)

    def column(self, name: str) -> np.ndarray:
        """Return a number for each document [documents]."""
        return np.concatenate([arrays[name] for arrays in self._arrays] or [np.zeros(0)])

    def part(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the ids start:stop of a document, and their weights (None: all 1), as views of the file."""
        shard = bisect_right(self._first, document) - 1
        arrays = self._arrays[shard]
        base = int(arrays["offsets"][document - self._first[shard]])
        where, weights = slice(base + start, base + stop), arrays.get("weights")
        return arrays["ids"][where], None if weights is None else weights[where]

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """What the documents are labelled with, of ANSWERS; the class that `prepare` splits by is no answer."""
        if "task" not in self.manifest:
            return ()
        return tuple(name for name in ANSWERS if self._arrays and all(name in arrays for arrays in self._arrays))

    def answer(self, name: str, document: int, start: int, stop: int) -> np.ndarray:
        """Return the tags start:stop of a document, or what another column says of it (any shape)."""
        shard = bisect_right(self._first, document) - 1
        arrays, number = self._arrays[shard], document - self._first[shard]
        if name == "tags":
            base = int(arrays["offsets"][number])
            return arrays["tags"][base + start : base + stop]
        return np.asarray(arrays[name][number])

    def texts(self) -> list[dict[str, Any]]:
        """Return what was kept of the rows themselves, in the order of column `example`; [] where nothing was."""
        path = self.folder / TEXTS.format(split=self.split)
        return list(files.read_lines(path)) if path.is_file() else []

    def tally(self, name: str, classes: int) -> np.ndarray:
        """Return how often each of `classes` stands in a column [classes] int64: numbers, -100 for none, or zeros and ones."""
        total = np.zeros(classes, np.int64)
        for arrays in self._arrays:
            column = arrays[name]
            total += column.sum(0, dtype=np.int64) if column.ndim == 2 else np.bincount(
                column[column >= 0], minlength=classes)[:classes]
        return total

    def document(self, number: int) -> Document:
        """Return document `number` (0-based, over all shards).  Raises IndexError when there is none."""
        if not 0 <= number < self.documents:
            raise IndexError(number)
        shard = bisect_right(self._first, number) - 1
        arrays, i = self._arrays[shard], number - self._first[shard]
        ids, weights = self.part(number, 0, int(arrays["offsets"][i + 1] - arrays["offsets"][i]))
        return Document(ids, weights, {name: arrays[name][i].item() for name in self.columns if arrays[name].ndim == 1})

    def where(self, number: int) -> str:
        """Return "file:line" of the input that a document came from."""
        columns = self.document(number).columns
        return f"{self.manifest['files'][int(columns['file'])]}:{int(columns['line'])}"

    def _open(self, entry: Entry) -> dict[str, np.ndarray]:
        path = files.inside(self.folder, entry.file)
        arrays = mapped.read(path, entry.bytes)
        ids, offsets = arrays.get("ids"), arrays.get("offsets")
        per_document = [a for name, a in arrays.items() if name not in BASIC]
        good = (
            ids is not None and ids.dtype == self.manifest["dtype"] and ids.shape == (entry.tokens,)
            and offsets is not None and offsets.dtype == np.int64 and offsets.shape == (entry.documents + 1,)
            and arrays.get("weights", ids).shape == ids.shape == arrays.get("tags", ids).shape
            and all(a.shape[:1] == (entry.documents,) for a in per_document)
            and offsets[0] == 0 and offsets[-1] == entry.tokens and bool((np.diff(offsets) >= 0).all())
        )
        if not good:
            raise DataError(_("the file is damaged: its arrays are not those that the manifest lists"), where=str(path),
                            fix=_("delete the folder and run `danlu prepare` again"))
        return arrays
