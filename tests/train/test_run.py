"""A run from end to end in this process: what a checkpoint holds, what splits and recomputation must not change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import danlu
from danlu import config
from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError
from danlu.parallel import World
from danlu.train import checkpoint
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.setup import assemble, make_model, open_data, settle


def recipe(corpus: Path, out: Path, **changes: Any) -> Run:
    base: dict[str, Any] = {
        "out": str(out), "data": [{"path": str(corpus)}], "objective": "causal_lm", "optim": {"kind": "adamw", "lr": 1e-3},
        "model": {"kind": "decoder", "family": "llama", "width": 32, "layers": 2, "heads": 2, "context": 64},
        "schedule": {"kind": "cosine", "warmup": 2}, "steps": 12, "rows": 8, "length": 32, "overlong": "split",
        "precision": "fp32", "every": {"log": 1, "evaluate": 4, "save": 4}, "threads": 1, "device": "cpu",
    }
    return config.validate(Run, base | changes)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def first_step(run: Run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of the first batch of a run."""
    world, data = World(run.layout), open_data(run)
    run, choice = settle(run, data, world, None)
    work = assemble(run, data, make_model(run, choice, world))
    from danlu.train.feed import Steps

    batch, _after = next(iter(Steps(work.rows, run.objective, data.tokenizer.special, per_step=run.step_rows,
                                    length=run.length, seed=run.seed, position=work.progress.position)))
    losses = work.engine.forward_backward(batch, step=0)
    return losses, {n: p.grad.clone() for n, p in work.model.named_parameters() if p.grad is not None}


