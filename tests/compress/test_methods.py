"""Methods against what defines them: errors of rounding, scores of pruning, singular values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compress.small import SHAPES, VOCAB, correlated, ids, model, said
from torch import Tensor

from danlu.adapt.targets import linears
from danlu.compress import awq, rows
from danlu.compress.compare import distance, numbers
from danlu.compress.factorize import Factorize, factorize, split
from danlu.compress.gptq import gptq
from danlu.compress.prune import Prune, mask, prune
from danlu.compress.quantize import Quantize, quantize
from danlu.compress.rows import Moments
from danlu.errors import ConfigError
from danlu.models.build import build
from danlu.nn import packed
from danlu.nn.forms import Int4, Int8
from danlu.nn.tasks import Head


def moment(x: Tensor) -> Moments:
    return Moments(x.double().mT @ x.double(), x.double().abs().sum(0), len(x))


def lost(weight: Tensor, now: Tensor, x: Tensor) -> float:
    """What defines the error: the squares of what the layer then says differently."""
    return float((x.double() @ (now - weight).double().mT).square().sum())


def test_moments_are_those_of_what_layers_are_given() -> None:
    made, given = model("bert"), ids()
    layers = {name: layer for name, layer in linears(made).items() if name.startswith("blocks.1.")}
    seen: list[Tensor] = []
    hook = made.blocks[1].mlp.down.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0].detach()))
    stage = next(iter(rows.stages(made, layers, given)))
    seen.clear()
    found = rows.moments(stage.layers, stage.run)
    hook.remove()
    x = torch.cat(seen).double()
    assert set(stage.layers) == set(layers) and found["blocks.1.mlp.down"].tokens == 120
    torch.testing.assert_close(found["blocks.1.mlp.down"].products, x.mT @ x)
    torch.testing.assert_close(found["blocks.1.mlp.down"].mean, x.abs().mean(0).float())
    difference = torch.randn(64, 256)
    assert rows.error(difference, found["blocks.1.mlp.down"]) == pytest.approx(float((x @ difference.double().mT).square().sum()))
    assert torch.equal(found["blocks.1.attention.q"].products, found["blocks.1.attention.v"].products)


@pytest.mark.parametrize("form", [Int8(), Int4(group=32), Int4(group=48)], ids=str)
def test_gptq_loses_less_than_rounding_to_nearest_where_inputs_are_correlated(form: Any) -> None:
    x = correlated(400, 96)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    nearest, made = (form.dense(parts, 96) for parts in (form.pack(weight), gptq(weight, moment(x), form)))
    assert lost(weight, made, x) < 0.7 * lost(weight, nearest, x)


def test_gptq_of_independent_inputs_is_rounding_to_nearest() -> None:
    weight = torch.randn(8, 32)
    even = Moments(torch.eye(32, dtype=torch.float64), torch.ones(32, dtype=torch.float64), 32)
    for form in (Int8(), Int4(group=32)):
        made, nearest = gptq(weight, even, form), form.pack(weight)        # type: ignore[attr-defined]
        assert all(torch.equal(made[name], nearest[name]) for name in nearest)


def test_gptq_survives_inputs_that_are_never_there() -> None:
    x = correlated(50, 64)
    x[:, :5] = 0
    weight = torch.randn(8, 64)
    made, nearest = (Int4().dense(parts, 64) for parts in (gptq(weight, moment(x), Int4()), Int4().pack(weight)))
    assert torch.isfinite(made).all() and lost(weight, made, x) < lost(weight, nearest, x)
    assert torch.isfinite(Int4().dense(gptq(weight, moment(0 * x), Int4()), 64)).all()


def test_awq_never_loses_more_than_rounding_to_nearest() -> None:
    x = correlated(400, 96)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    form = Int4(group=32)
    by = awq.factors([weight], moment(x), form)
    made = form.dense(form.pack(weight * by), 96) / by
    assert lost(weight, made, x) < lost(weight, form.dense(form.pack(weight), 96), x) and not (by == 1).all()
    even = Moments(torch.eye(96, dtype=torch.float64), torch.ones(96, dtype=torch.float64), 96)
    assert (awq.factors([weight], even, form) == 1).all()


@pytest.mark.parametrize("family", SHAPES)
def test_awq_moves_factors_without_changing_what_is_said(family: str) -> None:
    made, given = model(family), ids()
    before = said(made, given)
    layers = linears(made)
    left: dict[str, Tensor] = {}
    for stage in rows.stages(made, layers, given):
        found = rows.moments(stage.layers, stage.run)
        first = next(iter(stage.layers))
        block = made.get_submodule(".".join(first.split(".")[:2])) if first.startswith("blocks.") else None
        left |= awq.scale(made, block, stage.layers, found, Int4(group=32))
    for name, by in left.items():                        # these divide their inputs themselves
        layer = made.get_submodule(name)
        layer.weight.data.div_(by)
    torch.testing.assert_close(said(made, given), before, atol=2e-4, rtol=2e-4)
    folded = {"llama": ("attention.q", "mlp.up", "mlp.down"), "bert": (), "gpt2": ("attention.q", "mlp.up")}.get(family, ())
    assert not any(name.endswith(part) for name in left for part in folded)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("how", [{}, {"method": "dynamic"}, {"method": "gptq"}, {"bits": 4, "group": 32, "method": "awq"},
                                 {"bits": 4, "group": 32, "method": "gptq"}, {"bits": 4, "method": "nf4", "group": 32}], ids=str)
def test_a_quantised_model_says_nearly_the_same(family: str, how: dict[str, Any]) -> None:
    before, given = model(family), ids()
    made = copy.deepcopy(before)
    table = quantize(made, Quantize.model_validate(how), given)
    assert {name for name, _form in table} >= set(linears(before)) | {"embed"}
    apart = distance(before, made, given)
    old = said(before, given)
    found = float((said(made, given) - old).norm() / old.norm())
    assert found < (0.2 if how.get("bits", 8) == 8 else 0.9), found
    largest = float((said(made, given) - old).abs().max())
    assert apart.divergence is not None and apart.difference == pytest.approx(largest, rel=1e-3)
    assert numbers(made)[0] == numbers(before)[0]


def test_answers_are_compared_over_the_places_of_a_row() -> None:
    """A bias that lifts every beginning changes no answer, though it changes which of a place's two numbers is larger."""
    before = model("bert").cfg.with_tasks((Head.model_validate({"kind": "answer"}),))
    first = build(before, "cpu").init(3).eval()
    second = copy.deepcopy(first)
    bias = next(t for name, t in second.named_parameters() if name.endswith("answer.out.bias"))
    bias.data += torch.tensor([7.0, -7.0])
    apart = distance(first, second, ids())
    assert apart.difference > 6 and apart.agreement == 1.0
    assert apart.divergence == pytest.approx(0.0, abs=1e-6)


