"""Attention: grouped queries, rotary positions, sliding windows, packed documents, a cache; by three equal paths.

B rows, T tokens, S tokens that can be seen (past ones included), D width, H query heads, G key heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danlu.nn.cache import Past, StepPast
from danlu.nn.collective import Span
from danlu.nn.drop import mask
from danlu.nn.norm import RMSNorm
from danlu.nn.position import rotate
from danlu.nn.unpadded import Real

DROPPED = 1 << 24       # probabilities that are kept where dropout goes by the "plain" path in place of "sdpa"
BLOCK = 128     # queries in a block of the "block" path: larger ones compute more of what the causal mask throws away


class Sight(NamedTuple):
    """What each query sees.  Made once a forward pass and shared by all layers."""

    causal: bool                # token t sees tokens 0..t
    window: int | None          # … and of those only the last `window`
    bias: Tensor | None         # [B or 1, 1, T, S] added to the scores: 0 seen, -inf not.  None: `causal` says it all
    real: Real | None = None    # where the tokens stand in rows, if padding has been left out of x

    def parts(self) -> list[Sight]:
        """Return what the rows of each part see, of keys that are ahead of the tokens, too."""
        assert self.real is not None
        made = []
        for part in self.real.parts:
            bias, tokens = self.bias, part.inside.tokens
            if bias is not None:
                seen = bias.shape[-1] - self.real.tokens + tokens
                bias = (bias if len(bias) == 1 else bias[part.chosen])[..., :tokens, :seen]
            made.append(self._replace(bias=bias, real=part.inside))
        return made


def sight(tokens: int, *, causal: bool, device: str | torch.device, dtype: torch.dtype, window: int | None = None,
          segments: Tensor | None = None, past: int = 0, lengths: Tensor | None = None, span: Span | None = None) -> Sight:
    """Return what `tokens` new queries see, after `past` tokens that a cache holds; lengths [B]: of each row as many.

    segments [B, S]: a token sees only tokens of its own segment.  Padding (0) is a segment of its own: it sees only
    padding, so nothing real depends on it and no row of the softmax is empty.  span: the queries are these tokens of
    the row, and the keys come in its order; `segments` are the whole row's all the same.
    """
    if span is not None:
        query, key = span.mine[:, None], span.order
        theirs = None if segments is None else (segments[:, None, span.mine, None], segments[:, None, None, span.order])
        allowed = torch.ones(len(span.mine), len(span.order), dtype=torch.bool, device=device)
        return Sight(False, None, _bias(allowed, query, key, causal, window, theirs, dtype))
    seen = past + tokens
    if lengths is not None:
        query = lengths[:, None, None, None] + torch.arange(tokens, device=device)[:, None]          # [B, 1, T, 1]
        allowed = torch.ones(len(lengths), 1, tokens, seen, dtype=torch.bool, device=device)
        return Sight(False, None, _bias(allowed, query, torch.arange(seen, device=device), True, window, None, dtype))
    if window is not None and window >= seen:
        window = None
    if segments is None and window is None and (past == 0 or tokens == 1 or not causal):
        return Sight(causal and past == 0, None, None)      # one new query after a past sees everything
    query = torch.arange(past, seen, device=device)[:, None]
    key = torch.arange(seen, device=device)
    allowed = torch.ones(tokens, seen, dtype=torch.bool, device=device)
    same = None if segments is None else (segments[:, None, past:, None], segments[:, None, None, :])
    return Sight(causal, window, _bias(allowed, query, key, causal, window, same, dtype))


def with_ahead(see: Sight, ahead: int, tokens: int, *, device: str | torch.device, dtype: torch.dtype) -> Sight:
    """Return the sight of `tokens` queries that also see `ahead` keys, which stand before all others; 0: `see` itself."""
    if not ahead or (see.bias is None and not see.causal):
        return see                                          # what sees everything sees those, too
    bias = see.bias
    if bias is None:
        place = torch.arange(tokens, device=device)
        bias = _bias(torch.ones(tokens, tokens, dtype=torch.bool, device=device), place[:, None], place, True, None, None, dtype)
    return Sight(see.causal, None, F.pad(bias, (ahead, 0)))


def _bias(allowed: Tensor, query: Tensor, key: Tensor, causal: bool, window: int | None,  # noqa: PLR0917
          segments: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """Return 0 where query [T, 1] or [B, 1, T, 1] sees key [S], -inf where not: [B or 1, 1, T, S]."""
    if causal:
        allowed &= key <= query
    if window is not None:
        allowed &= key > query - window
        if not causal:
            allowed &= key < query + window
    allowed = allowed.expand(1, 1, -1, -1) if allowed.ndim == 2 else allowed                            # [B or 1, 1, T, S]
    allowed = allowed if segments is None else allowed & (segments[0] == segments[1])
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)


def working_dtype(weight: Tensor) -> torch.dtype:
    """Return the type that matrix products with `weight` are computed in: autocast's, if it is on."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


