"""The search: its estimates against full rehearsals, its candidates against `Layout.check`, its lines against the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danlu import config
from danlu.cli import main
from danlu.layout import Layout
from danlu.planner import estimate, offer
from danlu.planner.hardware import parse
from danlu.planner.public import pretraining, public
from danlu.planner.search import layouts, search
from danlu.rehearse import rehearse, settled
from danlu.train.recipe import Run

WITHIN = 0.03                                            # the share by which an estimate may differ from the rehearsal
SMALL = {"kind": "decoder", "family": "llama", "width": 512, "layers": 7, "heads": 8, "kv_heads": 4, "context": 256,
         "vocab": 2048}


def recipe(**more: Any) -> Run:
    return config.validate(Run, {
        "out": "absent", "data": [{"path": "absent"}], "objective": {"kind": "causal_lm"}, "optim": {"kind": "adamw"},
        "schedule": {"kind": "cosine"}, "steps": 10, "rows": 16, "length": 256, "model": SMALL, "device": "cuda", **more})


QUICK: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"recompute": "full"}), ({"dp": 16, "shard": "full"}, {"recompute": "full"}),
    ({"dp": 4, "shard": "full", "micro": 4}, {}), ({"tp": 4, "sequence": True}, {})]
SLOW: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}), ({"micro": 4}, {"recompute": "full", "precision": "fp32"}), ({"dp": 4}, {}), ({"dp": 8, "shard": "grads"}, {}),
    ({"dp": 8, "shard": "hybrid", "group": 4}, {"recompute": "full"}),
    ({"tp": 2, "dp": 4, "shard": "full", "sequence": True}, {"recompute": "full"}), ({"cp": 2, "dp": 2, "shard": "full"}, {}),
    ({"pp": 3, "micro": 4}, {}), ({"pp": 2, "dp": 2, "micro": 8, "shard": "full"}, {"recompute": "full"}),
    ({"dp": 4, "shard": "full", "offload": True}, {}), ({"micro": 2}, {"optim": {"kind": "lion"}})]


@pytest.mark.parametrize(("layout", "more"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)], ids=str)
def test_an_estimate_agrees_with_the_rehearsal(layout: dict[str, Any], more: dict[str, Any]) -> None:
    run = settled(recipe(layout=layout, **{"precision": "bf16"} | more), None)
    traces, whole = estimate.Traces(), rehearse(run)
    known = whole.largest.memory
    told = estimate.held(run, traces)
    assert told.peak == pytest.approx(known.peak, rel=WITHIN)
    assert (told.weights, told.optimizer, told.host) == (known.weights, known.optimizer, known.host)
    part, _waiting = estimate.parts(run, traces)[0]
    stage = whole.parts[0].traced.stages[0]
    assert part.flops() == run.layout.micro * sum(stage.usual.flops)
    for (axis, kind), (_count, size) in part.traffic().items():
        assert size == pytest.approx(whole.parts[0].traffic.of(axis, kind).bytes.total(), rel=0.01, abs=200), (axis, kind)


def test_every_candidate_is_a_layout_that_can_be() -> None:
    run = settled(recipe(rows=64), None)
    found = list(layouts(run, parse("32xA100")))
    assert len(found) > 50 and len(set(found)) == len(found)
    for one in found:
        one.check(64, length=run.length, model=run.network.model_dump(), optimizer="adamw")
        assert one.world <= 32 and 64 % (one.dp * one.micro) == 0
    assert {"none", "full", "grads", "hybrid"} == {one.shard for one in found}


def test_the_same_question_has_the_same_answer_and_its_lines_load() -> None:
    given = recipe(rows=64)
    run = settled(given, None).model_copy(update={"precision": "auto"})
    found = search(run, parse("2xA100", price=2.0), steps=1000, deadline=3600, budget=1e6, given=given)
    again = search(run, parse("2xA100", price=2.0), steps=1000, deadline=3600, budget=1e6, given=given)
    assert offer.record(found) == offer.record(again)
    steps = [one.pace.step for one in found.best if found.meets(one)]
    assert steps == sorted(steps) and found.best[0].fits
    for one in found.best:
        pasted = config.load(Run, None, [
            "out=x", "data=[{path: x}]", "objective=causal_lm", "optim=adamw", "schedule=cosine", "steps=10", "length=256",
            f"model={json.dumps(SMALL)}", *one.changes])
        assert pasted.layout == one.run.layout and pasted.step_rows == 64 and pasted.recompute == one.run.recompute
    rehearsal, off = offer.verified(found.best[0])
    assert abs(off) <= WITHIN and rehearsal.parameters > 0


def test_a_thousand_devices_take_few_traces() -> None:
    run = pretraining(public("gpt3-175b").config.model_copy(update={"vocab": 50304}), length=2048, rows=1536)
    found = search(run, parse("1024xA100"), steps=100_000)
    assert found.traced <= 5                             # which is what a search spends its seconds on
    best = found.best[0]
    assert found.looked > 1000 and best.fits and best.run.layout.tp > 1 and best.run.layout.world > 900


@pytest.mark.slow
def test_what_does_not_fit_is_offloaded_or_learned_otherwise() -> None:
    shape = public("llama-2-7b").config
    run = pretraining(shape, length=512, rows=8)
    found = search(run, parse("2xA100"), steps=10)
    assert found.best[0].fits and found.best[0].run.layout.world == 2
    lacking = search(run, parse("1xRTX4090"), steps=10)
    assert not lacking.best[0].fits and lacking.best[0].held.peak > 24e9


@pytest.mark.slow
def test_lora_where_all_parameters_do_not_fit(tmp_path: Path) -> None:
    given = config.validate(Run, config.dump(recipe(rows=8)) | {"model": None, "start": str(tmp_path)})
    shape = public("llama-2-7b").config
    run = pretraining(shape, length=256, rows=8)
    found = search(run, parse("1xA100-40GB"), steps=10, given=given)
    assert found.best[0].fits and found.best[0].other[0] == "adapt=lora"


def test_the_verb_prints_lines_to_paste(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(), only_set=True))
    words = ["plan", str(file), "--hardware", "4xA100", "--deadline", "24h", "--budget", "500"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert f"danlu train {file} rows=16" in told and "the budget of 500.00 pays" in told
    assert main([*words, "--price", "2", "--json", "--rehearse", "1"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["plans"][0]["meets"] and abs(read["rehearsed"][0]["estimate_above"]) <= WITHIN
    assert main([*words[:2], "--hardware", "4xNOTHING"]) == 2
    assert "NOTHING" in capsys.readouterr().err


def test_a_ring_is_as_fast_as_what_it_crosses() -> None:
    machine = parse("64xH100")
    near, inside = estimate.rate_between(Layout(dp=8, tp=8), machine, "tp")
    far, outside = estimate.rate_between(Layout(dp=8, tp=8), machine, "dp")
    both, _outside = estimate.rate_between(Layout(dp=64), machine, "dp")
    assert inside and not outside and near == machine.device.link and far == machine.device.network
    assert both == min(machine.device.link or 0, 8 * machine.device.network)     # eight of a ring stand in one node


@pytest.mark.parametrize("layout", [
    {"dp": 2, "shard": "full", "offload": True}, {"dp": 4, "shard": "hybrid", "group": 2}, {"tp": 2, "sequence": True},
    {"pp": 2, "micro": 4, "stages": [3, 5]}, {"pp": 2, "micro": 4, "pipeline": "interleaved", "chunks": 4}], ids=str)
def test_the_lines_make_of_the_recipe_what_was_planned(layout: dict[str, Any], tmp_path: Path) -> None:
    """Also where the recipe says what the plan leaves out: another device, shards, stages of a pipeline."""
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(layout=layout, device="cpu", model=SMALL | {"layers": 8}), only_set=True))
    given = config.load(Run, file, [])
    alone = given.model_copy(update={"device": "cuda", "layout": Layout()})
    found = search(settled(alone, None).model_copy(update={"precision": "auto"}), parse("2xA100"), steps=10, given=given)
    for one in found.best:
        pasted = config.load(Run, file, list(one.changes))
        assert pasted.layout == one.run.layout and pasted.device == "cuda"


def test_more_devices_make_nothing_slower_and_fewer_are_cheaper() -> None:
    run = settled(recipe(), None).model_copy(update={"precision": "auto"})
    steps = [search(run, parse(f"{count}xH100"), steps=1000).best[0].pace.step for count in (1, 4, 8, 16, 64)]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[2]
    alone = search(run, parse("1xRTX4090", price=1.0), steps=100_000).best[0]
    assert alone.cost is not None
    many = search(run, parse("16xRTX4090", price=1.0), steps=100_000, budget=1.01 * alone.cost)
    assert many.meets(many.best[0]) and many.best[0].pace.step <= alone.pace.step
    missed = search(run, parse("16xRTX4090", price=1.0), steps=100_000, budget=0.5 * alone.cost)
    assert not missed.meets(missed.best[0])
    assert missed.best[0].cost == min(one.cost or 0.0 for one in missed.best) == pytest.approx(alone.cost)


def test_a_precision_that_a_machine_lacks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(precision="bf16"), only_set=True))
    assert main(["plan", str(file), "--hardware", "V100"]) == 0
    assert "no bf16 that is worth it; fp16 stands in its place" in capsys.readouterr().out
    assert main(["plan", str(file), "--hardware", "A100", "--deadline", "0.001s"]) == 0
    told = capsys.readouterr().out
    assert "stands in its place" not in told and "is missed" in told