def test_compile_is_refused_where_matrices_are_cut(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set compile=false"):
        recipe(corpus, tmp_path / "run", compile=True, layout={"tp": 2})


def test_a_checkpoint_opens_in_transformers_with_the_same_loss(corpus: Path, tmp_path: Path) -> None:
    last = train(recipe(corpus, tmp_path / "run"))
    theirs, info = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = danlu.load(tmp_path / "run")
    ids = torch.tensor([Shards(corpus, "val").document(0).ids[:20].astype(int)])
    assert torch.allclose(theirs(ids).logits, ours(ids)["logits"], atol=1e-5)
    text = "the furnace 丹炉 learns"
    theirs = AutoTokenizer.from_pretrained(last).encode(text, add_special_tokens=False)
    assert theirs == Tokenizer.load(last).encode(text).tolist()


def test_the_receipt_says_what_the_run_was_made_from(corpus: Path, tmp_path: Path) -> None:
    run = recipe(corpus, tmp_path / "run")
    train(run)
    receipt = json.loads((tmp_path / "run" / "run.json").read_text())
    assert receipt["tokenizer"] == Tokenizer.load(corpus / "tokenizer").sha256
    assert receipt["data"][0]["fingerprint"] == Shards(corpus, "train").fingerprint
    assert receipt["metrics"]["steps"] == 12 and receipt["machine"]["torch"] == torch.__version__
    again = config.load(Run, tmp_path / "run" / "recipe.yaml", [f"out={tmp_path / 'again'}"])
    train(again)
    assert checkpoint.listing(tmp_path / "again")
    same = [load_file(checkpoint.listing(tmp_path / name)[-1] / "model.safetensors") for name in ("run", "again")]
    assert all(torch.equal(same[0][n], same[1][n]) for n in same[0]), "the written recipe repeats the run to the bit"


def test_tokens_of_loss_are_counted(corpus: Path, tmp_path: Path) -> None:
    """An epoch learns from every token but the first of each document."""
    shards = Shards(corpus, "train")
    run = recipe(corpus, tmp_path / "run", steps=None, epochs=1.0, rows=1, every={"log": 1000})
    train(run)
    counted = max(line.get("tokens", 0) for line in lines(tmp_path / "run"))
    assert counted == shards.tokens - shards.documents


@pytest.mark.parametrize("objective", ["causal_lm", {"kind": "causal_lm", "smoothing": 0.1, "z_loss": 1e-3}])
@pytest.mark.parametrize("change", [{"layout": {"micro": 2}}, {"layout": {"micro": 8}}, {"recompute": "full"}, {"recompute": 2}])
def test_splitting_and_recomputing_change_nothing(corpus: Path, tmp_path: Path, change: dict[str, Any], objective: Any) -> None:
    losses, gradients = first_step(recipe(corpus, tmp_path, objective=objective))
    others, changed = first_step(recipe(corpus, tmp_path, objective=objective, **change))
    torch.testing.assert_close(others, losses, rtol=1e-6, atol=0)
    assert changed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(changed[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_like_full(corpus: Path, tmp_path: Path, precision: str) -> None:
    finals = []
    for name in ("fp32", precision):
        train(recipe(corpus, tmp_path / name, precision=name, steps=20))
        finals.append(lines(tmp_path / name)[-1]["eval/loss"])
    assert finals[1] == pytest.approx(finals[0], rel=0.02)
    assert finals[0] < lines(tmp_path / "fp32")[0]["eval/loss"] - 0.3


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(corpus: Path, tmp_path: Path) -> None:
    losses, gradients = first_step(recipe(corpus, tmp_path))
    others, changed = first_step(recipe(corpus, tmp_path, compile=True))
    torch.testing.assert_close(others, losses, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(changed[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_averaged_weights_are_the_average_and_are_what_is_used(corpus: Path, tmp_path: Path) -> None:
    decay, out = 0.5, tmp_path / "run"
    train(recipe(corpus, out, ema=decay, steps=3, every={"log": 1, "save": 1, "keep": 9}, guard={"reload": True}))
    steps = [load_file(out / f"checkpoint-{n}" / "model.safetensors") for n in range(4)]
    average = load_file(out / "checkpoint-3" / "ema" / "model.safetensors")
    for name, value in average.items():
        wanted = steps[0][name]
        for step in steps[1:]:
            wanted = decay * wanted + (1 - decay) * step[name]
        torch.testing.assert_close(value, wanted)
    assert checkpoint.chosen(out).name == "ema"


def test_patience_ends_a_run_and_the_best_checkpoint_stays(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe(corpus, out, steps=200, optim={"kind": "adamw", "lr": 0.3}, schedule={"kind": "constant"}, guard={"spike": 1e9},
                 every={"log": 1, "evaluate": 2, "keep": 2}, stop={"patience": 3}))
    measured = {line["step"]: line["eval/loss"] for line in lines(out) if "eval/loss" in line}
    best = min(measured, key=lambda step: measured[step])
    assert max(measured) < 200 and list(measured)[-1] == best + 6
    assert best == 0 or (out / f"checkpoint-{best}").is_dir()
    weights, before = checkpoint.listing(out)[-1] / "model.safetensors", lines(out)
    digest = weights.read_bytes()
    train(config.validate(Run, yaml.safe_load((out / "recipe.yaml").read_text())))
    assert lines(out) == before and weights.read_bytes() == digest, "the same command again: patience has ended"


def test_a_run_that_begins_again_from_checkpoint_0_has_step_0_once(corpus: Path, tmp_path: Path) -> None:
    run = recipe(corpus, tmp_path / "run", steps=6, every={"log": 1, "evaluate": 3, "save": 6, "keep": 9})
    train(run)
    for folder in checkpoint.listing(run.out)[1:]:
        shutil.rmtree(folder)
    before = lines(run.out)
    train(run)
    assert [line["step"] for line in lines(run.out)] == [line["step"] for line in before]


@pytest.mark.slow
def test_a_compiled_run_in_bf16_reloads_to_the_same_loss(corpus: Path, tmp_path: Path) -> None:
    train(recipe(corpus, tmp_path / "run", compile=True, precision="bf16", steps=2, every={"log": 1},
                 model={"kind": "decoder", "preset": "gpt2", "width": 64, "layers": 4, "heads": 2, "context": 64}))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_averages_and_samples_leave_sharded_weights_alone(corpus: Path, tmp_path: Path) -> None:
    """What is looked at between two steps changes neither, however the weights are cut; and a sample in bf16 is written."""
    file, told = tmp_path / "run.yaml", {}
    given = recipe(corpus, tmp_path, ema=0.5, steps=6, every={"log": 1, "evaluate": 2, "sample": 3, "save": 100})
    file.write_text(yaml.safe_dump(config.dump(given)))
    for name, words in {"none": [], "grads": ["layout.shard=grads"], "full": ["layout.shard=full", "precision=bf16"]}.items():
        out = tmp_path / name
        subprocess.run([sys.executable, "-m", "danlu", "train", str(file), f"out={out}", "layout.dp=2", *words], check=True,
                       capture_output=True, timeout=200)
        assert (out / "samples.jsonl").read_text()
        told[name] = [line["train/loss"] for line in lines(out) if "train/loss" in line]
    assert told["grads"] == pytest.approx(told["none"], rel=1e-5)
    assert told["full"] == pytest.approx(told["none"], rel=1e-2)


@pytest.mark.parametrize("kind", [
    *("adamw", "adafactor", "muon"),
    *(pytest.param(kind, marks=pytest.mark.slow)
      for kind in ("gd", "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "lamb", "lion"))])
def test_every_optimizer_survives_a_checkpoint(corpus: Path, tmp_path: Path, kind: str) -> None:
    for steps in (4, 8):                                  # the second goes on from where the first stopped
        train(recipe(corpus, tmp_path / kind, optim={"kind": kind, "lr": 1e-3}, steps=steps, every={"log": 1},
                     schedule={"kind": "constant"}, guard={"reload": False}))
    train(recipe(corpus, tmp_path / f"{kind}-whole", optim={"kind": kind, "lr": 1e-3}, steps=8, every={"log": 1},
                 schedule={"kind": "constant"}, guard={"reload": False}))
    finals = [load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in (kind, f"{kind}-whole")]
    assert all(torch.equal(finals[0][n], finals[1][n]) for n in finals[0])


def test_a_mixture_takes_its_sources_by_weight(corpus: Path, tmp_path: Path) -> None:
    run = recipe(corpus, tmp_path / "run", data=[{"path": str(corpus), "weight": 3}, {"path": str(corpus), "split": "val"}],
                 eval=[{"path": str(corpus), "split": "val"}], guard={"overlap": 1.0})
    data = open_data(run)
    settled, choice = settle(run, data, World(), None)
    work = assemble(settled, data, make_model(settled, choice, World()))
    plans = work.rows.plans(work.rows.begin())
    taken = [next(plans)[0].source for _row in range(1000)]
    assert taken.count(0) == 750 and taken.count(1) == 250


def test_a_finished_run_is_left_as_it_is(corpus: Path, tmp_path: Path) -> None:
    run = recipe(corpus, tmp_path / "run")
    last = train(run)
    before = (last / "manifest.json").stat().st_mtime_ns
    assert train(run) == last and (last / "manifest.json").stat().st_mtime_ns == before
