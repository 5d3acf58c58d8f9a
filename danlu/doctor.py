"""`danlu doctor`: what this machine and installation can do, measured; `--security`: what is exposed."""

from __future__ import annotations

import gettext
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import danlu
from danlu import files, parallel
from danlu.errors import ConfigError
from danlu.words import DOMAIN, LOCALE, _

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "PyYAML", "rich")
EXTRAS = {"parquet": "pyarrow", "zstd": "zstandard", "hub": "datasets", "report": "matplotlib",
          "tensorboard": "tensorboard", "metrics": "sacrebleu", "serve": "starlette", "tune": "optuna", "bnb": "bitsandbytes"}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
RUNS = ("run.json", "manifest.json", "config.json")     # one of these makes a folder one of ours
DEEP = 4                                                # folders below this one that are looked into


class Fact(NamedTuple):
    """One line: what was looked at, what was found, whether that is as it should be, and what to do if not."""

    topic: str
    name: str
    value: Any
    good: bool = True
    fix: str | None = None


def main(*, security: bool, as_json: bool) -> int:
    """Print what was found; exit 7 if --security finds something open, 2 if something that Danlu needs is missing."""
    facts = list(exposed(Path.cwd()) if security else found(Path.cwd()))
    if as_json:
        print(json.dumps([fact._asdict() for fact in facts], ensure_ascii=False, indent=1))
    else:
        show(facts)
    return 0 if all(fact.good for fact in facts) else 7 if security else 2


def show(facts: list[Fact]) -> None:
    """Print the facts as a table, and what to do about those that are not good."""
    table = Table(show_header=False, box=None, pad_edge=False)
    topic = ""
    for fact in facts:
        mark = " " if fact.good else "[bold red]![/]"
        table.add_row(mark, "" if fact.topic == topic else f"[bold]{fact.topic}[/]", fact.name, escape(str(fact.value)))
        topic = fact.topic
    console = Console(highlight=False)
    console.print(table)
    for fact in facts:
        if fact.fix:
            console.print(f"{fact.name}: {fact.fix}", markup=False, soft_wrap=True)


def found(here: Path) -> Iterator[Fact]:
    """Yield everything about versions, processor, memory, accelerators, speed, extras, files and language."""
    yield from versions()
    yield from processor()
    yield from accelerators()
    yield from speed()
    yield from extras()
    yield from surroundings(here)


