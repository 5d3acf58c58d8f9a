"""Runs of several processes survive what machines do to them: the same weights, the same rows, and no process left over."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import Ended, command, environment

STEPS, SAVE, ROWS = 30, 6, 8
COPIES = ["layout.dp=2"]
SHARDS = ["layout.dp=2", "layout.shard=full"]
RECOVERY = 60.0                                          # seconds from a death to the next step, on a machine with other work

# Runs in every process started below, as `sitecustomize`: writes down which rows each step was trained on and what was saved.
WITNESS = """
import importlib.abc, importlib.util, json, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "danlu.train.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), watch(module))
        return spec

def watch(loop):
    from danlu.train import checkpoint, feed
    batch, step, save, plans = feed.Steps.batch, loop.Loop.step, checkpoint.save, []
    rank, attempt = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    file = os.open(os.path.join(os.environ["WITNESS"], f"{attempt}-{rank}"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def tell(**line):
        line = {"at": time.time(), "attempt": attempt, "rank": rank, **line}
        os.write(file, (json.dumps(line) + chr(10)).encode())

    def watched_batch(self, dealt):
        index, of = self.share
        size = self.per_step // of
        plans[:] = [[list(plan[:4]), plan.pieces] for plan in dealt[index * size : (index + 1) * size]]
        return batch(self, dealt)

    def watched_step(self, *arguments):
        done = step(self, *arguments)
        tell(step=self.progress.step + 1, dp=self.engine.world.index("dp"), rows=plans, skipped=bool(self.guard.reason))
        return done

    def watched_save(out, snap, **options):
        path = save(out, snap, **options)
        tell(saved=snap.step)
        return path

    feed.Steps.batch, loop.Loop.step, checkpoint.save = watched_batch, watched_step, watched_save

if "WITNESS" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("witness")
    (folder / "sitecustomize.py").write_text(WITNESS)
    return folder


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps that saves every 6."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"out: unused\nmodel: {{kind: decoder, family: llama, width: 32, layers: 2, heads: 4, context: 64}}\n"
        f"data: [{{path: {corpus}}}]\nobjective: causal_lm\noptim: {{kind: adamw, lr: 1e-3}}\n"
        f"schedule: {{kind: cosine, warmup: 5}}\nsteps: {STEPS}\nrows: {ROWS}\nlength: 32\noverlong: split\nprecision: fp32\n"
        f"every: {{log: 1, evaluate: 12, save: {SAVE}, keep: 2}}\nthreads: 1\n", encoding="utf-8")
    return path


class Started:
    """A training run in processes of its own, in a folder of its own, with witnesses."""

    def __init__(self, recipe: Path, witness: Path, out: Path, *changes: str, fault: str = "") -> None:
        self.out, self.seen = out, out.with_name(f"{out.name}-seen")
        self.seen.mkdir(exist_ok=True)
        self.log = self.seen / "stderr.txt"
        path = os.pathsep.join(filter(None, (str(witness), os.environ.get("PYTHONPATH", ""))))
        self.began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command("train", recipe, "--out", out, *changes), stdout=subprocess.DEVNULL, stderr=log, text=True,
                env=environment(fault, WITNESS=str(self.seen), PYTHONPATH=path))

    @property
    def err(self) -> str:
        return self.log.read_text()

    def until(self, happens: Callable[[], Any], patience: float = RECOVERY) -> Any:
        """Return what `happens` returns, once it is true; the run must not end before."""
        end = time.monotonic() + patience
        while not (value := happens()):
            assert self.process.poll() is None, f"ended before, with {self.process.returncode}: {self.err}"
            assert time.monotonic() < end, f"{self.err}\n{self.busy()}"
            time.sleep(0.01)
        return value

    def busy(self) -> str:
        """Of each process its age, the seconds it has computed and what it waits for: whether it is slow or stands still."""
        lines, since_boot = [], float(Path("/proc/uptime").read_text().split()[0])
        for pid in living(self.out):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            age, computed = since_boot - int(fields[19]) / 100, (int(fields[11]) + int(fields[12])) / 100
            lines.append(f"{pid}: {age:.0f} s old, has computed {computed:.1f} s, {Path(f'/proc/{pid}/wchan').read_text()}")
        return "\n".join([*lines, f"load {Path('/proc/loadavg').read_text()}"])

    def steps(self) -> list[dict[str, Any]]:
        return [line for line in told(self.out) if "step" in line]

    def workers(self) -> dict[int, int]:
        """The process ids of the workers that live, by rank."""
        found = {}
        for pid in living(self.out):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): pid for word in words if word.startswith(b"RANK=")}
        return found

    def kill(self) -> None:
        """Kill the supervisor; its workers must follow by themselves."""
        self.process.kill()
        self.process.wait()
        gone(self.out)

    def ended(self, patience: float = 120.0) -> Ended:
        """Wait for the end, and for that of every process it has started."""
        self.process.wait(timeout=patience)
        seconds = time.monotonic() - self.began
        gone(self.out, 1.0)
        code = self.process.returncode
        return Ended(code if code >= 0 else 128 - code, "", self.err, seconds).clean()


