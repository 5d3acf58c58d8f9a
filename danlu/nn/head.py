"""The vocabulary head: log-probabilities of labels, in chunks of tokens, never [tokens, vocabulary] at once.

N tokens that are learned from, n tokens of a chunk, D width, V vocabulary.  A chunk's probabilities are at hand in the
forward pass, so the gradients are made there and only scaled by the backward pass: three matrix products in all, where
computing the logits anew would make four.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from danlu.nn import placed
from danlu.nn.attention import working_dtype
from danlu.nn.collective import Cut, cut

CHUNK_BYTES = {"cpu": 48 * 2**20}       # of one chunk of logits: large enough for fast products, small beside the model
OTHER_CHUNK_BYTES = 512 * 2**20         # … on an accelerator
SLAB_BYTES = 2 * 2**20                  # of what a processor works on in float32 at a time: it stays in the cache


class Scores(NamedTuple):
    """What the head says of the N positions whose weight is not 0; float32."""

    logp: Tensor        # [N] log-probability of the label
    logz: Tensor        # [N] log of the sum of the exponentials of the logits
    mean: Tensor        # [N] mean over the vocabulary of the log-probabilities
    index: Tensor       # type: ignore[assignment]  # [N] int64, flat position in [B, T]


def scores(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None, *, bias: Tensor | None = None,
           index: Tensor | None = None, chunk: int | None = None) -> Scores:
    """Return the Scores of `labels` [B, T] under softmax(hidden·weightᵀ + bias) at the positions whose weight is not 0.

    hidden [B, T, D], or [N, D] if the caller has already selected it by `index` = learned(weights); weight [V, D],
    bias [V]; chunk: tokens at a time (default: by memory).  The gradient is exact whatever flows in; it is cheapest
    where that is proportional to `weights`, as in any plain or label-smoothed loss.  Under tensor parallelism weight and
    bias are cut along V, and no process ever has all logits of a token.
    """
    labels, hidden = labels.flatten(), hidden.reshape(-1, hidden.shape[-1])
    if index is None:
        index = learned(labels if weights is None else weights, everything=weights is None)
        hidden = select(hidden, index)
    hint = torch.ones(len(index), device=labels.device) if weights is None else select(weights.flatten().float(), index)
    weight, part = cut(weight)
    bias = None if bias is None else cut(bias)[0]
    logp, logz = _Head.apply(                                   # type: ignore[no-untyped-call]
        hidden, weight, bias, select(labels, index), hint, working_dtype(weight), chunk, torch.is_grad_enabled(), part)
    return Scores(logp, logz, _mean_logit(hidden, weight, bias, part) - logz, index)


def learned(weights: Tensor, *, everything: bool = False) -> Tensor:
    """Return the flat positions [N] whose weight is not 0."""
    flat = weights.flatten()
    return torch.arange(len(flat), device=flat.device) if everything else flat.nonzero()[:, 0]


def select(flat: Tensor, index: Tensor) -> Tensor:
    """Return flat[index]; `flat` itself, uncopied, where the index is complete."""
    return flat if len(index) == len(flat) else flat.index_select(0, index)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return all logits [..., V]: for decoding and distillation only."""
    if placed.is_part(weight):
        from torch.distributed.tensor import DTensor, Shard

        part = F.linear(hidden, weight.to_local(), None if bias is None else cut(bias)[0])
        return DTensor.from_local(part, weight.device_mesh, [Shard(part.ndim - 1)], run_check=False).full_tensor()
    return F.linear(hidden, weight, bias)


def _mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: Cut | None) -> Tensor:
    """Return the mean logit [N]: a mean of linear functions is the function of the mean, so no logit is computed."""
    with torch.autocast(hidden.device.type, enabled=False):
        kind = torch.promote_types(weight.dtype, torch.float32)
        mean = weight.mean(0, dtype=kind) if part is None else part.total(weight.sum(0, dtype=kind)) / part.size
        out = hidden.to(mean.dtype) @ mean
        if bias is None:
            return out
        return out + (bias.to(kind).mean() if part is None else part.total(bias.to(kind).sum()) / part.size)


