"""Runs on sparse weights: against torch's own pruning, the closed form of the schedule, and one process against several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import several
import torch
from cli import danlu
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.utils import prune as torch_prune

from danlu import config
from danlu.compress.prune import Prune, prune
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.models.build import build
from danlu.models.encoder import Encoder
from danlu.nn.tasks import Head
from danlu.optim import AdamW
from danlu.parallel.place import alone
from danlu.train import checkpoint
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.sparsify import Magnitude, Sparsify, TwoFour, settled, share
from danlu.train.zeros import Zeros

SPARSE = {"kind": "magnitude", "sparsity": 0.75, "begin": 2, "until": 8, "every": 2}
ONCE = SPARSE | {"begin": 6}                             # all at step 8
ADAMW = {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, rows with labels, and models of which half the weights were taken out, in three ways."""
    folder = tmp_path_factory.mktemp("sparse")
    several.tokenizer(folder / "tok")
    several.labelled(folder / "mood.jsonl", 80)
    train(learning(folder, folder / "dense", steps=30, model=several.ENCODER))
    for method in ("magnitude", "wanda", "2:4"):
        model: Any = checkpoint.load_model(folder / "dense")
        rows = [{"ids": torch.randint(5, 60, (1, 12))} for _row in range(8)]
        weights.save(folder / method.replace(":", "-"), prune(model, Prune(method=method), rows), tokenizer=folder / "tok")
    return folder


def learning(world: Path, out: Path, **changes: Any) -> Run:
    base: dict[str, Any] = {"objective": "classify", "tokenizer": str(world / "tok"), "optim": ADAMW,
                            "data": [{"path": str(world / "mood.jsonl")}]}
    return several.recipe(out, **base | changes)


def matrices(path: Path) -> dict[str, Tensor]:
    """The weights of linear layers but for heads."""
    return {name: layer.weight.detach() for name, layer in checkpoint.load_model(path).named_modules()
            if isinstance(layer, torch.nn.Linear) and not name.startswith("heads.")}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "2-4"])
@pytest.mark.parametrize("optim", [ADAMW, {"kind": "muon", "lr": 1e-2}, {"kind": "sgd", "lr": 0.1, "momentum": 0.9}])
def test_a_pruned_model_learns_and_keeps_exactly_its_zeros(world: Path, tmp_path: Path, method: str, optim: Any) -> None:
    last = train(learning(world, tmp_path / "run", start=str(world / method), optim=optim, sparsify="keep", steps=12))
    before, after = matrices(world / method), matrices(last)
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    zeros, number = sum(int((p == 0).sum()) for p in before.values()), sum(p.numel() for p in before.values())
    assert several.lines(tmp_path / "run")[-2]["sparsity"] == pytest.approx(zeros / (number + 2 * 32))     # … and the head's


