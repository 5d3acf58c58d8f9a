"""Machines: what a device can compute, hold, send and cost.  The table with its sources is devices.yaml, beside this file."""

from __future__ import annotations

import difflib
import math
import re
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from danlu import config, doctor, yamls
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.words import _

TABLE = Path(__file__).with_name("devices.yaml")
HOST = 2.0                                               # host memory of a node, in memories of its devices, as DGX machines have
DISK = 1e9                                               # bytes/s that a disk writes where it is not measured
BASE = {"cpu": 450_000_000, "cuda": 1_000_000_000, "npu": 1_000_000_000}        # of a process before any tensor, not measured
CORE = 32 * 2.5e9                                        # FLOP/s in fp32 of a core with AVX2, not measured
MOST = 1_000_000                                         # devices of a machine


class Device(Model):
    """One accelerator, or a process's share of a CPU.  Bytes, FLOP/s, bytes/s, W; rates are dense peaks, or measured ones."""

    name: str
    kind: Literal["cpu", "cuda", "npu"]
    memory: int = Field(gt=0)
    flops: dict[str, float]                              # by precision: fp32, tf32, bf16, fp16, fp8, int8
    bandwidth: float = Field(gt=0)                       # of its memory
    link: float | None                                   # to a device of the same node, one way; None: there is no other
    node: int = Field(ge=1)                              # devices of a node
    network: float                                       # its share of what leaves a node, one way
    power: float
    price: float | None = None                           # per device-hour, in the user's currency
    reached: float = 0.4                                 # share of the peak that training reaches in matrix products
    sources: tuple[str, ...] = ()
    note: str = ""


class Machine(Model):
    """So many devices of one kind."""

    device: Device
    count: int = Field(ge=1)
    host: int = Field(gt=0)                              # bytes of host memory of a node (of a CPU: all there is)
    disk: float = Field(gt=0)                            # bytes/s that are written
    calibrated: bool = False
    base: int = Field(ge=0)                              # bytes of a process before any tensor

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.count // self.device.node)

    def rate(self, precision: str) -> float:
        """Return the FLOP/s of a device that training reaches in `precision`; 0 where it has no such arithmetic."""
        peak = self.device.flops.get(precision, 0.0)
        return peak if self.calibrated else peak * self.device.reached

    def between(self, near: bool) -> float:
        """Return the bytes/s from a device to another, of the same node or not."""
        inside = self.device.link if self.device.link is not None else self.device.network
        return inside if near else self.device.network


class Measured(Model):
    """What `danlu calibrate` has measured on this machine: the file machine.json of the user's cache folder."""

    format: Literal[1] = 1
    date: str
    torch: str
    threads: int = Field(ge=1)
    processor: str
    flops: dict[str, float]                              # FLOP/s of all threads in matrix products, by precision
    bandwidth: float = Field(gt=0)
    link: float | None = None                            # bytes/s between two processes
    disk: float = Field(gt=0)
    base: int = Field(gt=0)


class _Row(Model):
    """A device as the file has it: in GB, TFLOP/s, GB/s."""

    name: str
    aliases: tuple[str, ...] = ()
    kind: Literal["cpu", "cuda", "npu"]
    memory: float = Field(gt=0)
    flops: dict[str, float]
    bandwidth: float = Field(gt=0)
    link: float = Field(gt=0)
    node: int = Field(ge=1)
    network: float = Field(gt=0)
    power: float = Field(gt=0)
    note: str = ""
    sources: tuple[str, ...] = Field(min_length=1)

    def device(self) -> Device:
        return Device(
            name=self.name, kind=self.kind, memory=int(self.memory * 1e9), flops={k: v * 1e12 for k, v in self.flops.items()},
            bandwidth=self.bandwidth * 1e9, link=self.link * 1e9, node=self.node, network=self.network * 1e9,
            power=self.power, sources=self.sources, note=self.note)


class _Table(Model):
    devices: tuple[_Row, ...]


@cache
def _table() -> _Table:
    data, lines = yamls.read(TABLE)
    return config.validate(_Table, data, {key: f"{TABLE}:{line}" for key, line in lines.items()})


