"""What a computation on fake tensors would hold and send: bytes alive and at the peak, collectives by axis, FLOPs."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from danlu.parallel import old_objects_apart

KINDS = {"all_reduce": "all-reduce", "allreduce": "all-reduce", "all_gather": "all-gather", "allgather": "all-gather",
         "reduce_scatter": "reduce-scatter", "broadcast": "broadcast", "all_to_all": "all-to-all", "alltoall": "all-to-all"}
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
QUIET = ("wait_tensor", "barrier")                       # they move nothing
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}
KERNEL = 600_000                                         # bytes of what oneDNN keeps of a product: 194 took 116 MB


class Kind(NamedTuple):
    """A collective: among which processes, and which."""

    axis: str
    name: str


class Traffic:
    """How many collectives of each kind, and their bytes: the whole tensor's, as one process sees it before or after."""

    def __init__(self) -> None:
        self.counts: Counter[Kind] = Counter()
        self.bytes: Counter[Kind] = Counter()

    def add(self, kind: Kind, size: int, times: int = 1) -> None:
        """Count `times` collectives of `size` bytes."""
        if times:
            self.counts[kind] += times
            self.bytes[kind] += times * size

    def more(self, other: Traffic, times: int = 1) -> Traffic:
        """Count another's, `times` over; return itself."""
        for kind, count in other.counts.items():
            self.counts[kind] += times * count
            self.bytes[kind] += times * other.bytes[kind]
        return self

    def of(self, axis: str, name: str) -> Traffic:
        """Return those of one kind."""
        kind, made = Kind(axis, name), Traffic()
        if kind in self.counts:
            made.counts[kind], made.bytes[kind] = self.counts[kind], self.bytes[kind]
        return made

    def record(self) -> list[dict[str, Any]]:
        """Return JSON-ready values, the most bytes first."""
        return [{"axis": kind.axis, "kind": kind.name, "count": self.counts[kind], "bytes": size}
                for kind, size in self.bytes.most_common() if self.counts[kind]]


class Event(NamedTuple):
    """A storage that begins (`size` > 0) or ends (0); a phase that begins, if it has a name; bytes of a file that is mapped;
    bytes of code that is made and stays."""

    key: int = 0
    size: int = 0
    phase: str = ""
    mapped: int | None = None
    code: int = 0


