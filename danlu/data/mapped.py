"""NumPy arrays to one safetensors file, and back as views of the mapped file: nothing is read before it is used.

The header is read here, strictly: a file that is shorter, longer or otherwise than its header says is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from danlu import files
from danlu.errors import DataError, ResourceError
from danlu.fault import fault
from danlu.words import _

DTYPES = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}
NAMES = {np.dtype(numpy): name for name, numpy in DTYPES.items()}
MOST_HEADER = 1 << 20
PIECE = 1 << 22


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[int, str]:
    """Write `arrays` to `path`, whole or not at all, and durable; return the file's size and SHA-256.

    Wide elements come first, so that every array is aligned.  Raises ResourceError when the disk is full.
    """
    order = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    header, start = {}, 0
    for name in order:
        array = arrays[name]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape),
                        "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for data in (memoryview(head), *(_bytes(arrays[name]) for name in order)):
                for begin in range(0, len(data), PIECE):
                    digest.update(data[begin : begin + PIECE])
                    file.write(data[begin : begin + PIECE])
            fault("shards.before_fsync")
            file.flush()
            os.fsync(file.fileno())
        fault("shards.before_rename")
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise ResourceError(
                _("{size:.1f} MB cannot be written: {why}").format(size=(len(head) + start) / 1e6, why=error.strerror),
                where=str(path), fix=_("free some space, or choose another `out`")) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    files.fsync_dir(path.parent)
    return len(head) + start, digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def read(path: Path, size: int) -> dict[str, np.ndarray]:
    """Return read-only views of the arrays in the file at `path`, which must have `size` bytes.

    Raises DataError that names the file when it is not what it claims to be.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size or found < 8:
                raise _broken(path, _("it has {found} bytes instead of {size}").format(found=found, size=size))
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from None
    length = int.from_bytes(memory[:8], "little")
    if length > min(MOST_HEADER, size - 8):
        raise _broken(path, _("its header says that it has {n} bytes").format(n=length))
    try:
        header = json.loads(memory[8 : 8 + length].decode(), object_pairs_hook=_no_twins)
    except ValueError as error:
        raise _broken(path, _("its header cannot be read: {why}").format(why=error)) from None
    return _views(path, memory, header, 8 + length)


def _views(path: Path, memory: mmap.mmap, header: Any, base: int) -> dict[str, np.ndarray]:
    if not isinstance(header, dict):
        raise _broken(path, _("its header is not a table"))
    entries, arrays, reached = {k: v for k, v in header.items() if k != "__metadata__"}, {}, 0
    if not all(isinstance(entry, dict) for entry in entries.values()):
        raise _broken(path, _("its header is not a table"))
    spans = {name: _whole(entry.get("data_offsets")) for name, entry in entries.items()}
    for name, entry in sorted(entries.items(), key=lambda item: spans[item[0]] or []):
        span, shape, dtype = spans[name], _whole(entry.get("shape")), DTYPES.get(str(entry.get("dtype")))
        if span is None or len(span) != 2 or shape is None or dtype is None:
            raise _broken(path, _("its header misdescribes {name!r}").format(name=name))
        count = int(np.prod(shape, dtype=object))
        if span[0] != reached or span[1] - span[0] != count * np.dtype(dtype).itemsize or base + span[1] > len(memory):
            raise _broken(path, _("{name!r} does not lie where its header says").format(name=name))
        arrays[name] = np.frombuffer(memory, dtype, count, base + span[0]).reshape(shape)
        reached = span[1]
    if base + reached != len(memory):
        raise _broken(path, _("{n} bytes belong to no array").format(n=len(memory) - base - reached))
    return arrays


def _whole(value: Any) -> list[int] | None:
    """Return a list of whole numbers of at least 0, or None for anything else."""
    good = isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)
    return value if good else None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _value in pairs}) != len(pairs):
        raise ValueError(_("a name stands twice"))
    return dict(pairs)


def _broken(path: Path, why: str) -> DataError:
    return DataError(_("the file is damaged: {why}").format(why=why), where=str(path),
                     fix=_("delete the folder and run `danlu prepare` again"))