class _Head(torch.autograd.Function):
    """(logp, logz).

    With G = softmax - onehot and upstream gradients a of logp, b of logz, the gradient of the logits is
    (b - a)·G + b·onehot.  The forward pass keeps G·W, which serves every a and b, and (w·G)ᵀh, for b - a = c·w.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,  # noqa: PLR0917
                hint: Tensor, kind: torch.dtype, chunk: int | None, learning: bool, part: Cut | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.chunk, ctx.part = kind, chunk, part
        ctx.save_for_backward(hidden, weight, bias, labels, hint)
        # float16 has too few small numbers for gradients that the loss scaler has not scaled: those wait for backward
        ahead = learning and kind != torch.float16
        needs = [ahead and need for need in ctx.needs_input_grad[:3]]
        logp, logz, ctx.ready = _pass(hidden, weight, bias, labels, kind, chunk, needs, part, hint=hint)
        return logp, logz

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 9
        if a is None and b is None:
            return nothing
        hidden, weight, bias, labels, hint = ctx.saved_tensors
        zero = torch.zeros_like(hint)
        up = (zero if b is None else b) - (zero if a is None else a)        # [N], the factor of G
        ready, ctx.ready = ctx.ready, [None] * 3                    # used up: the buffers become the gradients
        ratio = _ratio(up, hint)
        anew = [need and (have is None or (i > 0 and ratio is None))
                for i, (need, have) in enumerate(zip(ctx.needs_input_grad[:3], ready, strict=True))]
        if any(anew):
            *_, made = _pass(hidden, weight, bias, labels, ctx.kind, ctx.chunk, anew, ctx.part, up=up, extra=b)
        dh, dw, db = ready
        if b is not None:
            labels, mine = _mine(labels, len(weight), ctx.part)
            b = b if mine is None else b * mine
        if dh is not None:
            dh = dh * up[:, None]
            if b is not None:
                of_label = weight.index_select(0, labels) * b[:, None]
                dh = dh + (of_label if ctx.part is None else ctx.part.add(of_label))
        if dw is not None and ratio is not None:
            dw.mul_(ratio)
            if b is not None:
                dw.index_add_(0, labels, (hidden * b[:, None]).to(dw.dtype))
        if db is not None and ratio is not None:
            db.mul_(ratio)
            if b is not None:
                db.index_add_(0, labels, b.to(db.dtype))
        grads = [made[i] if anew[i] else grad for i, grad in enumerate((dh, dw, db))]
        inputs = (hidden, weight, bias)
        return (*(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), *nothing[3:])


def _ratio(up: Tensor, hint: Tensor) -> float | None:
    """Return c where up = c·hint but for rounding, else None."""
    if not len(up):
        return 0.0
    ratio = torch.dot(up.double(), hint.double()) / hint.double().square().sum()
    return ratio.item() if torch.allclose(up.double(), ratio * hint.double(), rtol=1e-6, atol=0) else None


def _pass(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kind: torch.dtype,  # noqa: PLR0917
          chunk: int | None, needs: list[bool], part: Cut | None, *, hint: Tensor | None = None, up: Tensor | None = None,
          extra: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return logp [N], logz [N] and the wanted ones of the gradients of (hidden [N, D], weight [V, D], bias [V]).

    The gradient of the logits is up·G + extra·onehot.  For weight and bias (not for hidden) it is weighted by `hint`.
    """
    full = torch.promote_types(kind, torch.float32)
    h, w, b = hidden.detach().to(kind), weight.detach().to(kind), None if bias is None else bias.detach().to(kind)
    logp, logz = (torch.empty(len(hidden), dtype=full, device=hidden.device) for _output in range(2))
    dh = torch.empty_like(h) if needs[0] else None
    dw = torch.zeros(weight.shape, dtype=full, device=hidden.device) if needs[1] else None
    db = torch.zeros(weight.shape[:1], dtype=full, device=hidden.device) if needs[2] else None
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, g in _chunks(h, w, b, chunk):
            factors = tuple(None if x is None else x[rows].to(full) for x in (up, extra))
            logp[rows], logz[rows] = _normalise(g, labels[rows], *factors, keep=any(needs), part=part)
            weighing = None if hint is None else hint[rows].to(full)
            if dh is not None:
                torch.mm(g, w, out=dh[rows])
            if dw is not None:
                _add_product(dw, g, h[rows] if weighing is None else (h[rows] * weighing[:, None]).to(kind))
            if db is not None:
                db += g.sum(0, dtype=full) if weighing is None else (g.mT @ weighing.to(kind)).to(full)
    if dh is not None and part is not None:
        part.add(dh)                                            # each process has made the share of its own ids
    return logp, logz, [dh, dw, db]


