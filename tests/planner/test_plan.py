"""Plans against real runs, PyTorch's own FLOP counter, and the rehearsal."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from danlu import cli, config
from danlu.adapt import quantize
from danlu.adapt.lora import LoRA
from danlu.data.kinds import BPE
from danlu.data.tokenizer import train
from danlu.models.build import build
from danlu.nn import paths
from danlu.parallel.place import alone
from danlu.planner.blocks import needs
from danlu.planner.hardware import here
from danlu.planner.memory import stored
from danlu.planner.plan import Plan, Shape, candidates, changed, fixes, plan, shape, unfit
from danlu.planner.rows import repeated
from danlu.rehearse import rehearse, settled
from danlu.rehearse.life import life
from danlu.rehearse.packed import packed
from danlu.rehearse.rows import columns
from danlu.train.recipe import Run
from danlu.train.step import Engine

DECODER = {"kind": "decoder", "width": 32, "layers": 2, "heads": 4, "context": 64, "vocab": 96}


def recipe(**more: Any) -> Run:
    return config.validate(Run, {
        "out": "runs/none", "data": [{"path": "data/none"}], "objective": {"kind": "causal_lm"}, "optim": {"kind": "adamw"},
        "schedule": {"kind": "cosine"}, "steps": 10, "rows": 4, "length": 32, "precision": "fp32", "model": DECODER,
        "device": "cpu", **more})


def planned(**more: Any) -> tuple[Shape, Plan]:
    of = shape(recipe(**more), 96)
    return of, plan(of, here())


@pytest.mark.parametrize("more", [{}, {"recompute": "full"}, {"layout": {"micro": 2}}, {"rows": 12, "layout": {"micro": 6}}],
                         ids=str)
def test_flops_are_those_of_the_counter(more: dict[str, Any]) -> None:
    run = settled(recipe(**more), None)
    model = build(run.network)
    model.to_empty(device="cpu")
    choice = paths.rule("cpu", torch.float32, run.length)
    engine = Engine(alone(model.init(0), recompute=run.recompute, micro=run.layout.micro).use(choice).train(), run.objective,
                    precision="fp32", clip=None, seed=0)
    one = columns(run)
    batch = {name: column.repeat(run.layout.micro, *[1] * (column.ndim - 1)) for name, column in one.items()}
    # PyTorch's table leaves out attention on a CPU, though it knows how to count it
    aten = torch.ops.aten
    attending = {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_a, **_k: sdpa_flop_count(q, k, v),
                 aten._scaled_dot_product_flash_attention_for_cpu_backward:
                     lambda grad, q, k, v, *_a, **_k: sdpa_backward_flop_count(grad, q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=attending) as counter:
        engine.forward_backward(batch, step=0)
    assert life(run, batch, None, copies=False).flops == counter.get_total_flops()


@pytest.mark.parametrize("more", [
    {}, {"layout": {"dp": 2}}, {"layout": {"dp": 2, "shard": "full"}}, {"layout": {"tp": 2}}, {"recompute": "full"},
    {"rows": 12, "layout": {"micro": 6}}, {"optim": {"kind": "sgd"}}, {"precision": "bf16"}], ids=str)
def test_the_plan_agrees_with_the_rehearsal(more: dict[str, Any]) -> None:
    """A step within a whole life, block by block, beside the step alone, micro-batch by micro-batch."""
    run = settled(recipe(rows=8, **more) if "rows" not in more else recipe(**more), None)
    told = rehearse(run)
    one = columns(run)
    batch = repeated(one, max(1, run.step_rows // run.layout.dp))
    lived = needs(life(run, batch, None, copies=False).events)["step"]
    assert lived.tensors == pytest.approx(told.largest.memory.peak, rel=0.03)
    assert told.parameters == sum(p.numel() for p in build(run.network).parameters())


def test_a_base_in_four_bits_is_an_eighth_and_its_scales() -> None:
    found = packed(torch.empty(256, 512), "nf4")
    blocks = 256 * 512 // 64
    assert found.data.nbytes == 256 * 512 // 2
    assert sum(part.nbytes for part in found.state) == blocks + 4 * (blocks // 256)
    assert isinstance(found, quantize.Packed)


@pytest.mark.slow
def test_what_cannot_fit_is_told_with_changes_that_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of, found = planned(rows=16, length=256, model=DECODER | {"context": 256})
    small = here().model_copy(update={"device": found.machine.device.model_copy(
        update={"memory": int(found.phases["step"].resident * 0.99 / 0.95)})})
    tight = plan(of, small)
    assert not tight.fits
    helps = fixes(of, small, tight)
    assert helps and all(fix.plan.fits for fix in helps)
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(rows=16, length=256, model=DECODER | {"context": 256}), only_set=True))
    assert cli.main(["plan", str(file), "--vocab", "96", "--memory", "10MB", "--json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False and told["worst"] in told["phases"]
    assert cli.main(["plan", str(file), "--vocab", "96"]) == 0
    assert "it fits" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    ["--hardware", "8xH900"], ["--hardware", "0xH100"], ["--memory", "much"], ["--memory", "inf"], ["--memory", "nan"],
    ["--memory", "0"], ["--vocab", "-5"], ["--model", "gpt3-175b", "--tokens", "1e300"], ["optim.lrr=1"], []], ids=str)
def test_bad_input_is_refused(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(model={k: v for k, v in DECODER.items() if k != "vocab"}), only_set=True))
    with_vocab = ["--vocab", "96"] if words else []          # without it the data is read, and is not there
    assert cli.main(["plan", str(file), *with_vocab, *words]) in (2, 3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    texts = [" ".join(f"word{(n * k) % 17}" for k in range(60)) for n in range(40)]
    train(texts, BPE(vocab=300)).save(folder / "tokenizer")
    (folder / "rows.txt").write_text("\n".join(texts), encoding="utf-8")
    return folder


def real(rows: Path, place: Path, **more: Any) -> dict[str, Any]:
    """A recipe whose rows are there."""
    return {"out": str(place / "run"), "data": [{"path": str(rows / "rows.txt")}], "tokenizer": str(rows / "tokenizer"),
            "objective": {"kind": "causal_lm"}, "optim": {"kind": "adamw"}, "schedule": {"kind": "constant"}, "rows": 2,
            "steps": 3, "length": 64, "overlong": "split", "threads": 1, "device": "cpu", "audit": {"stop": []},
            "model": {k: v for k, v in DECODER.items() if k != "vocab"}, **more}


def test_a_run_is_planned_filled_in_and_measured(rows: Path, tmp_path: Path) -> None:
    made = real(rows, tmp_path)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(made))
    assert cli.main(["train", str(file), "plan=auto"]) == 0
    told = json.loads((tmp_path / "run" / "plan.json").read_text())
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["fits"] and run["run"]["precision"] in ("fp32", "bf16")
    measured = run["measured"]
    assert measured["steps"] == 3 and measured["step_seconds"] > 0
    assert {"load", "evaluate", "step", "save"} <= measured["peak"].keys() & told["phases"].keys()


@pytest.mark.parametrize("layout", [{}, pytest.param({"dp": 2}, marks=pytest.mark.slow), pytest.param(
    {"pp": 2, "micro": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_probe_makes_steps_in_all_processes_and_leaves_nothing(layout: dict[str, int], rows: Path, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(real(rows, tmp_path, layout=layout)), encoding="utf-8")
    assert cli.main(["plan", str(file), "--probe", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["time"]
    assert told["probed"] and told["messages"] == told["bubble"] == told["memory"] == 0
    assert 0 < told["compute"] < told["step"] < 10
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_save_of_an_adapter_copies_the_adapter_alone(tmp_path: Path) -> None:
    run = settled(recipe(), None).model_copy(update={"adapt": LoRA(rank=2), "start": tmp_path})
    batch = repeated(columns(run), run.step_rows)
    with_copies, without = (needs(life(run, batch, None, copies=copies).events)["save"].tensors for copies in (True, False))
    told = stored(run, rehearse(run.model_copy(update={"start": None})))
    assert with_copies - without == pytest.approx(told["checkpoint"], rel=0.01) and told["checkpoint"] < told["model"] / 3


def test_rows_of_a_micro_batch_are_cut_with_its_number() -> None:
    """Or more parts would be more rows."""
    run = recipe(rows=None, micro_rows=8, layout={"micro": 2})
    made = [(changes, change(run)) for changes, change in candidates(run) if "layout.micro" in changes]
    assert {changes["layout.micro"]: changes["micro_rows"] for changes, _run in made} == {4: 4, 8: 2, 16: 1}
    assert all(one.step_rows == 16 and one.part_rows < 8 for _changes, one in made)


def test_a_change_is_planned_as_it_is_pasted() -> None:
    run = recipe(length=256, model=DECODER | {"context": 256}, optim={"kind": "adamw", "eps": 1e-6, "weight_decay": 0.3})
    for changes, change in candidates(run):
        given = yaml.safe_load(config.to_yaml(run, only_set=True))
        for name, value in changes.items():
            section, _dot, key = name.rpartition(".")
            if name == "optim":
                given["optim"] = {"kind": value}
            else:
                (given.setdefault(section, {}) if section else given)[key] = value
        assert config.validate(Run, given) == change(run), changes
    assert any("optim" in changes for changes, _change in candidates(run))
    of, found = planned(length=256, rows=8, model=DECODER | {"context": 256})
    short = plan(changed(of, lambda one: one.model_copy(update={"length": 128})), here())
    fresh = plan(shape(recipe(length=128, rows=8, model=DECODER | {"context": 256}), 96), here())
    assert short.phases == fresh.phases and short.flops == fresh.flops < found.flops


def test_a_disk_without_room_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    of, found = planned(every={"keep": 3, "best": True, "evaluate": 5})
    monkeypatch.setattr("danlu.planner.plan.shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    tight = plan(of, here())
    assert tight.lacks_disk and not tight.fits and fixes(of, here(), tight) == []
    assert tight.phases["merge"].disk > tight.phases["save"].disk == 5 * stored(of.run, found.rehearsal)["checkpoint"]
    told = unfit(of, here(), tight)
    assert "disk lacks room" in told.what and "every.keep" in (told.fix or "")
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(), only_set=True))
    assert cli.main(["plan", str(file), "--vocab", "96"]) == 5
    assert "the disk lacks room" in capsys.readouterr().out


def test_processes_share_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room = []
    for dp in (1, 2):
        file = tmp_path / f"{dp}.yaml"
        file.write_text(config.to_yaml(recipe(layout={"dp": dp}, precision="auto", device="auto"), only_set=True))
        assert cli.main(["plan", str(file), "--vocab", "96", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        room.append(told["machine"]["room"])
        if not torch.cuda.is_available():
            assert told["precision"] == "fp32"           # as such a run trains on a CPU
    assert room[1] == pytest.approx(room[0] / 2, rel=1e-6)
