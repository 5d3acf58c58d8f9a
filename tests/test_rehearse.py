"""A rehearsal against closed forms, and against a real placement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu import config
from danlu.cli import main
from danlu.errors import ConfigError
from danlu.layout import Layout
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.nn import paths
from danlu.objectives.lm import CausalLM
from danlu.optim import LAMB, AdamW, Lion, Momentum
from danlu.parallel.pipeline import Pipe, Stage
from danlu.parallel.place import alone
from danlu.rehearse import Rehearsal, rehearse, settled, slots, spans
from danlu.rehearse.ledger import KERNEL, Kind, Ledger, following
from danlu.rehearse.order import Action, Cost, orders, play
from danlu.rehearse.trace import placed_as, process
from danlu.train.recipe import Run
from danlu.train.step import Engine
from danlu.verbs.rehearse import amount, spread

LAYERS, WIDTH, LENGTH, ROWS = 4, 32, 16, 16


def recipe(layout: dict[str, Any], **more: Any) -> Run:
    model = {"kind": "decoder", "family": "gpt2", "width": WIDTH, "layers": LAYERS, "heads": 4, "context": LENGTH, "vocab": 64}
    return config.validate(Run, {
        "out": "absent", "data": [{"path": "absent"}], "objective": {"kind": "causal_lm"}, "optim": {"kind": "adamw"},
        "schedule": {"kind": "cosine"}, "steps": 10, "rows": ROWS, "length": LENGTH, "precision": "fp32", "model": model,
        "layout": layout, **more})


def rehearsed(layout: dict[str, Any], **more: Any) -> Rehearsal:
    return rehearse(settled(recipe(layout, **more), None))


def moved(rehearsal: Rehearsal, axis: str, kind: str, part: int = 0) -> tuple[int, int]:
    traffic = rehearsal.parts[part].traffic
    return traffic.counts[Kind(axis, kind)], traffic.bytes[Kind(axis, kind)]


def test_one_process_holds_the_model_and_sends_nothing() -> None:
    found = rehearsed({})
    memory, parameters = found.parts[0].memory, found.parameters
    assert found.parts[0].holdings[0].parameters == parameters
    assert memory.weights == 4 * parameters
    steps = 4 * len(found.parts[0].traced.parameters)
    assert memory.optimizer == 8 * parameters + steps                       # two running means, and the number of the step
    assert found.parts[0].traffic.record() == [] and found.bubble == 0


def test_recomputing_keeps_less() -> None:
    plain, less = rehearsed({}).parts[0].memory, rehearsed({}, recompute="full").parts[0].memory
    # a block's input stays, [ROWS, LENGTH, WIDTH] in fp32; at the peak one block's activations are there all the same
    block = 4 * ROWS * LENGTH * WIDTH
    assert LAYERS * block < less.activations < plain.activations
    assert less.peak < plain.peak


@pytest.mark.parametrize("kind", ["regress", "classify"])
def test_a_task_is_rehearsed_from_made_up_rows(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "task.yaml"
    objective = {"kind": kind} | ({"labels": ["bad", "good"]} if kind == "classify" else {})
    file.write_text(json.dumps(config.dump(recipe({"dp": 2}, objective=objective))))
    assert main(["rehearse", str(file), "--vocab", "64", "--json"]) == 0, capsys.readouterr().err


def test_products_in_bf16_leave_their_code_behind() -> None:
    """Each of its shapes once, on a CPU alone; nothing for fp32."""
    def kept(dtype: torch.dtype, *, cpu: bool = True) -> list[int]:
        ledger = Ledger(None, {}, {})
        ledger.log, ledger.cpu = [], cpu
        with following(ledger):
            for rows in (3, 3, 5):
                torch.ones(rows, 4, dtype=dtype) @ torch.ones(4, 2, dtype=dtype)
        return [event.code for event in ledger.log if event.code]

    assert kept(torch.bfloat16) == [KERNEL, KERNEL]
    assert kept(torch.float32) == kept(torch.bfloat16, cpu=False) == []


@pytest.mark.parametrize(("micro", "recompute"), [(1, "none"), (2, "full")])
def test_a_real_step_holds_as_much(micro: int, recompute: str) -> None:
    run = settled(recipe({"micro": micro}, recompute=recompute, device="cpu"), None)
    whole = build(run.network)
    whole.to_empty(device="cpu")
    ledger = Ledger(None, {}, {})
    with following(ledger):
        choice = paths.rule("cpu", torch.float32, LENGTH)
        engine = Engine(alone(whole.init(0), recompute=recompute, micro=micro).use(choice).train(), run.objective,
                        precision="fp32", clip=None, seed=0)
        optimizer = AdamW().build((leaf.name, leaf.local) for leaf in engine.leaves)
        shape = (ROWS, LENGTH)
        ids = torch.randint(0, 64, shape)
        batch = {"ids": ids, "labels": ids.clone(), "weights": torch.ones(shape),
                 "segments": torch.ones(shape, dtype=torch.int32), "positions": torch.zeros(shape, dtype=torch.int64)}
        for step in range(2):                            # in the second, the optimizer's state is there from the start
            before = ledger.mark()
            engine.forward_backward(batch, step=step)
            peak = ledger.peak - before
            engine.update(optimizer, 1e-3, allow=lambda norm: True)
    told = rehearse(run).parts[0].memory
    assert told.peak - told.weights - told.optimizer == pytest.approx(peak, rel=0.02)


def test_ddp_sums_every_gradient_once() -> None:
    found = rehearsed({"dp": 4, "micro": 2})
    count, size = moved(found, "dp", "all-reduce")
    talk = 2 * 8 + 8 + 8                                 # counts and whether to stop, sums, the norm
    assert size == 4 * found.parameters + talk and count == 1 + 3


@pytest.mark.parametrize("micro", [1, 3])
def test_fsdp_gathers_twice_and_scatters_once(micro: int) -> None:
    found = rehearsed({"dp": 4, "shard": "full", "micro": micro}, rows=12)
    size = 4 * found.parameters
    assert moved(found, "dp", "all-gather") == (2 * micro * (LAYERS + 1), 2 * micro * size)
    assert moved(found, "dp", "reduce-scatter") == (LAYERS + 1, size)
    assert sum(len(h.ranks) * h.parameters for h in found.parts[0].holdings) == found.parameters


def test_tensor_parallel_sums_four_times_a_block() -> None:
    found = rehearsed({"tp": 2})
    count, size = moved(found, "tp", "all-reduce")
    block = 4 * ROWS * LENGTH * WIDTH
    # after attention and the feed-forward part, and of the gradients of what goes into them; the embedding, the head's
    assert count >= 4 * LAYERS + 2 and 4 * LAYERS * block < size < (4 * LAYERS + 3) * block
    # matrices and the vocabulary are halved, the rest is in both
    whole = sum(h.parameters * len(h.ranks) for h in found.parts[0].holdings)
    both = sum(p.numel() for n, p in build(found.run.network).named_parameters()
               if "norm" in n or n == "position.weight" or n.endswith(("o.bias", "down.bias")))
    assert whole == found.parameters + both


@pytest.mark.parametrize(("layout", "stages"), [
    ({"pp": 2, "micro": 2, "pipeline": "interleaved"}, [2, 2]), ({"dp": 2, "pp": 2, "micro": 2, "shard": "full"}, [1, 1])])
def test_stages_have_the_model_between_them(layout: dict[str, Any], stages: list[int]) -> None:
    found = rehearsed(layout)
    assert [len(part.traced.stages) for part in found.parts] == stages
    assert sum(s.blocks for part in found.parts for s in part.traced.stages) == LAYERS
    tied = 64 * WIDTH                                    # in the first and the last stage
    held = sum(h.parameters * len(h.ranks) for part in found.parts for h in part.holdings)
    assert held == (found.parameters + tied) * (1 if layout.get("shard") else layout.get("dp", 1))
    message = 4 * ROWS // layout.get("dp", 1) // layout["micro"] * LENGTH * WIDTH
    count, size = moved(found, "pp", "send")
    assert size == count * message and count == layout["micro"] * (2 * stages[0] - 1)
    assert not any(stage.misfit for part in found.parts for stage in part.traced.stages)


def schedule(pp: int, micro: int, kind: str) -> Any:
    layout = Layout(pp=pp, micro=micro, pipeline=kind)      # type: ignore[arg-type]
    with process(layout, 0) as world:
        stages = [Stage(torch.nn.Linear(1, 1), CausalLM(), lambda: None) for _stage in range(layout.stage_count // pp)]
        pipe = Pipe(stages, [pp * i for i in range(len(stages))], world, rows=1, tokens=4, width=4, strip=1,
                    dtype=torch.float32, terms=1)
        return pipe.schedule


@pytest.mark.parametrize(("pp", "micro"), [(2, 2), (4, 4), (8, 96)])
def test_the_bubble_of_1f1b_is_its_closed_form(pp: int, micro: int) -> None:
    order = orders(schedule(pp, micro, "1f1b"))
    assert play(order).bubble == pytest.approx((pp - 1) / (micro + pp - 1))
    assert all(sorted(mine) == sorted(Action(kind, rank, m) for m in range(micro) for kind in "BF")
               for rank, mine in enumerate(order))


def test_other_orders_wait_less() -> None:
    plain, interleaved, zero = (play(orders(schedule(4, 8, kind))).bubble for kind in ("1f1b", "interleaved", "zero_bubble"))
    assert zero < interleaved < plain
    assert interleaved == pytest.approx(3 / (8 * 2 + 3))                    # (pp - 1) / (micro·chunks + pp - 1)


def test_a_slow_stage_is_waited_for() -> None:
    order = orders(schedule(2, 2, "1f1b"))
    assert play(order, {0: Cost(1, 2), 1: Cost(2, 4)}).length == 1 + 2 * (2 + 4) + 2


@pytest.mark.parametrize("layout", [{"dp": 3, "tp": 2, "shard": "full"}], ids=str)
def test_every_process_holds_what_it_would_be_given(layout: dict[str, Any]) -> None:
    run = settled(recipe(layout, rows=12), None)
    told = {rank: h.parameters for part in rehearse(run).parts for h in part.holdings for rank in h.ranks}
    for rank in range(run.layout.world):
        with process(run.layout, rank) as world:
            given = sum(getattr(p, "_local_tensor", p).numel() for p in placed_as(run, world).parameters())
        assert told[rank] == given


def test_slots_are_the_optimizers_own() -> None:
    def sizes(optim: Any) -> list[tuple[int, ...]]:
        kept = slots(optim, {"blocks.0.mlp.up.weight": 2})["blocks.0.mlp.up.weight"]
        return sorted(slot.at((11, 3)) for slot in kept)

    assert sizes(AdamW()) == [(), (11, 3), (11, 3)]
    assert sizes(LAMB()) == [(), (11, 3), (11, 3)]
    assert sizes(Lion()) == sizes(Momentum()) == [(11, 3)]


def test_world_fills_in_dp_or_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("layout: {tp: 2, pp: 2}\n")
    assert spread(file, [], 16) == ["layout.dp=4"] and spread(file, ["layout.pp=1"], 16) == ["layout.dp=8"]
    assert spread(file, [], 4) == spread(file, [], None) == []
    with pytest.raises(ConfigError, match="4 processes, not 6"):
        spread(file, [], 6)
    with pytest.raises(ConfigError, match="8 processes, not 16"):
        spread(file, ["--layout.dp=2"], 16)


def test_amounts_of_memory() -> None:
    assert (amount("80GB"), amount("80 GiB"), amount("8e10")) == (8e10, 80 * 2**30, 8e10)
    with pytest.raises(ConfigError):
        amount("much")
    assert spans([3, 0, 1, 2, 7]) == "0-3, 7"


def test_the_verb_prints_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    run = recipe({"tp": 2, "pp": 2, "micro": 2}, precision="bf16")
    file.write_text(config.to_yaml(run, only_set=True))
    assert main(["rehearse", str(file), "--world", "8", "--memory", "100kB", "--vocab", "64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["world"] == 8 and told["layout"]["dp"] == 2 and told["fits"] is False and len(told["parts"]) == 2
    assert main(["rehearse", str(file), "--memory", "1GB"]) == 0
    assert "fits" in capsys.readouterr().out
    assert main(["rehearse", str(file), "layout.tp=3"]) == 2
    assert "layout.tp=3" in capsys.readouterr().err
    assert isinstance(run.network, Decoder)
