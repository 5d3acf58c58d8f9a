"""Which of several equal computations runs.  All of them give the same numbers but for rounding.

`Choice` is a plain value: found once by `choose` (a short measurement), stored in the checkpoint, and used again by a
resumed run, which so rounds as the first one did.  Nothing else in Danlu decides such things.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from danlu.errors import IncompatibleError
from danlu.nn import attention, mlp
from danlu.words import _

Name = TypeVar("Name", bound=str)
AttentionPath = Literal["plain", "block", "sdpa"]
GeluPath = Literal["torch", "sigmoid"]
KEPT_BYTES = 512 * 2**20        # of probabilities that one layer may keep for its gradient; "sdpa" keeps none


@dataclass(frozen=True)
class Choice:
    """The path of every operation that has more than one."""

    attention: AttentionPath = "sdpa"
    gelu: GeluPath = "torch"

    def record(self) -> dict[str, str]:
        """Return the choice as JSON-ready values."""
        return asdict(self)

    @classmethod
    def restore(cls, record: dict[str, str]) -> Choice:
        """Return the choice that `record` was made from.  Raises IncompatibleError for a path this version lacks."""
        known = {"attention": get_args(AttentionPath), "gelu": get_args(GeluPath)}
        for name, value in record.items():
            if value not in known.get(name, ()):
                raise IncompatibleError(
                    _("the checkpoint was made by the path {name}={value}, which is not known here").format(
                        name=name, value=value),
                    fix=_("resume with the version of Danlu that wrote it, or start a new run from its weights"),
                )
        return cls(**record)  # type: ignore[arg-type]


def rule(device: str | torch.device, dtype: torch.dtype, tokens: int, *, causal: bool = True) -> Choice:
    """Return the choice that measurements on two chips agree on (LOG.md); it never varies, so equal runs are equal.

    On a CPU the fused kernel is slow in half precision, and in any precision for long rows, where half of a causal
    product is thrown away.
    """
    if torch.device(device).type != "cpu" or (dtype == torch.float32 and tokens < 4 * attention.BLOCK):
        return Choice()
    return Choice(attention="block" if causal and tokens > 2 * attention.BLOCK else "plain" if dtype != torch.float32 else "sdpa")


def choose(device: str | torch.device, dtype: torch.dtype, shape: Sequence[int], *, causal: bool = True) -> Choice:
    """Return the fastest choice here for attention of `shape` = [B, H, T, K] computed in `dtype`.

    On an accelerator the fused kernels always win; on a CPU it depends on the chip, so it is measured, once a process.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return Choice()
    rows, heads, tokens, width = shape
    able: list[AttentionPath] = ["sdpa"]
    whole = rows * heads * tokens**2 * dtype.itemsize
    if whole <= KEPT_BYTES:
        able.append("plain")
    if causal and tokens > attention.BLOCK and whole // 2 <= KEPT_BYTES:
        able.append("block")
    # Attention works row by row: two rows tell as much as the batch, and cost less.
    return _measured(dtype, (min(rows, 2), heads, tokens, width), causal, tuple(able), torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, shape: tuple[int, int, int, int], causal: bool,
              able: tuple[AttentionPath, ...], threads: int) -> Choice:
    """Return what is fastest with this many `threads` (a key of the cache)."""
    rows, heads, tokens, width = shape
    with torch.random.fork_rng(devices=[]):
        q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
        wide = torch.randn(rows, tokens, 4 * heads * width, dtype=dtype, requires_grad=True)
    sight = attention.sight(tokens, causal=causal, device="cpu", dtype=dtype)
    attentions: dict[AttentionPath, Callable[[], Tensor]] = {
        path: partial(attention.attend, q, k, v, sight, path) for path in able
    }
    gelus: dict[GeluPath, Callable[[], Tensor]] = {
        path: partial(mlp.gelu_tanh, wide, path) for path in get_args(GeluPath)
    }
    return Choice(attention=_fastest(attentions), gelu=_fastest(gelus))


def _fastest(candidates: dict[Name, Callable[[], Tensor]], rounds: int = 4) -> Name:
    """Return the name whose forward and backward took the least time, interleaved, best of `rounds`.

    An earlier name wins unless a later one takes a tenth less: two runs on one machine should choose alike.
    """
    best = dict.fromkeys(candidates, float("inf"))
    for _round in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            out = run()
            torch.autograd.backward(out, torch.ones_like(out))
            best[name] = min(best[name], time.perf_counter() - start)
    chosen = next(iter(best))
    for name, seconds in best.items():
        chosen = name if seconds < 0.9 * best[chosen] else chosen
    return chosen
