"""The worker processes of a run on this machine: started together, watched, ended together, started again.

PyTorch's elastic agent (torchrun's) starts them and gives each its rank.  An attempt has an agent and a rendezvous of
its own: inside one, gloo sometimes meets the addresses of the dead.  How an attempt ends is decided here, because the
agent forgets exit codes and waits 30 seconds for a process that cannot end.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from danlu.errors import ConfigError, ResourceError, TemporaryError
from danlu.log import say
from danlu.words import _

FINAL = frozenset({2, 3, 4, 5, 6, 7})                    # starting again would end the same way
ASKED = frozenset({128 + number for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)})
SETTINGS = "settings"                                    # file in which a worker tells with what to start again
FIRST_WAIT, LAST_WAIT = 1.0, 30.0                        # seconds before a restart, doubled each time
SETTLE = 3.0                                             # for the rank at fault to be heard: those it leaves may end first
LOUD = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api",
        "torch.distributed.elastic.agent.server.local_elastic_agent",
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous")


def supervise(arguments: list[str], *, world: int, run_folder: Path, max_restarts: int = 3, shutdown: float = 30.0,
              grace: float = 5.0) -> int:
    """Run `danlu ARGUMENTS` in `world` processes and return the exit code for the user.

    A failure that a restart may cure starts them all again; TemporaryError after `max_restarts` in a row without a new
    checkpoint.  shutdown: seconds to save after a signal; grace: seconds to end once another rank has failed.
    """
    heard, row, again, more = _Heard(), 0, False, list[str]()
    step = _newest(run_folder)
    with heard.listening():
        while True:
            # `--a=b` is a word of its own even after a flag, and resuming is what a restart is
            words = command([*arguments, "--resume=true", *more] if again else arguments)
            with _environment(world, again) as told_here:
                codes = _Attempt(heard, shutdown, grace).run(words, world)
                smaller = (told_here / SETTINGS).read_text("utf-8").split() if (told_here / SETTINGS).exists() else []
            rank, code = judged(codes)
            if heard.signal and code not in FINAL:
                return 128 + heard.signal if code or len(codes) < world else 0
            if smaller and code == ResourceError.code:
                say(_("memory ran out; starting again from the last checkpoint with {settings}, the same rows a step").format(
                    settings=" ".join(smaller)))
                more, again = [f"--{setting}" for setting in smaller], True
                continue
            if code in {0, *FINAL, *ASKED}:
                return code
            reached = _newest(run_folder)
            row, step, again = (0 if reached > step else row), max(step, reached), True
            # a traceback of Python may come of another rank's end, once; twice it is a mistake that will stay
            if row >= (min(1, max_restarts) if code == 1 else max_restarts):
                raise TemporaryError(
                    _("{why}; {n} restarts in a row have brought no new checkpoint").format(why=told(rank, code), n=row),
                    fix=_("see what the workers said above; the same command tries again"))
            wait = min(LAST_WAIT, FIRST_WAIT * 2**row)
            row += 1
            say(_("{why}; starting again from {place} in {wait:g} s").format(
                why=told(rank, code), place=f"checkpoint-{step}" if step >= 0 else _("the beginning"), wait=wait))
            if heard.within(wait):
                return 128 + heard.signal


def command(arguments: list[str]) -> list[str]:
    """Return what a worker process is."""
    return [sys.executable, "-m", "danlu", *arguments]


def follow(supervisor: int) -> None:
    """Let this process die with the one that started it, whatever kills that; end it at once if that is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: holds for deaths from now on only, hence:
    if os.getppid() != supervisor:
        os._exit(TemporaryError.code)


