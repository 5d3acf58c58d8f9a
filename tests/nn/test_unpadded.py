"""Padding left out of all but attention: the same outputs of real tokens, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.nn import unpadded as unpadded_rows
from danlu.nn.unpadded import real

SHAPE: dict[str, Any] = {"vocab": 50, "width": 32, "layers": 2, "context": 32}
MODELS = {"bert": Encoder(heads=2, outputs=("mlm",), **SHAPE), "gpt2": Decoder(family="gpt2", heads=2, **SHAPE),
          "llama": Decoder(heads=4, kv_heads=2, **SHAPE), "mistral": Decoder(family="mistral", heads=2, window=4, **SHAPE)}


def padded(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("places", ["each row its own", "all rows the same", "not given"])
@pytest.mark.parametrize("worth", [0, 4096])
def test_outputs_and_gradients_are_those_of_padded_rows(name: str, places: str, worth: int,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpadded_rows, "WORTH", worth)
    segments = padded([12, 5, 1, 9])
    where = real(segments)
    assert where is not None and [part.chosen.tolist() for part in where.parts] == ([[0], [3], [1], [2]] if worth == 0 else [])
    segments[0, 7:] = 2                                 # a second document in the first row
    given = {"each row its own": torch.arange(12)[None].expand(4, -1), "all rows the same": torch.arange(12)[None]}.get(places)
    model: Any = build(MODELS[name], "cpu").init(0).double()
    ids, found = torch.randint(0, 50, segments.shape, generator=torch.Generator().manual_seed(1)), []
    for unpadded in (False, True):
        model.unpadded = unpadded
        model.eval().zero_grad()
        hidden = model(ids, segments=segments, positions=given)["hidden"] * (segments > 0)[..., None]
        hidden.pow(3).sum().backward()
        found.append((hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-12)
    assert found[0][1].keys() == found[1][1].keys()
    for n, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][n], grad, rtol=1e-9, atol=1e-9, msg=n)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9) | st.integers(50, 90), min_size=1, max_size=6))
def test_collected_and_spread_are_each_others_gradient(lengths: list[int]) -> None:
    segments = padded(lengths)
    where = real(segments)
    if len(set(lengths)) == 1:
        assert where is None                            # there is nothing to leave out
        return
    assert where is not None
    x = torch.randn(*segments.shape, 3, dtype=torch.float64, requires_grad=True)
    collected = where.collect(x)
    order = segments.sum(-1).argsort(descending=True, stable=True) if where.parts else torch.arange(len(lengths))
    torch.testing.assert_close(collected, x[order][segments[order] > 0][None])
    torch.testing.assert_close(where.spread(collected), x * segments[..., None])
    assert sum(part.extent for part in where.parts) == (sum(lengths) if where.parts else 0)
    if max(lengths) < 10:
        assert torch.autograd.gradcheck(lambda x: where.spread(where.collect(x)), (x,))


def test_a_multiplication_costs_what_real_tokens_cost() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model: Any = build(MODELS["bert"], "cpu").init(0).eval()
    segments, counts = padded([16, *[4] * 15]), []
    for unpadded in (False, True):
        model.unpadded = unpadded
        with FlopCounterMode(display=False) as counter:
            model(torch.ones_like(segments), segments=segments, labels=torch.ones_like(segments), weights=segments.float())
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
    assert counts[1] < 0.4 * counts[0]                  # 76 of 256 tokens are real
