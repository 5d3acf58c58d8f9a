"""Tensors to one safetensors file and back, hashed while they are written.

The safetensors library reads.  Writing is here because its `save_file` neither hashes nor syncs, leaves mode 0600, and
wants every tensor in memory at once; the format is 8 bytes of header length, a JSON header, then the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from danlu.fault import fault

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
PIECE = 1 << 24


class Spec(NamedTuple):
    """What the header says of a tensor before its bytes exist."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


class Written(NamedTuple):
    """A file's size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


def write(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> Written:
    """Write `tensors` (CPU, any layout) to `path`, durable and hashed."""
    specs = [Spec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    return stream(path, specs, (t for t in tensors.values()), metadata=metadata)


def stream(path: Path, specs: Sequence[Spec], tensors: Iterable[Tensor], *,
           metadata: Mapping[str, str] | None = None) -> Written:
    """Write tensors one after the other as they are produced, so that only one need exist at a time.

    Raises OSError when the disk is full, ValueError when a tensor is not what its spec says.
    """
    header = _header(specs, metadata or {})
    digest = hashlib.sha256(header)
    with path.open("wb", buffering=0) as file:
        _write_all(file.write, memoryview(header))
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{spec.name} is {tensor.dtype} {tuple(tensor.shape)}, not {spec.dtype} {spec.shape}")
            data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(data), PIECE):
                _both(digest.update, file.write, data[start : start + PIECE])
            fault("ckpt.mid_shard")
        fault("ckpt.before_fsync")
        os.fsync(file.fileno())
    return Written(len(header) + sum(spec.bytes for spec in specs), digest.hexdigest())


def _header(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for spec in specs:
        entries[spec.name] = {"dtype": NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, start + spec.bytes]}
        start += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _both(hash_: Callable[[memoryview], None], write_: Callable[[memoryview], int], piece: memoryview) -> None:
    """Hash and write the same bytes at once: both release the interpreter's lock."""
    if len(piece) < 1 << 20:
        hash_(piece)
        _write_all(write_, piece)
        return
    hashing = threading.Thread(target=hash_, args=(piece,))
    hashing.start()
    try:
        _write_all(write_, piece)
    finally:
        hashing.join()


def _write_all(write_: Callable[[memoryview], int], piece: memoryview) -> None:
    while piece:
        piece = piece[write_(piece):]
