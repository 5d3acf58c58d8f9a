"""Clipping: inside the fused optimizer or before it, the same parameters; none where the norm is small enough."""

from __future__ import annotations

import pytest
import torch

from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.objectives.lm import CausalLM
from danlu.parallel.place import alone
from danlu.train.step import Engine

IDS = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("clip", [0.01, 1e6])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_what_is_clipped_in_one_pass_is_what_is_clipped_in_two(kind: type[torch.optim.Optimizer], clip: float) -> None:
    found = []
    for fused in (False, True):
        model = build(Decoder(vocab=50, width=32, layers=2, heads=2, context=16), "cpu").init(0)
        engine = Engine(alone(model.train()), CausalLM(), precision="fp32", clip=clip, seed=0)
        optimizer = kind([leaf.local for leaf in engine.leaves], lr=1e-3, fused=fused)          # type: ignore[call-arg]
        norms = []
        for number in range(3):
            engine.forward_backward({"ids": IDS, "labels": IDS.roll(-1, 1), "weights": torch.ones(4, 16)}, step=number)
            norms.append(engine.update(optimizer, 1e-3, allow=lambda norm: True))
        found.append((torch.tensor(norms), torch.cat([leaf.local.detach().flatten() for leaf in engine.leaves])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=2e-5)
    assert getattr(optimizer, "grad_scale", None) is None


def test_the_gradient_has_the_norm_that_was_asked_for() -> None:
    model = build(Decoder(vocab=50, width=32, layers=2, heads=2, context=16), "cpu").init(0)
    engine = Engine(alone(model.train()), CausalLM(), precision="fp32", clip=0.25, seed=0)
    before = torch.cat([leaf.local.detach().flatten() for leaf in engine.leaves]).double()
    optimizer = torch.optim.SGD([leaf.local for leaf in engine.leaves], lr=1.0)
    engine.forward_backward({"ids": IDS, "labels": IDS.roll(-1, 1), "weights": torch.ones(4, 16)}, step=0)
    assert engine.update(optimizer, 1.0, allow=lambda norm: True) > 0.25
    after = torch.cat([leaf.local.detach().flatten() for leaf in engine.leaves]).double()
    assert float((after - before).norm()) == pytest.approx(0.25, rel=1e-3)
