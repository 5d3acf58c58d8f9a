"""Runs that learn from teachers, against closed forms and against their teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import several
import torch
import torch.nn.functional as F
from cli import danlu

from danlu import config
from danlu.errors import ConfigError, IncompatibleError
from danlu.parallel import World
from danlu.train import checkpoint
from danlu.train.feed import Steps
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.setup import Work, assemble, first_weights, make_model, open_data, settle

SMALL = several.ENCODER | {"layers": 1, "width": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers of classes, one that learned them the wrong way round, and one of text."""
    folder = tmp_path_factory.mktemp("teachers")
    several.tokenizer(folder / "tok")
    several.tokenizer(folder / "bytes", "bpe")
    several.labelled(folder / "mood.jsonl", 80)
    several.labelled(folder / "turned.jsonl", 80, turned=True)
    several.texts(folder / "words.jsonl")
    for name in ("mood", "turned"):
        train(several.recipe(folder / name, objective="classify", tokenizer=str(folder / "tok"), model=several.ENCODER,
                             steps=60, data=[{"path": str(folder / f"{name}.jsonl")}]))
    train(several.recipe(folder / "words", objective="causal_lm", tokenizer=str(folder / "bytes"), model=several.DECODER,
                         steps=30, length=48, data=[{"path": str(folder / "words.jsonl")}]))
    return folder


def learning(world: Path, out: Path, **changes: Any) -> Run:
    base: dict[str, Any] = {"objective": "classify", "tokenizer": str(world / "tok"), "model": SMALL,
                            "data": [{"path": str(world / "turned.jsonl")}], "frozen": {"teacher": str(world / "mood")}}
    return several.recipe(out, **base | changes)


def made(run: Run) -> tuple[Run, Work, torch.Tensor]:
    """The run with its weights, and its first batch."""
    data = open_data(run)
    run, choice = settle(run, data, World(run.layout), None)
    model = make_model(run, choice, World(run.layout))
    first_weights(run, model)
    work = assemble(run, data, model)
    steps = Steps(work.rows, work.engine.objective, data.tokenizer.special, per_step=run.step_rows, length=run.length, seed=0,
                  position=work.rows.begin(), tight=run.tight)
    return run, work, next(iter(steps))[0]


def test_a_smaller_model_learns_what_its_teacher_says_and_not_what_the_data_say(world: Path, tmp_path: Path) -> None:
    run = learning(world, tmp_path / "run", steps=150, distil={"weight": 1.0, "temperature": 1.0},
                   every={"log": 50, "evaluate": 0, "save": 0})
    last = train(run)                                    # the last, for the best is the best at the labels
    teacher, student = checkpoint.load_model(world / "mood").eval(), checkpoint.load_model(last).eval()
    batch = made(learning(world, tmp_path / "other"))[2]
    columns = {name: batch[name] for name in ("ids", "segments", "positions") if name in batch}
    said = [model(**columns)["classify"].softmax(-1) for model in (teacher, student)]
    assert (said[0].argmax(-1) == said[1].argmax(-1)).float().mean() >= 0.9
    assert (said[1].argmax(-1) == batch["label"]).float().mean() <= 0.2, "the labels of the data are turned round"


