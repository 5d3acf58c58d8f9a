"""From what a row says to the ids, weights and labels that are stored: one function for each kind of content.

n ids of a row, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np

from danlu.data import align, chat
from danlu.data.example import Asked, Chat, Chosen, Content, Labelled, Segments, Similar, Tagged, Tokens, Unusable
from danlu.data.stream import Overlong
from danlu.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """What it takes to make ids of contents.

    length: ids that a row has room for.  labels: the classes; of regression none.  learn: which turns of a chat carry
    loss: answers, last (answer) or all.  stride: ids that windows of a long context share, at most half a window.
    """

    tokenizer: Tokenizer
    length: int
    overlong: Overlong
    labels: tuple[str, ...] = ()
    template: chat.Template | None = None
    learn: str = "answers"
    several: bool = False
    stride: int = 0


@dataclass
class Made:
    """A row as it is stored.  weights and tags [n]; `columns` by name, of any fixed shape.

    tags: the class of each word at its first piece; -1: not known, -100: no first piece.  text: what is kept of the
    content itself, to be judged by, in the first row of several.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None
    tags: np.ndarray | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    cut: int = 0                                         # ids that the policy `cut` took away
    text: dict[str, Any] | None = None


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
def _(content: Tagged, by: Encoder) -> list[Made]:
    """Return rows of whole words; column `window`: where the words begin, how many are here, the number of the first."""
    found, tokenizer = align.pieces(content.words, by.tokenizer), by.tokenizer
    known = np.full(len(found), -1) if content.tags is None else _numbers(content.tags, by)
    room = by.length - tokenizer.room_beside(1)
    sizes = [len(ids) for ids in found]
    runs = align.runs(sizes, room)
    if sum(sizes) > room and by.overlong != "split":
        refuse_long(sum(sizes), room, by.overlong)
        runs = runs[:1]
    rows = []
    for first, last in runs:
        text = np.concatenate(found[first:last])[:room]  # of one word that is longer than a row, its beginning
        ids, parts = tokenizer.together([text])
        begins = tokenizer.begins([text])[0]
        tags = np.full(len(ids), -100, np.int16)
        tags[begins + np.cumsum([0, *sizes[first : last - 1]])] = known[first:last]
        rows.append(Made(ids, tags=tags, cut=sum(sizes[first:last]) - len(text), columns={
            "parts": np.array(parts, np.int32), "window": np.array([begins, last - first, first], np.int32)}))
    rows[0].cut += sum(sizes[runs[-1][1]:])
    rows[0].text = {"words": content.words, "tags": content.tags}
    return rows


def _numbers(tags: Sequence[str], by: Encoder) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(by.labels)}
    unseen = [name for name in tags if name not in numbers]
    if unseen:
        raise _unseen(unseen[0], by)
    return np.array([numbers[name] for name in tags])