class Ledger(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end.  Use it inside `fake`.

    log: where every beginning and end is written down, in order, if it is asked for; then a number that a computation asks
    for is 1, so that it runs to its end.
    """

    def __init__(self, fake: FakeTensorMode | None, axes: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        """fake: whose tensors count, real ones without it; axes, sizes: of each process group, by its name."""
        super().__init__()
        self.fake, self.axes, self.sizes = fake, axes, sizes
        self.held: dict[int, int] = {}
        self.live = self.peak = self.flops = self.moved = 0
        self.paused = False
        self.traffic = Traffic()
        self.log: list[Event] | None = None
        self.cpu = False                                 # gloo copies some messages, oneDNN keeps code for each product in bf16
        self.kernels: set[Any] = set()

    def phase(self, name: str) -> None:
        """Write down that a phase begins."""
        if self.log is not None:
            gc.collect()                                 # as a run does
            self.log.append(Event(phase=name))

    def maps(self, size: int) -> None:
        """Write down that files of so many bytes are mapped and looked at now."""
        if self.log is not None:
            self.log.append(Event(mapped=size))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented                        # it comes again with the local parts
        if self.paused:
            return func(*args, **(kwargs or {}))
        if self.log is not None and func is torch.ops.aten._local_scalar_dense.default:
            return (args[0].dtype.is_floating_point and 1.0) or True
        if collective := func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func, args)
        out = func(*args, **(kwargs or {}))
        if collective and self.cpu and self.log is not None and _kind(func) in ("all-gather", "reduce-scatter"):
            whole = max(_bytes(one) for one in (*args, out))             # it holds all of it once more while it sends
            self.log += [Event(-1, whole), Event(-1)]
        mine = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and getattr(leaf, "fake_mode", None) is self.fake]
        if mine:
            products = _flops(func.overloadpacket, args, kwargs or {}, out)
            self._kernel(func.overloadpacket, args)
            self.flops += products
            if not products and not func.is_view:        # it takes as long as its numbers take to come and go
                self.moved += _bytes(args) + _bytes(out)
        for leaf in mine:
            if leaf.device.type != "meta":
                self._hold(leaf.untyped_storage())
        return out

    def _kernel(self, name: Any, args: Any) -> None:
        """Write down what oneDNN keeps from now on, if this product is the first of its shapes: code made for them."""
        if self.cpu and self.log is not None and name in PRODUCTS and args[-1].dtype in (torch.bfloat16, torch.float16):
            shapes = tuple((tuple(arg.shape), arg.stride()) for arg in args[-2:])
            if shapes not in self.kernels:
                self.kernels.add(shapes)
                self.log.append(Event(code=KERNEL))

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = 0
            weakref.finalize(storage, self._drop, key)
            self.resized(storage)

    def _drop(self, key: int) -> None:
        self.live -= self.held.pop(key)
        if self.log is not None:
            self.log.append(Event(key))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Take note of a storage's new size: FSDP empties its buffers without letting go of them."""
        key = storage._cdata
        if key in self.held:
            if self.log is not None:
                self.log += [Event(key)] * bool(self.held[key]) + [Event(key, storage.nbytes())] * bool(storage.nbytes())
            self.live += storage.nbytes() - self.held[key]
            self.held[key] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def mark(self) -> int:
        """Return the bytes alive; the peak begins there anew."""
        gc.collect()                                     # what only a cycle keeps is not the model's
        self.peak = self.live
        return self.live

    def take(self) -> tuple[Traffic, int]:
        """Return the traffic and the FLOPs since the last time."""
        made = self.traffic, self.flops
        self.traffic, self.flops = Traffic(), 0
        return made

    def _collective(self, func: Any, args: Any) -> None:
        kind = _kind(func)
        if kind.startswith(QUIET):
            return
        group = next((_group(arg) for arg in args if _group(arg) in self.axes), "")
        size = max((_bytes(arg) for arg in args), default=0)
        if func.namespace == "_c10d_functional" and kind == "all-gather":
            size *= self.sizes.get(group, 1)             # its output is not among its arguments
        if self.sizes.get(group, 2) > 1:
            self.traffic.add(Kind(self.axes.get(group, "other"), kind), size)


class Pause:
    """A context in which a ledger counts nothing."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __enter__(self) -> None:
        self.ledger.paused = True

    def __exit__(self, *error: object) -> None:
        self.ledger.paused = False


def _kind(func: Any) -> str:
    """Return which collective an operation is."""
    name = str(func.overloadpacket.__name__).strip("_")
    return next((told for prefix, told in KINDS.items() if name.startswith(prefix)), name)


def _flops(name: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of an operation.  PyTorch's table leaves out attention on a CPU: products with keys and values."""
    if name in (_FLASH, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward):
        query, key = args[:2] if name is _FLASH else args[1:3]
        rows, heads, length, width = query.shape
        return (2 if name is _FLASH else 5) * 2 * rows * heads * length * key.shape[2] * width     # back: scores again, 4 more
    count = flop_registry.get(name)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _group(arg: Any) -> str:
    if isinstance(arg, str):
        return arg
    if isinstance(arg, torch.ScriptObject):
        try:
            return str(torch.distributed.ProcessGroup.unbox(arg).group_name)
        except (RuntimeError, TypeError):                # a reduce operation
            return ""
    return ""


def _bytes(arg: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(arg) if isinstance(leaf, Tensor))


@contextmanager
def following(ledger: Ledger) -> Iterator[Ledger]:
    """Give `ledger` every operation, and every change of a storage's size, of what runs inside."""
    plain = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        made = plain(storage, size)
        ledger.resized(storage)
        return made

    # DTensor tries an operation on whole shapes when it meets it first; it does so under this lock
    # nor need every mark look through all that there was before
    with (changed(ShardingPropagator, "_fake_mode_lock", Pause(ledger)), changed(torch.UntypedStorage, "resize_", resize_),
          ledger, old_objects_apart()):
        yield ledger


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
