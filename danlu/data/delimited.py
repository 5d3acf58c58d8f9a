"""Rows out of lines: csv and tsv with or without a header, and words with their tags, a sentence after another."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from danlu.data.blocks import Block, Found, Reject, Row, split_lines, too_long, undecodable
from danlu.data.inputs import File, Input
from danlu.errors import DataError
from danlu.words import _

FIRST = 64                                          # rows that are looked at to tell a header from a row
NAME = re.compile(r"[^\W\d][\w .:/()\[\]-]{0,31}")   # what a column may be called; a sentence is longer
LANGUAGE = re.compile(rb"[a-z]{2,3}(-[a-z]+)?:")
SEPARATES = re.compile(rb"-DOCSTART-|# ?(id|sent_id|text|newdoc|newpar)\b")
BIO = re.compile(rb"O|[BIESLUM][-_]\S+")
COLUMNS = frozenset((
    "text", "text_a", "text_b", "label", "labels", "sentence", "sentence1", "sentence2", "premise", "hypothesis",
    "question", "question1", "question2", "answer", "answers", "context", "score", "tokens", "tags", "ner_tags", "idx",
    "id", "review", "content", "instruction", "input", "output", "query", "response", "prompt", "completion", "anchor",
    "target", "category", "class", "sentiment", "title",
    "文本", "标签", "类别", "内容", "评论", "问题", "答案"))


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


Fields = tuple[int, list[str]]                      # line where the row starts, its fields


def _fields(blocks: Iterator[Block], file: File, item: Input, row_bytes: int) -> Iterator[Fields | Reject]:
    """Yield what the rows of a csv or tsv file hold; a blank line gives no fields.

    Strict: text after a closing quotation mark is a fault, for it means that a stray mark has swallowed rows.
    """
    quote = item.quote if item.quote is not None else '"' if file.format == "csv" else ""
    csv.field_size_limit(row_bytes)                 # the module keeps one limit for the process
    lines = _Lines(blocks, item.encoding)
    reader = csv.reader(lines, delimiter=item.delimiter or ("," if file.format == "csv" else "\t"), strict=True,
                        quotechar=quote or None, quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE)
    while True:
        start = lines.line + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except _Refused as refused:
            yield refused.reject
        except csv.Error as error:
            yield Reject(start, "row_bytes" if "field limit" in str(error) else "csv", str(error))
        else:
            yield start, fields


def _blank(fields: Sequence[str], width: int) -> bool:
    return not fields or (len(fields) == 1 != width and not fields[0].strip())


def table(blocks: Iterator[Block], file: File, item: Input, row_bytes: int) -> Found:
    """Yield the text and the label of the rows of a csv or tsv file.

    The header must name the columns wanted; ragged rows are rejected.
    """
    headed = item.header is not False
    names, text, label = list[str](), 0, None
    for one in _fields(blocks, file, item, row_bytes):
        if isinstance(one, Reject):
            yield one
            continue
        start, fields = one
        if _blank(fields, len(names)):
            yield None
        elif not names:
            names = fields if headed else [str(index) for index in range(len(fields))]
            text = column(item.text, names, f"{file.path}:{start}")
            label = None if item.label is None else column(item.label, names, f"{file.path}:{start}")
            if not headed:
                yield Row(start, fields[text], None if label is None else fields[label])
        elif len(fields) != len(names):
            yield _ragged(start, fields, names)
        else:
            yield Row(start, fields[text], None if label is None else fields[label])


def _ragged(start: int, fields: Sequence[str], names: Sequence[str]) -> Reject:
    return Reject(start, "columns", f"{len(fields)} columns instead of {len(names)}")


def rows(blocks: Iterator[Block], file: File, item: Input, row_bytes: int) -> Found:
    """Yield whole rows {column: text}.  Columns without a header are named "0", "1", …

    When `header` is left open, the first rows decide (see `headed`).
    """
    found = _fields(blocks, file, item, row_bytes)
    first = list(islice(found, FIRST))
    sample = [one[1] for one in first if not isinstance(one, Reject) and not _blank(one[1], 0)]
    top = item.header if item.header is not None else bool(sample) and headed(sample)
    names = list[str]()
    for one in chain(first, found):
        if isinstance(one, Reject):
            yield one
            continue
        start, fields = one
        if _blank(fields, len(names)):
            yield None
            continue
        if not names:
            names = [name.strip() for name in fields] if top else [str(index) for index in range(len(fields))]
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(_("two columns are named {name!r}").format(name=twice[0]), where=f"{file.path}:{start}",
                                fix=_("name each column once, or set `header: false` if this is the first row"))
            if top:
                continue
        size = sum(len(field.encode()) for field in fields)
        if len(fields) != len(names):
            yield _ragged(start, fields, names)
        elif size > row_bytes:
            yield too_long(start, size, row_bytes)
        else:
            yield Row(start, dict(zip(names, fields, strict=True)), bytes=size)


def headed(sample: Sequence[Sequence[str]]) -> bool:
    """Say whether the first of these rows names the columns.

    It does not if it holds a number, an empty field, one text twice or a long text, nor if a value of it stands in the
    same column again (a class, say).  It does if a name in it is one that data sets use; else if all look like names.
    A column of numbers in front may have no name.
    """
    first, rest = [field.strip() for field in sample[0]], sample[1:]
    if not first[0] and len(first) > 1 and rest and all(row[0].isdigit() for row in rest):
        return headed([row[1:] for row in sample])       # pandas writes its index below no name
    if len(set(first)) < len(first) or any(not field or len(field) > 64 or _number(field) for field in first):
        return False
    if any(row[place].strip() == field for row in rest for place, field in enumerate(first) if place < len(row)):
        return False
    return any(field.lower() in COLUMNS for field in first) or all(NAME.fullmatch(field) for field in first)


def _number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def sentences(blocks: Iterator[Block], item: Input, row_bytes: int) -> Found:
    """Yield {"tokens": […], "tags": […]} from one word and its tag a line, with a blank line after each sentence.

    The word is the first column, the tag the last.  Lines that only separate (-DOCSTART-, `# id …`) are not words.  A
    language before every word of the first block (`en:word`, as WikiANN has it) is not part of the words.
    """
    head = next(blocks, None)
    if head is None:
        return
    between = item.delimiter or ("\t" if b"\t" in head.lines else None)
    language = _language(head.lines)
    start, words, tags, size, fault = 0, list[str](), list[str](), 0, None
    last = Block(head.file, 0, lines=b"\n")         # ends the last sentence
    for block in chain((head,), blocks, (last,)):
        for reject in block.rejects:
            fault, start = fault or reject, start or reject.line
        for line, offset, part in split_lines(block):
            if not part.strip() or SEPARATES.match(part):
                if fault or words:
                    yield fault or Row(start, {"tokens": words, "tags": tags}, bytes=size)
                start, words, tags, size, fault = 0, [], [], 0, None
                continue
            start, size = start or line, size + len(part)
            if size > row_bytes:
                words, tags, fault = [], [], fault or too_long(start, size, row_bytes)
            if fault:
                continue
            try:
                fields = part.decode(item.encoding).rstrip("\r\n").split(between)
            except UnicodeDecodeError as error:
                fault = undecodable(line, offset, error)
                continue
            if len(fields) < 2:
                fault = Reject(line, "columns", "a word without a tag")
            else:
                words.append(fields[0].removeprefix(language))
                tags.append(fields[-1].strip())


def _language(lines: bytes) -> str:
    """Return the language that stands before every word, with its colon, or ""."""
    found = {match[0] if (match := LANGUAGE.match(line)) else b"" for line in lines.split(b"\n")[:-1] if line.strip()}
    return found.pop().decode() if len(found) == 1 else ""


def tagged(lines: bytes) -> bool:
    """Say whether lines look like words with tags: blank lines between groups of rows of a word and a short mark."""
    sample = lines[:lines.rfind(b"\n") + 1].strip().replace(b"\r", b"").split(b"\n")
    full = [line.split(b"\t") for line in sample if line.strip()]
    marks = [fields[-1] for fields in full]
    return (len(full) < len(sample) and len({len(fields) for fields in full}) == 1 and len(full[0]) > 1
            and not any(b" " in fields[0].strip() or b" " in fields[-1] for fields in full)
            and (all(BIO.fullmatch(mark) for mark in marks)
                 or (max(map(len, marks)) <= 24 and len(set(marks)) <= max(2, len(marks) // 2))))
