"""What a vocabulary's head says of a few ids of each token: to learn from another model without all of its logits.

N tokens that are learned from, k ids of each, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from danlu.nn import head
from danlu.nn.collective import Cut, cut

CHUNK_BYTES = 32 * 2**20                # of rows of the table, or of logits, that are at hand at a time


class Best(NamedTuple):
    """The likeliest ids of N tokens."""

    ids: Tensor         # [N, k] int64
    logp: Tensor        # [N, k] their log-probabilities, float32
    index: Tensor       # type: ignore[assignment]  # [N] int64, flat position in [B, T]


@torch.no_grad()
def best(hidden: Tensor, weight: Tensor, index: Tensor, k: int, *, bias: Tensor | None = None,
         soften: Tensor | None = None) -> Best:
    """Return the k likeliest ids under softmax((hidden·weightᵀ + bias) / soften), hidden [N, D], weight [V, D], soften [1]."""
    k, size = min(k, len(weight)), max(1, CHUNK_BYTES // (4 * len(weight)))
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    logp = torch.empty(len(hidden), k, device=hidden.device)
    for start in range(0, len(hidden), size):
        logits = head.logits(hidden[start : start + size], weight, bias).float()
        logits = logits if soften is None else logits / soften
        values, ids[start : start + size] = logits.topk(k)
        logp[start : start + size] = values - logits.logsumexp(-1, keepdim=True)
    return Best(ids, logp, index)


def of_ids(hidden: Tensor, weight: Tensor, ids: Tensor, scores: head.Scores, weights: Tensor | None, *,
           bias: Tensor | None = None, soften: Tensor | None = None) -> Tensor:
    """Return the log-probabilities [N, k] of `ids` [N, k] under the same softmax, with gradients.

    scores: those of the same tokens, whose log of the sum of exponentials serves where soften is None.  Under tensor parallelism
    weight and bias are cut along V.
    """
    logz = scores.logz
    if soften is not None:
        logz = head.scores(hidden / soften, weight, ids[:, 0], weights, bias=None if bias is None else bias / soften,
                           index=torch.arange(len(ids), device=ids.device)).logz
    table, part = cut(weight)
    here = ids if part is None else ids - part.first
    mine = None if part is None else (here >= 0) & (here < len(table))
    here = here if mine is None else torch.where(mine, here, 0)
    logits: Tensor = _OfIds.apply(hidden, table, here, mine, part)          # type: ignore[no-untyped-call]
    if bias is not None:
        known = cut(bias)[0][here]
        logits = logits + (known if part is None or mine is None else part.total(known * mine))
    return (logits if soften is None else logits / soften) - logz[:, None]


class _OfIds(torch.autograd.Function):
    """hidden·table[ids] [N, k]; the rows of the table are gathered anew for the backward pass, for they take k·N·D."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, ids: Tensor, mine: Tensor | None, part: Cut | None) -> Tensor:  # noqa: PLR0917
        ctx.save_for_backward(hidden, table, ids, mine)
        ctx.part = part
        out = torch.empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for rows in _chunks(ids, table):
            out[rows] = (table[ids[rows]].to(out.dtype) @ hidden[rows, :, None].to(out.dtype))[..., 0]
        return out if mine is None or part is None else part.add(out * mine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table, ids, mine = ctx.saved_tensors
        given = given if mine is None else given * mine
        dh = torch.empty_like(hidden, dtype=given.dtype)
        dw = torch.zeros_like(table, dtype=given.dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(ids, table):
            dh[rows] = (given[rows, None] @ table[ids[rows]].to(given.dtype))[:, 0]
            if dw is not None:
                dw.index_add_(0, ids[rows].flatten(), (given[rows, :, None] * hidden[rows, None].to(given.dtype)).flatten(0, 1))
        dh = dh if ctx.part is None else ctx.part.add(dh)
        return dh.to(hidden.dtype), None if dw is None else dw.to(table.dtype), None, None, None


def _chunks(ids: Tensor, table: Tensor) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * ids.shape[1] * table.shape[1]))
    return [slice(start, start + size) for start in range(0, len(ids), size)]


def speak(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, *, index: Tensor,
         bias: Tensor | None = None, candidates: Tensor | None = None, soften: Tensor | None = None, most: int = 0
         ) -> dict[str, Any]:
    """Return {name: Scores} of hidden [N, D]; with candidates [B, T, k] also {name/of: [N, k]}; with `most` {name/best: Best}.

    soften [B]: the temperature, the same for all rows; None: 1.
    """
    one = None if soften is None else soften[:1]
    if most:
        return {f"{name}/best": best(hidden, weight, index, most, bias=bias, soften=one)}
    scores = head.scores(hidden, weight, labels, weights, bias=bias, index=index)
    if candidates is None:
        return {name: scores}
    ids = head.select(candidates.flatten(0, 1), index)
    chosen = head.select(weights.flatten(), index) if weights is not None else None
    return {name: scores, f"{name}/of": of_ids(hidden, weight, ids, scores, chosen, bias=bias, soften=one)}