def versions() -> Iterator[Fact]:
    """Yield the versions of Danlu, Python and what it needs."""
    yield Fact(_("versions"), "danlu", danlu.__version__)
    yield Fact(_("versions"), "python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    for name in NEEDED:
        yield Fact(_("versions"), name, importlib.metadata.version(name))


def processor() -> Iterator[Fact]:
    """Yield the processor, its instruction sets, and the cores and memory that this process may use."""
    told = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo")}
    model = told.get("model name", platform.machine())
    listed = told.get("flags", told.get("Features", "")).split()
    yield Fact(_("processor"), _("model"), model)
    yield Fact(_("processor"), _("instruction sets"), " ".join(f for f in FLAGS if f in listed) or "?")
    yield Fact(_("processor"), _("PyTorch uses"), torch.backends.cpu.get_cpu_capability())
    cores, quota = cores_here(), cpu_quota()
    text = _("{usable} of {all}, PyTorch starts {threads} threads").format(
        usable=cores, all=os.cpu_count(), threads=torch.get_num_threads())
    tight = quota is not None and quota < torch.get_num_threads()
    yield Fact(_("processor"), _("cores"), text if quota is None else
               _("{text}; time limited to {quota:g} cores").format(text=text, quota=quota),
               True, _("set threads={n} in recipes: more threads than the limit allows wait for each other").format(
                   n=max(1, int(quota or 1))) if tight else None)
    total, free = memory()
    yield Fact(_("processor"), _("memory"), _("{free:.1f} of {total:.1f} GB free").format(
        free=free / 1e9, total=total / 1e9))


def cores_here() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Return the cores' worth of time that the control group allows, None for no limit."""
    words = next(iter(_lines("/sys/fs/cgroup/cpu.max")), "max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def memory() -> tuple[int, int]:
    """Return bytes of memory in all and free, within the limit of the control group."""
    lines = [line.split() for line in _lines("/proc/meminfo")]
    table = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
    total, free = table.get("MemTotal", 0), table.get("MemAvailable", 0)
    limit, used = (next(iter(_lines(f"/sys/fs/cgroup/memory.{name}")), "") for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    return total, free


def accelerators() -> Iterator[Fact]:
    """Yield each CUDA device."""
    if not torch.cuda.is_available():
        yield Fact(_("accelerator"), "CUDA", _("none: training runs on the processor"))
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        yield Fact(_("accelerator"), f"cuda:{number}", f"{about.name}, {about.total_memory / 1e9:.0f} GB, "
                                                      f"sm_{about.major}{about.minor}, CUDA {torch.version.cuda}")


def speed() -> Iterator[Fact]:
    """Yield the measured rate of matrix products, and what `precision: auto` makes of it."""
    device = parallel.start(threads=None, device="auto")
    rates = {precision: parallel.peak(device, precision) for precision in ("fp32", "bf16")}
    for precision, rate in rates.items():
        name = _("matrix products, {precision}").format(precision=precision)
        yield Fact(_("speed"), name, f"{rate / 1e9:.0f} GFLOP/s")
    yield Fact(_("speed"), "precision: auto",
               _("{precision}: bf16 is {ratio:.1f} times as fast as fp32 here (1.2 is asked for)").format(
                   precision=parallel.fastest(device), ratio=rates["bf16"] / rates["fp32"]))
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    yield Fact(_("speed"), "compile: true", _("works: compiler {path}").format(path=compiler) if compiler
               else _("does not work here: torch.compile needs a C++ compiler"))


def extras() -> Iterator[Fact]:
    """Yield each extra and whether it is there; a missing one is no fault."""
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        yield Fact(_("extras"), extra, f"{module} {importlib.metadata.version(module)}" if there
                   else _("not installed: {command}").format(command=f'pip install "danlu[{extra}]"'))


def surroundings(here: Path) -> Iterator[Fact]:
    """Yield whether files can be written here, and the language."""
    try:
        files.check_writable(here)
        free = shutil.disk_usage(here).free / 1e9
        yield Fact(_("files"), str(here), _("writable, {free:.1f} GB free").format(free=free))
    except ConfigError as error:
        yield Fact(_("files"), str(here), error.what, False, error.fix)
    catalogue = gettext.find(DOMAIN, LOCALE)
    yield Fact(_("language"), _("messages"), catalogue or _("English, as in the code"))
    yield Fact(_("language"), _("file names and output"), f"{sys.getfilesystemencoding()}, {sys.stdout.encoding}")


def exposed(here: Path) -> Iterator[Fact]:
    """Yield what others could reach: sockets of this process, what Danlu sends, files below `here` open to others."""
    listening = sockets()
    yield Fact(_("network"), _("listening sockets"), listening or _("none: only danlu serve listens"), not listening)
    yield Fact(_("network"), _("connections out"),
               _("only to read hf://… inputs that you name; nothing is reported to anyone"))
    yield Fact(_("code"), _("from data or weights"),
               _("never run: no pickle, no auto_map, no trust_remote_code; weights are safetensors, state is JSON"))
    yield from folders(here)


def sockets() -> list[str]:
    """Return the addresses on which this process listens (Linux)."""
    if not Path("/proc/self/net").is_dir():
        return []
    result, own = [], set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):                # the one that listed the folder is closed by now
            own.add(os.readlink(f"/proc/self/fd/{name}"))
    for table in ("tcp", "tcp6"):
        for line in _lines(f"/proc/self/net/{table}")[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:              # 0A: LISTEN
                result.append(f"{table} {int(words[1].rpartition(':')[2], 16)}")
    return result


def folders(here: Path) -> Iterator[Fact]:
    """Yield each run, prepared or model folder below `here`: who else may read or change it, and pickles in it."""
    for root, inner, names in os.walk(here):
        path = Path(root)
        depth = len(path.relative_to(here).parts)
        inner[:] = [] if depth >= DEEP else sorted(name for name in inner if not name.startswith("."))
        if not set(RUNS) & set(names):
            continue
        inner[:] = []                                   # what is inside belongs to it
        below = [path, *(p for p in path.rglob("*") if not p.is_symlink())]
        modes = [p.stat().st_mode for p in below]
        open_to_all = [str(p) for p, mode in zip(below, modes, strict=True) if mode & stat.S_IWOTH]
        pickles = [str(p) for p in below if p.suffix in PICKLES]
        readable = any(mode & stat.S_IROTH for mode in modes)
        text = _("others may read it") if readable else _("only you and your group")
        if open_to_all:
            text = _("others may change {n} files, first {file}").format(n=len(open_to_all), file=open_to_all[0])
        yield Fact(_("folders"), str(path), text, not open_to_all, f"chmod -R o-w {path}" if open_to_all else None)
        if pickles:
            text = _("holds {n} pickles, which Danlu never opens: {file} …").format(n=len(pickles), file=pickles[0])
            yield Fact(_("folders"), str(path), text, False, _("remove them, or keep them elsewhere"))


def _lines(path: str) -> list[str]:
    """Return the lines of a file of the system; none where there is no such file (another system)."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
