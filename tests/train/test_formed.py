"""Runs from folders whose layers are not as their config says: thin matrices, fewer heads, zeros that take a bit each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import several
import torch
from cli import danlu

from danlu import config
from danlu.compress import folder
from danlu.compress.factorize import Factorize, factorize
from danlu.compress.prune import Prune, prune
from danlu.compress.quantize import Quantize, quantize
from danlu.errors import ConfigError, IncompatibleError
from danlu.models import weights
from danlu.nn import packed
from danlu.parallel import World
from danlu.train import checkpoint
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.setup import assemble, make_model, open_data, settle


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier and a decoder, each factorised, with fewer heads where that takes a form, and with zeros."""
    home = tmp_path_factory.mktemp("formed")
    several.tokenizer(home / "encoder-tok")
    several.tokenizer(home / "decoder-tok", "bpe")
    several.labelled(home / "mood.jsonl", 80)
    several.texts(home / "words.jsonl")
    for kind, shape in (("encoder", several.ENCODER), ("decoder", several.DECODER | {"family": "gpt2"})):
        train(learning(home, home / kind, kind, model=shape, steps=20))

        def opened(kind: str = kind) -> Any:
            return checkpoint.load_model(home / kind)
        thin, quarter, zeros, small = opened(), opened(), opened(), opened()
        factorize(thin, Factorize(rank=6))
        quantize(small, Quantize())
        for name, made in (("low", thin), ("cut", prune(quarter, Prune(method="heads"))), ("bits", prune(zeros, Prune())),
                           ("int8", small)):
            folder.write(home / f"{kind}-{name}", made, receipt={}, tokenizer=home / f"{kind}-tok", sparse=name == "bits")
    return home


def learning(world: Path, out: Path, kind: str = "encoder", **changes: Any) -> Run:
    base: dict[str, Any] = {"tokenizer": str(world / f"{kind}-tok")}
    if kind == "encoder":
        base |= {"objective": "classify", "data": [{"path": str(world / "mood.jsonl")}]}
    else:
        base |= {"objective": "causal_lm", "length": 48, "data": [{"path": str(world / "words.jsonl")}]}
    return several.recipe(out, **base | changes)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("form", ["low", "cut", "bits"])
def test_they_learn_go_on_and_open_again(world: Path, tmp_path: Path, kind: str, form: str) -> None:
    start = world / f"{kind}-{form}"
    last = train(learning(world, tmp_path / "whole", kind, start=str(start), steps=8))
    losses = [line["eval/loss"] for line in several.lines(tmp_path / "whole") if "eval/loss" in line]
    assert losses[-1] < losses[0]
    began, made = weights.load(start), checkpoint.load_model(last)
    assert packed.forms(made) == packed.forms(began) and bool(packed.forms(made)) == (form == "low")
    sizes = {name: t.shape for name, t in made.state_dict().items()}
    assert sizes == {name: t.shape for name, t in began.state_dict().items()}
    assert any(not torch.equal(t, began.state_dict()[name]) for name, t in made.state_dict().items())
    again = learning(world, tmp_path / "cut", kind, start=str(start), steps=8,
                     every={"log": 1, "evaluate": 0, "save": 3, "keep": 9})
    train(again)
    for path in checkpoint.listing(tmp_path / "cut"):
        if path.name not in ("checkpoint-0", "checkpoint-3"):
            path.rename(path.with_name(f"gone-{path.name}"))
    there = weights.load(train(again)).state_dict()
    assert all(torch.equal(t, there[name]) for name, t in made.state_dict().items())


@pytest.mark.parametrize("form", ["low", "cut", "bits"])
def test_a_run_begins_with_what_the_folder_says(world: Path, tmp_path: Path, form: str) -> None:
    run = learning(world, tmp_path / "run", start=str(world / f"encoder-{form}"))
    data = open_data(run)
    run, choice = settle(run, data, World(run.layout), None)
    engine = assemble(run, data, make_model(run, choice, World(run.layout))).engine
    batch = {"ids": torch.randint(5, 60, (4, 12)), "ends": torch.full((4,), 11)}
    engine.placed.eval()
    wanted = weights.load(world / f"encoder-{form}").eval()(batch["ids"])["classify"]
    torch.testing.assert_close(engine.outputs(batch)["classify"], wanted)
    names = {leaf.name for leaf in engine.leaves}
    assert ("blocks.0.mlp.up.down" in names) == (form == "low") and ("blocks.0.mlp.up.weight" in names) == (form != "low")


def test_a_thin_model_teaches(world: Path, tmp_path: Path) -> None:
    train(learning(world, tmp_path / "run", model=several.ENCODER, frozen={"teacher": str(world / "encoder-low")}, steps=4,
                   distil={"hidden": 1.0}))
    assert several.lines(tmp_path / "run")[-1]


def test_what_cannot_be_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="do not learn"):
        train(learning(world, tmp_path / "a", start=str(world / "encoder-int8")))
    with pytest.raises(ConfigError, match="leave adapt out"):
        train(learning(world, tmp_path / "b", start=str(world / "encoder-low"), adapt="lora"))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["low", "cut"])
def test_a_layout_changes_nothing(world: Path, tmp_path: Path, form: str) -> None:
    layouts = {"one": (), "ddp": ("layout.dp=2",), "fsdp": ("layout.dp=2", "layout.shard=full"),
               "pp": ("layout.pp=2", "layout.micro=2")}
    told = {}
    for name, layout in layouts.items():
        run = learning(world, tmp_path / name, "decoder", start=str(world / f"decoder-{form}"), steps=6,
                       every={"log": 1, "evaluate": 0})
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(config.to_yaml(run), encoding="utf-8")
        assert danlu("train", recipe, *layout).code == 0
        told[name] = [line for line in several.lines(tmp_path / name) if "train/loss" in line]
        assert packed.forms(checkpoint.load_model(tmp_path / name)) == packed.forms(weights.load(world / f"decoder-{form}"))
    for name in list(layouts)[1:]:
        for mine, theirs in zip(told["one"], told[name], strict=True):
            assert theirs["train/loss"] == pytest.approx(mine["train/loss"], rel=1e-4)