def refuse_elsewhere(environment: Mapping[str, str], world: int) -> None:
    """Raise ConfigError if other tools' variables ask for processes that the layout does not."""
    nodes, processes = (int(value) if (value := environment.get(name, "")).isdigit() else 1
                        for name in ("NNODES", "NPROC_PER_NODE"))
    if nodes > 1:
        raise ConfigError(
            _("NNODES={n}, but `danlu train` starts processes on this machine only").format(n=nodes), where="NNODES",
            fix=_("start `torchrun --nnodes={n} … -m danlu train …` on each machine, or let "
                  "`danlu launch --render slurm|k8s` write the job").format(n=nodes))
    if processes > 1 and processes != world:
        raise ConfigError(
            _("NPROC_PER_NODE={n}, but the layout needs {m} processes").format(n=processes, m=world), where="NPROC_PER_NODE",
            fix=_("unset it, or choose layout.dp, tp, pp and cp with the product {n}; several machines need torchrun").format(
                n=processes))


def judged(codes: Mapping[int, int]) -> tuple[int, int]:
    """Return the rank and exit code that say why an attempt ended; (0, 0) if every rank ended well.

    A rank that only lost the others ends with 75: it is named when nobody else is.
    """
    def weight(rank: int) -> tuple[int, int]:
        code = codes[rank]
        kinds = (code in FINAL, code in ASKED, code < 0, code != TemporaryError.code)
        return kinds.index(True) if True in kinds else len(kinds), rank

    failed = [rank for rank, code in codes.items() if code]
    rank = min(failed, key=weight, default=0)
    return rank, codes[rank] if failed else 0


def told(rank: int, code: int) -> str:
    """Return how a rank ended, in words."""
    if code >= 0:
        return _("rank {rank} ended with exit code {code}").format(rank=rank, code=code)
    known = {number.value: number.name for number in signal.Signals}
    return _("rank {rank} was killed by {signal}").format(rank=rank, signal=known.get(-code, str(-code)))


def _newest(run_folder: Path) -> int:
    from danlu.train.checkpoint import NAME, listing  # needs PyTorch

    found = listing(run_folder)
    match = NAME.match(found[-1].name) if found else None
    return int(match[1]) if match else -1


@contextmanager
def _environment(world: int, again: bool) -> Iterator[Path]:
    """Set what workers inherit, for the length of an attempt; yield the folder in which they tell."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="danlu-") as folder:
        os.environ |= {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",   # with it shared, gloo's restarts fail now and then
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "",        # none: they are handled here
            "OMP_NUM_THREADS": before.get("OMP_NUM_THREADS") or str(max(1, cores // world)),
            # who lost whom is said here: the C++ of PyTorch would add pages in every process that is left behind
            "TORCH_CPP_LOG_LEVEL": before.get("TORCH_CPP_LOG_LEVEL", "FATAL"),
            "DANLU_SUPERVISOR": str(os.getpid()), "DANLU_TOLD": folder,
            # workers on one machine talk over its loopback, where nobody else can listen in
            **{name: before.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if sys.platform == "linux"},
            "DANLU_FAULT": "" if again else before.get("DANLU_FAULT", ""),     # a planted fault happens once
        }
        try:
            yield Path(folder)
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ |= before


class _Heard:
    """The last signal that asked the run to stop, or 0.  A second SIGINT ends everything at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.kill: Callable[[], None] = lambda: None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            self.kill()
            os._exit(130)
        self.signal = number

    def listen(self) -> None:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            signal.signal(getattr(signal, name), self)

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)   # the agent may take any
        before = {number: signal.getsignal(number) for number in numbers}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def within(self, seconds: float) -> bool:
        """Return True as soon as a signal comes, False after `seconds` without."""
        end = time.monotonic() + seconds
        while not self.signal and time.monotonic() < end:
            time.sleep(0.05)
        return bool(self.signal)


