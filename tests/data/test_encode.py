"""Rows of tasks: every word once, every character of a context in some window, what is labelled where it was labelled."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data import align
from danlu.data.encode import Encoder, Made, encode
from danlu.data.example import Asked, Chosen, Segments, Similar, Tagged, Unusable
from danlu.data.tokenizer import BPE, Chars, Tokenizer, WordPiece, train

TEXTS = [*["the furnace learns from text and keeps what it reads", "丹炉炼模型数据"] * 20,
         *["never lies, it says; the café is 1,024 m away"] * 20]
KINDS: dict[str, Any] = {"wordpiece": WordPiece(vocab=150), "bpe": BPE(vocab=320), "chars": Chars(),
                         "bpe with cls": BPE(vocab=320, masked=True)}
WORD = st.text("abcdeé丹炉模数,. '0", min_size=1, max_size=9).filter(str.strip)


@cache
def tokenizer(kind: str) -> Tokenizer:
    return train(TEXTS, KINDS[kind])


def by(kind: str, length: int, **changes: Any) -> Encoder:
    given: dict[str, Any] = {"overlong": "error", "labels": ("O", "X", "Y")}
    return Encoder(tokenizer(kind), length, **given | changes)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(words=st.lists(WORD, min_size=1, max_size=20), length=st.integers(8, 40), data=st.data())
def test_each_word_begins_once_in_some_row(kind: str, words: list[str], length: int, data: st.DataObject) -> None:
    tags = tuple(data.draw(st.sampled_from("OXY")) for _word in words)
    rows = encode(Tagged(tuple(words), tags), by(kind, length, overlong="split"))
    found: dict[int, int] = {}
    for row in rows:
        assert row.tags is not None and len(row.tags) == len(row.ids) <= length
        begins, number, first = row.columns["window"].tolist()
        places = np.flatnonzero(row.tags >= 0)
        assert len(places) == number and places[0] == begins
        for offset, place in enumerate(places):
            assert first + offset not in found, "no word is judged twice"
            found[first + offset] = int(row.tags[place])
    assert [found[n] for n in range(len(words))] == ["OXY".index(tag) for tag in tags]
    pieces = align.pieces(words, tokenizer(kind))
    assert sum(len(row.ids) - tokenizer(kind).room_beside(1) for row in rows) == sum(
        min(len(one), length - tokenizer(kind).room_beside(1)) for one in pieces)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_words_are_cut_as_the_text_is(kind: str) -> None:
    words = ["the", "furnace", "learns", "丹", "炉", "from", "text"]
    ids = np.concatenate(align.pieces(words, tokenizer(kind)))
    assert tokenizer(kind).decode(ids).replace(" ", "") == "".join(words)
    assert ids.tolist() == tokenizer(kind).encode("the furnace learns丹炉from text").tolist()


def test_a_word_of_which_nothing_is_left_is_unknown() -> None:
    pieces = align.pieces(["the", "\u200b\x00", "text"], tokenizer("wordpiece"))
    assert pieces[1].tolist() == [tokenizer("wordpiece").special.unk]


def test_a_sentence_that_is_too_long_goes_by_the_policy() -> None:
    content = Tagged(tuple("abcdefghij"), tuple("OXYOXYOXYO"))
    with pytest.raises(Unusable, match="room for 6"):
        encode(content, by("wordpiece", 8))
    (row,) = encode(content, by("wordpiece", 8, overlong="cut"))
    assert row.cut == 4 and row.columns["window"].tolist() == [1, 6, 0]
    assert [len(encode(content, by("wordpiece", 8, overlong="split"))), row.text] == [2, {
        "words": content.words, "tags": content.tags}]
    with pytest.raises(Unusable) as found:
        encode(content, by("wordpiece", 8, overlong="drop"))
    assert found.value.reason == "dropped"
    with pytest.raises(Unusable, match="'Z' does not stand in the training data"):
        encode(Tagged(("a",), ("Z",)), by("wordpiece", 8))


def context_of(row: Made, text: dict[str, Any]) -> list[tuple[int, int]]:
    """Characters of each token of the context in a row."""
    _begins, size, first = row.columns["window"].tolist()
    return [(text["spans"][2 * n], text["spans"][2 * n + 1]) for n in range(first, first + size)]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(words=st.lists(WORD, min_size=1, max_size=40), length=st.integers(24, 50), stride=st.integers(0, 40), data=st.data())
def test_windows_hold_the_context_and_the_answer(kind: str, words: list[str], length: int, stride: int,
                                                 data: st.DataObject) -> None:
    context = " ".join(words)
    start = data.draw(st.integers(0, len(context) - 1))
    answer = context[start : start + data.draw(st.integers(1, 6))]
    maker = by(kind, length, stride=stride)
    try:
        rows = encode(Asked("what", context, ((answer, start),)), maker)
    except Unusable as found:
        assert found.reason in ("answer_too_long", "empty") or (found.reason == "answer_lost" and not answer.strip())
        return
    text = rows[0].text
    assert text is not None
    whole = maker.tokenizer.encode(context)
    covered, told = np.zeros(len(whole), bool), 0
    for row in rows:
        begins, size, first = row.columns["window"].tolist()
        assert len(row.ids) <= length
        assert row.ids[begins : begins + size].tolist() == whole[first : first + size].tolist()
        covered[first : first + size] = True
        if row.columns["answer"][0] >= 0:
            told += 1
            a, b = (int(place) - begins for place in row.columns["answer"])
            spans = context_of(row, text)
            said = context[spans[a][0] : spans[b][1]]
            assert answer.strip() in said, "the tokens cover the answer"
            inner = [context[s:e].strip() for s, e in (spans[a], spans[b])]
            assert all(inner)
            assert spans[a][1] > start and spans[b][0] < start + len(answer), "and no token beside it"
    assert covered.all() and told


@given(size=st.integers(1, 200), room=st.integers(1, 40), data=st.data())
def test_neighbouring_windows_share_what_they_should(size: int, room: int, data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, room - 1))
    found = align.windows(size, room, shared)
    assert found[0][0] == 0 and found[-1][1] == size
    assert all(b[0] == a[1] - shared and b[1] > a[1] for a, b in pairwise(found))
    assert all(0 < stop - start <= room for start, stop in found)


def test_a_long_question_goes_by_the_policy() -> None:
    question = Asked("the " * 40, "it reads text", (("text", 9),))
    with pytest.raises(Unusable, match="room for"):
        encode(question, by("wordpiece", 32))
    rows = encode(question, by("wordpiece", 32, overlong="cut"))
    assert rows[0].cut == 40 - 14 and len(rows[0].ids) <= 32


def test_a_question_without_an_answer_says_so_in_each_window() -> None:
    rows = encode(Asked("what", "it reads text " * 20, ()), by("wordpiece", 24, stride=4))
    assert len(rows) > 2 and all(row.columns["answer"].tolist() == [-1, -1] for row in rows)


def test_choices_stand_one_after_the_other_each_with_the_text() -> None:
    maker = by("wordpiece", 40)
    (row,) = encode(Chosen("the furnace", ("learns", "lies", "never reads text"), 2), maker)
    parts = row.columns["parts"].reshape(-1, 2)
    stops = parts.sum(1).cumsum()
    for end, (first, second), choice in zip(stops, parts, ("learns", "lies", "never reads text"), strict=True):
        both = [maker.tokenizer.encode(one) for one in ("the furnace", choice)]
        assert row.ids[end - first - second : end].tolist() == maker.tokenizer.together(both)[0].tolist()
    assert stops[-1] == len(row.ids) and row.columns["label"] == 2
    with pytest.raises(Unusable, match="room for"):
        encode(Chosen("the furnace " * 9, ("learns", "lies"), 0), maker)
    (cut,) = encode(Chosen("the furnace " * 9, ("learns", "lies"), 0), by("wordpiece", 40, overlong="cut"))
    assert cut.cut and len(cut.ids) <= 40


def test_alike_texts_stand_one_after_the_other() -> None:
    (row,) = encode(Similar(("the furnace", "it learns", "text"), None), by("wordpiece", 40))
    assert row.columns["parts"].sum() == len(row.ids) and "label" not in row.columns
    (row,) = encode(Similar(("the furnace", "it learns"), 3.5), by("wordpiece", 40))
    assert row.columns["label"] == np.float32(3.5)


PREFIXED: dict[str, dict[str, Any]] = {
    "metaspace, first": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
    "metaspace, always": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
    "prepend": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}},
}


@pytest.mark.parametrize("name", PREFIXED)
def test_pieces_stand_right_after_one_another(name: str) -> None:
    letters = "▁abcdefghijklmnopqrstuvwxyz答铜：\n"
    words = ["▁un", "happy", "▁happy", "▁the"]
    vocab = [["<unk>", 0.0], *[[one, -8.0] for one in letters], *[[one, -2.0] for one in words]]
    given = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
             "post_processor": None, "decoder": None,
             "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}} | PREFIXED[name]
    one = Tokenizer(json.dumps(given), named={}, add_bos=False, add_eos=False, settings={})
    for texts in (["un", "happy"], ["答：", "铜"], ["the ", "happy"], ["", "un", "happy"], ["a\n", "\nb"]):
        ids = np.concatenate(one.encode_pieces(texts))
        spelt = "".join(str(one.raw.id_to_token(i)) for i in ids).removeprefix("▁").replace("▁", " ")
        assert spelt == "".join(texts)
    made = encode(Segments((("un", 0.0), ("happy", 1.0))), Encoder(one, 16, overlong="error"))
    assert [one.raw.id_to_token(i) for i in made[0].ids] == ["▁un", "happy"]
