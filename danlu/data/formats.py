"""From files to blocks, whatever the format; the same blocks every time a file is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from danlu import chance
from danlu.data import delimited, tables
from danlu.data.blocks import BOM, Block, Found, Reject, Row, cut_lines, gather, split_lines, too_long
from danlu.data.inputs import File, Input
from danlu.data.raw import Raw
from danlu.errors import ConfigError, DataError
from danlu.words import _

UTF8 = ("utf-8", "utf8", "utf_8", "utf-8-sig", "utf_8_sig")


def stream(files: Sequence[File], inputs: Sequence[Input], *, row_bytes: int, skip_broken: bool = False,
           start: int = 0, whole: bool = False) -> Iterator[Block]:
    """Yield the blocks of `files` in order, from file number `start` on; each file ends with a block that says so.

    `whole` rows keep all their columns; else a row is a text and its label.  A row of more than `row_bytes` bytes is
    rejected and never held.  A damaged file raises DataError, or ends early.
    """
    for index, item in enumerate(inputs):
        own = [number for number, file in enumerate(files) if file.input == index]
        if not own or (own[-1] < start):
            continue
        if item.take is None:
            for number in own:
                if number >= start:
                    yield from _file(number, files[number], item, row_bytes, skip_broken=skip_broken, whole=whole)
        else:
            again = partial(_several, own, files, item, row_bytes, skip_broken=skip_broken, whole=whole)
            yield from _taken(item, own, again, once=any(files[number].once for number in own))


def _several(own: Iterable[int], files: Sequence[File], item: Input, row_bytes: int, *,
             skip_broken: bool, whole: bool) -> Iterator[Block]:
    for number in own:
        yield from _file(number, files[number], item, row_bytes, skip_broken=skip_broken, whole=whole)


def _file(number: int, file: File, item: Input, row_bytes: int, *, skip_broken: bool, whole: bool
          ) -> Iterator[Block]:
    """Yield the numbered blocks of one file and its last, empty one, whose mark covers the whole file."""
    count, broken, mark = 0, "", tables.no_mark
    try:
        cut, mark = _cut(number, file, item, row_bytes, whole)
        for block in cut:
            yield replace(block, number=count)
            count += 1
    except DataError as error:
        if not skip_broken:
            raise
        broken = error.what
    yield Block(number, 0, mark=mark(), number=count, last=True, broken=broken)


def _cut(number: int, file: File, item: Input, row_bytes: int, whole: bool
         ) -> tuple[Iterator[Block], Callable[[], str]]:
    if file.format == "hub":
        return gather(tables.hub(file, item, whole=whole), number, tables.no_mark), tables.no_mark
    if file.format == "parquet":
        mark = tables.parquet_mark(file)
        return gather(tables.parquet(file, item, whole=whole), number, mark), mark
    raw = Raw(file, max_ratio=item.max_ratio, max_bytes=item.max_bytes)
    if file.format == "json":
        if item.encoding.lower() not in UTF8:
            raise ConfigError(_("a json file is UTF-8 by its standard"), where=file.path,
                              fix=_("convert it, or use jsonl"))
        found = tables.elements(raw, row_bytes)
        return gather(tables.questions(found, row_bytes) if whole else found, number, raw.mark), raw.mark
    if file.format == "txt" and item.sample_by == "document":
        return gather(_document(raw, row_bytes), number, raw.mark), raw.mark
    lines = cut_lines(number, raw, row_bytes, bom=item.encoding.lower() in UTF8)
    if file.format == "txt" and item.sample_by == "paragraph":
        return gather(_paragraphs(lines, row_bytes), number, raw.mark), raw.mark
    if file.format in ("csv", "tsv", "conll"):
        return gather(_rows_of(lines, file, item, row_bytes, whole), number, raw.mark), raw.mark
    return lines, raw.mark


def _rows_of(lines: Iterator[Block], file: File, item: Input, row_bytes: int, whole: bool) -> Found:
    """Return the rows of a file of columns; a tsv whose lines are words and tags is read as one of sentences."""
    if not whole:
        if file.format == "conll":
            raise ConfigError(_("a conll file holds words and tags, not texts"), where=file.path,
                              fix=_("leave it out here; fine-tuning for tags reads it"))
        return delimited.table(lines, file, item, row_bytes)
    first = next(lines, None)
    again = lines if first is None else chain((first,), lines)
    words = first is not None and file.format == "tsv" and not item.header and delimited.tagged(first.lines)
    if file.format == "conll" or words:
        return delimited.sentences(again, item, row_bytes)
    return delimited.rows(again, file, item, row_bytes)


def _document(raw: Raw, row_bytes: int) -> Found:
    """Yield the whole file as one row."""
    pieces, size = list[bytes](), 0
    for piece in raw.pieces():
        size += len(piece)
        if size <= row_bytes:
            pieces.append(piece)
        else:
            pieces.clear()
    if size > row_bytes:
        yield too_long(1, size, row_bytes)
    elif size:
        yield Row(1, b"".join(pieces).removeprefix(BOM))


def _paragraphs(lines: Iterator[Block], row_bytes: int) -> Found:
    """Yield runs of lines between blank ones.  A paragraph longer than `row_bytes` is rejected."""
    start, held, size = 1, list[bytes](), 0

    def paragraph() -> Row | Reject:
        return Row(start, b"\n".join(held)) if size <= row_bytes else too_long(start, size, row_bytes)

    for block in lines:
        yield from block.rejects
        for line, _offset, part in split_lines(block):
            if part.strip():
                start = start if size else line
                size += len(part) + 1
                if size <= row_bytes:
                    held.append(part.removesuffix(b"\r"))
                else:
                    held.clear()
            elif size:
                yield paragraph()
                held, size = [], 0
    if size:
        yield paragraph()


def _taken(item: Input, own: Sequence[int], again: Callable[[], Iterator[Block]], *, once: bool) -> Iterator[Block]:
    """Yield blocks with only the rows that `take` asks for: the first ones, or a seeded choice over the whole input."""
    wanted: set[int] | None = None
    take = item.take or 0
    if item.take_seed is not None:
        if once:
            raise ConfigError(_("take_seed needs an input that can be read twice; a pipe cannot"), where=item.path,
                              fix=_("leave take_seed out to take the first rows"))
        total = sum(len(_rows(block)) for block in again())
        choice = chance.generator(item.take_seed, "take").choice(total, min(take, total), replace=False, shuffle=False)
        wanted = set(choice.tolist())
    seen, ended = 0, set[int]()
    for block in again():
        if block.last:
            ended.add(block.file)
            yield block
            continue
        rows = _rows(block)
        chosen = tuple(row for n, row in enumerate(rows, seen) if (n < take if wanted is None else n in wanted))
        seen += len(rows)
        until = chosen[-1].line if chosen and seen >= take else 1 << 62         # what is wrong with rows behind does not matter
        rejects = tuple(one for one in block.rejects if wanted is None and one.line < until)
        yield replace(block, lines=b"", rows=chosen, rejects=rejects)
        if wanted is None and seen >= take:
            break
    yield from (Block(number, 0, number=1 << 40, last=True) for number in own if number not in ended)


def _rows(block: Block) -> list[Row]:
    """Return the rows of a block, leaving blank lines out."""
    return [*block.rows, *(Row(line, part.removesuffix(b"\r")) for line, _offset, part in split_lines(block) if part.strip())]