def devices() -> tuple[Device, ...]:
    """Return the devices of the table."""
    return tuple(row.device() for row in _table().devices)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def device(name: str) -> Device:
    """Return the device of that name or alias, however it is spaced.  Raises ConfigError with what was meant."""
    known = {_plain(alias): row for row in _table().devices for alias in (row.name, *row.aliases)}
    row = known.get(_plain(name))
    if row is not None:
        return row.device()
    close = difflib.get_close_matches(_plain(name), [*known, "here", "cpu"], n=1, cutoff=0.5)
    meant = known[close[0]].name if close and close[0] in known else close[0] if close else None
    names = ", ".join(["here", *(row.name for row in _table().devices)])
    raise ConfigError(_("unknown device {name!r}").format(name=name) + (_(" — did you mean {name!r}?").format(name=meant)
                      if meant else ""), where="--hardware", fix=_("known: {names}").format(names=names))


def parse(text: str, *, price: float | None = None, path: Path | None = None) -> Machine:
    """Return the machine that '8xH100', '285 x V100', 'A100-40GB', 'here' or '2xcpu' means.

    price: of a device-hour; path: of what was measured here (`measured_at`).  Raises ConfigError for unknown names and impossible numbers.
    """
    found = re.fullmatch(r"\s*(?:([-+]?[0-9][0-9.,_]*)\s*[x×*])?\s*(.*\S)\s*", text, re.IGNORECASE)
    if found is None or re.fullmatch(r"[-+]?[0-9.,_]*\s*[x×*]", found[2]):
        raise ConfigError(_("{text!r} is no machine").format(text=text), where="--hardware",
                          fix=_("write how many of which device: 8xH100, or here for this machine"))
    digits = re.sub("[_,]", "", found[1] or "1")
    count = int(digits) if digits.isdecimal() else 0
    if not 1 <= count <= MOST:
        raise ConfigError(_("{n} devices cannot be").format(n=digits), where="--hardware",
                          fix=_("give a number from 1 to {most}").format(most=f"{MOST:,}"))
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ConfigError(_("a price of {price} cannot be").format(price=price), where="--price",
                          fix=_("give what an hour of one device costs"))
    name = found[2].strip()
    made = here(count, path=path) if _plain(name) in ("here", "cpu", "local", "本机") else several(device(name), count)
    return made if price is None else made.model_copy(update={"device": made.device.model_copy(update={"price": price})})


def several(one: Device, count: int) -> Machine:
    """Return a machine of `count` devices, with the host, the disk and the base of a process assumed."""
    host = one.memory if one.kind == "cpu" else int(HOST * one.memory * min(count, one.node))
    return Machine(device=one, count=count, host=host, disk=DISK, base=BASE[one.kind])


def measured_at(cache_home: str | None = None) -> Path:
    """Return where the measurements of this machine lie; cache_home: the value of XDG_CACHE_HOME."""
    return (Path(cache_home) if cache_home else Path.home() / ".cache") / "danlu" / "machine.json"


def measured(path: Path) -> Measured | None:
    """Return what was measured, None if nothing was.  Raises ConfigError for a file of something else."""
    if not path.is_file():
        return None
    data, lines = yamls.read(path)
    return config.validate(Measured, data, {key: f"{path}:{line}" for key, line in lines.items()})


def here(count: int = 1, *, path: Path | None = None) -> Machine:
    """Return this machine, its memory and rates shared by `count` processes; path: of the measurements (`measured_at`)."""
    found = measured(measured_at() if path is None else path)
    total, _free = doctor.memory()
    cores = doctor.cores_here()
    flops = dict(found.flops) if found else {"fp32": CORE * cores}
    link = (found.link if found else None) or 1e9
    one = Device(
        name="here", kind="cpu", memory=max(1, total // count), flops={k: v / count for k, v in flops.items()},
        bandwidth=(found.bandwidth if found else 10e9) / count, link=link, node=count, network=link, power=15.0 * cores / count,
        sources=(_("measured on {date}").format(date=found.date),) if found else
        (_("assumed: {cores} cores with AVX2; `danlu calibrate` measures them").format(cores=cores),))
    return Machine(device=one, count=count, host=total, disk=found.disk if found else DISK, calibrated=found is not None,
                   base=found.base if found else BASE["cpu"])