def test_without_it_training_fills_the_zeros_and_says_so(world: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    last = train(learning(world, tmp_path / "run", start=str(world / "magnitude"), steps=2))
    assert all(int((p == 0).sum()) == 0 for p in matrices(last).values())
    assert "sparsify=keep keeps them" in capsys.readouterr().err


def test_averaged_weights_are_as_sparse(world: Path, tmp_path: Path) -> None:
    last = train(learning(world, tmp_path / "run", sparsify=SPARSE, model=several.ENCODER, steps=12, ema=0.5))
    there, mean = matrices(last.parent / last.name), matrices(last / "ema")
    assert all(torch.equal(there[name] == 0, mean[name] == 0) for name in there)


def test_weights_are_zero_when_the_schedule_says_so() -> None:
    how = Magnitude(sparsity=0.8, initial=0.2, begin=10, until=50, every=10)
    told = {step: share(how, step, 100) for step in range(1, 101)}
    wanted = {step: 0.8 + (0.2 - 0.8) * (1 - (step - 10) / 40) ** 3 for step in (10, 20, 30, 40, 50)}
    assert {step: value for step, value in told.items() if value is not None} == pytest.approx(wanted)
    assert settled(how, 100) == 50
    assert [step for step in range(1, 101) if share(TwoFour(begin=0.1, until=0.25, every=10), step, 100)] == [20, 25]


@pytest.mark.parametrize("over", ["layer", "model"])
def test_torch_prunes_the_same_weights(over: str) -> None:
    zeros, held, optimizer = tiny({"kind": "magnitude", "sparsity": 0.6, "begin": 1, "until": 1, "over": over})
    layers = [torch.nn.Linear(p.shape[1], p.shape[0]) for p in held.values()]
    for layer, p in zip(layers, held.values(), strict=True):
        layer.weight.data.copy_(p)
    if over == "layer":
        for layer in layers:
            torch_prune.l1_unstructured(layer, "weight", 0.6)
    else:
        torch_prune.global_unstructured([(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=0.6)
    zeros.hold()
    zeros.settle(optimizer, 1)
    for layer, p in zip(layers, held.values(), strict=True):
        assert torch.equal(layer.weight_mask == 1, p != 0)
    assert zeros.share == pytest.approx(0.6, abs=1e-3)


def test_two_of_four_come_by_and_by() -> None:
    zeros, held, optimizer = tiny({"kind": "2:4", "begin": 0, "until": 4, "every": 1})
    before = {name: p.detach().clone() for name, p in held.items()}
    shares = []
    for step in range(1, 5):
        zeros.hold()
        zeros.settle(optimizer, step)
        shares.append(zeros.share)
    assert shares == pytest.approx([0.0, 0.5 * (1 - 8 / 27), 0.5 * (1 - 1 / 27), 0.5], abs=2e-3)
    for name, p in held.items():
        fours, old = p.detach().unflatten(1, (-1, 4)), before[name].unflatten(1, (-1, 4))
        assert int((fours == 0).sum(-1).min()) == int((fours == 0).sum(-1).max()) == 2
        assert torch.equal(fours.abs().sum(-1), old.abs().sort(-1).values[..., 2:].flip(-1).sum(-1))


def tiny(how: dict[str, Any]) -> tuple[Zeros, dict[str, Tensor], torch.optim.Optimizer]:
    cfg = Encoder(width=32, layers=2, heads=2, vocab=50, outputs=(), tasks=(Head(labels=("a", "b")),))
    model = alone(build(cfg, "cpu").init(0))
    given: Sparsify = TypeAdapter(Sparsify).validate_python(how)
    leaves = model.leaves()
    zeros = Zeros(given, cfg, leaves, model.world, total=100)
    return zeros, {leaf.name: leaf.local for leaf in zeros.leaves}, AdamW().build((leaf.name, leaf.local) for leaf in leaves)


@pytest.mark.parametrize("how", [SPARSE, SPARSE | {"over": "model"}, {"kind": "2:4", "begin": 1, "until": 0.75, "every": 3}])
def test_a_run_becomes_as_sparse_as_asked_and_goes_on_to_the_bit(world: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"model": several.ENCODER, "sparsify": how, "steps": 12}
    whole = train(learning(world, tmp_path / "whole", **changes))
    recipe = learning(world, tmp_path / "cut", **changes | {"every": {"log": 1, "evaluate": 6, "save": 5, "keep": 9}})
    train(recipe)
    for path in checkpoint.listing(tmp_path / "cut"):
        if path.name not in ("checkpoint-0", "checkpoint-5"):            # between two prunings
            path.rename(path.with_name(f"gone-{path.name}"))
    again = train(recipe)
    a, b = matrices(whole), matrices(again)
    assert all(torch.equal(a[name], b[name]) for name in a)
    zeros, number = sum(int((p == 0).sum()) for p in a.values()), sum(p.numel() for p in a.values())
    assert zeros / number == pytest.approx(0.5 if how["kind"] == "2:4" else 0.75, abs=2e-3)
    told = json.loads((tmp_path / "whole" / "run.json").read_text())["metrics"]
    assert told["sparsity"] == pytest.approx(zeros / number, abs=1e-6)


def test_no_checkpoint_is_the_best_before_the_model_is_sparse(world: Path, tmp_path: Path) -> None:
    run = learning(world, tmp_path / "run", start=str(world / "dense"), sparsify=SPARSE | {"sparsity": 0.98}, steps=12,
                   every={"log": 1, "evaluate": 1, "keep": 12})
    train(run)
    best = checkpoint.chosen(tmp_path / "run")
    told = [line for line in several.lines(tmp_path / "run") if "eval/loss" in line]
    assert min(told, key=lambda line: line["eval/loss"])["step"] < 8, "the test would show nothing"
    assert int(best.name.removeprefix("checkpoint-")) >= 8


def test_what_cannot_be_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        learning(world, tmp_path / "a", start=str(world / "magnitude"), sparsify="keep", adapt="lora")
    with pytest.raises(ConfigError, match="name it under `start`"):
        learning(world, tmp_path / "b", model=several.ENCODER, sparsify="keep")
    with pytest.raises(ConfigError, match="the run has 12 steps"):
        train(learning(world, tmp_path / "c", model=several.ENCODER, sparsify=SPARSE | {"until": 20}))
    with pytest.raises(ConfigError, match="more than sparsity"):
        learning(world, tmp_path / "d", model=several.ENCODER, sparsify=SPARSE | {"initial": 0.9})


@pytest.mark.slow
@pytest.mark.parametrize("how", [
    pytest.param("keep", id="keep"), pytest.param(SPARSE, id="gradual"), pytest.param(ONCE, id="once"),
    pytest.param(ONCE | {"over": "model"}, id="over model"),
    pytest.param({"kind": "2:4", "begin": 6, "until": 8, "every": 2}, id="2:4")])
def test_a_layout_changes_nothing(world: Path, tmp_path: Path, how: Any) -> None:
    began = {"start": str(world / "wanda")} if how == "keep" else {"model": several.ENCODER}
    layouts = {"one": (), "ddp": ("layout.dp=2",), "fsdp": ("layout.dp=2", "layout.shard=full"), "tp": ("layout.tp=2",),
               "pp": ("layout.pp=2", "layout.micro=2")}
    told, held = {}, {}
    for name, layout in layouts.items():
        run = learning(world, tmp_path / name, sparsify=how, steps=8, every={"log": 1, "evaluate": 0}, **began)
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(config.to_yaml(run), encoding="utf-8")
        assert danlu("train", recipe, *layout).code == 0
        told[name] = [line for line in several.lines(tmp_path / name) if "train/loss" in line]
        held[name] = matrices(tmp_path / name)
    for name in list(layouts)[1:]:
        for mine, theirs in zip(told["one"], told[name], strict=True):
            assert theirs["train/loss"] == pytest.approx(mine["train/loss"], rel=1e-4)
            assert theirs["sparsity"] == mine["sparsity"]
        zeros = [sum(int((p == 0).sum()) for p in held[each].values()) for each in ("one", name)]
        assert zeros[0] == zeros[1]
        for key, p in held["one"].items():              # of two weights of one size, rounding may choose the other
            q = held[name][key]
            moved = (p == 0) != (q == 0)
            if how == "keep":
                assert not moved.any(), (name, key)
                continue
            assert int(moved.sum()) <= max(2, p.numel() // 500), (name, key)       # two for a pair
            if how == SPARSE:                            # what was as small at an early cut may have grown since
                continue
            # … and then what one of them kept is as small as the least that both kept
            kept = torch.where(p == 0, q, p).abs()[moved]
            if isinstance(how, dict) and how["kind"] == "2:4":
                whole = torch.where((p == 0) | (q == 0), torch.inf, p.abs())
                least = whole.unflatten(-1, (-1, 4)).amin(-1).repeat_interleave(4, -1)[moved]
            else:
                among = held["one"].values() if "over" in how else [p]
                least = torch.cat([one[one != 0].abs() for one in among]).min()
            assert bool((kept <= 1.02 * least).all()), (name, key, kept, least)


def test_the_loss_after_weights_are_gone_is_no_spike(world: Path, tmp_path: Path) -> None:
    train(learning(world, tmp_path / "sure", model=several.ENCODER, steps=120))
    train(learning(world, tmp_path / "run", start=str(tmp_path / "sure"), steps=24, optim={"kind": "adamw", "lr": 1e-4},
                   sparsify={"kind": "magnitude", "sparsity": 0.98, "begin": 16, "until": 16}))
    told = [line for line in several.lines(tmp_path / "run") if "train/loss" in line]
    assert told[16]["train/loss"] > 1.4 * max(line["train/loss"] for line in told[:16]), "the test would show nothing"
    assert not any("skipped" in line for line in told)
