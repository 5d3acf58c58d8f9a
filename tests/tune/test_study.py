"""A study: real trials in processes of their own; the rest with trials that only pretend, to count and compare."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import children_of, command, danlu, environment

from danlu import config
from danlu.errors import ConfigError, DataError, IncompatibleError, Stopped
from danlu.train.recipe import Run
from danlu.train.signals import Asked
from danlu.tune import space, study, trial

SEARCH = ("optim.lr=log(1e-4,1e-1)", "rows=[4,8]")


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""out: {tmp_path}/run
data: {corpus}
model: {{kind: decoder, family: llama, width: 16, layers: 1, heads: 2, context: 64}}
objective: causal_lm
optim: {{kind: adamw, lr: 1e-3}}
schedule: {{kind: cosine, warmup: 2}}
steps: 12
rows: 8
length: 32
overlong: split
precision: fp32
every: {{log: 4, evaluate: 4}}
guard: {{reload: false}}
threads: 1
device: cpu
""", encoding="utf-8")
    return path


def job(recipe: Path, out: Path, *words: str, **changes: Any) -> study.Job:
    axes = space.read(words or SEARCH, None)
    run = space.check(axes, recipe, [])
    about: dict[str, Any] = {"recipe": {}, "space": {k: config.dump(a) for k, a in axes.items()}, "metric": "eval/loss",
                             "direction": "minimize", "sampler": "tpe", "pruner": "none", "seed": 0} | changes
    return study.Job(recipe, [], axes, study.Search(**about), out, run)


def pretend(curve: Callable[[float], list[float]]) -> Callable[..., trial.Ended]:
    """A trial that writes `curve(learning rate)`, one evaluation every 4 steps, and looks whether it goes on."""
    def run(words: list[str], folder: Path, *, hopeless: Callable[[], bool], asked: Asked) -> trial.Ended:
        folder.mkdir(parents=True, exist_ok=True)
        lr = float(next(word for word in words if word.startswith("optim.lr=")).partition("=")[2])
        for number, value in enumerate(curve(lr)):
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 4 * number, "eval/loss": value}) + "\n")
            if hopeless():
                return trial.Ended(143, True, "")
        return trial.Ended(0, False, "")
    return run


def steady(lr: float) -> list[float]:
    return [9.0, 5 + lr, 4 + lr, 3 + lr]


