"""Weights laid out for writing: the same numbers in 16 bits, near ones in 8, and a row never knows of the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import MAKES, made, prompts, tokenizer

from danlu.decode import Batcher, Sampling
from danlu.decode.pack import Laid8, able, pack

needs16 = pytest.mark.skipif(not able(16), reason="this processor has no such kernel")
needs8 = pytest.mark.skipif(not able(8), reason="this processor has no such kernel")
SIZES: dict[str, Any] = {"width": 64, "heads": 4, "init_std": 0.1}


@needs16
@pytest.mark.parametrize("make", MAKES)
def test_16_bits_are_the_model_in_bfloat16(make: str) -> None:
    model = made(make, **SIZES)
    ids = torch.tensor([prompts(1, longest=40, seed=3)[0]])
    with torch.inference_mode():
        plain = copy.deepcopy(model).bfloat16()(ids)["logits"].float()
        exact = model(ids)["logits"]
        packed = pack(model, bits=16)(ids)["logits"].float()
    spread = exact.std()
    assert (packed - exact).abs().max() / spread < 2 * (plain - exact).abs().max() / spread + 1e-3


@needs8
@pytest.mark.parametrize("bias", [True, False])
def test_8_bits_are_within_their_steps(bias: bool) -> None:
    source = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=source), torch.randn(5, 64, generator=source)
    added = torch.randn(48, generator=source) if bias else None
    x[3] = 0
    got = Laid8(weight, added)(x.bfloat16()[:, None])[:, 0].float()
    right = torch.nn.functional.linear(x, weight, added)
    # a step of the weights times |x|, one of the inputs times |w|, half of each at most, and the rounding to bfloat16
    error = (x.abs().sum(1)[:, None] * weight.abs().amax(1) + weight.abs().sum(1) * x.abs().amax(1)[:, None]) / 254
    assert ((got - right).abs() <= error + 0.02 * right.abs() + 1e-2).all()
    assert (got - right).norm() / right.norm() < 0.02


@needs8
def test_a_row_in_8_bits_is_the_same_beside_any_other() -> None:
    source = torch.Generator().manual_seed(1)
    layer, x = Laid8(torch.randn(48, 64, generator=source), None), torch.randn(6, 1, 64, generator=source).bfloat16()
    x[2] *= 100
    together = layer(x)
    for row in range(6):
        assert torch.equal(layer(x[row:row + 1])[0], together[row])


@needs8
def test_texts_in_8_bits_are_the_same_together_and_alone() -> None:
    model = pack(made("grouped", **SIZES), bits=8)
    how = Sampling(max_new_tokens=12, temperature=0)
    with Batcher(model, tokenizer(), slots=3, queue=9) as batcher:
        tickets = [batcher.submit(prompt, how) for prompt in prompts(3)]
        together = [[i for piece in ticket for i in piece.ids] for ticket in tickets]
        alone = [[i for piece in batcher.submit(prompt, how) for i in piece.ids] for prompt in prompts(3)]
    assert together == alone
