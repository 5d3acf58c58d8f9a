"""Context parallelism: the tokens of each row are cut over processes; keys and values are gathered where they are needed.

Causal attention does more for later tokens.  So a row is cut into 2·cp pieces and process i has the i-th from the front
and the i-th from the back: all do the same (Llama 3, Dubey et al., 2024, section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danlu.nn.collective import Span, numbered
from danlu.objectives.protocol import Batch
from danlu.parallel.world import World


def pieces(length: int, index: int, of: int) -> Tensor:
    """Return the places in a row of `length` tokens that process `index` of `of` has, [length / of]."""
    size = length // (2 * of)
    front, back = index * size, (2 * of - 1 - index) * size
    return torch.cat((torch.arange(front, front + size), torch.arange(back, back + size)))


def attach(model: Any, world: World, length: int) -> Span | None:
    """Let `model` (whole or a stage) see whole rows of which this process has some tokens."""
    of = world.layout.cp
    if of == 1:
        return None
    order = torch.cat([pieces(length, i, of) for i in range(of)]).to(world.device)
    span = Span(pieces(length, world.index("cp"), of).to(world.device), order, world.group("cp"))
    model.span = span
    for _number, block in numbered(model.blocks):
        block.attention.span = span
    return span


# Columns that say something of a row or of its stretches, however many numbers that is.
OF_ROWS = frozenset({"label", "label_weights", "row_weights", "answer", "window", "example", "starts", "ends", "there"})


def cut(batch: Batch, span: Span | None, *, first: bool) -> Batch:
    """Return the batch with this process's tokens of each column [B, T]; segments stay whole, since they say who sees whom.

    What is learned once a row (columns `…_weights` [B] or [B, K]) is learned where the row's first token is: `first`.
    """
    if span is None:
        return batch
    tokens, made = len(span.order), {}
    for name, column in batch.items():
        if name == "segments" or name.rpartition("/")[2] in OF_ROWS or column.ndim < 2 or column.shape[1] != tokens:
            made[name] = torch.zeros_like(column) if name.endswith("_weights") and not first else column
        else:
            made[name] = column.index_select(1, span.mine)
    return made


def whole(column: Tensor, span: Span | None, world: World, *, tokens: bool) -> Tensor:
    """Return a column as it is where nothing is cut: of all tokens [B, T, …], or of rows, as the first process has it."""
    if span is None:
        return column
    if tokens:
        return span.whole(column)
    return world.add(column if world.index("cp") == 0 else torch.zeros_like(column), ("cp",))