@pytest.mark.parametrize("names", [("mood",), ("mood", "turned")])
def test_the_loss_is_that_of_the_data_and_the_mean_divergence(world: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    _run, work, batch = made(learning(world, tmp_path / "run", frozen={name: str(world / name) for name in names},
                                      distil={"weight": 0.25, "temperature": 3.0}))
    losses = work.engine.forward_backward(batch, step=0)
    columns = {name: batch[name] for name in ("ids", "segments", "positions") if name in batch}
    said = work.model.whole.eval()(**columns)["classify"]
    wanted = []
    for name in names:
        by = checkpoint.load_model(world / name).eval()(**columns)["classify"]
        wanted.append(9 * F.kl_div(F.log_softmax(said / 3, -1), F.softmax(by / 3, -1), reduction="batchmean"))
    assert float(losses[0]) == pytest.approx(F.cross_entropy(said, batch["label"]).item(), rel=1e-4)
    assert float(losses[1]) == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-4)
    assert work.engine.objective.scales == (0.75, 0.25)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_text_is_compared_over_the_whole_vocabulary_where_top_is_as_large(world: Path, tmp_path: Path,
                                                                          temperature: float) -> None:
    run, work, batch = made(learning(
        world, tmp_path / "run", objective="causal_lm", tokenizer=str(world / "bytes"), length=48, pack=False,
        model=several.DECODER | {"layers": 1}, data=[{"path": str(world / "words.jsonl")}],
        frozen={"teacher": str(world / "words")}, distil={"top": 1000, "temperature": temperature}))
    losses = work.engine.forward_backward(batch, step=0)
    columns = {name: batch[name] for name in ("ids", "segments", "positions") if name in batch}
    weights = batch["weights"].flatten()
    said = work.model.whole.eval()(**columns)["logits"].flatten(0, 1) / temperature
    by = checkpoint.load_model(world / "words").eval()(**columns)["logits"].flatten(0, 1) / temperature
    apart = F.kl_div(F.log_softmax(said, -1), F.softmax(by, -1), reduction="none").sum(-1) * temperature**2
    assert float(losses[1]) == pytest.approx(((apart * weights).sum() / weights.sum()).item(), rel=1e-3)
    assert run.frozen and float(losses[1]) > 0.01


def test_teachers_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to distil"):
        train(learning(world, tmp_path / "a", frozen={"teacher": str(world / "words")}))
    with pytest.raises(IncompatibleError, match="another tokenizer"):
        other = several.tokenizer(tmp_path / "tok", "bpe")
        train(learning(world, tmp_path / "b", tokenizer=str(other), model=SMALL))
    with pytest.raises(ConfigError, match="name it: frozen"):
        learning(world, tmp_path / "c", frozen={}, distil={})
    with pytest.raises(ConfigError, match="look inside all blocks"):
        learning(world, tmp_path / "d", layout={"pp": 2, "micro": 2}, distil={"hidden": 1.0})


def test_a_resumed_run_learns_the_same(world: Path, tmp_path: Path) -> None:
    train(learning(world, tmp_path / "whole", steps=8))
    train(learning(world, tmp_path / "cut", steps=8, every={"log": 1, "evaluate": 0, "save": 4}))
    train(learning(world, tmp_path / "cut", steps=8))
    a, b = (checkpoint.load_model(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["classify", "causal_lm"])
def test_a_layout_changes_nothing(world: Path, tmp_path: Path, objective: str) -> None:
    changes: dict[str, Any] = {"every": {"log": 1, "evaluate": 0}, "steps": 4, "model": SMALL | {"width": 32, "layers": 2}}
    if objective == "causal_lm":
        changes |= {"objective": objective, "tokenizer": str(world / "bytes"), "length": 48, "pack": False,
                    "model": several.DECODER, "data": [{"path": str(world / "words.jsonl")}],
                    "frozen": {"teacher": str(world / "words")}, "distil": {"top": 8}}
    told = {}
    layouts = {"one": (), "dp": ("layout.dp=2", "layout.shard=full"), "tp": ("layout.tp=2",), "cp": ("layout.cp=2",),
               "pp": ("layout.pp=2", "layout.micro=2"), "pp×fsdp": ("layout.pp=2", "layout.micro=4", "layout.dp=2",
                                                                   "layout.shard=full")}
    for name, layout in layouts.items():
        run = learning(world, tmp_path / name, **changes)
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(config.to_yaml(run), encoding="utf-8")
        assert danlu("train", recipe, *layout).code == 0
        told[name] = [line for line in several.lines(tmp_path / name) if "train/loss" in line]
    term = "train/distil/text_loss" if objective == "causal_lm" else "train/distil/classify_loss"
    for name in list(layouts)[1:]:
        for mine, theirs in zip(told["one"], told[name], strict=True):
            assert theirs["train/loss"] == pytest.approx(mine["train/loss"], rel=1e-4)
            assert theirs[term] == pytest.approx(mine[term], rel=1e-3, abs=1e-6)