class Attention(nn.Module):
    """Multi-head attention with `kv_heads` shared key and value heads (Ainslie et al., 2023)."""

    def __init__(self, width: int, heads: int, *, kv_heads: int | None = None, head_width: int | None = None,
                 qkv_bias: bool = False, out_bias: bool = False, qk_norm: float | None = None, dropout: float = 0.0,
                 device: str | torch.device | None = None) -> None:
        super().__init__()
        self.head_width = head_width or width // heads
        self.dropout = dropout
        self.path = "sdpa"
        self.span: Span | None = None                           # set under context parallelism
        self.prefix: nn.Module | None = None                    # an adapter's: more keys and values, in front
        self.after: nn.Module | None = None                     # … and what it makes of the output
        self.tell: Callable[[Any, Tensor, Tensor, Tensor], None] | None = None      # is told what q, k and v made
        self.watch: list[Tensor] | None = None                  # takes the probabilities of each call, where they are looked at
        keys = (kv_heads or heads) * self.head_width
        self.q = nn.Linear(width, heads * self.head_width, bias=qkv_bias, device=device)
        self.k = nn.Linear(width, keys, bias=qkv_bias, device=device)
        self.v = nn.Linear(width, keys, bias=qkv_bias, device=device)
        self.o = nn.Linear(heads * self.head_width, width, bias=out_bias, device=device)
        self.q_norm = None if qk_norm is None else RMSNorm(self.head_width, qk_norm, device=device)
        self.k_norm = None if qk_norm is None else RMSNorm(self.head_width, qk_norm, device=device)

    def forward(self, x: Tensor, see: Sight, *, rotary: tuple[Tensor, Tensor] | None = None,
                past: Past | StepPast | None = None) -> Tensor:
        """Return [B, T, D], or [1, N, D] where x is the real tokens alone, as `see.real` says.

        `rotary` = (cos, sin), each [B or 1, T, K/2]; `past` is extended in place.
        """
        q = self.q(x).unflatten(-1, (-1, self.head_width))      # [B, T, H, K]; -1 holds under tensor parallelism
        k = self.k(x).unflatten(-1, (-1, self.head_width))      # [B, T, G, K]
        v = self.v(x).unflatten(-1, (-1, self.head_width))
        if self.tell is not None:
            self.tell(self, q, k, v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if see.real is not None and see.real.parts and self.watch is None:
            counts = [part.extent for part in see.real.parts]
            pieces = zip(see.parts(), q.split(counts, 1), k.split(counts, 1), v.split(counts, 1), strict=True)
            out = torch.cat([self._seen(*piece, past=None) for piece in pieces], 1)
        else:
            out = self._seen(see, q, k, v, past=past)
        out = self.o(out.flatten(-2))
        return out if self.after is None else self.after(out)   # type: ignore[no-any-return]

    def _seen(self, see: Sight, q: Tensor, k: Tensor, v: Tensor, *, past: Past | StepPast | None) -> Tensor:
        """Return what queries see [B, T, H, K], or [1, N, H, K] of the real tokens alone."""
        if see.real is not None:
            q, k, v = see.real.spread(q), see.real.spread(k), see.real.spread(v)
        if past is not None:
            k, v = past.extend(k, v)                            # [B, S, G, K]
        if self.span is not None:
            k, v = self.span.gather(k), self.span.gather(v)     # [B, S, G, K]
        if self.prefix is not None:
            k, v = self.prefix(k, v)
        if self.watch is not None:
            self.watch.append(probabilities(q.to(v.dtype), k.to(v.dtype), see))
        dropout = self.dropout if self.training else 0.0
        out = attend(q.to(v.dtype), k.to(v.dtype), v, see, self.path, dropout=dropout)
        return out if see.real is None else see.real.collect(out)


def attend(q: Tensor, k: Tensor, v: Tensor, see: Sight, path: str, *, dropout: float = 0.0) -> Tensor:
    """Return softmax(q·k/sqrt(K) under `see`)·v [B, T, H, K] by the path.  q [B, T, H, K]; k, v [B, S, G, K]."""
    if path == "sdpa" and dropout > 0 and q.device.type == "cpu" and q[..., 0].numel() * k.shape[1] <= DROPPED:
        path = "plain"                                          # PyTorch has no fused kernel with dropout there
    if path == "sdpa":
        return _sdpa(q, k, v, see, dropout)
    block = {"plain": q.shape[1], "block": BLOCK}[path]
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out: Tensor = Blocks.apply(q, k, v, see, block, dropout, learning)      # type: ignore[no-untyped-call]
    return out


def probabilities(q: Tensor, k: Tensor, see: Sight) -> Tensor:
    """Return what each query gives each key [B, H, T, S]: attention whose values are the unit vectors."""
    one = torch.eye(k.shape[1], dtype=q.dtype, device=q.device)[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    return _sdpa(q, k, one, see, 0.0).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, see: Sight, dropout: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    bias = None if see.bias is None else see.bias.to(q.dtype)
    if bias is not None and q.shape[1] != k.shape[1] and q.device.type != "cpu":
        # there the kernels that share heads take no mask, and what is left for both keeps all scores in fp32
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout,
                                         is_causal=see.causal and bias is None, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class Blocks(torch.autograd.Function):
    """Attention as plain matrix products, `block` queries at a time, over no more keys than those can see.

    One block is ordinary attention.  The gradient is written out, because autograd would pad every slice of k and v
    back to full size and keep the scores beside the probabilities.  R = H/G query heads share a key head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, see: Sight, block: int, dropout: float,  # noqa: PLR0917
                learning: bool) -> Tensor:
        batch, tokens, heads, width = q.shape
        out = torch.empty_like(q)                                           # [B, T, H, K]
        q, k, v = _by_head(q, k.shape[2]), _by_head(k, k.shape[2])[:, 0], _by_head(v, v.shape[2])[:, 0]
        keep: list[Tensor] = []
        spans = _spans(tokens, k.shape[1], block, see)
        with torch.autocast(q.device.type, enabled=False):
            for start, stop, first, last in spans:
                scores = _product(q[:, :, start:stop].flatten(1, 2), k[:, first:last].mT, width**-0.5)
                scores = _mask(scores, see, batch, (start, stop, first, last))
                p = torch.softmax(scores, -1)                               # [B*G, R*t, s]
                seen = p
                if dropout > 0:
                    drop = mask(p, dropout) if p.device.type == "cpu" else F.dropout(torch.ones_like(p), dropout)
                    seen = p * drop
                    keep.append(drop)
                keep.append(p)
                part = (seen @ v[:, first:last]).view(batch, -1, heads * batch // len(k), stop - start, width)
                out[:, start:stop] = part.permute(0, 3, 1, 2, 4).flatten(2, 3)
                if not learning:
                    keep.clear()
        ctx.save_for_backward(q, k, v, *keep)
        ctx.spans, ctx.dropout = spans, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors                                  # [B*G, R, T, K], [B*G, S, K] twice
        batch, heads, scale = grad.shape[0], k.shape[0] // grad.shape[0], q.shape[-1] ** -0.5
        grad = _by_head(grad, heads)
        alone = len(ctx.spans) == 1 and ctx.spans[0][2:] == (0, k.shape[1])
        if not alone:
            dq = torch.empty_like(q)
            # Several blocks add to the same keys: in float32, or bfloat16 would round once a block.
            full = torch.promote_types(k.dtype, torch.float32)
            dk, dv = torch.zeros_like(k, dtype=full), torch.zeros_like(v, dtype=full)
        for start, stop, first, last in ctx.spans:
            drop = kept.pop(0) if ctx.dropout > 0 else None
            p = kept.pop(0)
            g = grad[:, :, start:stop].flatten(1, 2)                        # [B*G, R*t, K]
            to_v = (p if drop is None else p * drop).mT @ g
            dp = g @ v[:, first:last].mT
            if drop is not None:
                dp *= drop
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            to_q = _product(ds, k[:, first:last], scale)
            to_k = _product(ds.mT, q[:, :, start:stop].flatten(1, 2), scale)
            if alone:
                dq, dk, dv = to_q.view_as(q), to_k, to_v
            else:
                dq[:, :, start:stop] = to_q.view_as(dq[:, :, start:stop])
                dk[:, first:last] += to_k
                dv[:, first:last] += to_v
        dq = dq.view(batch, -1, *dq.shape[2:]).transpose(1, 2)
        dk, dv = (x.to(v.dtype).view(batch, heads, *x.shape[1:]).transpose(1, 2) for x in (dk, dv))
        return dq, dk, dv, None, None, None, None


def _by_head(x: Tensor, keys: int) -> Tensor:
    """Return x [B, T, H, K] as a contiguous [B*G, R, T, K]: the query heads of one key head stand together."""
    batch, tokens, _heads, width = x.shape
    x = x.reshape(batch, tokens, keys, -1, width).permute(0, 2, 3, 1, 4)    # [B, G, R, T, K]
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _spans(tokens: int, seen: int, block: int, see: Sight) -> list[tuple[int, int, int, int]]:
    """Return (first query, past the last, first key, past the last) of each block."""
    past, spans = seen - tokens, []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        last = past + stop if see.causal else seen
        first = max(0, past + start - see.window + 1) if see.causal and see.window is not None else 0
        spans.append((start, stop, first, last))
    return spans


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale·a@b, the scale applied inside the product."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _mask(scores: Tensor, see: Sight, batch: int, span: tuple[int, int, int, int]) -> Tensor:
    """Return the scores [B*G, R*t, s] with -inf added where the query does not see the key."""
    start, stop, first, last = span
    if see.bias is not None:
        bias = see.bias[:, :, start:stop, first:last].to(scores.dtype)      # [B or 1, 1, t, s]
        scores.view(batch, -1, *bias.shape[2:]).add_(bias)
    elif see.causal:
        size = stop - start                                                 # only the last keys can be in the future
        future = torch.full((size, size), -math.inf, dtype=scores.dtype, device=scores.device).triu_(1)
        scores.view(len(scores), -1, size, last - first)[..., -size:] += future
    return scores
