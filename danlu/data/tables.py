"""Rows out of formats whose records do not end at a line end: csv, json arrays, parquet, hub data sets."""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from danlu import files
from danlu.data.blocks import BOM, Block, Found, Reject, Row, split_lines, too_long
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


def column(wanted: str | int, names: Sequence[str], where: str) -> int:
    """Return the index of a column.  Raises DataError that names the columns there are."""
    if isinstance(wanted, int) and 0 <= wanted < len(names):
        return wanted
    if isinstance(wanted, str) and wanted in names:
        return list(names).index(wanted)
    near = difflib.get_close_matches(str(wanted), names, 1)
    raise DataError(
        _("there is no column {wanted!r}; the columns are {names}").format(wanted=wanted, names=", ".join(names)),
        where=where,
        fix=_("set `text` (or `label`) to {near}").format(near=repr(near[0]) if near else _("one of them")))


class _Refused(Exception):
    def __init__(self, reject: Reject) -> None:
        super().__init__(reject.reason)
        self.reject = reject


class _Lines:
    """Decoded lines for csv.reader.  One at fault is raised; the reader drops its row and can be asked for the next."""

    def __init__(self, blocks: Iterator[Block], encoding: str) -> None:
        self.line = 0
        self.encoding = encoding
        self.parts = self._parts(blocks)

    def _parts(self, blocks: Iterator[Block]) -> Iterator[Reject | tuple[int, int, bytes]]:
        for block in blocks:
            yield from block.rejects
            yield from split_lines(block)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        part = next(self.parts)
        if isinstance(part, Reject):
            self.line = part.line
            raise _Refused(part)
        self.line, offset, data = part
        try:
            return data.decode(self.encoding) + "\n"
        except UnicodeDecodeError as error:
            raise _Refused(undecodable(self.line, offset, error)) from None


def undecodable(line: int, offset: int, error: UnicodeDecodeError) -> Reject:
    """Return the reject of a row whose bytes are not in the encoding."""
    byte = error.object[error.start]
    return Reject(line, "encoding", f"byte 0x{byte:02x} at offset {offset + error.start} is not {error.encoding}")


def table(blocks: Iterator[Block], file: File, item: Input, row_bytes: int) -> Found:
    """Yield the rows of a csv or tsv file.  The header must name the columns wanted; ragged rows are rejected.

    Strict: text after a closing quotation mark is a fault, for it means that a stray mark has swallowed rows.
    """
    quote = item.quote if item.quote is not None else '"' if file.format == "csv" else ""
    csv.field_size_limit(row_bytes)                 # the module keeps one limit for the process
    lines = _Lines(blocks, item.encoding)
    reader = csv.reader(lines, delimiter=item.delimiter or ("," if file.format == "csv" else "\t"), strict=True,
                        quotechar=quote or None, quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE)
    names, text, label = list[str](), 0, None
    while True:
        start = lines.line + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except _Refused as refused:
            yield refused.reject
            continue
        except csv.Error as error:
            reason = "row_bytes" if "field limit" in str(error) else "csv"
            yield Reject(start, reason, str(error))
            continue
        if not fields or (len(fields) == 1 != len(names) and not fields[0].strip()):
            yield None
            continue
        if not names:
            names = fields if item.header else [str(index) for index in range(len(fields))]
            text = column(item.text, names, f"{file.path}:{start}")
            label = None if item.label is None else column(item.label, names, f"{file.path}:{start}")
            if item.header:
                continue
        if len(fields) != len(names):
            yield Reject(start, "columns", f"{len(fields)} columns instead of {len(names)}")
        else:
            yield Row(start, fields[text], None if label is None else fields[label])


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


def parquet(file: File, item: Input) -> Found:
    """Yield the rows of a parquet file, a few row batches at a time; text is given as bytes."""
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
            names = opened.schema_arrow.names
            text = names[column(item.text, names, file.path)]
            label = None if item.label is None else names[column(item.label, names, file.path)]
            wanted = [text] if label is None else [text, label]
            line = given = 0
            for batch in opened.iter_batches(batch_size=_batch(opened.metadata, file, item), columns=wanted):
                fault("prepare.read")
                texts = _binary(pa, batch.column(text), file, text)
                labels = [None] * len(texts) if label is None else batch.column(label).to_pylist()
                given += sum(map(len, filter(None, texts)))
                _check_ratio(given, file, item)
                for one, its in zip(texts, labels, strict=True):
                    line += 1
                    yield Row(line, one, its)
    except (pa.ArrowException, OSError) as error:
        raise broken(file.path, str(error).splitlines()[0]) from error


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


def hub(file: File, item: Input) -> Found:
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
        yield from _hub_rows(rows, file, item)
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