def test_a_real_study_of_three_trials(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tune"
    ended = danlu("tune", recipe, "--trials", 3, *(w for s in SEARCH for w in ("--search", s)), "--out", out, "--json").clean()
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    lines = told["trials"]
    assert [line["state"] for line in lines if line["trial"] == told["best"]["trial"]] == ["complete"]
    assert {line["state"] for line in lines} <= {"complete", "pruned"} and len(lines) == 3
    for line in lines:
        folder = out / line["folder"]
        metrics = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [m["eval/loss"] for m in metrics if "eval/loss" in m and m["step"]]
        if line["state"] == "complete":
            assert line["value"] == min(losses) and line["step"] == 12
        made = config.load(Run, folder / "recipe.yaml")
        assert (made.optim.lr, made.rows, made.out) == (line["values"]["optim.lr"], line["values"]["rows"], folder)
    best = config.load(Run, Path(told["recipe"]))
    assert (best.optim.lr, best.rows) == (told["best"]["values"]["optim.lr"], told["best"]["values"]["rows"])
    with (out / "trials.csv").open() as file:
        assert [float(row["optim.lr"]) for row in csv.DictReader(file)] == [line["values"]["optim.lr"] for line in lines]
    monkeypatch.setattr(trial, "run", pretend(steady))   # the same seed draws the same values
    again = study.study(job(recipe, tmp_path / "again"), study.Limits(3, None))
    assert [each.params for each in again] == [line["values"] for line in lines]


@pytest.mark.slow
def test_a_trial_that_fails_is_one_failed_trial(recipe: Path, tmp_path: Path) -> None:
    out, good = tmp_path / "tune", config.load(Run, recipe).data[0].path
    ended = danlu("tune", recipe, "--trials", 9, "--sampler", "grid", "--pruner", "none", "--search",
                  f"data.0.path=[{tmp_path / 'missing'}, {good}]", "--out", out).clean()
    assert ended.code == 0, ended.err
    lines = json.loads((out / "study.json").read_text())["trials"]
    assert sorted(line["state"] for line in lines) == ["complete", "fail"], "a grid ends when it is done"
    failed = next(line for line in lines if line["state"] == "fail")
    assert failed["exit_code"] in (2, 3) and failed["error"].startswith("danlu: ")
    assert failed["error"] == (out / failed["folder"] / "train.log").read_text().splitlines()[-1]
    assert f"danlu train {out / 'best.yaml'}" in ended.out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_study_goes_on_and_leaves_no_child(recipe: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "tune"
    words = ("tune", recipe, "steps=160", "every.save=40", "--trials", 2, "--search", SEARCH[0], "--pruner", "none", "--out", out)
    process = subprocess.Popen(command(*words), env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not list(out.glob("trial-0000/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = children_of(process.pid)
    assert len(children) == 1
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (-number, 128 + number)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    ended = danlu(*words, timeout=400).clean()
    assert ended.code == 0 and "going on with the study" in ended.err
    assert "resuming from checkpoint-" in (out / "trial-0000" / "train.log").read_text()
    assert [line["state"] for line in json.loads((out / "study.json").read_text())["trials"]] == ["complete"] * 2


@pytest.mark.slow
def test_a_real_trial_that_falls_behind_is_stopped(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "tune"
    ended = danlu("tune", recipe, "steps=3000", "every.evaluate=20", "--trials", 2, "--sampler", "grid", "--seed", 0,
                  "--search", "optim.lr=[3e-2,1e-6]", "--out", out, timeout=600).clean()
    assert ended.code == 0, ended.err
    lines = json.loads((out / "study.json").read_text())["trials"]
    assert [line["values"]["optim.lr"] for line in lines] == [3e-2, 1e-6], "with this seed the good one comes first"
    assert [line["state"] for line in lines] == ["complete", "pruned"] and lines[1]["step"] < 3000


def test_a_trial_that_falls_behind_is_stopped_and_counted(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "run", pretend(lambda lr: [9.0, 5.0, 4.0, 3.0] if next(order) else [9.0, 8.0, 7.0, 6.0]))
    order = iter([True, False, True])
    found = study.study(job(recipe, tmp_path / "tune", pruner="median"), study.Limits(3, None))
    assert [each.state.name for each in found] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert found[1].intermediate_values == {4: 8.0} and found[0].value == 3.0


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_same_seed_same_trials_however_often_interrupted(
        recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    words = ("optim.lr=[1e-4,1e-3,1e-2,3e-2,5e-2,1e-1]", "rows=[4,8]") if sampler == "grid" else SEARCH
    monkeypatch.setattr(trial, "run", pretend(steady))
    whole = study.study(job(recipe, tmp_path / "whole", *words, sampler=sampler), study.Limits(12, None))
    for total in (1, 5, 11, 12):
        parts = study.study(job(recipe, tmp_path / "parts", *words, sampler=sampler), study.Limits(total, None))
        assert len(parts) == total
    assert [each.params for each in parts] == [each.params for each in whole]
    other = study.study(job(recipe, tmp_path / "other", *words, sampler=sampler, seed=1), study.Limits(12, None))
    assert [each.params for each in other] != [each.params for each in whole]
    assert len({json.dumps(each.params) for each in whole}) == 12, "no trial is made twice"


def test_the_trial_under_way_goes_on_with_its_values(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(words: list[str], folder: Path, *, hopeless: Callable[[], bool], asked: Asked) -> trial.Ended:
        asked.signal = signal.SIGTERM
        return trial.Ended(143, False, "")

    monkeypatch.setattr(trial, "run", stopped)
    out = tmp_path / "tune"
    with pytest.raises(Stopped):
        study.study(job(recipe, out), study.Limits(2, None))
    left = json.loads((out / "study.json").read_text())["trials"]
    assert [line["state"] for line in left] == ["running"]
    with (out / "study.log").open("a") as file:          # half a line, as a kill leaves it; and the lock
        file.write('{"op_code": 6, "worker')
    os.symlink("study.log", out / "study.log.lock")
    monkeypatch.setattr(trial, "run", pretend(steady))
    found = study.study(job(recipe, out), study.Limits(2, None))
    assert [each.state.name for each in found] == ["COMPLETE", "COMPLETE"] and found[0].params == left[0]["values"]


def test_what_a_study_refuses(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "run", pretend(steady))
    out = tmp_path / "tune"
    study.study(job(recipe, out), study.Limits(1, None))
    with pytest.raises(IncompatibleError, match="another metric, direction"):
        study.study(job(recipe, out, metric="eval/accuracy", direction="maximize"), study.Limits(2, None))
    with pytest.raises(IncompatibleError, match="another space"):
        study.study(job(recipe, out, "optim.lr=log(1e-4,1e-2)"), study.Limits(2, None))
    with study.alone(out), pytest.raises(ConfigError, match="another danlu tune"):
        study.study(job(recipe, out), study.Limits(2, None))
    with pytest.raises(ConfigError, match=r"no metric eval/f1; there are eval/loss"):
        study.study(job(recipe, tmp_path / "metric", metric="eval/f1"), study.Limits(2, None))
    monkeypatch.setattr(trial, "run", pretend(lambda lr: [9.0, float("nan")]))
    with pytest.raises(DataError, match=r"the first 3 trials have failed.*no evaluation gave a finite eval/loss"):
        study.study(job(recipe, tmp_path / "failing"), study.Limits(9, None))


def test_more_is_better_for_most_metrics() -> None:
    falling = ("eval/loss", "eval/mlm_loss", "eval/perplexity", "eval/mse", "eval/mae")
    assert {study.direction(name) for name in falling} == {"minimize"}
    assert {study.direction(name) for name in ("eval/accuracy", "eval/f1", "eval/pearson")} == {"maximize"}


def test_time_up_begins_no_trial(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "run", pretend(steady))
    assert study.study(job(recipe, tmp_path / "tune"), study.Limits(5, 0.0)) == []