def test_methods_that_look_at_rows_refuse_to_do_without() -> None:
    with pytest.raises(ConfigError, match="there are no rows"):
        quantize(model("bert"), Quantize(method="gptq"), [])
    with pytest.raises(ConfigError, match="there are no rows"):
        prune(model("bert"), Prune(method="wanda"))
    with pytest.raises(ValueError, match="has no 4 bits"):
        Quantize(bits=4, method="dynamic")
    made = model("bert")
    quantize(made, Quantize())
    with pytest.raises(ConfigError, match="packed already"):
        quantize(made, Quantize())


def test_layers_are_kept_and_taken_in_by_name() -> None:
    made = model("bert")
    quantize(made, Quantize(keep=("blocks.0.*", "embed"), also=("heads.*",)))
    names = {name for name, _form in packed.forms(made)}
    assert names == {"pooler", "heads.classify.out", *(f"blocks.1.attention.{x}" for x in "qkvo"),
                     "blocks.1.mlp.up", "blocks.1.mlp.down"}
    with pytest.raises(ConfigError, match="no layer is called"):
        quantize(model("bert"), Quantize(keep=("nothing",)))


def test_magnitude_takes_the_smallest_of_each_matrix() -> None:
    made = model("bert")
    before = {name: layer.weight.detach().clone() for name, layer in linears(made).items()}
    prune(made, Prune(sparsity=0.3))
    for name, layer in linears(made).items():
        border = before[name].abs().flatten().sort().values[round(0.3 * before[name].numel())]
        assert torch.equal(layer.weight, torch.where(before[name].abs() >= border, before[name], 0.0))


def test_wanda_takes_the_smallest_of_weight_times_norm_in_each_row() -> None:
    x, weight = correlated(100, 32), torch.randn(6, 32)
    kept = mask(weight, Prune(method="wanda", sparsity=0.25), x.norm(dim=0))
    for row in range(6):
        score = weight[row].abs() * x.norm(dim=0)
        assert set(score.argsort()[:8].tolist()) == set((~kept[row]).nonzero()[:, 0].tolist())
    made, given = model("llama"), ids()
    first = {name: layer.weight.detach().clone() for name, layer in linears(made).items()}
    seen: list[Tensor] = []
    hook = made.blocks[0].attention.q.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0].detach()))
    rows.read(made, given)
    hook.remove()
    prune(made, Prune(method="wanda"), given)
    wanted = mask(first["blocks.0.attention.q"], Prune(method="wanda"), torch.cat(seen).norm(dim=0))
    assert torch.equal(made.blocks[0].attention.q.weight != 0, wanted)
    assert all((layer.weight == 0).float().mean(1).eq(0.5).all() for layer in linears(made).values())


