"""What several processes write together and any number can read: parts of tensors in safetensors files, without pickle.

PyTorch's DCP writes, every process its own parts and of copies one; a file's header says where its parts lie in the
whole tensors.  Reading takes no more of the files than is asked for, and no other process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from danlu import files, tensorfile
from danlu.errors import DanluError, DataError, IncompatibleError, ResourceError
from danlu.nn import placed
from danlu.words import _

T = TypeVar("T")
FILE_BYTES = 1 << 30                                     # of a file, about; DCP holds the bytes of one in memory
PLACES = "DCP_SHARDING_INFO"                             # in a file's header: where each of its tensors begins in the whole


class Crew:
    """The processes that save together.  No group: this process alone, and nothing is waited for.

    Whatever fails in one fails in all, so that none waits for another that has given up.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` gave in each process, in order."""
        if self.group is None:
            return [work()]
        mine: list[T] = []
        error: BaseException | None = None
        try:
            mine.append(work())
        except BaseException as caught:                  # raised below, when the others know
            error = caught
        told: list[tuple[list[T], str]] = [([], "")] * self.size
        dist.all_gather_object(told, (mine, "" if error is None else _words(error)), group=self.group)
        failed = {rank: why for rank, (_result, why) in enumerate(told) if why}
        if error is not None and (isinstance(error, DanluError) or not isinstance(error, Exception)):
            raise error
        if failed:
            raise _failure(failed) from error
        return [result for each, _why in told for result in each]

    def first(self, work: Callable[[], T]) -> T:
        """Return what `work` gave in the first process, which alone does it."""
        return self.all(lambda: [work()] if self.main else [])[0][0]


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _failure(failed: Mapping[int, str]) -> ResourceError:
    rank, why = min(failed.items())
    return ResourceError(_("process {rank}: {why}").format(rank=rank, why=why))


def wrap(whole: Tensor, part: Tensor) -> Tensor:
    """Return `part` as what this process holds of a tensor placed like `whole`; a number (0 dimensions) as it is."""
    if not placed.is_part(whole) or placed.is_part(part):
        return part
    if part.shape != placed.local(whole).shape:
        if part.ndim and placed.cuts(whole) > 1:
            raise IncompatibleError(_("a state of shape {shape} cannot be put together from parts of {whole}").format(
                shape=tuple(part.shape), whole=tuple(whole.shape)))
        return part
    return placed.like(whole, part)


def sizes(tensors: Mapping[str, Tensor], crew: Crew) -> dict[str, int]:
    """Return the bytes of every tensor, as a whole, of which some process holds a part."""
    held = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    return {name: size for each in crew.all(lambda: held) for name, size in each.items()}


def write(folder: Path, tensors: Mapping[str, Tensor], crew: Crew) -> dict[str, tensorfile.Written]:
    """Write `tensors` (DTensor, or plain and equal in all processes that have them) into `folder`, each process its part.

    Returns size and hash of every file.  ResourceError in all processes when it fails in one.
    """
    import torch.distributed.checkpoint as dcp  # takes long, and a process that is alone never needs it
    from torch.distributed.checkpoint.api import CheckpointException

    whole = sizes(tensors, crew)
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_divided(whole, FILE_BYTES * crew.size) or None,
                                          save_distributed=True, thread_count=1)    # of more, DCP loses the errors
    writer.per_thread_copy_ahead = 0                     # else DCP takes this thread's GPU, which may be another's
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=crew.group)
    except CheckpointException as error:
        failed = {rank: _words(cause) for rank, (cause, _trace) in error.failures.items()}
        raise _failure(failed) from error
    records = {name: record for each in crew.all(lambda: _hashed(folder, crew.rank)) for name, record in each.items()}
    crew.first(lambda: Parts(folder).check(whole))
    crew.first(lambda: files.fsync_dir(folder))
    return records


def _hashed(folder: Path, rank: int) -> dict[str, tensorfile.Written]:
    return {p.name: tensorfile.Written(p.stat().st_size, files.sha256(p))
            for p in folder.glob(f"shard-{rank + 1:05}-*.safetensors")}


def _divided(whole: Mapping[str, int], most: int) -> dict[str, int]:
    """Return the number of the file, from 1, that each tensor's parts go to."""
    number, filled, numbers = 1, 0, {}
    for name, size in sorted(whole.items()):
        if filled and filled + size > most:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers


class _Piece(NamedTuple):
    """A part of a tensor and where it begins in the whole."""

    offset: tuple[int, ...]
    tensor: Tensor


class Parts(Mapping[str, Tensor]):
    """The tensors of safetensors files, in which each may lie in several parts.  A tensor is put together when asked for.

    source: a file, or a folder of them.  Raises DataError where the files are damaged or a part is missing.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.pieces: dict[str, list[_Piece]] = {}
        for path in sorted(source.glob("*.safetensors")) if source.is_dir() else [source]:
            try:
                for name, piece in _pieces(path):
                    self.pieces.setdefault(name, []).append(piece)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path)) from None
        self.like = {name: _like(pieces) for name, pieces in self.pieces.items()}     # on the meta device

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def __contains__(self, name: object) -> bool:
        return name in self.pieces

    def __getitem__(self, name: str) -> Tensor:
        shape = tuple(self.like[name].shape)
        return self.part(name, (0,) * len(shape), shape)

    def part(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the part of a tensor that begins at `offset`; a view of the file where it lies in one piece."""
        out, filled = None, 0
        for piece in self.pieces[name]:
            low = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, piece.offset, piece.tensor.shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            found = piece.tensor[_slices(low, high, piece.offset)]
            if found.shape == tuple(shape):
                return found
            out = torch.empty(*shape, dtype=found.dtype) if out is None else out
            out[_slices(low, high, offset)] = found
            filled += found.numel()
        if filled != math.prod(shape):
            raise DataError(_("a part of {name} is missing").format(name=name), where=str(self.source))
        return torch.empty(*shape, dtype=self.like[name].dtype) if out is None else out

    def check(self, wanted: Mapping[str, int]) -> None:
        """Raise DataError unless every tensor of `wanted` is there with all its bytes.  Reads only headers."""
        for name, size in wanted.items():
            if size != sum(piece.tensor.numel() * piece.tensor.element_size() for piece in self.pieces.get(name, ())):
                raise DataError(_("a part of {name} is missing").format(name=name), where=str(self.source))


def _pieces(path: Path) -> Iterable[tuple[str, _Piece]]:
    """Yield the parts that a file holds; a tensor of a file without places is whole.  They are mapped, not read."""
    with safe_open(path, framework="pt") as file:
        places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            offset = tuple(int(n) for n in places[name]["saved_offsets"]) if places else (0,) * tensor.ndim
            if len(offset) != tensor.ndim or any(n < 0 for n in offset):
                raise ValueError(f"{name} at {offset}")
            yield name, _Piece(offset, tensor)


def _slices(low: Sequence[int], high: Sequence[int], begin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))


def _like(pieces: Sequence[_Piece]) -> Tensor:
    """Return a tensor of the whole's shape on the meta device."""
    ends = [[o + n for o, n in zip(piece.offset, piece.tensor.shape, strict=True)] for piece in pieces]
    return torch.empty([max(end) for end in zip(*ends, strict=True)], dtype=pieces[0].tensor.dtype, device="meta")