@_encode.register
def _(content: Asked, by: Encoder) -> list[Made]:
    """Return a row for each window of the context.

    Columns: answer, its first and last token in the row, -1 where it is not in this window; window: where the context
    begins, how many of its tokens are here, the number of the first of them.
    """
    tokenizer = by.tokenizer
    question, room = tokenizer.encode(content.question), by.length - tokenizer.room_beside(2)
    ids, spans = tokenizer.encode_spans(content.context)
    if not len(ids):
        raise Unusable("empty", "the context gives no token")
    cut = max(0, len(question) - room // 2)
    if cut:
        refuse_long(len(question), room // 2, by.overlong)
        question = question[: room // 2]
    room -= len(question)
    gold = None
    if content.answers:
        said, start = content.answers[0]
        blank = len(said) - len(said.lstrip())           # a token of blanks alone is no part of an answer
        gold = align.covering(spans, start + blank, start + len(said.rstrip()))
        if gold is None:
            raise Unusable("answer_lost", f"no token holds a character of the answer {said[:40]!r}")
    rows = []
    for first, last in align.windows(len(ids), room, min(by.stride, room // 2)):
        row, parts = tokenizer.together([question, ids[first:last]])
        begins = tokenizer.begins([question, ids[first:last]])[1]
        here = gold is not None and first <= gold[0] and gold[1] < last
        answer = [begins + place - first for place in gold] if here and gold is not None else [-1, -1]
        rows.append(Made(row, columns={
            "parts": np.array(parts, np.int32), "answer": np.array(answer, np.int32),
            "window": np.array([begins, last - first, first], np.int32)}))
    if gold is not None and all(row.columns["answer"][0] < 0 for row in rows):
        raise Unusable("answer_too_long", f"{gold[1] - gold[0] + 1} tokens of an answer stand in no window whole; raise length "
                       "or the stride")
    rows[0].cut = cut
    rows[0].text = {"key": content.key, "question": content.question, "context": content.context,
                    "answers": [said for said, _start in content.answers], "spans": np.array(spans).ravel().tolist()}
    return rows


@_encode.register
def _(content: Chosen, by: Encoder) -> list[Made]:
    """Return one row of a stretch for each choice; column `parts`: of each, its ids of type 0 and of type 1."""
    tokenizer, number = by.tokenizer, len(content.choices)
    about, *choices = tokenizer.encode_batch([content.text, *content.choices])
    pairs, cut = [[about, choice] for choice in choices], 0
    size = sum(len(about) + len(choice) + tokenizer.room_beside(2) for choice in choices)
    if size > by.length:
        refuse_long(size, by.length, by.overlong)
        each = by.length // number - tokenizer.room_beside(2)
        if each < 2:
            raise Unusable("overlong", f"{number} choices, and a row has room for {by.length} tokens")
        found = [shortened(pair, each, by.overlong) for pair in pairs]
        pairs, cut = [pair for pair, _cut in found], sum(beyond for _pair, beyond in found)
    made = [tokenizer.together(pair) for pair in pairs]
    columns: dict[str, Any] = {"parts": np.array([parts for _ids, parts in made], np.int32).ravel()}
    if content.label is not None:
        columns["label"] = np.int32(content.label)
    return [Made(np.concatenate([ids for ids, _parts in made]), columns=columns, cut=cut)]


@_encode.register
def _(content: Similar, by: Encoder) -> list[Made]:
    """Return one row of a stretch for each text; column `parts`: their lengths."""
    tokenizer = by.tokenizer
    texts, cut = shortened(tokenizer.encode_batch(content.texts),
                           by.length - len(content.texts) * tokenizer.room_beside(1), by.overlong)
    made = [tokenizer.together([text])[0] for text in texts]
    columns: dict[str, Any] = {"parts": np.array([len(ids) for ids in made], np.int32)}
    if content.score is not None:
        columns["label"] = np.float32(content.score)
    return [Made(np.concatenate(made), columns=columns, cut=cut)]


@_encode.register
def _(content: Chat, by: Encoder) -> list[Made]:
    assert by.template is not None, "a chat is rendered by a template"
    turns = chat.weighed(content.turns, by.learn)
    ids, weights = chat.encode(chat.render(by.template, turns, content.tools, generate=False), by.tokenizer)
    return [_fitted(ids, weights, by)]


@_encode.register
def _(content: Segments, by: Encoder) -> list[Made]:
    tokenizer = by.tokenizer
    found = tokenizer.encode_pieces([text for text, _weight in content.pieces])
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
    whole = "; it cannot be split, but cut or dropped" if overlong == "split" else ""
    raise Unusable("dropped" if overlong == "drop" else "overlong", f"{size} tokens, and a row has room for {room}{whole}")


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
        raise _unseen(unseen[0], by)
    if by.several:
        return np.isin(np.arange(len(numbers)), [numbers[name] for name in named]).astype(np.uint8)
    return np.int32(numbers[named[0]])


def _unseen(name: str, by: Encoder) -> Unusable:
    return Unusable("unseen_label", f"the label {name!r} does not stand in the training data: {', '.join(by.labels[:8])}")
