"""Going on without forgetting: closed forms of the penalties and divergences, and runs that forget less for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import several
import torch
import torch.nn.functional as F
from cli import danlu
from safetensors.torch import load_file

from danlu import config
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.nn.tasks import Head
from danlu.objectives.distil import Distilled, divergence, of_best
from danlu.parallel import World
from danlu.train import checkpoint, keep
from danlu.train.feed import Steps
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.setup import Work, assemble, make_model, open_data, settle


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Old rows, new rows that teach the contrary of some, and a model that knows the old ones."""
    folder = tmp_path_factory.mktemp("continual")
    several.tokenizer(folder / "tok")
    several.labelled(folder / "old.jsonl", 160)
    several.labelled(folder / "old-test.jsonl", 60, seed=7)
    several.labelled(folder / "new.jsonl", 80, seed=3, turned=True)
    run = several.recipe(folder / "start", objective="classify", tokenizer=str(folder / "tok"), model=several.ENCODER,
                         data=[{"path": str(folder / "old.jsonl")}], steps=80, rows=16, every={"log": 10, "evaluate": 40})
    train(run)
    assert several.lines(folder / "start")[-1]["eval/accuracy"] >= 0.95, "the old is known"
    return folder


def going_on(world: Path, out: Path, **changes: Any) -> Run:
    """Return the recipe of a run that goes on with the new rows."""
    base: dict[str, Any] = {
        "start": str(world / "start"), "objective": "classify", "data": [{"path": str(world / "new.jsonl")}], "steps": 20,
        "optim": {"kind": "adamw", "lr": 1e-3}, "every": {"log": 1, "evaluate": 0}}
    continual = {"old": [str(world / "old-test.jsonl")]} | changes.pop("continual", {})
    return several.recipe(out, **base | {"continual": continual} | changes)


def made(run: Run) -> tuple[Run, Work]:
    run = run.model_copy(update={"start": checkpoint.chosen(run.start)})
    data = open_data(run)
    run, choice = settle(run, data, World(run.layout), None)
    return run, assemble(run, data, make_model(run, choice, World(run.layout)))


def test_the_gradient_of_ewc_is_that_of_its_formula(world: Path, tmp_path: Path) -> None:
    section = {"ewc": {"data": str(world / "old.jsonl"), "strength": 30.0, "rows": 8}}
    run, work = made(going_on(world, tmp_path / "run", continual=section))
    engine, (pull,) = work.engine, work.engine.penalties
    model = work.model.whole
    start = {leaf.name: leaf.local.detach().clone() for leaf in engine.leaves}
    expected = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    model.eval()
    for batch in keep._old_rows(run, run.continual.ewc, open_data(run)):     # F by its definition: squares, row by row
        assert batch["label_weights"].sum() == 1
        out = model(**{name: batch[name] for name in run.objective.inputs if name in batch})
        model.zero_grad()
        F.cross_entropy(out["classify"][:1], batch["label"][:1]).backward()
        for name, parameter in model.named_parameters():
            expected[name] += 0 if parameter.grad is None else parameter.grad.square() / 8
    model.zero_grad()
    for leaf in engine.leaves:
        leaf.local.data += torch.randn(leaf.local.shape, generator=torch.Generator().manual_seed(len(leaf.name))) * 0.1
        leaf.local.grad = torch.zeros_like(leaf.local)
    value = pull.add(engine.leaves)
    wanted = sum(15.0 * (expected[leaf.name] * (leaf.local - start[leaf.name]).square()).sum() for leaf in engine.leaves)
    torch.testing.assert_close(value.float(), wanted.detach(), rtol=1e-4, atol=0)
    for leaf, grad in zip(engine.leaves, torch.autograd.grad(wanted, [leaf.local for leaf in engine.leaves]), strict=True):
        torch.testing.assert_close(leaf.local.grad, grad, rtol=1e-4, atol=1e-6, msg=leaf.name)