def _mine(labels: Tensor, rows: int, part: Cut | None) -> tuple[Tensor, Tensor | None]:
    """Return the labels as rows of this process's weight, and whether each is one of them (None: all are)."""
    if part is None:
        return labels, None
    here = labels - part.first
    mine = (here >= 0) & (here < rows)
    return torch.where(mine, here, 0), mine


def _chunks(h: Tensor, w: Tensor, b: Tensor | None, chunk: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their logits [n, V]); the logits' memory is used again for the next rows."""
    most = chunk or CHUNK_BYTES.get(h.device.type, OTHER_CHUNK_BYTES) // (len(w) * h.element_size())
    count = -(-len(h) // max(1, most))
    size = -(-len(h) // max(1, count))
    buffer = torch.empty(size, len(w), dtype=h.dtype, device=h.device)
    for start in range(0, len(h), max(1, size)):
        rows = slice(start, min(start + size, len(h)))
        g = buffer[: rows.stop - start]
        if b is None:
            torch.mm(h[rows], w.mT, out=g)
        else:
            torch.addmm(b, h[rows], w.mT, out=g)
        yield rows, g


def _normalise(g: Tensor, labels: Tensor, up: Tensor | None, extra: Tensor | None, *,
               keep: bool, part: Cut | None = None) -> tuple[Tensor, Tensor]:
    """Return (logp, logz) [n] of the logits g [n, V]; with `keep`, g becomes up·(softmax - onehot) + extra·onehot."""
    full = torch.promote_types(g.dtype, torch.float32)
    slabs = g.device.type == "cpu" and part is None             # with others, one exchange a chunk is cheaper
    step = max(1, SLAB_BYTES // (4 * g.shape[1])) if slabs else max(1, len(g))
    labels, mine = _mine(labels, g.shape[1], part)
    logp, logz = (torch.empty(len(g), dtype=full, device=g.device) for _output in range(2))
    for start in range(0, len(g), step):
        rows = slice(start, min(start + step, len(g)))
        x, label = g[rows].to(full), labels[rows, None]         # in float32 this is g itself, and all is done in place
        peak = x.amax(1, keepdim=True)
        x -= peak if part is None else part.most(peak)
        of_label = x.gather(1, label)
        total = x.exp_().sum(1, keepdim=True)
        if part is not None and mine is not None:
            of_label, total = part.add(torch.stack((of_label * mine[rows, None], total)))
        logz[rows], logp[rows] = (total.log() + peak)[:, 0], (of_label - total.log())[:, 0]
        if keep:
            x *= 1 / total if up is None else up[rows, None] / total
            onehot = -torch.ones_like(of_label) if up is None else -up[rows, None]
            onehot = onehot if extra is None else onehot + extra[rows, None]
            x.scatter_add_(1, label, onehot if mine is None else onehot * mine[rows, None])
            if x.dtype != g.dtype:
                g[rows] = x
    return logp, logz


def _add_product(total: Tensor, g: Tensor, h: Tensor) -> None:
    """Add gᵀ·h [V, D] to `total` in the type of `total`."""
    if total.dtype == g.dtype:
        total.addmm_(g.mT, h)
        return
    step = max(1, SLAB_BYTES // (2 * h.shape[1])) if g.device.type == "cpu" else len(total)
    for start in range(0, len(total), step):                    # slab by slab: a product is added while in the cache
        total[start:start + step] += g[:, start:start + step].mT @ h
