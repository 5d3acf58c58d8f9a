"""Workers are started, watched, ended and started again; none is left.  The workers here are small scripts."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import danlu
from danlu import cli, fault, parallel
from danlu.errors import ConfigError, TemporaryError
from danlu.layout import Layout
from danlu.train import launch
from danlu.train.launch import FINAL, judged, refuse_elsewhere, supervise

BEGIN = """
import os, pathlib, signal, sys, time
rank, out = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
with (out / f"starts-{rank}").open("a") as file:
    file.write(f"{os.getpid()}\\n")
start = len((out / f"starts-{rank}").read_text().split())
def saved(step):
    (out / f"checkpoint-{step}").mkdir(exist_ok=True)
def together():
    while len(list(out.glob("starts-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
"""
FOLLOWING = f"""
sys.path.insert(0, {str(Path(danlu.__file__).parent.parent)!r})
from danlu.train.launch import follow
follow(int(os.environ["DANLU_SUPERVISOR"]))
"""


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`supervise`, with workers that run a script; quick to start again."""
    monkeypatch.setattr(launch, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(launch, "SETTLE", 0.5)

    def run(script: str, world: int = 2, **options: Any) -> int:
        (tmp_path / "worker.py").write_text(BEGIN + script)
        monkeypatch.setattr(launch, "command", lambda words: [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), *words])
        return supervise(["train", "a.yaml"], world=world, run_folder=tmp_path, **options)

    return run


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(out: Path) -> list[int]:
    return [int(word) for file in out.glob("starts-*") for word in file.read_text().split()]


def starts(out: Path) -> list[int]:
    return [len(file.read_text().split()) for file in sorted(out.glob("starts-*"))]


def nobody_left(out: Path, patience: float = 5.0) -> None:
    end = time.monotonic() + patience
    while (left := [pid for pid in pids(out) if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == []


def test_a_clean_end_is_zero(workers: Any, tmp_path: Path) -> None:
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    assert workers("import json\n(out / f'env-{rank}').write_text(json.dumps(dict(os.environ)))") == 0
    assert starts(tmp_path) == [1, 1]
    seen = json.loads((tmp_path / "env-1").read_text())
    assert seen["WORLD_SIZE"] == "2" and seen["MASTER_ADDR"] == "127.0.0.1" and int(seen["OMP_NUM_THREADS"]) >= 1
    assert dict(os.environ) == before and signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("code", [3, 7])
def test_a_final_code_ends_the_run_even_if_others_fail_first(workers: Any, tmp_path: Path, code: int) -> None:
    script = f"time.sleep(0.3 * rank)\nsys.exit({code} if rank else 75)"
    assert workers(script) == code
    assert starts(tmp_path) == [1, 1]
    nobody_left(tmp_path)


def test_a_killed_worker_is_started_again_with_the_others(workers: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_FAULT", "rank1.train.step:kill:2")
    script = ("together()\nif start == 1:\n    saved(10)\n    if rank: os.kill(os.getpid(), 9)\n    time.sleep(60)\n"
              "(out / f'second-{rank}').write_text(' '.join(sys.argv[2:]) + os.environ['DANLU_FAULT'])")
    assert workers(script, grace=0.5) == 0
    assert starts(tmp_path) == [2, 2]
    assert (tmp_path / "second-0").read_text() == "train a.yaml --resume=true", "resumes, and the fault is not planted again"
    assert capfd.readouterr().err.strip() == "rank 1 was killed by SIGKILL; starting again from checkpoint-10 in 0.05 s"
    nobody_left(tmp_path)


def test_no_progress_ends_the_run_and_progress_prolongs_it(workers: Any, tmp_path: Path,
                                                           capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TemporaryError, match="rank 0 ended with exit code 75; 2 restarts in a row have brought no new check"):
        workers("if start <= 2: saved(start)\nsys.exit(75)", world=1, max_restarts=2)
    assert starts(tmp_path) == [4]
    assert [line.split("in ")[-1] for line in capfd.readouterr().err.strip().splitlines()] == ["0.05 s", "0.05 s", "0.1 s"]


def test_a_mistake_in_the_program_is_tried_once_more_and_no_oftener(workers: Any, tmp_path: Path) -> None:
    with pytest.raises(TemporaryError, match="exit code 1; 1 restarts in a row"):
        workers("sys.exit(1)", world=1, max_restarts=3)
    assert starts(tmp_path) == [2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_reaches_the_workers_and_they_save(workers: Any, tmp_path: Path, number: int, code: int) -> None:
    script = f"""
def asked(number, _frame):
    time.sleep(0.5 * (1 - rank))             # rank 0 saves, after the others have gone
    (out / f"saved-{{rank}}").write_text(str(number))
    os._exit(128 + number)
signal.signal({number}, asked)
together()
if rank == 1:
    time.sleep(0.2)
    os.kill(os.getppid(), {number})
time.sleep(60)
"""
    assert workers(script) == code
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert starts(tmp_path) == [1, 1]
    nobody_left(tmp_path)


def test_who_does_not_end_in_time_is_killed(workers: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = ("signal.signal(15, signal.SIG_IGN)\ntogether()\nif rank == 1:\n    time.sleep(0.2)\n    os.kill(os.getppid(), 15)\n"
              "time.sleep(60)")
    began = time.monotonic()
    assert workers(script, shutdown=0.5) == 143
    assert time.monotonic() - began < 15
    assert "2 workers have not ended within 0.5 s and are killed" in capfd.readouterr().err
    nobody_left(tmp_path)


def test_a_stopped_worker_is_reaped_at_once(workers: Any, tmp_path: Path) -> None:
    script = ("together()\nif start == 2: sys.exit(0)\nif rank: os.kill(os.getpid(), signal.SIGSTOP)\n"
              "time.sleep(0.5)\nsys.exit(75)")
    began = time.monotonic()
    assert workers(script, grace=60) == 0
    assert time.monotonic() - began < 15 and starts(tmp_path) == [2, 2]
    nobody_left(tmp_path)


SUPERVISOR = """
import pathlib, sys
from danlu.train import launch
out = pathlib.Path(sys.argv[1])
launch.command = lambda words: [sys.executable, str(out / "worker.py"), str(out), *words]
sys.exit(launch.supervise(["train"], world=2, run_folder=out))
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Any:
    """A supervisor in a process of its own, with two workers that ignore SIGINT."""
    (tmp_path / "worker.py").write_text(BEGIN + FOLLOWING + "signal.signal(2, signal.SIG_IGN)\n"
                                        "(out / f'ready-{rank}').touch()\ntime.sleep(100)\n")
    root = str(Path(danlu.__file__).parent.parent)
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path)], env=os.environ | {"PYTHONPATH": root})
    try:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert all(alive(pid) for pid in pids(tmp_path)) and len(pids(tmp_path)) == 2
        yield process
    finally:
        for pid in [process.pid, *pids(tmp_path)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError as error:
                assert error.errno == errno.ESRCH
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_workers_die_with_a_killed_supervisor(supervisor: Any, tmp_path: Path) -> None:
    supervisor.kill()
    supervisor.wait()
    nobody_left(tmp_path)


def test_a_second_interrupt_ends_at_once(supervisor: Any, tmp_path: Path) -> None:
    supervisor.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert supervisor.poll() is None
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(5) == 130
    nobody_left(tmp_path)


@pytest.mark.parametrize(("codes", "named"), [
    ({0: 0, 1: 0}, (0, 0)), ({0: 75, 1: -9}, (1, -9)), ({0: 75, 1: 75}, (0, 75)), ({0: -9, 1: 5}, (1, 5)),
    ({0: 75, 1: 143}, (1, 143)), ({0: 75, 1: 1}, (1, 1)), ({}, (0, 0)),
])
def test_the_rank_at_fault_is_named(codes: dict[int, int], named: tuple[int, int]) -> None:
    assert judged(codes) == named


def test_variables_of_other_launchers_are_not_passed_over() -> None:
    refuse_elsewhere({"NNODES": "1", "NPROC_PER_NODE": "4"}, 4)
    refuse_elsewhere({"NPROC_PER_NODE": "gpu"}, 4)
    with pytest.raises(ConfigError, match="this machine only"):
        refuse_elsewhere({"NNODES": "2"}, 4)
    with pytest.raises(ConfigError, match="NPROC_PER_NODE=8, but the layout needs 4"):
        refuse_elsewhere({"NPROC_PER_NODE": "8"}, 4)


def test_a_fault_is_planted_in_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault, "_armed", {})
    fault.arm("rank1.train.step:nan:2,grad:nan,rank0.loss:nan", rank=1)
    assert fault.armed() == "train.step:nan:2,grad:nan:1"
    monkeypatch.setattr(fault, "_armed", {})
    fault.arm("rank1.train.step:nan:2,rank0.loss:nan")
    assert fault.armed() == "loss:nan:1"


class TestWhatARankSays:
    """Errors of several ranks: one sentence, from the one at fault."""

    def run(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, **options: Any) -> int:
        def main(**_options: Any) -> int:
            raise error

        monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=main))
        return cli.main(["version"], **options)

    def test_lost_processes_are_temporary(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        from torch import distributed as dist

        for error in (RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1\nmore"),
                      dist.DistBackendError("NCCL error"), dist.DistNetworkError("no route")):
            assert self.run(monkeypatch, error, rank=1) == 75
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 1 and "the other processes of the run do not answer any more: " in said[0]
            assert "gloo" not in said[0]
            with pytest.raises(RuntimeError):
                self.run(monkeypatch, error)
        with pytest.raises(RuntimeError):
            self.run(monkeypatch, RuntimeError("shapes differ"), rank=1)

    def test_what_all_would_say_is_said_once(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                             tmp_path: Path) -> None:
        for rank in range(3):
            assert self.run(monkeypatch, ConfigError("no such thing"), rank=rank, told=tmp_path) == 2
        assert capsys.readouterr().err == "danlu: no such thing\n"
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        assert self.run(monkeypatch, RuntimeError("Connection closed by peer"), rank=1, told=tmp_path) == 75
        assert capsys.readouterr().err == "", "the cause has been told"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "my recipe.yaml"
    path.write_text("out: runs/GPT_1\nmodel: {kind: decoder, family: gpt2, width: 32, layers: 4, heads: 4, context: 64}\n"
                    "data: [{path: data}]\nobjective: causal_lm\noptim: {kind: adamw, lr: 1e-3}\nschedule: constant\n"
                    "steps: 10\nrows: 32\nlength: 32\nresume: false\n", encoding="utf-8")
    return path


def test_a_slurm_script_saves_and_goes_back_into_the_queue(recipe: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--render", "slurm", str(recipe), "layout.dp=16", "--nodes", "4", "--optim.lr", "2e-3"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=False).returncode == 0
    for part in ("#SBATCH --nodes=4", "#SBATCH --gpus-per-node=4", "#SBATCH --signal=B:TERM@120", "#SBATCH --requeue",
                 "--nnodes=4 --nproc-per-node=4 --max-restarts=3", "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
                 shlex.quote(str(recipe)) + " layout.dp=16 --optim.lr=2e-3 resume=true"):
        assert part in script, part
    stubs = {"scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$@" >> "$LOG"; fi',
             "scancel": 'echo scancel "$@" >> "$LOG"; kill -TERM $(cat "$LOG.pid")',
             "srun": 'echo $$ > "$LOG.pid"; trap "sleep 0.3; exit 143" TERM; echo "$@" >> "$LOG"\n'
                     'for i in $(seq 100); do sleep 0.1; done'}
    for name, text in stubs.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    log = tmp_path / "log"
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    job = subprocess.Popen(["bash", tmp_path / "job.sh"], env=os.environ | {
        "PATH": path, "LOG": str(log), "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]"})
    end = time.monotonic() + 10
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    job.terminate()
    assert job.wait(20) == 143
    lines = log.read_text().splitlines()
    assert "--rdzv-endpoint=n1:20017 --rdzv-id=17" in lines[0] and lines[1:] == ["scancel --signal=TERM 17", "requeue 17"]


def test_a_kubernetes_manifest_needs_no_operator(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["launch", "--render=k8s", str(recipe), "layout.dp=16", "--image", "us/danlu:1"]) == 0
    settings, service, job = yaml.safe_load_all(capsys.readouterr().out)
    (tmp_path / "again.yaml").write_text(settings["data"]["recipe.yaml"])
    run = danlu.config.load(danlu.Run, tmp_path / "again.yaml")
    assert run.layout.world == 16 and run.resume and run.rows == 32
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert pod["subdomain"] == service["metadata"]["name"] == name == "danlu-gpt-1"
    assert job["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]
    container = pod["containers"][0]
    assert container["image"] == "us/danlu:1" and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    start = container["command"][2]
    assert f"--nnodes=2 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint={name}-0.{name}:" in start
    assert subprocess.run(["sh", "-n", "-c", start], check=False).returncode == 0
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("words", ["--gpus-per-node=3", "--nodes=3", "--nodes=2 --gpus-per-node=4", "--gpus-per-node=0"])
def test_a_layout_that_does_not_fit_the_machines_is_refused(recipe: Path, words: str,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--render", "slurm", str(recipe), "layout.dp=16", *words.split()]) == 2
    assert "the layout needs 16 processes" in capsys.readouterr().err


def test_a_port_that_was_taken_meanwhile_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(taken.getsockname()[1])), ("RANK", "0"),
                            ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        with pytest.raises(TemporaryError, match="another program") as caught:
            parallel.join(Layout(dp=2), torch.device("cpu"))
    assert caught.value.code not in FINAL                    # so the supervisor starts all again, at another port
