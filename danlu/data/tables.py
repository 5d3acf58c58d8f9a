"""Rows out of formats whose records do not end at a line end: json arrays, parquet, hub data sets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from danlu import files
from danlu.data.blocks import BOM, Found, Reject, Row, too_long, undecodable
from danlu.data.delimited import column
from danlu.data.inputs import HUB, MIB, SUFFIXES, File, Input, kind
from danlu.data.raw import FLOOR, Raw, broken, check_magic
from danlu.errors import ConfigError, DataError, SecurityError
from danlu.fault import fault
from danlu.words import _

OUTSIDE = re.compile(rb'["{}\[\],]')
INSIDE = re.compile(rb'["\\]')
BUILDERS = {"txt": "text", "jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}


def no_mark() -> str:
    """Return the mark of a source whose bytes are not seen."""
    return ""


class _Scan:
    """Where a json scanner stands: how deep, inside a string or not, and in which array the records are."""

    def __init__(self) -> None:
        self.depth, self.inside, self.skip = 0, False, 0
        self.target = 0                             # depth of the records; 0 before the array was found, -1 after it
        self.key = bytearray()                      # last string at depth 1
        self.begun = self.closed = False


def elements(raw: Raw, row_bytes: int) -> Found:
    """Yield the raw elements of a json array, or of the array under "data" of an object, each as bytes.

    Only the bounds of the elements are found here; one longer than `row_bytes` is rejected and never held.
    """
    scan, count, held, size = _Scan(), 0, bytearray(), 0
    path = raw.file.path
    for piece in raw.pieces():
        _begin(scan, piece, path)
        start = 0
        for cut, closing in _cuts(scan, piece, path):
            if cut < 0:                             # the array begins
                start = -cut
                continue
            size += cut - start
            held += piece[start:cut] if size <= row_bytes else b""
            if not closing or count or size > row_bytes or held.strip():
                count += 1
                yield too_long(count, size, row_bytes) if size > row_bytes else Row(count, bytes(held).strip())
            held, size, start = bytearray(), 0, cut + 1
        if scan.target > 0:
            size += len(piece) - start
            held += piece[start:] if size <= row_bytes else b""
    if scan.begun and (scan.depth or scan.inside):
        raise broken(path, _("a bracket is not closed"))
    if scan.begun and scan.target == 0:
        raise DataError(_("the file is one object without an array under \"data\""), where=path,
                        fix=_("write [ … ] around the records, or use jsonl"))


def _begin(scan: _Scan, piece: bytes, path: str) -> None:
    if scan.begun or not (start := piece.removeprefix(BOM).lstrip()[:1]):
        return
    scan.begun = True
    if start not in b"[{":
        raise DataError(_("a json file holds an array of objects, or an object with one under \"data\""), where=path,
                        fix=_("set `format` to what it is"))


def _cuts(scan: _Scan, piece: bytes, path: str) -> Iterator[tuple[int, bool]]:
    """Yield (where a comma or bracket ends an element, whether the array ends too); first, minus where it begins."""
    at, scan.skip = scan.skip, 0
    while at < len(piece):
        found = (INSIDE if scan.inside else OUTSIDE).search(piece, at)
        stop = found.start() if found else len(piece)
        if scan.inside and scan.depth == 1 and scan.target == 0 and len(scan.key) < 64:
            scan.key += piece[at:min(stop, at + 64)]
        if found is None:
            return
        at = found.end()
        byte = found[0]
        if byte == b"\\":
            at += 1
            scan.skip = max(0, at - len(piece))
        elif byte == b'"':
            scan.inside = not scan.inside
            if scan.inside and scan.target == 0:
                scan.key.clear()
        elif byte in b"{[":
            if scan.closed:
                raise DataError(_("a second value follows the first, as in JSON Lines"), where=path,
                                fix="format: jsonl")
            scan.depth += 1
            if byte == b"[" and scan.target == 0 and (scan.depth == 1 or (scan.depth == 2 and scan.key == b"data")):
                scan.target = scan.depth
                yield -at, False
        elif byte == b",":
            if scan.depth == scan.target:
                yield stop, False
        else:
            if scan.depth == scan.target:
                yield stop, True
                scan.target = -1
            scan.depth -= 1
            scan.closed = scan.depth <= 0


def parquet_mark(file: File) -> Callable[[], str]:
    """Return the mark of a parquet file, which is not read in order: of all its bytes."""
    if file.size is None:
        raise DataError(_("parquet cannot be read from a pipe"), where=file.path, fix=_("save it as a file"))
    mark = f"{file.size}:{files.sha256(Path(file.path))}"
    return lambda: mark


def questions(found: Found, row_bytes: int) -> Found:
    """Yield the rows of a json array, numbered; an article of SQuAD gives one for each of its questions."""
    count = 0
    for one in found:
        if not (isinstance(one, Row) and b'"paragraphs"' in one.text):
            count += one is not None
            yield one if one is None else one._replace(line=count)
            continue
        try:
            inner = list(_asked(json.loads(one.text)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            count += 1
            yield Reject(count, "squad", f"article {one.line}: {type(error).__name__}: {error}")
            continue
        for row in inner:
            count += 1
            size = sum(len(value.encode(errors="replace")) for value in row.values() if isinstance(value, str))
            yield Row(count, row, bytes=size) if size <= row_bytes else too_long(count, size, row_bytes)


def _asked(article: Any) -> Iterator[dict[str, Any]]:
    """Yield the questions of an article: {"id", "context", "question", "answers": {"text": […], "answer_start": […]}}."""
    for paragraph in article["paragraphs"]:
        for asked in paragraph["qas"]:
            answers = [] if asked.get("is_impossible") else asked.get("answers") or []
            yield {"id": str(asked.get("id", "")), "context": paragraph["context"], "question": asked["question"],
                   "answers": {"text": [one["text"] for one in answers],
                               "answer_start": [one["answer_start"] for one in answers]}}


def parquet(file: File, item: Input, *, whole: bool = False) -> Found:
    """Yield the rows of a parquet file, a few row batches at a time; text is given as bytes, whole rows as columns."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(_("reading parquet files needs an extra"), where=file.path,
                          fix='pip install "danlu[parquet]"') from None
    with open(file.path, "rb") as handle:
        check_magic(handle.read(16), file)
    try:
        with pq.ParquetFile(file.path, pre_buffer=False) as opened:
            size = _batch(opened.metadata, file, item)
            yield from (_columns(opened, size) if whole else _texts(pa, opened, size, file, item))
    except (pa.ArrowException, OSError) as error:
        raise broken(file.path, str(error).splitlines()[0]) from error


