"""Memory that runs out in a step: smaller micro-batches of the same rows, once said, the same weights."""

from __future__ import annotations

import json
import re
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from cli import command, danlu, environment, weights_hash

from danlu.errors import OutOfMemory, short_of_memory
from danlu.train.room import finer

RECIPE = """out: unused
model: {{kind: decoder, family: gpt2, width: 32, layers: 2, heads: 2, context: 64, dropout: {dropout}}}
data: [{{path: {corpus}}}]
objective: causal_lm
optim: {{kind: adamw, lr: 1e-3}}
schedule: {{kind: cosine, warmup: 3}}
steps: 12
rows: 8
length: 32
overlong: split
precision: fp32
every: {{log: 1, evaluate: 6, save: 4, keep: 2}}
threads: 1
"""


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(dropout=0.0, corpus=corpus), encoding="utf-8")
    return path


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize(("rows", "micro", "next_one"), [
    (8, 1, 2), (8, 4, 8), (8, 8, None), (12, 4, 6), (9, 1, 3), (7, 1, 7), (1, 1, None)])
def test_the_next_number_of_micro_batches_divides_the_rows(rows: int, micro: int, next_one: int | None) -> None:
    assert finer(rows, micro) == next_one


def test_what_a_shortage_of_memory_looks_like() -> None:
    assert short_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert short_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 60)
    assert short_of_memory(told.value) and not short_of_memory(RuntimeError("shapes do not match"))
    assert "layout.micro=4" in str(OutOfMemory("no room", settings=("layout.micro=4",)))


def test_micro_batches_are_halved_at_the_same_rows_a_step(recipe: Path, tmp_path: Path) -> None:
    assert danlu("train", recipe, "--out", tmp_path / "whole").code == 0
    ended = danlu("train", recipe, "--out", tmp_path / "halved", fault="memory:oom:5").clean()
    assert ended.code == 0
    said = [line for line in ended.err.splitlines() if "memory ran out" in line]
    assert len(said) == 1 and re.search("in step 5: from now on 2 micro-batches of 4 rows instead of 1 of 8", said[0])
    whole, halved = losses(tmp_path / "whole"), losses(tmp_path / "halved")
    assert whole[:4] == halved[:4] and halved == pytest.approx(whole, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "halved/metrics.jsonl").read_text().splitlines()]
    assert [line.get("micro") for line in lines if "train/loss" in line] == [None] * 4 + [2] * 8


@pytest.mark.slow
def test_a_run_that_went_on_in_halves_resumes_in_halves_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(dropout=0.1, corpus=corpus), encoding="utf-8")      # drawn by the micro-batch
    assert danlu("train", recipe, "--out", tmp_path / "a", fault="memory:oom:3").code == 0
    assert danlu("train", recipe, "--out", tmp_path / "b", fault="memory:oom:3,train.step:kill:11").code == -9
    assert danlu("train", recipe, "--out", tmp_path / "b").clean().code == 0
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")


def test_one_row_that_does_not_fit_ends_the_run(recipe: Path, tmp_path: Path) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", "layout.micro=8", fault="memory:oom:9").clean()
    assert ended.code == 5 and "cannot become smaller" in ended.err and "recompute=full" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["rows=null", "micro_rows=4"]])
def test_several_processes_start_again_with_smaller_micro_batches(recipe: Path, tmp_path: Path, settings: list[str]) -> None:
    both = ["layout.dp=2", *settings]
    assert danlu("train", recipe, "--out", tmp_path / "whole", *both).code == 0
    ended = danlu("train", recipe, "--out", tmp_path / "halved", *both, fault="rank1.memory:oom:7").clean()
    assert ended.code == 0 and ended.err.count("memory ran out") == 1 and "layout.micro=2" in ended.err
    assert losses(tmp_path / "halved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_memory_that_really_ends(corpus: Path, tmp_path: Path) -> None:
    """The address space ends where a step of all rows would go beyond it."""
    recipe = tmp_path / "wide.yaml"
    wide = {"rows: 8": "rows: 512", "length: 32": "length: 64", "width: 32": "width: 256", "steps: 12": "steps: 2",
            "warmup: 3": "warmup: 1"}
    text = RECIPE.format(dropout=0.0, corpus=corpus)
    for old, new in wide.items():
        text = text.replace(old, new)
    recipe.write_text(text, encoding="utf-8")
    plain = danlu("train", recipe, "--out", tmp_path / "plain")
    assert plain.code == 0
    for room in (2.5e9, 3e9, 3.5e9, 4e9, 4.5e9, 5e9):   # how much the libraries map differs; one of these cuts between
        ended = subprocess.run(command("train", recipe, "--out", tmp_path / f"{room:g}"), env=environment(), text=True,
                               capture_output=True, check=False,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (int(room),) * 2))   # noqa: B023
        if ended.returncode == 0 and "micro-batches" in ended.stderr:
            assert losses(tmp_path / f"{room:g}") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
            return
    pytest.fail("no limit was met in a step")