def test_l2sp_pulls_old_weights_back_and_new_ones_to_zero(world: Path, tmp_path: Path) -> None:
    parts = {"mood": {"objective": "classify"}}          # a head of another name: new
    _run, work = made(going_on(world, tmp_path / "run", objective={"kind": "tasks", "parts": parts},
                              data=[{"path": str(world / "new.jsonl"), "task": "mood"}],
                              continual={"l2sp": {"alpha": 0.3, "beta": 0.2}, "old": []}))
    engine, (pull,) = work.engine, work.engine.penalties
    assert work.model.fresh == {"heads.mood.out.weight", "heads.mood.out.bias"}
    start = {leaf.name: leaf.local.detach().clone() for leaf in engine.leaves}
    for leaf in engine.leaves:
        leaf.local.data += 0.05
        leaf.local.grad = torch.ones_like(leaf.local)
    value = pull.add(engine.leaves)
    wanted = sum(0.1 * leaf.local.square().sum() if leaf.name in work.model.fresh
                 else 0.15 * (leaf.local - start[leaf.name]).square().sum() for leaf in engine.leaves)
    torch.testing.assert_close(value.float(), wanted.detach(), rtol=1e-4, atol=0)
    for leaf, grad in zip(engine.leaves, torch.autograd.grad(wanted, [leaf.local for leaf in engine.leaves]), strict=True):
        torch.testing.assert_close(leaf.local.grad, grad + 1, rtol=1e-5, atol=1e-6, msg=leaf.name)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_torch_s(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    said, by = torch.randn(6, 5, generator=draw), torch.randn(6, 5, generator=draw)
    wanted = F.kl_div(F.log_softmax(said / temperature, -1), F.softmax(by / temperature, -1), reduction="none").sum(-1)
    single = Head(labels=tuple("abcde"))
    torch.testing.assert_close(divergence(said, by, single, temperature), wanted * temperature**2)
    mine, theirs = (torch.distributions.Bernoulli(logits=x / temperature) for x in (said, by))
    wanted = torch.distributions.kl_divergence(theirs, mine).mean(-1)
    heads = Head(labels=tuple("abcde"), problem="multi")
    torch.testing.assert_close(divergence(said, by, heads, temperature), wanted * temperature**2)


def test_the_divergence_of_text_is_that_of_the_likeliest_and_the_rest() -> None:
    draw = torch.Generator().manual_seed(0)
    said, by = (F.log_softmax(torch.randn(7, 11, generator=draw), -1) for _model in range(2))
    whole = F.kl_div(said, by, log_target=True, reduction="none").sum(-1)
    for k in (1, 4, 10):
        best = by.topk(k).indices
        parts = [x.gather(1, best).exp() for x in (said, by)]
        mine, theirs = (torch.cat((part, 1 - part.sum(1, keepdim=True)), 1) for part in parts)
        found = of_best(said.gather(1, best), by.gather(1, best))
        torch.testing.assert_close(found, (theirs * (theirs / mine).log()).sum(1), rtol=1e-4, atol=1e-6)
        assert (found <= whole + 1e-6).all()
    torch.testing.assert_close(of_best(said, by), whole, rtol=1e-4, atol=1e-5)
    sure = torch.zeros(3, 1, requires_grad=True)
    of_best(sure, torch.tensor([[0.0], [-1e-9], [-3.0]])).sum().backward()
    assert sure.grad is not None and bool(sure.grad.isfinite().all())


def test_what_is_forgotten_is_what_an_evaluation_before_and_after_finds(world: Path, tmp_path: Path) -> None:
    run = going_on(world, tmp_path / "run", continual={"replay": {"data": str(world / "old.jsonl"), "share": 0.25}})
    last = train(run)
    told = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    receipt = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["forgetting"]["old-test"]
    rows = [json.loads(line) for line in (world / "old-test.jsonl").read_text().splitlines()]
    for when, folder in (("before", checkpoint.chosen(world / "start")), ("after", last)):
        model, cfg = checkpoint.load_model(folder), weights.read_config(folder)
        from danlu.data.tokenizer import Tokenizer
        tokenizer, right, loss = Tokenizer.load(folder), 0, 0.0
        for row in rows:
            ids, _parts = tokenizer.together([tokenizer.encode(row["text"])])
            logits = model(torch.tensor(ids.astype("int64"))[None])["classify"][0]
            truth = cfg.tasks[0].labels.index(row["label"])
            right += int(logits.argmax()) == truth
            loss -= float(logits.detach().log_softmax(-1)[truth])
        assert told[when]["old-test"]["accuracy"] == pytest.approx(right / len(rows))
        assert told[when]["old-test"]["loss"] == pytest.approx(loss / len(rows), rel=1e-4)
        assert receipt[f"accuracy_{when}"] == told[when]["old-test"]["accuracy"]
    source = [line for line in several.lines(tmp_path / "run") if "train/loss" in line]
    assert len(source) == 20


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Old and new texts of other words, and a model that knows the old ones."""
    folder = tmp_path_factory.mktemp("speech")
    several.tokenizer(folder / "tok", "bpe")
    several.texts(folder / "old.jsonl", 160, words=(*several.GOOD, *several.REST[:4]))
    several.texts(folder / "old-test.jsonl", 40, seed=5, words=(*several.GOOD, *several.REST[:4]))
    several.texts(folder / "new.jsonl", 80, words=(*several.BAD, *several.REST[4:]))
    train(several.recipe(folder / "start", model=several.DECODER, data=[{"path": str(folder / "old.jsonl")}], steps=60,
                         every={"log": 20}, **spoken(folder)))
    return folder


def spoken(folder: Path) -> dict[str, Any]:
    return {"objective": "causal_lm", "tokenizer": str(folder / "tok"), "length": 48}


def reading_on(speech: Path, out: Path, **changes: Any) -> Run:
    """Return the recipe of a run that goes on with the new texts."""
    continual = {"old": [str(speech / "old-test.jsonl")]} | changes.pop("continual", {})
    base: dict[str, Any] = {"start": str(speech / "start"), "data": [{"path": str(speech / "new.jsonl")}], "steps": 40,
                            "every": {"log": 10}, "continual": continual}
    return several.recipe(out, **base | spoken(speech) | changes)


def test_each_remedy_makes_it_forget_less(speech: Path, tmp_path: Path) -> None:
    """Without a remedy the old words are forgotten; replay and EWC keep most of them and still learn the new ones."""
    def told(name: str, remedy: dict[str, Any]) -> tuple[float, float]:
        train(reading_on(speech, tmp_path / name, continual=remedy))
        found = json.loads((tmp_path / name / "forgetting.json").read_text())
        lost = found["after"]["old-test"]["loss"] - found["before"]["old-test"]["loss"]
        return lost, [line for line in several.lines(tmp_path / name) if "eval/loss" in line][-1]["eval/loss"]

    bare, learned = told("bare", {})
    assert bare > 1.0
    found = {name: told(name, remedy) for name, remedy in {
        "replay": {"replay": {"data": str(speech / "old.jsonl"), "share": 0.3}},
        "ewc": {"ewc": {"data": str(speech / "old.jsonl"), "strength": 3e4, "rows": 64}},
        "l2sp": {"l2sp": {"alpha": 1.0}},
        "distil": {"replay": {"data": str(speech / "old.jsonl"), "share": 0.1}, "distil": {"weight": 3.0}},
        "average": {"average": {"start": 0.5}}}.items()}
    assert all(lost < 0.7 * bare for lost, _new in found.values()), (bare, found)
    assert found["replay"][0] < 0.2 * bare and found["replay"][1] < learned + 0.3
    assert found["ewc"][0] < 0.2 * bare and found["ewc"][1] < learned + 0.5


def test_a_run_that_is_resumed_keeps_the_same(world: Path, tmp_path: Path) -> None:
    """Penalty, divergence and replay after an interruption are to the bit those of a run that was not interrupted."""
    section = {"replay": {"data": str(world / "old.jsonl")}, "ewc": {"strength": 1e4, "rows": 8}, "l2sp": {}, "distil": {}}
    for name, steps in (("whole", (8,)), ("cut", (4, 8))):
        for number in steps:
            train(going_on(world, tmp_path / name, continual=section, steps=number))
    finals = [load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])
    told = [json.loads((tmp_path / name / "forgetting.json").read_text()) for name in ("whole", "cut")]
    assert told[0] == told[1], "what the start model knew is measured once"
    assert [line for line in several.lines(tmp_path / "cut") if "train/loss" in line][-1]["train/penalty"] > 0


def test_averages_are_of_start_and_last_checkpoints(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = going_on(world, out, continual={"average": {"start": 0.4, "last": 2}}, every={"log": 1, "evaluate": 0, "save": 5})
    train(run)
    begin = load_file(checkpoint.chosen(world / "start") / "model.safetensors")
    last = [load_file(out / f"checkpoint-{n}" / "model.safetensors") for n in (15, 20)]
    found = load_file(out / "averaged" / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.4 * begin[name] + 0.3 * last[0][name] + 0.3 * last[1][name], msg=name)
    assert checkpoint.chosen(out) == out / "averaged" and not checkpoint.verify(out / "averaged")
    train(going_on(world, out, steps=25, continual={}))                     # goes on: the average is of an earlier end
    assert checkpoint.chosen(out).name.startswith("checkpoint-")


def test_text_is_distilled_on_replayed_rows_alone(speech: Path, tmp_path: Path) -> None:
    run, work = made(reading_on(speech, tmp_path / "run", rows=16, continual={
        "replay": {"data": str(speech / "old.jsonl"), "share": 0.5}, "distil": {}}))
    objective = work.engine.objective
    assert isinstance(objective, Distilled) and objective.terms == ("lm", "distil/text")
    steps = Steps(work.rows, objective, open_data(run).tokenizer.special, per_step=16, length=48, seed=0,
                  position=work.rows.begin())
    batch, _after = next(iter(steps))
    old = batch["distil/old"]
    assert 0 < old.sum() < len(old)
    assert objective.count(batch)[1] == (batch["weights"] * old[:, None]).sum()
    losses = work.engine.forward_backward(batch, step=0)
    assert abs(float(losses[1])) < 1e-6, "the model is still the start model"
    for leaf in work.engine.leaves:
        leaf.local.data += 0.01
    assert float(work.engine.forward_backward(batch, step=1)[1]) > 1e-5


@pytest.mark.parametrize(("change", "said"), [
    ({"start": None, "model": several.ENCODER}, "name it under `start`"),
    ({"continual": {"ewc": {}}}, "continual.ewc.data"),
    ({"continual": {"average": {"last": 3}}}, "every.keep=2"),
    ({"continual": None, "epochs": 3.0}, "steps=1 and epochs=3.0 .* epochs=null"),
    ({"continual": None, "metric": "accuracy", "layout": {"pp": 2, "micro": 2}}, "metric=loss"),
])
def test_recipes_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    base: dict[str, Any] = {"out": "run", "start": "start", "objective": "classify", "data": [{"path": "x"}],
                            "optim": {"kind": "adamw", "lr": 1e-3}, "schedule": {"kind": "constant"}, "steps": 1,
                            "rows": 8, "length": 32, "continual": {}}
    with pytest.raises(ConfigError, match=said):
        config.validate(Run, {name: value for name, value in (base | change).items() if value is not None})


@pytest.mark.slow
def test_in_a_pipeline_the_last_stage_asks_the_start_model(world: Path, tmp_path: Path) -> None:
    told = {}
    for name, layout in {"one": (), "pp": ("layout.pp=2", "layout.micro=2")}.items():
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(config.to_yaml(going_on(world, tmp_path / name, continual={"distil": {}}, steps=4)), encoding="utf-8")
        assert danlu("train", recipe, *layout).code == 0
        told[name] = [line["train/distil/classify_loss"] for line in several.lines(tmp_path / name) if "train/loss" in line]
    assert told["pp"] == pytest.approx(told["one"], rel=1e-3, abs=1e-7) and told["one"][-1] > 1e-6
