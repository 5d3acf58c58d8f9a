"""Layouts that cannot be are refused with what can; those that can are what their numbers say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.layout import Layout

MODEL = {"heads": 8, "kv_heads": 2, "hidden": 256, "layers": 6, "vocab": 320}


@pytest.mark.parametrize(("fields", "told"), [
    ({"dp": 3}, "layout.dp=3 does not divide rows=16; use one of [1, 2, 4, 8, 16], or rows=18"),
    ({"dp": 2, "micro": 3}, "layout.micro=3 does not divide rows/dp=8"),
    ({"tp": 4}, "layout.tp=4 does not divide model.kv_heads=2; use one of [1, 2]"),
    ({"tp": 3}, "layout.tp=3 does not divide model.heads=8"),
    ({"cp": 3}, "layout.cp=3 needs a length that 2·cp divides, for example 36"),
    ({"pp": 8, "micro": 8}, "8 stages need as many blocks, and model.layers=6"),
    ({"pp": 4, "micro": 2}, "set layout.micro to one of [4, 8, 16]"),
    ({"pp": 2, "micro": 3, "pipeline": "interleaved"}, "set layout.micro to one of [2, 4, 8]"),
    ({"pp": 2, "micro": 2, "stages": (5, 2)}, "must be 2 numbers above 0 with the sum model.layers=6"),
    ({"stages": (6,)}, "layout.stages needs layout.pp above 1"),
    ({"shard": "full"}, "layout.shard=full needs layout.dp or layout.cp above 1"),
    ({"dp": 8, "shard": "hybrid", "group": 3}, "layout.shard=hybrid needs layout.group, one of [2, 4]"),
    ({"dp": 8, "group": 2}, "layout.group is of use only with layout.shard=hybrid"),
    ({"offload": True}, "layout.offload needs layout.shard=full, grads or hybrid"),
    ({"sequence": True}, "layout.sequence needs layout.tp above 1"),
    ({"tp": 2, "local": {"steps": 4}}, "layout.local needs layout.dp above 1"),
])
def test_what_cannot_be_is_refused_with_what_can(fields: dict[str, Any], told: str) -> None:
    layout = Layout.model_validate(fields)
    with pytest.raises(ValueError, match="layout") as caught:
        layout.check(16, length=32, model=MODEL)
    assert told in str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="layout") as caught:
        Layout(dp=3, tp=3, cp=3, sequence=True).check(16, length=32, model=MODEL, optimizer="muon")
    assert str(caught.value).count("; ") >= 4 and "optim.kind=muon works on whole matrices" in str(caught.value)


@pytest.mark.parametrize("fields", [
    {}, {"dp": 4, "micro": 2}, {"tp": 2, "sequence": True}, {"cp": 4}, {"pp": 3, "micro": 4},
    {"dp": 8, "shard": "hybrid", "group": 4},
    {"pp": 2, "micro": 4, "pipeline": "zero_bubble"}, {"dp": 2, "tp": 2, "pp": 2, "micro": 4, "shard": "full"},
    {"dp": 4, "local": {"steps": 8}},
])
def test_what_can_be_is_not_refused(fields: dict[str, Any]) -> None:
    Layout.model_validate(fields).check(16, length=32, model=MODEL, optimizer="adamw")


@given(dp=st.integers(1, 8), tp=st.integers(1, 4), pp=st.integers(1, 4), cp=st.integers(1, 4))
def test_the_world_is_the_product_of_its_axes(dp: int, tp: int, pp: int, cp: int) -> None:
    layout = Layout(dp=dp, tp=tp, pp=pp, cp=cp)
    assert layout.world == dp * tp * pp * cp and layout.shards == 1
    assert layout.model_copy(update={"shard": "full"}).shards == dp * cp
