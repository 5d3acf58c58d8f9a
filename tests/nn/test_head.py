"""The chunked head against torch's log_softmax in float64, in value and gradient, and its memory against arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.nn import head

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "plain": lambda logp, logz, mean, w: -(logp * w).sum() / 7,
    "smoothed": lambda logp, logz, mean, w: -((0.9 * logp + 0.1 * mean) * w).sum(),
    "z": lambda logp, logz, mean, w: ((0.01 * logz**2 - logp) * w).sum(),
    "not in proportion": lambda logp, logz, mean, w: (logp.sin() * 3).sum(),
    "only logz": lambda logp, logz, mean, w: logz.sum(),
    "only mean": lambda logp, logz, mean, w: mean.sum(),
}


def plain(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(h.flatten(0, 1)[index], w, b)
    logp = logits.log_softmax(-1)
    return logp.gather(1, labels.flatten()[index, None])[:, 0], logits.logsumexp(-1), logp.mean(-1)


def example(bias: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    source = torch.Generator().manual_seed(5)
    shapes = [(3, 13, 7), (29, 7), *([(29,)] if bias else [])]
    inputs = [torch.randn(s, dtype=torch.float64, generator=source).requires_grad_() for s in shapes]
    weights = torch.rand(3, 13, generator=source)
    weights[torch.rand(3, 13, generator=source) < 0.4] = 0
    labels = torch.where(weights != 0, torch.randint(29, (3, 13), generator=source), -100)
    return inputs, labels, weights


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(loss: str, bias: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLAB_BYTES", 29 * 4 * 3)         # three rows at a time
    inputs, labels, weights = example(bias)
    h, w, b = (*inputs, None)[:3]
    index = weights.flatten().nonzero()[:, 0]
    learned = weights.flatten()[index].double()
    wanted = plain(h, w, b, labels, index)
    got = head.scores(h, w, labels, weights, bias=b, chunk=chunk)
    assert torch.equal(got.index, index)
    for name, want in zip(("logp", "logz", "mean"), wanted, strict=True):
        torch.testing.assert_close(getattr(got, name), want, atol=1e-12, rtol=0)
    ours = torch.autograd.grad(LOSSES[loss](*got[:3], learned), inputs, allow_unused=True)
    theirs = torch.autograd.grad(LOSSES[loss](*wanted, learned), inputs, allow_unused=True)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


def test_a_frozen_weight_and_frozen_hidden_states() -> None:
    inputs, labels, weights = example(False)
    h, w = inputs
    index = weights.flatten().nonzero()[:, 0]
    for frozen, free in ((w, h), (h, w)):
        frozen.requires_grad_(False)
        (ours,) = torch.autograd.grad(head.scores(h, w, labels, weights).logp.sum(), free)
        (theirs,) = torch.autograd.grad(plain(h, w, None, labels, index)[0].sum(), free)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        frozen.requires_grad_(True)


def test_backward_twice_gives_the_same() -> None:
    inputs, labels, weights = example(True)
    h, w, b = inputs
    logp = head.scores(h, w, labels, weights, bias=b).logp
    first = torch.autograd.grad(logp.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(logp.sum(), inputs)
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


def test_no_position_is_learned() -> None:
    inputs, labels, weights = example(False)
    got = head.scores(*inputs, labels, torch.zeros_like(weights))
    assert len(got.logp) == len(got.index) == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(got.logp.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_and_exact_sums(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h, w = torch.randn(1, 40, 32, requires_grad=True), (torch.randn(300, 32) / 6).requires_grad_()
    labels, weights = torch.randint(300, (1, 40)), torch.ones(1, 40)
    with torch.autocast("cpu", dtype):
        got = head.scores(h, w, labels, weights)
    rounded = [x.detach().to(dtype).float().requires_grad_() for x in (h, w)]
    wanted = plain(rounded[0], rounded[1], None, labels, torch.arange(40))
    assert got.logp.dtype == got.logz.dtype == torch.float32
    torch.testing.assert_close(got.logp, wanted[0], atol=0.03, rtol=0)      # the logits were rounded, nothing after
    ours = torch.autograd.grad(got.logp.mean(), (h, w))
    for x, y in zip(ours, torch.autograd.grad(wanted[0].mean(), rounded), strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() / y.norm() < 0.02


def test_a_sure_label_keeps_its_small_gradient_in_bfloat16() -> None:
    h, w = torch.eye(4)[None, :1] * 3.0, torch.eye(4) * 3.0     # p(label) = 0.9996, so softmax - onehot is 4e-4
    h.requires_grad_()
    label = torch.zeros(1, 1, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        got = head.scores(h, w, label)
    (ours,) = torch.autograd.grad(got.logp.sum(), h)
    (theirs,) = torch.autograd.grad(plain(h, w, None, label, torch.arange(1))[0].sum(), h)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0.01)


def test_no_tensor_of_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1 << 16)
    sizes = []
    real = torch.empty

    def watched(*shape: int, **settings: object) -> Tensor:
        out: Tensor = real(*shape, **settings)                  # type: ignore[call-overload]
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", watched)
    h, w = torch.randn(1, 512, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with torch.no_grad():
        quiet = head.scores(h, w, torch.zeros(1, 512, dtype=torch.int64)).logp
    loud = head.scores(h, w, torch.zeros(1, 512, dtype=torch.int64)).logp
    loud.sum().backward()
    assert torch.equal(quiet, loud)
    assert max(sizes) * 4 <= 1 << 16
