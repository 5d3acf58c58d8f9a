"""The best checkpoint by any metric: it stays, early stopping waits for it, and it is what every verb then uses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import several
import torch

import danlu
from danlu.evaluate.loss import Loss
from danlu.evaluate.subject import open_subject
from danlu.models import weights
from danlu.train import checkpoint, run
from danlu.train.recipe import Run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    several.tokenizer(folder / "tok")
    return several.labelled(folder / "rows.jsonl")


def measuring(values: list[float], losses: list[float]) -> Any:
    """Return a stand-in for evaluation that finds these accuracies and losses, one after the other."""
    told: Iterator[tuple[float, float]] = iter(zip(values, losses, strict=True))

    def held_out(*_given: Any) -> Loss:
        accuracy, loss = next(told)
        return Loss(("classify",), (1.0,), torch.tensor([[loss]]), torch.ones(1, 1), figures={"accuracy": accuracy})

    return held_out


def recipe(rows: Path, out: Path, **changes: Any) -> Run:
    base: dict[str, Any] = {
        "objective": "classify", "tokenizer": str(rows.parent / "tok"), "model": several.ENCODER, "data": [{"path": str(rows)}],
        "steps": 100, "every": {"log": 1, "evaluate": 1, "keep": 2}}
    return several.recipe(out, **base | changes)


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2), ("loss", 4), ("eval_accuracy", 2)])
def test_the_best_is_by_the_metric_and_its_direction(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, best: int
) -> None:
    """Accuracy is highest at step 2, loss lowest at step 4; the run waits three evaluations for something better."""
    monkeypatch.setattr(run, "held_out", measuring([0.5, 0.6, 0.9, 0.8, 0.9, 0.7, 0.7, 0.7],
                                                   [1.0, 0.9, 0.8, 0.7, 0.5, 0.6, 0.6, 0.6]))
    out = tmp_path / "run"
    run.train(recipe(rows, out, metric=metric, stop={"patience": 3}))
    assert [line["step"] for line in several.lines(out) if "eval/loss" in line][-1] == best + 3
    assert checkpoint.chosen(out) == out / f"checkpoint-{best}"
    assert open_subject(out).folder == out / f"checkpoint-{best}", "danlu eval and predict"
    kept = weights.load(out / f"checkpoint-{best}").state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in danlu.load(out).state_dict().items())
    assert f"checkpoint-{best + 3}" in [path.name for path in checkpoint.listing(out)]


def test_another_metric_begins_its_own_best(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy was best at step 2; the run goes on by the loss, whose values are no worse for being smaller numbers."""
    monkeypatch.setattr(run, "held_out", measuring([0.5, 0.6, 0.9, 0.8, 0.8], [9.0, 8.0, 7.0, 6.0, 5.0]))
    run.train(recipe(rows, tmp_path / "run", metric="accuracy", steps=4))
    monkeypatch.setattr(run, "held_out", measuring([0.8] * 3, [4.0, 5.0, 6.0]))
    run.train(recipe(rows, tmp_path / "run", metric="loss", steps=6, every={"log": 1, "evaluate": 1, "keep": 9}))
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (5, 4.0)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_a_figure_that_is_none_costs_no_checkpoint(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   metric: str) -> None:
    """As AUC of held-out rows of one class: there is no such number, and no best one."""
    monkeypatch.setattr(run, "held_out", measuring([math.nan, math.nan, 0.4, 0.3], [1.0, 0.9, 0.8, 0.7]))
    run.train(recipe(rows, tmp_path / "run", metric=metric, steps=3,
                     every={"log": 1, "evaluate": 1, "save": 1, "keep": 9}))
    states = [json.loads((tmp_path / "run" / f"checkpoint-{n}" / "trainer_state.json").read_text()) for n in (1, 2, 3)]
    assert [state["progress"]["evaluation"]["eval/accuracy"] for state in states[:2]] == [None, 0.4]
    assert states[2]["best_global_step"] == (3 if metric == "loss" else 2)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["eval/accuracy"] == 0.3


def test_a_smaller_gain_than_min_delta_is_none(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "held_out", measuring([0.5, 0.7, 0.701, 0.702, 0.703], [1.0] * 5))
    out = tmp_path / "run"
    run.train(recipe(rows, out, metric="accuracy", stop={"patience": 3, "min_delta": 0.01}))
    assert checkpoint.chosen(out) == out / "checkpoint-1"
