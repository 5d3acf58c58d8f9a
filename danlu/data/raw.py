"""The plain bytes of a file, whatever it is packed in, a piece at a time.

Nothing is unpacked faster than it is taken, so that a decompression bomb is stopped and never held.
"""

from __future__ import annotations

import hashlib
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from danlu.data.inputs import MIB, File
from danlu.errors import ConfigError, DataError, SecurityError
from danlu.fault import fault
from danlu.words import _

FLOOR = 64 * MIB                                    # a ratio says nothing about a smaller output
SLICE = 1024                                        # packed bytes fed to zstd at once: at most 32 MiB come out
WINDOW = 1 << 27                                    # bytes of history a zstd frame may ask for
MAGIC: tuple[tuple[bytes, str], ...] = (
    (rb"\x80[\x02-\x05][\x00-\xff]", "pickle"), (rb"\x93NUMPY", "numpy"), (rb"PK\x03\x04", "zip"),
    (rb"\x1f\x8b\x08", "gzip"), (rb"\x28\xb5\x2f\xfd", "zstd"), (rb"PAR1", "parquet"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16"), (rb"BZh[1-9]1AY&SY", "bzip2"), (rb"\xfd7zXZ\x00", "xz"),
)


class Raw:
    """Gives the unpacked bytes of a file in order, and knows what it has read so far."""

    def __init__(self, file: File, *, max_ratio: float, max_bytes: int) -> None:
        self.file, self.max_ratio, self.max_bytes = file, max_ratio, max_bytes
        self.taken = 0                              # bytes read from the file
        self.given = 0                              # bytes handed out
        self.sha256 = hashlib.sha256()              # of the bytes read from the file

    def mark(self) -> str:
        """Return what stands for all bytes read so far: equal marks, equal bytes."""
        return f"{self.taken}:{self.sha256.copy().hexdigest()}"

    def pieces(self) -> Iterator[bytes]:
        """Yield the unpacked bytes in pieces of about 1 MiB.  Raises DataError (broken) and SecurityError (a bomb)."""
        try:
            with opened(self.file) as handle:
                packed = self._packed(handle)
                for piece in UNPACK[self.file.packed](packed, self.file.path):
                    self.given += len(piece)
                    self._check_size()
                    yield piece
        except OSError as error:
            raise DataError(_("the file cannot be read: {why}").format(why=error.strerror or error),
                            where=self.file.path) from error

    def _packed(self, handle: BinaryIO) -> Iterator[bytes]:
        while piece := handle.read(MIB):
            if self.taken == 0:
                check_magic(piece, self.file)
            fault("prepare.read")
            self.taken += len(piece)
            self.sha256.update(piece)
            yield piece

    def _check_size(self) -> None:
        if self.given > self.max_bytes:
            raise SecurityError(_("the file unpacks to more than max_bytes={limit} bytes").format(limit=self.max_bytes),
                                where=self.file.path, fix=_("raise max_bytes of this input if that is right"))
        if self.file.packed and self.given > FLOOR and self.given > self.max_ratio * self.taken:
            raise SecurityError(
                _("the file unpacks to {ratio:.0f} times its size, as decompression bombs do").format(
                    ratio=self.given / self.taken),
                where=self.file.path, fix=_("if it is sound, raise max_ratio={limit:g} of this input").format(
                    limit=self.max_ratio))


def opened(file: File) -> BinaryIO:
    """Return the file, buffered so that read(MIB) gives a whole MiB from a pipe too: equal pieces every time."""
    if file.path == "-" and not file.kept:
        return open(sys.stdin.fileno(), "rb", buffering=MIB, closefd=False)
    return open(file.kept or file.path, "rb", buffering=MIB)


def check_magic(start: bytes, file: File) -> None:
    """Raise when a file is plainly not what its name or format says.  Raises SecurityError for a pickle."""
    found = next((name for pattern, name in MAGIC if re.match(pattern, start[:16], re.DOTALL)), "")
    expected = {"gz": "gzip", "zst": "zstd"}.get(file.packed, "parquet" if file.format == "parquet" else "")
    if found in ("pickle", "numpy"):
        raise SecurityError(_("this is a {kind} file, which can run code when it is loaded").format(kind=found),
                            where=file.path, fix=_("save the text as jsonl, txt or parquet"))
    if found == "UTF-16":
        raise DataError(_("this is UTF-16 text"), where=file.path, fix="iconv -f UTF-16 -t UTF-8")
    if found == "parquet" != expected:                          # "PAR1" may well open a text
        found = ""
    if found != expected:
        raise DataError(_("this is {found}, not {expected}").format(
            found=found or _("something else"), expected=expected or file.format), where=file.path,
            fix=_("unpack it, or give it the name that belongs to it (.gz, .zst, .parquet)"))


def _plain(packed: Iterator[bytes], name: str) -> Iterator[bytes]:
    del name
    return packed


def broken(name: str, why: str) -> DataError:
    """Return the error for a file that ends or breaks where it should not."""
    return DataError(_("the file is damaged or cut short: {why}").format(why=why), where=name,
                     fix=_("fetch it again, or set `on_error: skip` to keep what stands before the damage"))


def _gunzip(packed: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Unpack every member of a gzip file, checking lengths and check sums."""
    member = None
    for piece in packed:
        rest = piece
        while rest:
            if member is None:
                rest = rest.lstrip(b"\0")                       # gzip allows zeros after a member
                member = zlib.decompressobj(wbits=31) if rest else None
                continue
            try:
                out = member.decompress(rest, MIB)
            except zlib.error as error:
                raise broken(name, str(error)) from None
            if out:
                yield out
            rest = member.unused_data if member.eof else member.unconsumed_tail
            member = None if member.eof else member
    if member is not None:
        raise broken(name, _("the end is missing"))


def _unzstd(packed: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Unpack every frame of a zstd file.  The library's own reader takes a cut file for a whole one; this does not."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError(_("reading .zst files needs an extra"), where=name, fix='pip install "danlu[zstd]"') from None
    frame: Any = None
    for piece in packed:
        view = memoryview(piece)
        for start in range(0, len(piece), SLICE):
            rest = bytes(view[start:start + SLICE])
            while rest:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
                try:
                    out = frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise broken(name, str(error)) from None
                if out:
                    yield out
                rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise broken(name, _("the end is missing"))


UNPACK: dict[str, Callable[[Iterator[bytes], str], Iterator[bytes]]] = {"": _plain, "gz": _gunzip, "zst": _unzstd}
