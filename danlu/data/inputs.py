"""What to read: an input as the user names it, and the files it stands for."""

from __future__ import annotations

import codecs
import glob
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from danlu.config import Model
from danlu.errors import ConfigError, DataError, SecurityError
from danlu.words import _

Format = Literal["auto", "txt", "jsonl", "json", "csv", "tsv", "conll", "parquet"]
SUFFIXES = {
    ".txt": "txt", ".text": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv",
    ".tsv": "tsv", ".conll": "conll", ".parquet": "parquet",
}
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
HUB = "hf://"
MIB = 1 << 20
ROW_BYTES = 16 * MIB


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _several(value: Any) -> Any:
    if isinstance(value, str | dict | Input):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class Input(Model):
    """One thing to read: a file, a folder, a pattern, `-` for standard input, or `hf://owner/name`."""

    path: str = Field(min_length=1, description="File, folder, pattern, `-` or hf://name; `#500` takes 500 rows.")
    format: Format = Field(default="auto", description="Format of the files; auto goes by their names.")
    encoding: str = Field(
        default="utf-8", description="Encoding of the text, for example gb18030; it is never guessed.")
    sample_by: Literal["line", "paragraph", "document"] = Field(
        default="line", description="What one document is in a txt file: a line, a paragraph or the whole file.")
    text: str | int = Field(
        default="text", description="Column of the text: its name, or its index from 0 in csv and tsv.")
    label: str | int | None = Field(default=None, description="Column of the class, if the rows have one.")
    split: Literal["train", "val", "test"] | None = Field(
        default=None, description="Split that all rows of this input go to, whatever `split` says.")
    header: bool | None = Field(
        default=None, description="Whether the first row of csv and tsv files names the columns; null: fine-tuning looks, "
        "`prepare` takes it for granted.")
    delimiter: str | None = Field(
        default=None, min_length=1, max_length=1, description="Between csv columns; comma or tab.")
    quote: str | None = Field(
        default=None, max_length=1, description='Quotation mark of columns; default: " in csv, none ("") in tsv.')
    take: int | None = Field(default=None, ge=1, description="Take only so many rows.")
    take_seed: int | None = Field(
        default=None, ge=0, description="Take them at random over the whole input by this seed; null: the first ones.")
    max_ratio: float = Field(
        default=200.0, gt=1, allow_inf_nan=False,
        description="Refuse a file that unpacks to more than this many times its size.")
    max_bytes: int = Field(default=2**40, ge=1, description="Refuse a file that unpacks to more bytes than this.")
    subset: str | None = Field(default=None, description="Configuration of a hub data set.")
    hub_split: str = Field(default="train", description="Split of a hub data set that is read.")

    @model_validator(mode="after")
    def _fits(self) -> Input:
        try:
            info = codecs.lookup(self.encoding)
            plain = "a\n,\t\"{".encode(self.encoding).removeprefix(codecs.BOM_UTF8) == b"a\n,\t\"{"
        except (LookupError, UnicodeError, TypeError):
            raise ValueError(_("encoding={name!r} is not known; use utf-8, gb18030, big5, latin-1 …").format(
                name=self.encoding)) from None
        if not plain or info.name in ("utf-7", "hz") or info.name.startswith("iso2022"):
            raise ValueError(_("encoding={name!r} hides line ends; convert the file first: iconv -f {name} -t UTF-8")
                             .format(name=self.encoding))
        if self.take_seed is not None and self.path == "-":
            raise ValueError(_("take_seed needs an input that can be read twice; standard input cannot"))
        return self


OneInput = Annotated[Input, BeforeValidator(_path_alone)]
Inputs = Annotated[tuple[OneInput, ...], BeforeValidator(_several), Field(min_length=1)]


class Record(NamedTuple):
    """One document as it stands in the file."""

    text: str
    file: str
    line: int                                       # from 1: the line where it starts, or the record's number
    label: str | None
    split: str | None
    bytes: int                                      # UTF-8 size of the text


@dataclass(frozen=True)
class File:
    """One file of an input.  `path` is as the user would write it; size and time are None for a stream or a hub set."""

    input: int
    path: str
    format: str
    packed: str = ""                                # "", "gz" or "zst"
    size: int | None = None
    mtime: int | None = None
    kept: str = ""                                  # a copy that can be read again, of a file that cannot

    @property
    def once(self) -> bool:
        """Say whether the file can be read only once, from its start."""
        return self.size is None and not self.path.startswith(HUB)