@pytest.fixture
def start(recipe: Path, witness: Path, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts runs; whatever the test does, none of their processes is left."""
    started: list[Started] = []

    def begin(*changes: str, fault: str = "", name: str = "run") -> Started:
        started.append(Started(recipe, witness, tmp_path / name, *changes, fault=fault))
        return started[-1]

    yield begin
    left = [pid for each in started for pid in living(each.out)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for each in started:
        each.process.wait()
    assert left == []


def living(out: Path) -> list[int]:
    """The processes, whoever is their parent, whose command line names this run folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:                                  # it has just ended
            continue
        if str(out).encode() in words and state != "Z":
            found.append(int(folder.name))
    return found


def gone(out: Path, patience: float = 5.0) -> None:
    end = time.monotonic() + patience
    while (left := living(out)) and time.monotonic() < end:
        time.sleep(0.02)
    assert left == []


def weights(out: Path, step: int = STEPS) -> str:
    """What `danlu ckpt hash` prints."""
    return hashlib.sha256((out / f"checkpoint-{step}" / "model.safetensors").read_bytes()).hexdigest()


def told(out: Path) -> list[dict[str, Any]]:
    """All that the witnesses have written, in the order of its happening."""
    files = [file for file in out.with_name(f"{out.name}-seen").iterdir() if file.suffix != ".txt"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return sorted(lines, key=lambda line: line["at"])


def rows(out: Path) -> list[list[Any]]:
    """The rows of each step, in order; of a step that was made several times, those of the attempt that went on from it."""
    last: dict[int, dict[str, dict[int, Any]]] = {}
    for line in told(out):
        if "step" in line:
            shares = last.setdefault(line["step"], {}).setdefault(line["attempt"], {})
            assert shares.setdefault(line["dp"], line["rows"]) == line["rows"], "processes that share rows read the same"
    assert sorted(last) == list(range(1, STEPS + 1))
    steps = [list(last[step].values())[-1] for step in sorted(last)]
    return [[row for _dp, share in sorted(shares.items()) for row in share] for shares in steps]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    assert [step for step, _loss in found] == list(range(1, STEPS + 1)), "every step once, in order"
    return [loss for _step, loss in found]


def whole(out: Path, reference: Path) -> None:
    """A run that ended as the uninterrupted one did: same rows, same losses, no litter."""
    assert rows(out) == rows(reference)
    assert losses(out) == pytest.approx(losses(reference), abs=1e-5, rel=0)
    assert [path.name for path in out.iterdir() if path.name.startswith((".tmp", ".trash"))] == []
    assert not (out / "heartbeat").exists()


@pytest.fixture(scope="module")
def references(recipe: Path, witness: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The uninterrupted run under a layout, made when it is first asked for."""
    made: dict[tuple[str, ...], Path] = {}

    def reference(*layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("reference") / "run"
            assert Started(recipe, witness, made[layout], *layout).ended().code == 0
        return made[layout]

    return reference


@pytest.mark.slow
def test_one_process_and_two_train_on_the_same_rows(references: Callable[..., Path]) -> None:
    alone, two = references(), references(*COPIES)
    whole(two, alone)
    keys = [tuple(row[0]) for step in rows(alone) for row in step]
    assert len(set(keys)) == len(keys) == STEPS * ROWS, "each row once"


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_nothing_changes(start: Callable[..., Started],
                                                              references: Callable[..., Path]) -> None:
    run = start(*COPIES, fault="rank1.train.step:kill:15")
    ended = run.ended()
    assert ended.code == 0, ended.err
    assert re.search(r"rank 1 was killed by SIGKILL; starting again from checkpoint-(6|12) in 1 s", ended.err)
    whole(run.out, references(*COPIES))
    assert weights(run.out) == weights(references(*COPIES))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_are_ten_recoveries(start: Callable[..., Started], references: Callable[..., Path]) -> None:
    draw, reference = random.Random(0), references(*SHARDS)
    for number in range(10):
        run = start(*SHARDS, fault=f"train.step:slow:{draw.randint(2, STEPS)}", name=f"run-{number}")
        run.until(run.steps)
        time.sleep(draw.uniform(0, 0.9))                 # less than the planted pause: the run is not over
        killed, before = time.time(), len({line["attempt"] for line in run.steps()})
        os.kill(run.workers()[number % 2], signal.SIGKILL)
        run.until(lambda run=run, before=before: len({line["attempt"] for line in run.steps()}) > before)
        assert run.steps()[-1]["at"] - killed < RECOVERY
        ended = run.ended()
        assert ended.code == 0 and f"rank {number % 2} was killed by SIGKILL; starting again" in ended.err, ended.err
        whole(run.out, reference)
        assert weights(run.out) == weights(reference)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 1.5, 3.0])
def test_a_worker_killed_before_its_first_step_is_started_again(start: Callable[..., Started], references: Callable[..., Path],
                                                                delay: float) -> None:
    run = start(*COPIES)
    run.until(lambda: 1 in run.workers())
    time.sleep(delay)                                    # while it imports, meets the other, builds
    os.kill(run.workers()[1], signal.SIGKILL)
    ended = run.ended()
    assert ended.code == 0 and "rank 1 was killed by SIGKILL; starting again" in ended.err, ended.err
    whole(run.out, references(*COPIES))
    assert weights(run.out) == weights(references(*COPIES))


def saved(out: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*")}


CHAINS = [
    [([], "process"), (SHARDS, "worker"), (["layout.dp=2", "layout.tp=2"], "supervisor"), ([], "process"), ([], "")],
    [(["layout.pp=2", "layout.micro=2"], "supervisor"), (["layout.cp=2"], "worker"), ([], "process"),
     (["layout.dp=2", "layout.shard=grads"], "worker"), (["layout.dp=2", "layout.shard=grads"], "")],
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chain", CHAINS, ids=["1-2-4-1", "pp-cp-1-dp"])
def test_a_run_goes_on_under_another_layout_wherever_it_was_killed(
        start: Callable[..., Started], references: Callable[..., Path], chain: list[tuple[list[str], str]]) -> None:
    out = Path()
    for number, (layout, victim) in enumerate(chain):
        before = saved(out) if number else {0}
        at = 1 + (number == 0)                           # a new run saves step 0 first
        fault = {"process": f"ckpt.after_rename:kill:{at}", "worker": f"rank1.ckpt.after_rename:kill:{at}",
                 "supervisor": f"train.step:slow:{SAVE + 2}", "": ""}[victim]
        run = start(*layout, fault=fault)
        out = run.out
        if victim == "worker":                           # it would be started again, under the same layout
            run.until(lambda run=run: "rank 1 was killed by SIGKILL; starting again" in run.err)
            run.kill()
        elif victim == "supervisor":
            run.until(lambda run=run, before=before: saved(run.out) - before - {0})
            run.kill()
        else:
            assert run.ended().code == (137 if victim else 0), run.err
        if number:
            assert f"resuming from checkpoint-{max(before)}" in run.err, "each layout has got as far as its first save"
            assert not victim or max(saved(out)) == min(max(before) + SAVE, STEPS)
    whole(out, references())


def test_a_signal_to_the_supervisor_saves_once_and_ends_all(start: Callable[..., Started]) -> None:
    run = start(*COPIES, fault="train.step:slow:9")
    run.until(lambda: len(run.steps()) == 2 * 8)
    time.sleep(0.1)                                      # the ninth step has begun, and waits
    asked = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    ended = run.ended(30.0)
    assert time.monotonic() - asked < 30 and ended.code == 143
    assert ended.err.count("stopped by a signal at step 9; the same command goes on from there") == 1, ended.err
    for rank in range(2):
        assert [line["saved"] for line in told(run.out) if line["rank"] == rank and "saved" in line] == [0, 6, 9]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "number"), [
    (COPIES, signal.SIGTERM), (SHARDS, signal.SIGUSR1), (["layout.tp=2"], signal.SIGTERM),
    (["layout.pp=2", "layout.micro=2"], signal.SIGINT)], ids=["copies", "shards", "tp", "pp"])
def test_after_a_signal_the_same_command_goes_on(start: Callable[..., Started], references: Callable[..., Path],
                                                 layout: list[str], number: signal.Signals) -> None:
    run = start(*layout, fault="train.step:slow:9")
    run.until(lambda: len(run.steps()) == 2 * 8)
    run.process.send_signal(number)
    assert run.ended(30.0).code == 128 + number
    assert max(saved(run.out)) in (8, 9)
    assert start(*layout).ended().code == 0
    whole(run.out, references(*layout))
    assert weights(run.out) == weights(references(*layout))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_started_again(start: Callable[..., Started], references: Callable[..., Path],
                                                           rank: int) -> None:
    run = start(*COPIES, "guard.hang=8", fault=f"rank{rank}.train.step:stop:15")
    ended = run.ended()
    assert ended.code == 0, ended.err
    assert re.search(rf"no sign of life from rank {rank} \(last heard of at step \d+\)", ended.err), ended.err
    assert f"rank {1 - rank} ended with exit code 75; starting again" in ended.err
    lines = run.steps()
    attempts = list(dict.fromkeys(line["attempt"] for line in lines))
    died, alive = (next(line["at"] for line in lines[::way] if line["attempt"] == attempt)
                   for way, attempt in ((-1, attempts[0]), (1, attempts[1])))
    assert len(attempts) == 2 and alive - died < RECOVERY
    whole(run.out, references(*COPIES))
    assert weights(run.out) == weights(references(*COPIES))


@pytest.mark.parametrize("layout", [COPIES, pytest.param(SHARDS, marks=pytest.mark.slow),
                                    pytest.param(["layout.tp=2"], marks=pytest.mark.slow),
                                    pytest.param(["layout.pp=2", "layout.micro=2"], marks=pytest.mark.slow)])
def test_a_bad_gradient_of_one_rank_is_skipped_by_all(start: Callable[..., Started], layout: list[str]) -> None:
    run = start(*layout, fault="rank1.grad:nan:10")
    ended = run.ended()
    assert ended.code == 6 and "4 updates in a row" in ended.last and "starting again" not in ended.err, ended.err
    for rank in range(2):
        skipped = [line["step"] for line in run.steps() if line["rank"] == rank and line["skipped"]]
        assert skipped == [10, 11, 12], "the thirteenth ends the run"
        dumped = json.loads((run.out / f"failed-batch-{rank}.json").read_text())
        assert dumped["step"] == 13 and dumped["batch"]["ids"]


@pytest.mark.parametrize(("changes", "words"), [
    (["layout.tp=3"], "layout.tp=3 does not divide model.heads=4; use one of [1, 2, 4]"),
    pytest.param(["layout.dp=3", "layout.pp=4"], "layout.dp=3 does not divide rows=8; use one of [1, 2, 4, 8]",
                 marks=pytest.mark.slow),
    pytest.param(["layout.pp=2"], "set layout.micro to one of [2, 4, 8]", marks=pytest.mark.slow),
])
def test_a_layout_that_cannot_be_is_refused_before_anything_starts(start: Callable[..., Started], changes: list[str],
                                                                   words: str) -> None:
    run = start(*changes)
    ended = run.ended(30.0)
    assert ended.code == 2 and words in ended.last, ended.err
    assert not run.out.exists() and told(run.out) == []


@pytest.mark.slow
def test_what_only_the_data_forbids_is_said_once_and_not_tried_again(start: Callable[..., Started]) -> None:
    run = start("layout.tp=3", "model.heads=6", "model.width=48", "model.hidden=96")
    ended = run.ended()
    assert ended.code == 2 and ended.err.count("layout.tp=3 does not divide model.vocab=320") == 1, ended.err
    assert "starting again" not in ended.err and not saved(run.out)


@pytest.mark.slow
def test_data_that_changes_under_a_run_ends_it(start: Callable[..., Started], corpus: Path, tmp_path: Path) -> None:
    """Not even a death, which is started again, makes it train on the changed file."""
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    run = start(*COPIES, f"data={data}", fault="rank1.ckpt.after_rename:kill:2")
    run.until(lambda: "starting again from checkpoint-6" in run.err)
    shard = next((data / "train").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ended = run.ended()
    assert ended.code == 3 and ended.err.count("starting again") == 1 and ended.err.count(str(shard)) == 1, ended.err
    assert shard.name in ended.last


@pytest.mark.slow
def test_a_dead_data_worker_of_one_rank_ends_all(start: Callable[..., Started]) -> None:
    run = start(*COPIES, "workers=1", fault="rank1.data.worker:kill:8")
    ended = run.ended()
    assert ended.code == 3 and "a process that makes batches died" in ended.last and "starting again" not in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("layout", [COPIES, SHARDS], ids=["copies", "shards"])
@pytest.mark.parametrize("point", ["rank0.ckpt.before_manifest", "rank1.ckpt.before_shard", "rank0.ckpt.before_rename",
                                   "rank1.ckpt.async.mid"])
def test_killed_while_saving_never_loads_half_a_checkpoint(start: Callable[..., Started], references: Callable[..., Path],
                                                           point: str, layout: list[str]) -> None:
    run = start(*layout, fault=f"{point}:kill:3")        # the saves of steps 0, 6 and 12
    ended = run.ended()
    assert ended.code == 0, ended.err
    assert f"rank {point[4]} was killed by SIGKILL; starting again from checkpoint-6" in ended.err
    assert "resuming from checkpoint-6" in ended.err and "damaged" not in ended.err
    whole(run.out, references(*layout))
    assert weights(run.out) == weights(references(*layout))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["ckpt.before_shard", "ckpt.after_rename"])
def test_killed_at_the_last_save_is_started_again(start: Callable[..., Started], references: Callable[..., Path],
                                                  point: str) -> None:
    run = start(*COPIES, fault=f"rank1.{point}:kill:{STEPS // SAVE + 1}")
    ended = run.ended()
    assert ended.code == 0, ended.err
    assert "rank 1 was killed by SIGKILL; starting again" in ended.err and "could not be written" not in ended.err
    whole(run.out, references(*COPIES))
    assert weights(run.out) == weights(references(*COPIES))


@pytest.mark.slow
def test_a_save_that_fails_in_one_rank_is_told_once_and_the_run_goes_on(start: Callable[..., Started],
                                                                        references: Callable[..., Path]) -> None:
    run = start(*SHARDS, fault="rank1.ckpt.before_shard:enospc:3")
    ended = run.ended()
    assert ended.code == 0 and ended.err.count("a checkpoint could not be written: process 1") == 1, ended.err
    assert 12 not in {line.get("saved") for line in told(run.out)}
    whole(run.out, references(*SHARDS))
    assert weights(run.out) == weights(references(*SHARDS))


def test_a_layout_whose_gradients_are_no_numbers_is_not_verified(recipe: Path, tmp_path: Path) -> None:
    ended = subprocess.run(command("verify", "layout", recipe, "--out", tmp_path / "run", "layout.pp=2", "layout.micro=2"),
                           env=environment("rank1.grad:nan"), capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 6 and "is not finite" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
