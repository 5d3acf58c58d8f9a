"""Rotary angles against transformers' own functions; rotation against complex numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from danlu.nn.position import Linear, Llama3, Scaling, Yarn, frequencies, rotate, turn

CASES: list[tuple[Scaling, dict[str, object]]] = [
    (Linear(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    (Llama3(factor=8.0, low=1.0, high=4.0, original=64),
     {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64}),
    (Yarn(factor=4.0, original=128), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    (Yarn(factor=4.0, original=128, fast=16, slow=2, attention=1.3, truncate=False),
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0,
      "attention_factor": 1.3, "truncate": False}),
]


@pytest.mark.parametrize(("ours", "theirs"), CASES)
def test_stretched_angles(ours: Scaling, theirs: dict[str, object]) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512,
                         rope_parameters={"rope_theta": 10000.0, **theirs})
    wanted, factor = ROPE_INIT_FUNCTIONS[str(theirs["rope_type"])](config, "cpu")
    angles, sharpen = frequencies(32, 10000.0, ours)
    torch.testing.assert_close(angles, wanted, atol=0, rtol=1e-6)
    assert sharpen == pytest.approx(factor)


def test_plain_angles() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=2)
    wanted, _factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    assert torch.equal(frequencies(32, 10000.0)[0], wanted)


def test_rotation_is_a_turn_in_the_complex_plane() -> None:
    x, angles = torch.randn(2, 5, 3, 8, dtype=torch.float64), frequencies(8, 10.0)[0]
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])
    cos, sin = turn(positions, angles, 1.0, torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * (positions[..., None] * angles))[:, :, None]
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1), atol=1e-6, rtol=0)
