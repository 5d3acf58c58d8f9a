"""Which products of packed weights a device's kernels are asked for; what they compute is tested with the forms."""

from __future__ import annotations

import pytest
import torch

from danlu.nn import packed
from danlu.nn.forms import Int8


@pytest.mark.parametrize("activations", [True, False])
def test_whole_numbers_are_multiplied_by_kernels_only_where_they_take_so_few_rows(
        activations: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", which no more than a GPU is a CPU."""
    layer, asked = torch.nn.Linear(32, 24), []
    packed.become(layer, Int8(activations=activations), Int8().pack(layer.weight.detach()))
    monkeypatch.setattr(packed, "_kernel", lambda layer: asked.append(len(x)))
    monkeypatch.setattr(packed, "working_dtype", lambda x: x.dtype)        # "meta" knows no autocast
    layer.to("meta")
    for rows in (0, 1, packed.FEW, packed.FEW + 1):
        x = torch.empty(rows, 32, device="meta")
        assert layer(x).shape == (rows, 24)
    assert asked == ([packed.FEW + 1] if activations else [1, packed.FEW])


@pytest.mark.parametrize(("rows", "columns", "there"), [(24, 32, True), (20, 32, False), (24, 36, False)])
def test_whole_numbers_have_a_kernel_where_both_sizes_fit(rows: int, columns: int, there: bool) -> None:
    form, weight = Int8(activations=True), torch.randn(rows, columns)
    parts = form.pack(weight)
    assert form.kernel(parts, columns) is not None
    elsewhere = {name: part.to("meta") for name, part in parts.items()}
    assert (form.kernel(elsewhere, columns) is not None) == there
