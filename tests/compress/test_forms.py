"""Forms of weights: exact round trips, closed forms, counted bytes, kernels against whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danlu.nn import forms, packed
from danlu.nn.forms import NF4, Bits, Int4, Int8, Low


def weight(rows: int = 48, columns: int = 100, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_codes_two_to_a_byte_come_back(columns: int) -> None:
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    pairs = forms.paired(codes)
    assert pairs.shape == (5, -(-columns // 2)) and torch.equal(forms.split(pairs)[:, :columns], codes)
    assert int(pairs[0, 0]) == int(codes[0, 0]) + 16 * (int(codes[0, 1]) if columns > 1 else 0)


@pytest.mark.parametrize("form", [Int8(), Int4(group=32), Int4(group=64), NF4(group=64), Bits(count=0)],
                         ids=lambda form: f"{form.kind} {getattr(form, 'group', '')}")
@pytest.mark.parametrize("shape", [(48, 100), (3, 7), (64, 128)])
def test_what_is_packed_is_what_is_told_and_packs_to_itself(form: Any, shape: tuple[int, int]) -> None:
    w = weight(*shape)
    if form.kind == "bits":
        w[w.abs() < 0.7] = 0
        form = Bits(count=int(w.count_nonzero()))
    parts = form.pack(w)
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == {
        name: tuple(part) for name, part in form.parts(*shape).items()}
    whole = form.dense(parts, shape[1])
    again = form.dense(form.pack(whole), shape[1])
    if form.kind == "bits":
        assert torch.equal(whole, w)
    elif form.kind == "int4":                            # its grid is that of what is left of the group's ends
        torch.testing.assert_close(again, whole, atol=float((whole.max() - whole.min()) / 15), rtol=0)
    else:
        assert torch.equal(again, whole)


def test_eight_bits_are_at_most_half_a_step_off() -> None:
    w = weight()
    step = w.abs().amax(1, keepdim=True) / 127
    codes = (w / step).round()
    parts = Int8().pack(w)
    assert torch.equal(parts["codes"], codes.to(torch.int8))
    torch.testing.assert_close(Int8().dense(parts, 100), codes * step)
    assert ((Int8().dense(parts, 100) - w).abs() <= step / 2 * (1 + 1e-5)).all()


def test_four_bits_are_the_nearest_of_sixteen_in_each_group() -> None:
    w, form = weight(16, 96), Int4(group=32)
    parts = form.pack(w)
    whole = form.dense(parts, 96)
    for group in range(3):
        here = w[:, 32 * group : 32 * group + 32]
        scale, offset = parts["scales"][group].float().unbind(-1)
        torch.testing.assert_close(scale, (here.amax(1) - here.amin(1)) / 15, rtol=2**-8, atol=0)
        levels = (torch.arange(16) - 8) * scale[:, None] + offset[:, None]                      # [O, 16]
        nearest = levels.gather(1, (here[:, :, None] - levels[:, None]).abs().argmin(-1))
        torch.testing.assert_close(whole[:, 32 * group : 32 * group + 32], nearest)


def test_normal_levels_are_the_nearest_there_are() -> None:
    w, form = weight(16, 128), NF4(group=64)
    parts = form.pack(w)
    levels = torch.tensor(forms.NORMAL)
    for group in range(2):
        here = w[:, 64 * group : 64 * group + 64]
        scale = here.abs().amax(1, keepdim=True).half().float()
        best = levels[(here[:, :, None] / scale[:, :, None] - levels).abs().argmin(-1)] * scale
        torch.testing.assert_close(form.dense(parts, 128)[:, 64 * group : 64 * group + 64], best)


def test_the_levels_are_those_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weight(16, 128)
    data, state = bnb.quantize_4bit(w.reshape(1, -1), blocksize=64, quant_type="nf4", compress_statistics=False)
    torch.testing.assert_close(NF4().dense(NF4().pack(w), 128), bnb.dequantize_4bit(data, state).view_as(w), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (48, 100), (130, 96)])
@pytest.mark.parametrize("form", [Int8(), Int8(activations=True), Int4(group=32), Int4(group=64), NF4()], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_kernels_compute_what_whole_matrices_do(form: Any, shape: tuple[int, int], rows: int) -> None:
    layer: Any = nn.Linear(shape[1], shape[0])
    packed.become(layer, form, form.pack(weight(*shape)))
    x = weight(rows, shape[1], seed=1)
    with torch.no_grad():
        found = layer(x.view(rows, 1, -1))[:, 0]
        exact = x @ form.dense({"codes": layer.codes, "scales": layer.scales}, shape[1]).mT + layer.bias
    # bfloat16 has 8 bits; of activations in 8 bits each is half a step off, and the steps of a row add up as a random walk
    bound = 2**-7 if not getattr(form, "activations", False) else 0.02
    assert float((found - exact).norm() / exact.norm()) < bound
    if rows > packed.FEW and not getattr(form, "activations", False):
        torch.testing.assert_close(found, exact)


def test_activations_in_eight_bits_are_exact_where_they_are_whole_numbers() -> None:
    layer: Any = nn.Linear(64, 32, bias=False)
    w = torch.randint(-127, 128, (32, 64)).float()
    w[:, 0] = 127
    packed.become(layer, Int8(activations=True), Int8().pack(w))
    x = torch.randint(-127, 128, (9, 64)).float()
    x[:, 1] = -127
    with torch.no_grad():
        assert torch.equal(layer(x), x @ w.mT)


def test_gradients_pass_through_packed_weights() -> None:
    for form in (Int8(), Int8(activations=True), Int4(group=32)):
        layer: Any = nn.Linear(64, 64)
        packed.become(layer, form, form.pack(weight(64, 64)))
        x = weight(2, 64, seed=3).requires_grad_()
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


def test_a_table_of_tokens_makes_only_the_rows_that_are_asked_for() -> None:
    table: Any = nn.Embedding(30, 16)
    w = table.weight.detach().clone()
    packed.become(table, Int8(), Int8().pack(w))
    ids = torch.tensor([[3, 3, 29]])
    assert torch.equal(table(ids), table.weight[ids]) and not list(table.parameters())
    assert float((table.weight - w).abs().max()) <= float(w.abs().max()) / 127 / 2 * 1.001


def test_two_thin_matrices_learn() -> None:
    layer: Any = nn.Linear(10, 8)
    up, down = torch.randn(8, 3), torch.randn(3, 10)
    packed.become(layer, Low(rank=3), {"up": up, "down": down})
    x = torch.randn(4, 10)
    torch.testing.assert_close(layer(x), x @ (up @ down).mT + layer.bias)
    layer(x).sum().backward()
    assert layer.up.grad is not None and layer.down.grad is not None and layer.bias.grad is not None
    assert sorted(layer.state_dict()) == ["bias", "down", "up"]


def test_the_table_of_forms_is_json_and_back() -> None:
    table: Any = [("a.b", Int8()), ("c", Int4(group=32)), ("d", Int8()), ("e", forms.Cut(rows=3, columns=4)), ("e", Low(rank=2))]
    groups = packed.groups_of(table)
    assert sorted(packed.table_of(groups), key=str) == sorted(table, key=str) and len(groups) == 4
