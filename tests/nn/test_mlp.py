"""Activations against torch's, and the fast tanh-GELU against the slow one, forward and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from danlu.nn import mlp
from danlu.nn.mlp import MLP, activate, gelu_tanh


@pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float64, 1e-13, 1e-13), (torch.float32, 1e-6, 4e-6)])
def test_the_paths_of_gelu_are_equal(dtype: torch.dtype, value: float, slope: float,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "SLAB", 1000)
    x = torch.linspace(-12, 12, 10_001, dtype=dtype).requires_grad_()
    slow, fast = gelu_tanh(x, "torch"), gelu_tanh(x, "sigmoid")
    torch.testing.assert_close(fast, slow, atol=value, rtol=0)
    up = torch.linspace(1, 2, 10_001, dtype=dtype)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, up)[0] for y in (fast, slow)), atol=slope, rtol=0)
    with torch.no_grad():
        assert torch.equal(gelu_tanh(x, "sigmoid"), fast)


def test_gelu_takes_views_and_bfloat16() -> None:
    x = torch.randn(6, 10, dtype=torch.bfloat16).mT
    torch.testing.assert_close(gelu_tanh(x, "sigmoid"), gelu_tanh(x, "torch"))


@pytest.mark.parametrize(("name", "wanted"), [
    ("gelu", F.gelu), ("silu", F.silu), ("relu", F.relu), ("relu2", lambda x: F.relu(x) ** 2),
    ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
])
def test_gated_and_plain(name: mlp.Activation, wanted: object) -> None:
    x = torch.randn(3, 8)
    torch.testing.assert_close(activate(x, name), wanted(x))    # type: ignore[operator]
    gated, plain = MLP(8, 12, activation=name, gated=True, bias=True), MLP(8, 12, activation=name)
    assert gated.gate is not None
    torch.testing.assert_close(gated(x), gated.down(wanted(gated.gate(x)) * gated.up(x)))   # type: ignore[operator]
    torch.testing.assert_close(plain(x), plain.down(wanted(plain.up(x))))                   # type: ignore[operator]
