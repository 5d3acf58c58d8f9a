"""The processes of a run: who this one is, and sums over those that share an axis of the layout."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from danlu.errors import ConfigError, TemporaryError
from danlu.layout import Layout
from danlu.words import _

AXES = ("pp", "dp", "cp", "tp")                          # from the outermost to the innermost
PATIENCE = timedelta(hours=2)                            # of a collective; the watchdog is faster, and names who hangs
PARTING = 30.0                                           # seconds


def launched() -> int:
    """Return how many processes a launcher (torchrun, `danlu train` itself) has started for this run; 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else 1


@dataclass
class World:
    """This process among the others.  One process alone has no mesh, and every sum is what it has."""

    layout: Layout = field(default_factory=Layout)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None                       # pp, replicate, shard, tp: of the weights; replicate × shard = dp × cp
    data: DeviceMesh | None = None                       # pp, dp, cp, tp: of the rows
    saving: dist.ProcessGroup | None = None              # gloo, for the thread that writes checkpoints
    ends: dist.ProcessGroup | None = None                # first and last stage, which share a tied embedding

    @property
    def size(self) -> int:
        return 1 if self.mesh is None else dist.get_world_size()

    @property
    def rank(self) -> int:
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def index(self, axis: str) -> int:
        """Return this process's place along pp, dp, cp or tp."""
        return 0 if self.data is None else self.data.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the processes that differ from this one along `axis` alone."""
        assert self.data is not None, "one process has no groups"
        return self.data.get_group(axis)

    def add(self, tensor: Tensor, axes: Iterable[str] = AXES) -> Tensor:
        """Return `tensor` summed over `axes`, in place; it may live on any device."""
        if self.mesh is not None:
            held = tensor.to(self.device)
            for axis in axes:
                if getattr(self.layout, axis) > 1:
                    dist.all_reduce(held, group=self.group(axis))
            if held is not tensor:
                tensor.copy_(held)
        return tensor

    def most(self, tensor: Tensor) -> Tensor:
        """Return the largest `tensor` of all processes, element by element, in place."""
        if self.mesh is not None:
            held = tensor.to(self.device)
            dist.all_reduce(held, dist.ReduceOp.MAX)
            tensor.copy_(held)
        return tensor


def join(layout: Layout, device: torch.device) -> World:
    """Meet the other processes that a launcher has started.  ConfigError if they are not as many as the layout needs."""
    size = launched()
    if size != layout.world:
        raise ConfigError(
            _("the layout needs {n} processes and {m} were started").format(n=layout.world, m=size), where="layout",
            fix=_("start {n}, or change layout.dp, tp, pp or cp: their product is the number of processes").format(
                n=layout.world))
    if size == 1 and not os.environ.get("RANK"):
        return World(layout, device)
    if not dist.is_initialized():
        # what `layout.offload` leaves on the host is summed there
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, **_met(size),
                                device_id=device if device.type == "cuda" else None)
    return meshed(layout, device)


def _met(size: int) -> dict[str, Any]:
    """Return where the processes meet, as init_process_group takes it: on the loopback, if that is where they are.

    PyTorch's own store would listen on every address of the machine.
    """
    host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    if host != "127.0.0.1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return {}
    if rank:
        return {"store": dist.TCPStore(host, port, size, False), "rank": rank, "world_size": size}
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(size)
    except OSError as error:                             # whoever chose the port let go of it so that it can be taken here
        listening.close()
        raise TemporaryError(_("another program has taken port {port}, where the processes meet: {why}").format(
            port=port, why=error.strerror), fix=_("start again")) from None
    store = dist.TCPStore(host, port, size, True, master_listen_fd=listening.detach())
    return {"store": store, "rank": rank, "world_size": size}


def meshed(layout: Layout, device: torch.device) -> World:
    """Return the world of a process group that is already there."""
    kind, shards = device.type, layout.shards
    if layout.world == 1:
        return World(layout, device)
    copies = layout.dp * layout.cp // shards
    mesh = init_device_mesh(kind, (layout.pp, copies, shards, layout.tp), mesh_dim_names=("pp", "replicate", "shard", "tp"))
    data = init_device_mesh(kind, (layout.pp, layout.dp, layout.cp, layout.tp), mesh_dim_names=AXES)
    fake = dist.get_backend() == "fake"
    saving = None if fake else dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    return World(layout, device, mesh, data, saving, _ends(data) if layout.pp > 1 else None)


def _ends(data: DeviceMesh) -> dist.ProcessGroup | None:
    """Return the group of the first and last stage with this process's other coordinates, None between them.

    Every process takes part in making every group, as `new_group` wants it.
    """
    mine, ranks = None, data.mesh.flatten(1)             # [pp, the rest]
    for column in range(ranks.shape[1]):
        pair: Sequence[int] = [int(ranks[0, column]), int(ranks[-1, column])]
        group = dist.new_group(list(pair))
        mine = group if dist.get_rank() in pair else mine
    return mine


def leave() -> None:
    """Part from the other processes, once no thread uses them any more; after PARTING seconds without: all is on disk."""
    if dist.is_available() and dist.is_initialized():
        for thread in threading.enumerate():
            if thread.name == "danlu-checkpoint":
                thread.join()
        parting = threading.Thread(target=dist.destroy_process_group, name="danlu-parting", daemon=True)
        parting.start()
        parting.join(PARTING)