def _texts(pa: Any, opened: Any, size: int, file: File, item: Input) -> Found:
    names = opened.schema_arrow.names
    text = names[column(item.text, names, file.path)]
    label = None if item.label is None else names[column(item.label, names, file.path)]
    line = given = 0
    for batch in opened.iter_batches(batch_size=size, columns=[text] if label is None else [text, label]):
        fault("prepare.read")
        texts = _binary(pa, batch.column(text), file, text)
        labels = [None] * len(texts) if label is None else batch.column(label).to_pylist()
        given += sum(map(len, filter(None, texts)))
        _check_ratio(given, file, item)
        for one, its in zip(texts, labels, strict=True):
            line += 1
            yield Row(line, one, its)


def _columns(opened: Any, size: int) -> Found:
    line = 0
    for batch in opened.iter_batches(batch_size=size):
        fault("prepare.read")
        for place in range(batch.num_rows):
            line += 1
            try:
                row = batch.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError as error:         # the library checks text only when it is taken out
                yield undecodable(line, 0, error)
            else:
                yield Row(line, row, bytes=weigh(row))


def weigh(value: Any) -> int:
    """Return about how many bytes a value of a row is: those of its texts, eight for anything else."""
    if isinstance(value, str | bytes):
        return len(value) if isinstance(value, bytes) or value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, dict):
        return sum(map(weigh, value.values()))
    return sum(map(weigh, value)) if isinstance(value, list | tuple) else 8


def _batch(metadata: Any, file: File, item: Input) -> int:
    """Return how many rows hold about 1 MiB of text; refuses a file that says it unpacks to too much."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    _check_ratio(size, file, item)
    return int(min(8192, max(16, MIB * metadata.num_rows / max(1, size))))


def _check_ratio(given: int, file: File, item: Input) -> None:
    if given > item.max_bytes or (given > FLOOR and given > item.max_ratio * max(1, file.size or 0)):
        raise SecurityError(_("the file unpacks to {ratio:.0f} times its size, as decompression bombs do").format(
            ratio=given / max(1, file.size or 0)), where=file.path,
            fix=_("if it is sound, raise max_ratio or max_bytes of this input"))


def _binary(pa: Any, values: Any, file: File, name: str) -> list[bytes | None]:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise DataError(_("column {name!r} holds {kind}, not text").format(name=name, kind=values.type),
                        where=file.path, fix=_("set `text` to the column that holds the text"))
    found: list[bytes | None] = values.cast(pa.large_binary()).to_pylist()
    return found


def hub(file: File, item: Input, *, whole: bool = False) -> Found:
    """Yield the rows of a data set as the `datasets` library streams it; a local path after hf:// needs no network.

    Data sets that are programs are refused: version 4 and later of the library have no way to run them.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(_("reading hub data sets needs an extra"), where=file.path,
                          fix='pip install "danlu[hub]"') from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ConfigError(_("the installed `datasets` could run code that comes with a data set"), where=file.path,
                          fix='pip install "datasets>=4"')
    name = unquote(file.path.removeprefix(HUB))
    shown = kind(name)[0]
    if name.startswith(("/", ".")) and not Path(name).exists():
        raise DataError(_("there is no such file"), where=file.path,
                        fix=_("check the path; it is taken from the current folder"))
    try:
        if Path(name).is_file():
            if not shown:
                raise DataError(_("the name does not show the format"), where=file.path,
                                fix=_("use one of {known}").format(known=" ".join(SUFFIXES)))
            options = {"delimiter": "\t"} if shown == "tsv" else {}
            rows = datasets.load_dataset(BUILDERS[shown], data_files=name, split="train", streaming=True, **options)
        else:
            rows = datasets.load_dataset(name, item.subset, split=item.hub_split, streaming=True)
        yield from (_hub_columns(rows) if whole else _hub_rows(rows, file, item))
    except (ConfigError, DataError):
        raise
    except Exception as error:                      # the library raises whatever its readers and the network raise
        why = f"{type(error).__name__}: {error}"
        raise DataError(_("the data set cannot be read: {why}").format(why=why), where=file.path, fix=_(
            "check the name, `subset` and `hub_split`; a local path works without a network")) from error


def _hub_rows(rows: Any, file: File, item: Input) -> Found:
    for line, row in enumerate(rows, 1):
        fault("prepare.read")
        if line == 1:
            column(str(item.text), list(row), file.path)
        label = row.get(item.label) if item.label is not None else None
        if isinstance(label, float) and not math.isfinite(label):
            yield Reject(line, "label", f"{label} is not a number one can use")
        else:
            yield Row(line, row.get(item.text), label)


def _hub_columns(rows: Any) -> Found:
    for line, row in enumerate(rows, 1):
        fault("prepare.read")
        yield Row(line, dict(row), bytes=weigh(row))
