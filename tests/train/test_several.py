"""Runs of several tasks, from files of rows to figures of each task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import several
import torch

from danlu import cli
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.objectives.tasks import Tasks
from danlu.parallel import World
from danlu.train import checkpoint
from danlu.train.feed import Steps, stream
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.setup import Work, assemble, make_model, open_data, settle

PARTS = {"mood": {"objective": "classify", "weight": 2.0}, "stars": {"objective": "regress"},
         "words": {"objective": "masked_lm", "weight": 0.5}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    several.tokenizer(folder / "tok")
    several.labelled(folder / "mood.jsonl")
    several.scored(folder / "stars.jsonl")
    several.texts(folder / "words.jsonl")
    return folder


def three(files: Path, out: Path, **changes: Any) -> Run:
    base: dict[str, Any] = {
        "objective": {"kind": "tasks", "parts": PARTS}, "tokenizer": str(files / "tok"), "model": several.ENCODER,
        "data": [{"path": str(files / f"{task}.jsonl"), "task": task} for task in PARTS]}
    return several.recipe(out, **base | changes)


def made(run: Run) -> tuple[Run, Work]:
    data = open_data(run)
    run, choice = settle(run, data, World(run.layout), None)
    return run, assemble(run, data, make_model(run, choice, World(run.layout)))


def test_every_task_is_learned_judged_and_kept(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    last = train(three(files, out, steps=240, rows=24, metric="mood/accuracy",
                       every={"log": 1, "evaluate": 60}))
    told = [line for line in several.lines(out) if "eval/loss" in line]
    assert {"eval/mood/accuracy", "eval/mood/loss", "eval/stars/pearson", "eval/stars/loss", "eval/words/loss",
            "eval/words/perplexity"} <= told[-1].keys()
    assert told[-1]["eval/mood/accuracy"] >= 0.9 and told[-1]["eval/stars/loss"] < told[0]["eval/stars/loss"] / 2
    assert told[-1]["eval/words/loss"] < told[0]["eval/words/loss"]
    whole = 2 * told[-1]["eval/mood/loss"] + told[-1]["eval/stars/loss"] + 0.5 * told[-1]["eval/words/loss"]
    assert told[-1]["eval/loss"] == pytest.approx(whole)
    steps = [line for line in several.lines(out) if "train/loss" in line]
    assert {"train/mood/classify_loss", "train/stars/regress_loss", "train/words/mlm_loss"} <= steps[0].keys()
    cfg = weights.read_config(last)
    assert [(task.name, task.labels) for task in cfg.tasks] == [("mood", ("bad", "good")), ("stars", ())]
    ids = torch.tensor([[2, 7, 8, 3]])
    assert {"mood", "stars", "logits"} <= checkpoint.load_model(out)(ids).keys()
    left = json.loads((out / "eval_results.json").read_text())["results"]
    best = max(line["eval/mood/accuracy"] for line in told)
    assert left.keys() == {"mood/mood", "stars/stars"} and left["mood/mood"]["accuracy,none"] == pytest.approx(best)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"mood", "stars"}


def test_one_of_several_tasks_is_asked_by_name(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(three(files, out, steps=60, rows=24))
    assert cli.main(["predict", str(out), "--head", "mood", "--text", "the film is lovely"]) == 0
    assert capsys.readouterr().out.startswith("good\t")
    assert cli.main(["predict", str(out), "--head", "stars", "--text", "the film is lovely and fine"]) == 0
    assert float(capsys.readouterr().out) > 0.5
    assert cli.main(["eval", str(out), "--head", "stars", "--data", str(files / "stars.jsonl"), "--json"]) == 0
    assert "pearson,none" in json.loads(capsys.readouterr().out)["results"]["stars"]
    for words, said in (((), "--head mood"), (("--head", "moods"), "mood, stars")):
        assert cli.main(["eval", str(out), "--data", str(files / "stars.jsonl"), *words]) == 2
        assert said in capsys.readouterr().err


def test_a_step_is_the_sum_of_its_tasks(files: Path, tmp_path: Path) -> None:
    """Loss and gradient are those of each task computed alone, on its rows alone, by its own objective."""
    run, work = made(three(files, tmp_path / "run", rows=12))
    assert isinstance(run.objective, Tasks)
    data = open_data(run)
    steps = Steps(work.rows, run.objective, data.tokenizer.special, per_step=12, length=32, seed=0,
                  position=work.rows.begin(), tight=True)
    plans = [plan for (plan, _after), _n in zip(work.rows.plans(work.rows.begin()), range(12), strict=False)]
    losses = work.engine.forward_backward(steps.batch(plans), step=0)
    found = {leaf.name: leaf.local.grad.clone() for leaf in work.engine.leaves}
    expected = {name: torch.zeros_like(grad) for name, grad in found.items()}
    model = work.model.whole
    for number, (name, part) in enumerate(run.objective.parts.items()):
        own = [work.rows.read(plan) for plan in plans if plan.source == number]
        assert own, "every task has a row here"
        batch = part.objective.collate(own, data.tokenizer.special, steps.rng, 32)
        model.zero_grad()
        out = model(**{key: batch[key] for key in part.objective.inputs if key in batch})
        loss = part.objective.loss(out, batch).sum() / part.objective.count(batch).sum()
        torch.testing.assert_close(losses[number], loss.detach().double(), rtol=1e-5, atol=1e-6, msg=name)
        (part.weight * loss).backward()
        for key, parameter in model.named_parameters():
            expected[key] += 0 if parameter.grad is None else parameter.grad
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("micro", [2, 12])
def test_a_task_may_have_no_row_in_a_micro_batch(files: Path, tmp_path: Path, micro: int) -> None:
    """With a row each, most micro-batches lack two tasks of three: the step is the same, and nothing is not a number."""
    run, work = made(three(files, tmp_path / "a", rows=12))
    _split, other = made(three(files, tmp_path / "b", rows=12, layout={"micro": micro}))
    special = open_data(run).tokenizer.special
    batch, _after = next(iter(Steps(work.rows, run.objective, special, per_step=12, length=32, seed=0,
                                    position=work.rows.begin())))
    torch.testing.assert_close(other.engine.forward_backward(batch, step=0), work.engine.forward_backward(batch, step=0),
                               rtol=1e-5, atol=0)
    for a, b in zip(work.engine.leaves, other.engine.leaves, strict=True):
        torch.testing.assert_close(b.local.grad, a.local.grad, rtol=1e-4, atol=1e-6, msg=a.name)


def test_a_batch_without_any_row_of_a_task_has_its_columns(files: Path, tmp_path: Path) -> None:
    run, work = made(three(files, tmp_path / "run"))
    data = open_data(run)
    only = stream(data.train[0], run.objective, task="mood", length=32, overlong="error", pack=True, seed=0)
    batch, _after = next(iter(Steps(only, run.objective, data.tokenizer.special, per_step=4, length=32, seed=0,
                                    position=only.begin())))
    mixed, _after = next(iter(Steps(work.rows, run.objective, data.tokenizer.special, per_step=16, length=32, seed=0,
                                    position=work.rows.begin())))
    assert batch.keys() == mixed.keys()
    losses = work.engine.forward_backward(batch, step=0)
    assert losses[0] > 0 and losses[1:].tolist() == [0.0, 0.0]
    assert all(bool(leaf.local.grad.isfinite().all()) for leaf in work.engine.leaves)


def test_a_decoder_learns_words_and_moods_at_once(files: Path, tmp_path: Path) -> None:
    several.tokenizer(tmp_path / "tok", "bpe")
    parts = {"mood": "classify", "words": {"kind": "causal_lm"}}
    run = several.recipe(
        tmp_path / "run", objective={"kind": "tasks", "parts": parts}, tokenizer=str(tmp_path / "tok"), model=several.DECODER,
        data=[{"path": str(files / f"{task}.jsonl"), "task": task} for task in parts], steps=30, length=48)
    train(run)
    told = [line for line in several.lines(tmp_path / "run") if "eval/loss" in line]
    assert told[-1]["eval/mood/accuracy"] >= 0.8
    assert told[-1]["eval/words/perplexity"] < told[0]["eval/words/perplexity"] / 2


@pytest.mark.parametrize(("change", "said"), [
    ({"data": [{"path": "x", "task": "mood"}]}, "task stars has no source"),
    ({"data": [{"path": "x"}]}, "data.0.task must be one of mood, stars, words"),
    ({"objective": "classify"}, "objective.kind is not tasks"),
    ({"objective": {"kind": "tasks", "parts": {"a/b": "classify"}}}, "letters, digits"),
    ({"objective": {"kind": "tasks", "parts": {"keys": "classify"}}}, "cannot be called keys"),
    ({"objective": {"kind": "tasks", "parts": {"a": "causal_lm", "b": "masked_lm"}}}, "one model cannot learn both"),
])
def test_recipes_that_cannot_be_are_refused(files: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        three(files, tmp_path / "run", **change)


def test_a_head_of_the_start_model_is_kept_beside_a_new_one(files: Path, tmp_path: Path) -> None:
    """A single head stands in the folder as transformers calls it, several under our names: it is the same head."""
    train(several.recipe(tmp_path / "start", objective="classify", tokenizer=str(files / "tok"), model=several.ENCODER,
                         data=[{"path": str(files / "mood.jsonl")}], steps=4))
    begin = checkpoint.chosen(tmp_path / "start")
    parts = {"classify": "classify", "stars": "regress"}
    data = [{"path": str(files / "mood.jsonl"), "task": "classify"}, {"path": str(files / "stars.jsonl"), "task": "stars"}]
    run, work = made(three(files, tmp_path / "run", model=None, start=str(begin), objective={"kind": "tasks", "parts": parts},
                           data=data))
    assert work.model.fresh == {"heads.stars.out.weight", "heads.stars.out.bias"}
    there = weights.load(begin).state_dict()
    held = dict(work.model.named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in there.items()) and "heads.classify.out.weight" in there
    assert [head.name for head in run.network.tasks] == ["classify", "stars"]
