"""Whole rows of fine-tuning data, whatever the format: each row is a record or a reject, and none vanishes."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from danlu.data import formats, parse
from danlu.data.blocks import Reject
from danlu.data.inputs import MIB, ROW_BYTES, File, Input, resolve, split_take
from danlu.data.raw import Raw
from danlu.errors import DataError
from danlu.words import _


class Record(NamedTuple):
    """One row as it stands in the file."""

    file: str
    line: int                                       # from 1: the line where it starts, or the row's number
    columns: dict[str, Any]
    bytes: int                                      # about the UTF-8 size of its texts


def read(item: Input | str, *, row_bytes: int = ROW_BYTES, on_reject: Callable[[str, Reject], None] | None = None
         ) -> Iterator[Record]:
    """Yield every row of an input with all its columns, in order, in bounded memory.

    csv and tsv give texts; columns without a header are "0", "1", …; words and tags give {"tokens", "tags"}; a line of
    txt gives {"text"}; SQuAD's articles give a row a question.  A row at fault goes to `on_reject` with the name of its
    file; without one it raises DataError at the first.  A file in another encoding than the input says raises DataError.
    """
    chosen = split_take(Input(path=item) if isinstance(item, str) else item)
    files = resolve([chosen])
    for block in formats.stream(files, [chosen], row_bytes=row_bytes, whole=True):
        file = files[block.file]
        rows, rejects = parse.wholes(block, file.format, chosen, row_bytes=row_bytes)
        for reject in rejects:
            if reject.reason == "encoding" and file.format not in ("parquet", "hub"):
                raise _misread(file, chosen, reject)
            if on_reject is None:
                raise DataError(_("a row cannot be used ({reason}): {detail}").format(
                    reason=reject.reason, detail=reject.detail), where=f"{file.path}:{reject.line}",
                    fix=_("mend or remove the row"))
            on_reject(file.path, reject)
        for line, columns, size in rows:
            yield Record(file.path, line, columns, size)


def _misread(file: File, item: Input, reject: Reject) -> DataError:
    """Return the error for a file that is not in the encoding its input says, with the one it may be in."""
    detail = reject.detail
    fix = _("set `encoding` to the one the file was written in, or mend that row")
    if not file.once:
        pieces = Raw(file, max_ratio=item.max_ratio, max_bytes=item.max_bytes).pieces()
        detail = _first_fault(pieces, item.encoding) or detail
        start = b"".join(islice(Raw(file, max_ratio=item.max_ratio, max_bytes=item.max_bytes).pieces(), 1))[:MIB]
        if codecs.lookup(item.encoding).name.startswith("utf-8") and file.format != "json" and _may_be_chinese(start):
            fix = "encoding: gb18030"
    return DataError(_("the file is not in the encoding {encoding}: {detail}").format(
        encoding=item.encoding, detail=detail), where=f"{file.path}:{reject.line}", fix=fix)


def _first_fault(pieces: Iterator[bytes], encoding: str) -> str:
    """Return which byte of a file is the first that cannot be decoded, "" for none."""
    decoder, seen = codecs.getincrementaldecoder(encoding)(), 0
    for piece in pieces:
        held = len(decoder.getstate()[0])           # bytes of a character that the last piece cut in two
        try:
            decoder.decode(piece)
        except UnicodeDecodeError as error:
            return f"byte 0x{error.object[error.start]:02x} at offset {seen - held + error.start} is not {encoding}"
        seen += len(piece)
    return ""


def _may_be_chinese(start: bytes) -> bool:
    """Say whether bytes decode as GB18030 and no line of them is UTF-8 beyond ASCII, as in a UTF-8 file with one fault."""
    try:
        codecs.getincrementaldecoder("gb18030")().decode(start)
    except UnicodeDecodeError:
        return False
    for line in start.split(b"\n")[:-1]:
        if not line.isascii():
            try:
                line.decode()
            except UnicodeDecodeError:
                continue
            return False
    return True
