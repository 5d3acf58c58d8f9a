"""Tiny models and rows for compression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.nn.tasks import Head

SHAPES: dict[str, Any] = {
    "llama": {"family": "llama", "heads": 4, "kv_heads": 2, "tied": True},
    "qwen2": {"family": "qwen2", "heads": 4, "kv_heads": 4},
    "gpt2": {"family": "gpt2", "heads": 4},
    "bert": {"family": "bert", "heads": 4},
    "roberta": {"family": "roberta", "heads": 4},
}
VOCAB = 200


def model(family: str, *, width: int = 64, layers: int = 2) -> Any:
    """A random model that says something of its inputs: a decoder with its head, an encoder with one of classes."""
    told = {"width": width, "layers": layers, "vocab": VOCAB, "context": 64, "init_std": 0.15, **SHAPES[family]}
    if family in ("bert", "roberta"):
        cfg: Any = Encoder.model_validate(told).with_tasks([Head(labels=("bad", "good", "mixed"))])
    else:
        cfg = Decoder.model_validate(told)
    made: Any = build(cfg, "cpu").init(3)
    return made.eval()


def ids(number: int = 6, tokens: int = 20, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"ids": torch.randint(5, VOCAB, (1, tokens), generator=draw)} for _row in range(number)]


@torch.no_grad()
def said(made: Any, rows: list[dict[str, Tensor]]) -> Tensor:
    """What the head says of the rows."""
    name = "logits" if made.cfg.kind == "decoder" else "classify"
    return torch.cat([made(**row)[name].flatten(0, -2) for row in rows])


def correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs [T, I] of a few directions and unlike sizes."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs // 4, generator=draw) @ torch.randn(inputs // 4, inputs, generator=draw)
    x = x + 0.1 * torch.randn(tokens, inputs, generator=draw)
    return x * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=draw)]
