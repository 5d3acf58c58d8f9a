"""Tiny decoders of every make, with random weights far from ties, and a tokenizer whose every byte is a token."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers

from danlu.data.tokenizer import Tokenizer
from danlu.models.build import build
from danlu.models.decoder import Decoder, DecoderModel

SHAPE = {"width": 32, "layers": 2, "heads": 4, "context": 96, "init_std": 0.4}
MAKES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "grouped": {"family": "llama", "kv_heads": 2},
    "window": {"family": "mistral", "kv_heads": 2, "window": 9},
    "qwen3": {"family": "qwen3", "kv_heads": 1, "head_width": 12},
}


@cache
def tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Raw(models.BPE({**{c: i for i, c in enumerate(letters)}, "<|endoftext|>": 256}, []))
    raw.add_special_tokens(["<|endoftext|>"])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return Tokenizer(raw.to_str(), named={"eos": "<|endoftext|>"}, add_bos=False, add_eos=False, settings={})


def made(make: str, seed: int = 1, **more: Any) -> DecoderModel:
    cfg = Decoder.model_validate({**SHAPE, "vocab": 257, **MAKES[make], **more})
    model = build(cfg, "cpu")
    assert isinstance(model, DecoderModel)
    return model.init(seed).eval()


@cache
def tiny(make: str) -> DecoderModel:
    return made(make)


def prompts(number: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (number,), generator=source).tolist()
    return [torch.randint(0, 256, (n,), generator=source).tolist() for n in lengths]
