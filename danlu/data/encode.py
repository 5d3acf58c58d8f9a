"""From what a row says to the ids, weights and labels that are stored: one function for each kind of content.

n ids of a row, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np

from danlu.data import chat
from danlu.data.example import Chat, Content, Labelled, Segments, Tokens, Unusable
from danlu.data.stream import Overlong
from danlu.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """What it takes to make ids of contents.

    length: ids that a row has room for.  labels: the classes; of regression none.  learn: which turns of a chat carry
    loss: answers, last (answer) or all.
    """

    tokenizer: Tokenizer
    length: int
    overlong: Overlong
    labels: tuple[str, ...] = ()
    template: chat.Template | None = None
    learn: str = "answers"
    several: bool = False


@dataclass
class Made:
    """A row as it is stored.  weights and tags [n]; `columns` by name, of any fixed shape."""

    ids: np.ndarray
    weights: np.ndarray | None = None
    tags: np.ndarray | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    cut: int = 0                                         # ids that the policy `cut` took away


def encode(content: Content, by: Encoder) -> list[Made]:
    """Return the rows that `content` gives.  Raises Unusable for what cannot be learned from or does not fit."""
    return _encode(content, by)


@singledispatch
def _encode(content: Any, by: Encoder) -> list[Made]:
    raise AssertionError(f"no encoding for {type(content).__name__}")


@_encode.register
def _(content: Labelled, by: Encoder) -> list[Made]:
    stretches = by.tokenizer.encode_batch(content.parts)
    stretches, cut = shortened(stretches, by.length - by.tokenizer.room_beside(len(stretches)), by.overlong)
    ids, parts = by.tokenizer.together(stretches)
    columns: dict[str, Any] = {"parts": np.array(parts, np.int32)}
    if content.label is not None:
        columns["label"] = label_column(content.label, by)
    return [Made(ids, columns=columns, cut=cut)]


@_encode.register
def _(content: Chat, by: Encoder) -> list[Made]:
    assert by.template is not None, "a chat is rendered by a template"
    turns = chat.weighed(content.turns, by.learn)
    ids, weights = chat.encode(chat.render(by.template, turns, content.tools, generate=False), by.tokenizer)
    return [_fitted(ids, weights, by)]


@_encode.register
def _(content: Segments, by: Encoder) -> list[Made]:
    tokenizer = by.tokenizer
    found = tokenizer.encode_batch([text for text, _weight in content.pieces])
    ids = np.concatenate(found)
    weights = np.repeat(np.array([w for _text, w in content.pieces], np.float32), [len(one) for one in found])
    framed = tokenizer.frame(ids) if content.ends else ids
    before = int(content.ends and tokenizer.add_bos)
    after = len(framed) - len(ids) - before
    last = weights[-1] if len(weights) else np.float32(1)
    weights = np.concatenate([np.zeros(before, np.float32), weights, np.full(after, last, np.float32)])
    if (weights[before:] == 1).all():                    # plain text: the stream cuts it as the recipe says
        return [Made(framed)]
    return [_fitted(framed, weights, by)]


@_encode.register
def _(content: Tokens, by: Encoder) -> list[Made]:
    ids, top = np.array(content.ids, np.int64), by.tokenizer.special.size
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < top:
        raise Unusable("ids", f"ids from {ids.min()} to {ids.max()}, and the tokenizer has {top}")
    return [_fitted(ids, np.array(content.weights, np.float32), by)]


def _fitted(ids: np.ndarray, weights: np.ndarray, by: Encoder) -> Made:
    """Return a row of which some tokens are learned, cut at its front where nothing is learned, if the policy says so."""
    if not weights.any():
        raise Unusable("masked", "no token of it carries loss")
    beyond = len(ids) - by.length
    if beyond <= 0:
        return Made(ids, weights)
    refuse_long(len(ids), by.length, by.overlong)
    first = int(by.tokenizer.special.bos is not None and ids[0] == by.tokenizer.special.bos)
    if weights[first : first + beyond].any():
        raise Unusable("answer_too_long", f"{len(ids)} tokens, and what is learned alone does not fit into {by.length}")
    keep = np.concatenate([np.arange(first), np.arange(first + beyond, len(ids))])
    return Made(ids[keep], weights[keep], cut=beyond)


def refuse_long(size: int, room: int, overlong: Overlong) -> None:
    """Raise Unusable unless the policy allows a row that is too long to be cut."""
    if overlong == "cut":
        return
    raise Unusable("dropped" if overlong == "drop" else "overlong", f"{size} tokens, and a row has room for {room}")


def shortened(stretches: Sequence[np.ndarray], room: int, overlong: Overlong) -> tuple[list[np.ndarray], int]:
    """Return the stretches with ids taken from the end of the longest until they fit, and how many were taken."""
    sizes = [len(one) for one in stretches]
    beyond = sum(sizes) - room
    if beyond <= 0:
        return list(stretches), 0
    refuse_long(sum(sizes), room, overlong)
    for _id in range(beyond):
        sizes[sizes.index(max(sizes))] -= 1
    return [one[:size] for one, size in zip(stretches, sizes, strict=True)], beyond


def label_column(label: str | tuple[str, ...] | float, by: Encoder) -> Any:
    """Return what is stored for a label: a number of a class, [K] zeros and ones, or a score."""
    if isinstance(label, float):
        return np.float32(label)
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(by.labels)}
    named = label if isinstance(label, tuple) else (label,)
    unseen = [name for name in named if name not in numbers]
    if unseen:
        raise Unusable("unseen_label", f"the label {unseen[0]!r} does not stand in the training data: {', '.join(by.labels[:8])}")
    if by.several:
        return np.isin(np.arange(len(numbers)), [numbers[name] for name in named]).astype(np.uint8)
    return np.int32(numbers[named[0]])
