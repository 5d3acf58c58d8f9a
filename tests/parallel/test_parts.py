"""How rows, tokens and blocks are dealt out: each once, and evenly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer
from danlu.layout import Layout
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.objectives.lm import CausalLM
from danlu.parallel import context, pipeline
from danlu.train.feed import Steps, stream


@given(of=st.integers(1, 8), size=st.integers(1, 16))
def test_every_token_of_a_row_is_in_one_process_and_the_work_is_even(of: int, size: int) -> None:
    length = 2 * of * size
    parts = [context.pieces(length, i, of) for i in range(of)]
    assert torch.cat(parts).sort().values.tolist() == list(range(length))
    seen = [int((part + 1).sum()) for part in parts]     # a causal token sees itself and those before it
    assert max(seen) - min(seen) == 0


@given(pp=st.integers(2, 8), more=st.integers(0, 24))
def test_stages_take_every_block_once_in_order(pp: int, more: int) -> None:
    layers = pp + more
    stages = pipeline.bounds(Layout(pp=pp), layers)
    assert [i for stage in stages for i in stage] == list(range(layers)) and all(stages)
    assert max(len(s) for s in stages[:-1]) - min(len(s) for s in stages[:-1]) <= 1


def test_the_last_stage_bears_the_head() -> None:
    assert [len(s) for s in pipeline.bounds(Layout(pp=4), 31)] == [8, 8, 8, 7]
    assert [len(s) for s in pipeline.bounds(Layout(pp=8), 96)] == [12] * 8
    assert [len(s) for s in pipeline.bounds(Layout(pp=4), 16, head=4.0)] == [5, 5, 5, 1]
    small = build(Decoder(width=32, layers=4, heads=4, vocab=320))
    assert pipeline.head_cost(small) == 320 * 32 / sum(p.numel() for p in small.blocks[0].parameters())
    assert [len(s) for s in pipeline.bounds(Layout(pp=2, stages=(1, 3)), 4)] == [1, 3]


def test_interleaved_stages_go_round_the_processes() -> None:
    layout = Layout(pp=2, pipeline="interleaved", chunks=3)
    assert [pipeline.mine(layout, i) for i in range(2)] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("of", [2, 4])
def test_shares_of_a_step_are_its_rows(corpus: Path, of: int) -> None:
    rows = stream(Shards(corpus), CausalLM(), length=32, overlong="split", pack=True, seed=3)
    special = Tokenizer.load(corpus / "tokenizer").special

    def first(share: tuple[int, int]) -> dict[str, torch.Tensor]:
        steps = Steps(rows, CausalLM(), special, per_step=8, length=32, seed=0, position=rows.begin(), share=share)
        return next(iter(steps))[0]

    whole, parts = first((0, 1)), [first((i, of)) for i in range(of)]
    assert torch.equal(torch.cat([part["ids"] for part in parts]), whole["ids"])


def test_rows_that_fill_up_weigh_nothing(corpus: Path) -> None:
    rows = stream(Shards(corpus, "val"), CausalLM(), length=32, overlong="split", pack=True, seed=None)
    special, number = Tokenizer.load(corpus / "tokenizer").special, rows.rows(0)

    def weight(share: tuple[int, int], per_step: int, fill: bool) -> tuple[float, list[int]]:
        steps = Steps(rows, CausalLM(), special, per_step=per_step, length=32, seed=0, position=rows.begin(), rows_in_all=number,
                      share=share, fill=fill)
        made = [batch for batch, _after in steps]
        return sum(float(b["weights"].sum()) for b in made), [len(b["ids"]) for b in made]

    whole, _sizes = weight((0, 1), number, False)
    parts = [weight((i, 4), 8 * 4, True) for i in range(4)]
    assert sum(part for part, _sizes in parts) == whole
    assert {size for _part, sizes in parts for size in sizes} == {8} and len({len(sizes) for _part, sizes in parts}) == 1