@pytest.mark.parametrize("given", [None, ids()], ids=["magnitude", "with rows"])
def test_two_of_every_four_stay(given: Any) -> None:
    made = model("llama")
    prune(made, Prune(method="2:4"), given)
    for layer in linears(made).values():
        whole = layer.in_features // 4 * 4
        assert ((layer.weight[:, :whole] != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 9.0]])
    assert mask(weight, Prune(method="2:4")).tolist() == [[False, True, True, False, True]]


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("what", ["heads", "ffn", "layers"])
def test_what_is_taken_out_whole_is_as_if_it_were_zero(family: str, what: str) -> None:
    """The smaller model says what the whole one does whose parts are masked."""
    whole, given = model(family, layers=4 if what == "layers" else 2), ids()
    made = prune(copy.deepcopy(whole), Prune.model_validate({"method": what}), given)
    assert numbers(made)[0] < numbers(whole)[0]
    if what == "layers":
        from danlu.compress.structure import kept_layers
        kept = kept_layers(whole, 0.5, given)
        assert len(made.blocks) == made.cfg.layers == len(kept) == 2
        whole.blocks = torch.nn.ModuleList(whole.blocks[number] for number in kept)
    for old, new in zip(whole.blocks, made.blocks, strict=True):
        if what == "layers":
            continue
        big, small = (old.attention.o, new.attention.o) if what == "heads" else (old.mlp.down, new.mlp.down)
        columns = big.weight.detach().mT                 # [I, O]: which of them are left
        stay = torch.tensor([any(torch.equal(column, one) for one in small.weight.detach().mT) for column in columns])
        assert int(stay.sum()) == small.in_features == big.in_features // 2
        big.weight.data.mul_(stay)
    torch.testing.assert_close(said(made, given), said(whole, given), atol=1e-5, rtol=1e-5)


def test_the_least_share_of_a_weight_is_lost() -> None:
    weight = torch.randn(40, 24)
    sizes = torch.linalg.svdvals(weight.double())
    for rank in (3, 9):
        thin = split(weight, Factorize(rank=rank))
        assert thin is not None and thin.up.shape == (40, rank) and thin.down.shape == (rank, 24)
        exact = sizes[rank:].square().sum().sqrt()
        found = (thin.up.double() @ thin.down.double() - weight.double()).norm()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
        assert thin.error == pytest.approx(float(exact / sizes.norm()))
    assert split(weight, Factorize(rank=16)) is None     # 16·64 numbers are more than 40·24


def test_with_rows_the_least_share_of_what_is_said_is_lost() -> None:
    x, weight = correlated(300, 24), torch.randn(40, 24)
    outputs = x.double() @ weight.double().mT
    sizes = torch.linalg.svdvals(outputs)
    thin, blind = split(weight, Factorize(rank=5), moment(x)), split(weight, Factorize(rank=5))
    assert thin is not None and blind is not None
    found = (x.double() @ (thin.up @ thin.down).double().mT - outputs).norm()
    torch.testing.assert_close(found, sizes[5:].square().sum().sqrt(), rtol=1e-2, atol=0)
    assert found < (x.double() @ (blind.up @ blind.down).double().mT - outputs).norm()


def test_ranks_follow_from_the_error_allowed() -> None:
    weight = torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5, *[0.01] * 20]))
    for error, rank in ((0.5, 1), (0.11, 2), (0.05, 3), (0.01, 4)):
        thin = split(weight, Factorize(error=error))
        assert thin is not None and len(thin.down) == rank and thin.error <= error


@pytest.mark.parametrize("family", SHAPES)
def test_a_factorised_model_has_fewer_numbers(family: str) -> None:
    whole, given = model(family), ids()
    made = copy.deepcopy(whole)
    done = factorize(made, Factorize(rank=8), given)
    away = sum(made.get_submodule(name).out_features * made.get_submodule(name).in_features for name in done)
    more = sum(thin.up.numel() + thin.down.numel() for thin in done.values())
    assert numbers(made)[0] == numbers(whole)[0] - away + more < numbers(whole)[0]
    made = copy.deepcopy(whole)
    with pytest.raises(ConfigError, match="fewer numbers"):
        factorize(made, Factorize(error=1e-6))
    assert torch.equal(said(made, given), said(whole, given)) and whole.cfg.vocab == VOCAB
