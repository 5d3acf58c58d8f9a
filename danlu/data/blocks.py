"""Blocks: about 1 MiB of whole lines or of rows, cut where records end, in bounded memory.

A block is what a worker process gets.  Cutting is cheap and sequential; decoding and parsing (`parse.py`) run in
parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from danlu.data.inputs import MIB
from danlu.data.raw import Raw
from danlu.errors import DataError

BOM = b"\xef\xbb\xbf"


class Reject(NamedTuple):
    """A row that is at fault, and why."""

    line: int
    reason: str                                     # a key, the same in every language
    detail: str


class Row(NamedTuple):
    """One record that was found already; bytes are still to be decoded or parsed."""

    line: int
    text: Any                                       # the document; in whole rows {column: value}
    label: Any = None
    bytes: int = 0                                  # size of a whole row


def _size(row: Row) -> int:
    return len(row.text) if isinstance(row.text, str | bytes) else row.bytes


@dataclass(frozen=True)
class Block:
    """Whole lines of a file (`lines`), or rows found already (`rows`)."""

    file: int                                       # index in the list of files
    line: int                                       # of the first line, from 1
    offset: int = 0                                 # of the first byte of `lines` in the unpacked file
    lines: bytes = b""
    rows: tuple[Row, ...] = ()
    rejects: tuple[Reject, ...] = ()                # found while cutting
    blank: int = 0
    mark: str = ""                                  # stands for all bytes read up to here; "" where they are not seen
    number: int = 0                                 # of the block in its file, from 0
    last: bool = False                              # the file ends with this block, which holds nothing else
    broken: str = ""                                # why the file ended early

    @property
    def size(self) -> int:
        """Return about how many bytes of text the block holds."""
        return len(self.lines) + sum(_size(row) for row in self.rows)


Found = Iterator[Row | Reject | None]               # None: a blank row


def too_long(line: int, size: int, limit: int) -> Reject:
    """Return the reject of a row of `size` bytes."""
    return Reject(line, "row_bytes", f"{size} bytes, more than max_row_bytes={limit}")


def undecodable(line: int, offset: int, error: UnicodeDecodeError) -> Reject:
    """Return the reject of a row whose bytes are not in the encoding."""
    byte = error.object[error.start]
    return Reject(line, "encoding", f"byte 0x{byte:02x} at offset {offset + error.start} is not {error.encoding}")


def cut_lines(file: int, raw: Raw, row_bytes: int, *, bom: bool) -> Iterator[Block]:
    """Yield blocks of whole lines.  Holds at most `row_bytes` bytes of an unfinished line, and skips the rest of it."""
    tail, line, offset, lost = b"", 1, 0, 0         # lost: bytes of an over-long line that were dropped so far
    for piece in raw.pieces():
        data, rejects = tail + piece, tuple[Reject, ...]()
        if bom and offset == 0 and not lost and data.startswith(BOM):
            data, offset = data[len(BOM):], len(BOM)
        if lost:
            end = piece.find(b"\n") + 1
            if not end:
                lost += len(piece)
                continue
            rejects, offset, data = (too_long(line, lost + end - 1, row_bytes),), offset + lost + end, piece[end:]
            line, lost = line + 1, 0
        end = data.rfind(b"\n") + 1
        if end or rejects:
            yield Block(file, line, offset, lines=data[:end], rejects=rejects, mark=raw.mark())
        line, offset, tail = line + data.count(b"\n", 0, end), offset + end, data[end:]
        if len(tail) > row_bytes:
            lost, tail = len(tail), b""
    if lost:
        yield Block(file, line, offset, rejects=(too_long(line, lost, row_bytes),), mark=raw.mark())
    elif tail:
        yield Block(file, line, offset, lines=tail, mark=raw.mark())


def gather(found: Found, file: int, mark: Callable[[], str]) -> Iterator[Block]:
    """Gather rows into blocks of about 1 MiB; what was found before an error is given before it is raised."""
    rows, rejects, blank, size = list[Row](), list[Reject](), 0, 0

    def block() -> Block:
        first = min([row.line for row in rows[:1]] + [reject.line for reject in rejects[:1]], default=1)
        return Block(file, first, rows=tuple(rows), rejects=tuple(rejects), blank=blank, mark=mark())

    for one in _until_broken(found):
        if isinstance(one, DataError):
            if rows or rejects or blank:
                yield block()
            raise one
        if isinstance(one, Row):
            rows.append(one)
            size += 64 + _size(one)
        elif one is None:
            blank += 1
        else:
            rejects.append(one)
        if size >= MIB or len(rejects) >= 4096:
            yield block()
            rows, rejects, blank, size = [], [], 0, 0
    if rows or rejects or blank:
        yield block()


def _until_broken(found: Found) -> Iterator[Row | Reject | DataError | None]:
    try:
        yield from found
    except DataError as error:
        yield error


def split_lines(block: Block) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line, offset in the file, bytes without the line feed) of each line."""
    line, offset = block.line, block.offset
    for part in block.lines.removesuffix(b"\n").split(b"\n") if block.lines else ():
        yield line, offset, part
        line, offset = line + 1, offset + len(part) + 1
