"""From a block to its records: decoded strictly, checked, and the rest rejected with a reason, a line and a place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from danlu.data.blocks import Block, Reject, split_lines, too_long, undecodable
from danlu.data.inputs import Input

JSON = ("jsonl", "json")


@dataclass
class Parsed:
    """The records of a block, column by column; `labels` is empty when the input has none."""

    lines: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    blank: int = 0


class _NotANumber(ValueError):
    pass


def _refuse(name: str) -> NoReturn:
    raise _NotANumber(name)


def parse(block: Block, format: str, item: Input, *, row_bytes: int) -> Parsed:
    """Return the records of a block, in order.  Every row is a record, a reject or blank; none vanishes."""
    out = Parsed(rejects=list(block.rejects), blank=block.blank)
    decode = json.JSONDecoder(parse_constant=_refuse).decode
    for line, text, mark in _decoded(block, format, item, row_bytes, out.rejects):
        value, label = text, mark
        if isinstance(text, str) and (not text or text.isspace()) and format in ("txt", "jsonl"):
            out.blank += 1
            continue
        if format in JSON:
            value, label, fault = _json(decode, text, item)
            if fault:
                out.rejects.append(Reject(line, *fault))
                continue
        reason = _check(value, label, item)
        if reason is not None:
            out.rejects.append(Reject(line, *reason))
            continue
        out.lines.append(line)
        out.texts.append(value)
        if item.label is not None:
            out.labels.append(label_name(label))
    out.rejects.sort(key=lambda reject: reject.line)
    return out


def _decoded(block: Block, format: str, item: Input, row_bytes: int, rejects: list[Reject]
             ) -> Iterator[tuple[int, Any, Any]]:
    """Yield (line, text, label); a block of lines is decoded at once, and line by line only where that fails."""
    encoding = "utf-8" if format in ("parquet", "json", "hub") else item.encoding
    for row in block.rows:
        size = len(row.text) if isinstance(row.text, str | bytes) else 0
        if size > row_bytes:
            rejects.append(too_long(row.line, size, row_bytes))
        elif isinstance(row.text, bytes):
            try:
                yield row.line, row.text.decode(encoding), row.label
            except UnicodeDecodeError as error:
                rejects.append(undecodable(row.line, 0, error)._replace(
                    detail=f"byte 0x{row.text[error.start]:02x} at offset {error.start} of the row is not {encoding}"))
        else:
            yield row.line, row.text, row.label
    if len(block.lines) <= row_bytes:
        try:
            text = block.lines.decode(encoding)
        except UnicodeDecodeError:
            text = ""
        if text:
            for line, part in enumerate(text.removesuffix("\n").split("\n"), block.line):
                yield line, part.removesuffix("\r"), None
            return
    for line, offset, data in split_lines(block):
        if len(data) > row_bytes:
            rejects.append(too_long(line, len(data), row_bytes))
            continue
        try:
            part = data.decode(encoding)
        except UnicodeDecodeError as error:
            rejects.append(undecodable(line, offset, error))
        else:
            yield line, part.removesuffix("\r"), None


def _json(decode: Any, text: str, item: Input) -> tuple[Any, Any, tuple[str, str] | None]:
    """Return (text, label, None) of one JSON object, or what is wrong with it as (reason, detail)."""
    value, wrong = _object(decode, text)
    if wrong:
        return None, None, wrong
    for name in (item.text, item.label):
        if name is not None and name not in value:
            return None, None, ("no_column", f"no {name!r}; there are {', '.join(list(value)[:8])}")
    named: dict[Any, Any] = value
    return named[item.text], None if item.label is None else named[item.label], None


def _object(decode: Any, text: str) -> tuple[dict[str, Any], tuple[str, str] | None]:
    try:
        value = decode(text)
    except _NotANumber as error:
        return {}, ("not_a_number", f"{error} is not JSON")
    except RecursionError:
        return {}, ("json", "nested too deep")
    except ValueError as error:
        return {}, ("json", str(error))
    return (value, None) if isinstance(value, dict) else ({}, ("not_object", f"a JSON {type(value).__name__}, not an object"))


def wholes(block: Block, format: str, item: Input, *, row_bytes: int
           ) -> tuple[list[tuple[int, dict[str, Any], int]], list[Reject]]:
    """Return the whole rows of a block as (line, columns, bytes), in order, and its rejects.  Blank lines are neither."""
    found, rejects = list[tuple[int, dict[str, Any], int]](), list(block.rejects)
    decode = json.JSONDecoder(parse_constant=_refuse).decode
    sizes = {row.line: row.bytes for row in block.rows}
    for line, value, _label in _decoded(block, format, item, row_bytes, rejects):
        row, wrong, size = value, None, sizes.get(line, 0)
        if isinstance(value, str):
            if not value or value.isspace():
                continue
            row, wrong = _object(decode, value) if format in JSON else ({"text": value}, None)
            size = len(value) if value.isascii() else len(value.encode())
        wrong = wrong or (("row_bytes", too_long(line, size, row_bytes).detail) if size > row_bytes else None)
        plain = isinstance(value, str) and format in JSON and "\\u" not in value and "\0" not in value
        wrong = wrong or (None if plain else _unsound(row))
        if wrong:
            rejects.append(Reject(line, *wrong))
        else:
            found.append((line, row, size))
    return found, sorted(rejects, key=lambda reject: reject.line)


def _unsound(value: Any) -> tuple[str, str] | None:
    """Return what is wrong with a text somewhere in a row: it holds NUL or is not valid Unicode."""
    if isinstance(value, str):
        return _text_fault(value)
    inner = value.items() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((wrong for one in inner if (wrong := _unsound(one))), None)


def _check(text: Any, label: Any, item: Input) -> tuple[str, str] | None:
    """Return what is wrong with a record as (reason, detail), or None."""
    if not isinstance(text, str):
        return "not_text", f"{item.text!r} is {type(text).__name__}, not text"
    wrong = _text_fault(text)
    if wrong or item.label is None:
        return wrong
    finite = not isinstance(label, float) or math.isfinite(label)
    if not isinstance(label, str | int | float) or not finite or label == "":
        return "label", f"label {label!r} is neither a name nor a number"
    try:
        str(label).encode()
    except UnicodeEncodeError:
        return "label", "the label holds a lone surrogate"
    return None


def _text_fault(text: str) -> tuple[str, str] | None:
    if "\0" in text:
        return "nul", f"NUL at character {text.index(chr(0))}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return "surrogate", f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
    return None


def label_name(label: str | int | float) -> str:
    """Return the name of a class: 1, 1.0, "1" and true, "true" are each one class."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)