def split_take(item: Input) -> Input:
    """Return `item` with a `#500` at the end of its path moved to `take`; a file of that very name wins."""
    match = re.fullmatch(r"(.+)#([1-9]\d*)", item.path)
    if match is None or item.take is not None or os.path.lexists(item.path):
        return item
    return item.model_copy(update={"path": match[1], "take": int(match[2])})


def resolve(inputs: Iterable[Input]) -> list[File]:
    """Return every file that the inputs stand for, in the order of the inputs, then of the names.

    Raises DataError for a name that leads to nothing, SecurityError for a pickle, ConfigError for a stray take_seed.
    """
    found = [file for number, item in enumerate(inputs) for file in _files(number, split_take(item))]
    if sum(file.path == "-" for file in found) > 1:
        raise DataError(_("standard input can be read by one input only"), where="-", fix=_("name it once"))
    return found


def _files(number: int, item: Input) -> list[File]:
    if item.take is None and item.take_seed is not None:
        raise ConfigError(_("take_seed says how to take rows, but not how many"), where=item.path, fix=_("set `take`"))
    if item.path == "-":
        if item.format == "auto":
            raise DataError(_("standard input has no name to tell its format"), where="-",
                            fix=_("set `format: jsonl` or another"))
        return [File(number, "-", item.format)]
    if item.path.startswith(HUB):
        return [File(number, item.path, "hub")]
    if os.path.lexists(item.path):
        names = _folder(item.path, item.format) if os.path.isdir(item.path) else [item.path]
    elif glob.has_magic(item.path):
        names = [name for name in sorted(glob.glob(item.path, recursive=True)) if not os.path.isdir(name)]
        if not names:
            raise DataError(_("no file matches this pattern"), where=item.path,
                            fix=_("check the folder and the pattern"))
    else:
        raise DataError(_("there is no such file"), where=item.path,
                        fix=_("check the path; it is taken from the current folder"))
    return [_file(number, name, item.format) for name in names]


def _folder(folder: str, format: str) -> list[str]:
    """Return the files below a folder whose names show the format (any known one if `auto`), sorted."""
    names = []
    for root, folders, inner in os.walk(folder):                # links to folders are not followed: no loops
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [os.path.join(root, name) for name in inner if not name.startswith(".")]
    chosen = sorted(name for name in names if kind(name)[0] in SUFFIXES.values() and format in ("auto", kind(name)[0]))
    if not chosen and format != "auto":
        chosen = sorted(name for name in names if not kind(name)[0] and not name.endswith(PICKLED))
    if not chosen:
        raise DataError(_("the folder holds no file of a known format ({known})").format(known=" ".join(SUFFIXES)),
                        where=folder, fix=_("set `format`, or name the files"))
    return chosen


def kind(name: str) -> tuple[str, str]:
    """Return (format, packing) as a file's name shows them; "" where it does not."""
    stem, packed = name.lower(), ""
    for suffix in ("gz", "zst"):
        if stem.endswith(f".{suffix}"):
            stem, packed = stem[: -len(suffix) - 1], suffix
    return SUFFIXES.get(os.path.splitext(stem)[1], ""), packed


def _file(number: int, name: str, format: str) -> File:
    shown, packed = kind(name)
    if name.lower().endswith(PICKLED):
        raise SecurityError(_("a pickle or array file can run code when it is loaded; it is never read as data"),
                            where=name, fix=_("save the text as jsonl, txt or parquet"))
    try:
        status = os.stat(name)
    except OSError as error:
        raise DataError(_("the file cannot be opened: {why}").format(why=error.strerror), where=name,
                        fix=_("check the link and the permissions")) from None
    if format == "auto" and not shown:
        raise DataError(_("the name does not show the format"), where=name,
                        fix=_("set `format` to one of {known}").format(known=", ".join(sorted(set(SUFFIXES.values())))))
    chosen = shown if format == "auto" else format
    if stat.S_ISFIFO(status.st_mode):
        return File(number, name, chosen, packed)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(_("this is neither a file, a folder nor a pipe"), where=name, fix=_("name a regular file"))
    return File(number, name, chosen, packed, status.st_size, status.st_mtime_ns)
