"""RMSNorm against the formula and against transformers."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from danlu.nn.norm import RMSNorm


def test_rms_norm() -> None:
    ours, theirs = RMSNorm(16, 1e-5), LlamaRMSNorm(16, 1e-5)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 16) * 5
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight)


def test_statistics_are_float32() -> None:
    x = torch.full((1, 4), 300.0, dtype=torch.float16)          # 300² overflows float16
    out = RMSNorm(4, 1e-5)(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones(1, 4, dtype=torch.float16))
