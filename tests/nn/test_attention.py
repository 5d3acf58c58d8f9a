"""Every path against attention written out with explicit masks, forward and gradient, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from danlu.nn import attention
from danlu.nn.attention import Attention, attend, sight
from danlu.nn.cache import Past
from danlu.nn.position import frequencies, turn

PATHS = ("plain", "block", "sdpa")


def reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention one head at a time; allowed [B, T, S]."""
    heads = []
    for head in range(q.shape[2]):
        shared = head // (q.shape[2] // k.shape[2])
        scores = torch.einsum("btk,bsk->bts", q[:, :, head], k[:, :, shared]) / q.shape[-1] ** 0.5
        p = torch.where(allowed, scores, torch.tensor(-torch.inf, dtype=q.dtype)).softmax(-1)
        heads.append(torch.einsum("bts,bsk->btk", p, v[:, :, shared]))
    return torch.stack(heads, 2)


def seen(tokens: int, causal: bool, window: int | None, segments: Tensor | None) -> Tensor:
    allowed = torch.ones(2, tokens, tokens, dtype=torch.bool)
    for t, s in itertools.product(range(tokens), range(tokens)):
        allowed[:, t, s] &= s <= t or not causal
        allowed[:, t, s] &= window is None or abs(t - s) < window
        if segments is not None:
            allowed[:, t, s] &= segments[:, t] == segments[:, s]
    return allowed


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_paths_are_equal(causal: bool, packed: bool, window: int | None, heads: tuple[int, int],
                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 8)                  # several blocks, and a last one that is not full
    source = torch.Generator().manual_seed(1)
    tokens, query_heads, key_heads = 27, *heads
    q, k, v, up = (torch.randn(2, tokens, n, 4, dtype=torch.float64, generator=source)
                   for n in (query_heads, key_heads, key_heads, query_heads))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    segments = torch.tensor([[1] * 10 + [2] * 12 + [0] * 5, [1] * 20 + [2] * 7]) if packed else None
    see = sight(tokens, causal=causal, device="cpu", dtype=torch.float64, window=window, segments=segments)
    wanted = reference(q, k, v, seen(tokens, causal, window, segments))
    gradients = torch.autograd.grad((wanted * up).sum(), inputs)
    for path in PATHS:
        out = attend(q, k, v, see, path)
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
        for got, want in zip(torch.autograd.grad((out * up).sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(attend(q, k, v, see, path), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_stays_near_float32(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 8)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    see = sight(40, causal=True, device="cpu", dtype=torch.bfloat16)
    wanted = attend(q, k, v, see, "sdpa")
    out = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), see, path)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_gradient_with_dropout(path: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    see = sight(5, causal=True, device="cpu", dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)                                    # the same things are dropped every time
        return attend(q, k, v, see, path, dropout=0.4)

    assert not torch.equal(run(q, k, v), attend(q, k, v, see, path))
    assert torch.autograd.gradcheck(run, (q, k, v))


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1, 2) for _ in range(3))
    see = sight(4, causal=False, device="cpu", dtype=torch.float32)
    many = [x.expand(20_000, -1, -1, -1) for x in (q, k, v)]
    out = attend(*many, see, "plain", dropout=0.3).mean(0)
    torch.testing.assert_close(out, attend(q, k, v, see, "plain")[0], atol=0.03, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_changes_nothing(path: str, window: int | None) -> None:
    torch.manual_seed(0)
    layer = Attention(16, 4, kv_heads=2, qkv_bias=True, qk_norm=1e-6).double()
    layer.path = path
    x, positions = torch.randn(2, 11, 16, dtype=torch.float64), torch.arange(11)[None]
    angles, factor = frequencies(4, 100.0)
    cos, sin = turn(positions, angles, factor, torch.float64)
    whole = layer(x, sight(11, causal=True, device="cpu", dtype=torch.float64, window=window), rotary=(cos, sin))
    past, parts, start = Past(11), [], 0
    for size in (5, 1, 3, 1, 1):
        see = sight(size, causal=True, device="cpu", dtype=torch.float64, window=window, past=start)
        here = slice(start, start + size)
        parts.append(layer(x[:, here], see, rotary=(cos[:, here], sin[:, here]), past=past))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_padding_touches_nothing_and_is_finite(path: str) -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2)
    layer.path = path
    x = torch.randn(1, 9, 8, requires_grad=True)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 0, 0, 0]])
    out = layer(x, sight(9, causal=True, device="cpu", dtype=torch.float32, segments=segments))
    assert torch.isfinite(out).all()
    out[:, 4:6].sum().backward()                                # the second document alone
    assert x.grad is not None
    assert x.grad[:, 4:6].abs().min() > 0
    assert x.grad[:, :4].abs().max() == 0 and x.grad[:, 6:].abs().max() == 0
