"""Dropout: the share, the scale, the gradient, and that a seed says which."""

from __future__ import annotations

import pytest
import torch

from danlu.nn.drop import dropout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_dropped_and_the_mean_stays(share: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(400_003, requires_grad=True)
    out = dropout(x, share, True)
    assert abs(float((out == 0).float().mean()) - share) < 4 * (share * (1 - share) / 400_003) ** 0.5 + 1e-5
    assert abs(float(out.mean()) - 1) < 0.02
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())
    neighbours = (out[:-1] == 0) & (out[1:] == 0)         # cut from one draw, and yet each for itself
    assert abs(float(neighbours.float().mean()) - share**2) < 0.01


def test_a_seed_says_which_and_evaluation_drops_nothing() -> None:
    x = torch.randn(7, 13)
    torch.manual_seed(3)
    first = dropout(x, 0.3, True)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.3, True))
    assert dropout(x, 0.3, False) is x and dropout(x, 0.0, True) is x
