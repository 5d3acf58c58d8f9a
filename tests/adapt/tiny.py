"""Tiny models with weights, and every kind of adapter, for the tests beside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danlu.adapt import IA3, Adapter, BitFit, Bottleneck, Freeze, LoRA, Prefix, Prompt, PTuning
from danlu.models.build import Config, build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder

VOCAB, CONTEXT = 64, 32
MODELS: dict[str, Config] = {
    "bert": Encoder(width=32, layers=2, heads=4, hidden=48, vocab=VOCAB, context=CONTEXT, dropout=0.0,
                    attention_dropout=0.0, init_std=0.1, outputs=("mlm",)),
    "gpt2": Decoder(family="gpt2", width=32, layers=2, heads=4, vocab=VOCAB, context=CONTEXT, init_std=0.1),
    "llama": Decoder(family="llama", width=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=VOCAB, context=CONTEXT,
                     init_std=0.1),
}
KINDS: dict[str, Adapter] = {
    "lora": LoRA(rank=4), "lora q,v": LoRA(rank=3, alpha=5.0, target=("q", "v")), "rslora": LoRA(rank=4, rslora=True),
    "dora": LoRA(rank=4, dora=True), "pissa": LoRA(rank=4, init="pissa"), "dora+pissa": LoRA(rank=2, dora=True, init="pissa"),
    "lora embed": LoRA(rank=4, target=("embed", "q")), "ia3": IA3(), "houlsby": Bottleneck(style="houlsby", reduction=4),
    "pfeiffer": Bottleneck(reduction=4), "prompt": Prompt(tokens=5), "prefix": Prefix(tokens=5),
    "ptuning": PTuning(tokens=5, hidden=16), "bitfit": BitFit(), "freeze": Freeze(last=1),
}
LOOKED_AT = ("prompt", "prefix", "ptuning")              # there is more to look at, so something changes at once


def base(cfg: Config, seed: int = 7) -> Any:
    """A model with random weights, biases and norms among them: what is 0 hides mistakes."""
    model = build(cfg, "cpu").init(seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(torch.randn(p.shape, generator=draw), alpha=0.1)
    return model.eval()


def adapted(cfg: Config, adapt: Adapter, seed: int = 7) -> Any:
    """The same with an adapter, as at step 0."""
    model = base(cfg, seed)
    adapt.apply(model)
    adapt.begin(model, 3)
    return model


def shake(model: Any, names: set[str], seed: int = 1) -> Any:
    """Move the parameters of `names` at random."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in names:
                p.add_(torch.randn(p.shape, generator=draw), alpha=0.1)
    return model


def ids(rows: int = 3, tokens: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, given: Tensor | None = None, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids() if given is None else given, **more)["logits"]
    return out