@dataclass
class _Attempt:
    """One start of all workers, to the end of the last of them."""

    heard: _Heard
    shutdown: float
    grace: float
    workers: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    passed: int = 0                                      # the signal that was passed on
    failed: float | None = None                          # when the first failure was seen
    end: float | None = None                             # when what still runs is killed
    ended: set[int] = field(default_factory=set)         # ranks whose end is our doing: their codes say nothing

    def run(self, words: list[str], world: int) -> dict[int, int]:
        """Start the workers and return the exit codes of those that ended by themselves, by rank."""
        agent = _agent(words, world)
        look = agent._monitor_workers
        agent._monitor_workers = lambda group: self._watch(agent, group, look)
        self.heard.kill = self._kill_groups
        try:
            agent.run()
        finally:
            self._kill_groups()
            self.heard.kill = lambda: None
            agent._rdzv_handler.shutdown()
        return {rank: worker.returncode for rank, worker in self.workers.items() if rank not in self.ended}

    def _watch(self, agent: Any, group: Any, look: Callable[[Any], Any]) -> Any:
        """Stand in for the agent's own look at its workers, ten times a second, until the last of them has ended."""
        from torch.distributed.elastic.agent.server.api import RunResult, WorkerState

        if not self.workers:
            self.workers = {rank: handler.proc for rank, handler in agent._pcontext.subprocess_handlers.items()}
            self.heard.listen()
        running = {rank: worker for rank, worker in self.workers.items() if worker.poll() is None}
        if not running:
            return look(group)
        failures = {worker.returncode for worker in self.workers.values()} - {None, 0}
        now = time.monotonic()
        if self.heard.signal != self.passed:
            self.passed, self.end = self.heard.signal, now + self.shutdown
            for worker in running.values():              # not to its group: workers that make batches must not die of it
                worker.send_signal(self.passed)
        elif failures and not self.passed and self.end is None:
            self.failed = self.failed or now
            if now > self.failed + (0 if failures & FINAL else self.shutdown if failures & ASKED else SETTLE):
                self.end = now + self.grace
                self.ended |= running.keys()
                for worker in running.values():
                    worker.terminate()
        self._kill(running, late=self.end is not None and now > self.end, failures=bool(failures))
        return RunResult(state=WorkerState.HEALTHY)

    def _kill(self, running: Mapping[int, subprocess.Popen[bytes]], *, late: bool, failures: bool) -> None:
        """Kill those that are out of time, and those that are stopped: they hear no other signal."""
        if not failures and not self.passed:
            return
        doomed = [rank for rank, worker in running.items() if late or _is_stopped(worker.pid)]
        if late and self.passed:
            say(_("{n} workers have not ended within {time:g} s and are killed").format(n=len(doomed), time=self.shutdown))
        self.ended |= set(doomed)
        for rank in doomed:
            running[rank].kill()
            try:
                running[rank].wait(10.0)
            except subprocess.TimeoutExpired:            # it waits inside the kernel, for a device or a disk
                raise TemporaryError(_("rank {rank} (process {pid}) cannot be killed").format(
                    rank=rank, pid=running[rank].pid), fix=_("look after the device or the disk it waits for")) from None

    def _kill_groups(self) -> None:
        """Kill whatever is left of the workers and of the processes they started."""
        for worker in self.workers.values():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)    # each leads a group of its own


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:                                      # it has just ended, or this is not Linux
        return False


def _agent(words: list[str], world: int) -> Any:
    """Return the agent that will start `words` in `world` processes that meet on this machine."""
    from torch.distributed import HashStore
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    for name in LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # This agent is the only one: it meets itself in a store of this process, which no port leads to.
    # An address and no name, for a laptop's own name often leads nowhere.
    meeting, store = RendezvousParameters(backend="c10d", endpoint="127.0.0.1:0", run_id=secrets.token_hex(8), min_nodes=1,
                                          max_nodes=1, local_addr="127.0.0.1"), HashStore()
    handler = create_handler(store, C10dRendezvousBackend(store, meeting.run_id), meeting)
    spec = WorkerSpec(role="danlu", local_world_size=world, entrypoint=words[0], args=tuple(words[1:]), max_restarts=0,
                      rdzv_handler=handler, monitor_interval=0.1, local_addr="127.0.0.1")
    return LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs(log_dir=os.devnull))
