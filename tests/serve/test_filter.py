"""Filters against plain search in normalised text; nothing of a match leaves, however the stream is cut."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.serve.filter import Chain, Classifier, Words, judge, normal, words_of
from danlu.serve.filters import measured, opened, wilson
from tests.evaluate import small
from tests.serve.at import CPU, serving

LIST = Words(["bad word", "evil", "毒品", "a", "café", "c++"], "list")


@pytest.mark.parametrize("text", ["evil", "so EVIL!", "ｅｖｉｌ", "e\u200bv\u00adil", "Évil", "a bad   word.", "bad\nword",
                                  "有毒品吗", "毒\u200d品", "in a cafe", "use c++ now", "evil毒", "𝐞𝐯𝐢𝐥"])
def test_what_is_found(text: str) -> None:
    assert judge([LIST], text) is not None


@pytest.mark.parametrize("text", ["", "devil", "evils", "evil_", "badword", "bad words", "毒 品", "caf", "c+", "word bad"])
def test_what_is_not_found(text: str) -> None:
    assert judge([Words(["bad word", "evil", "毒品", "café", "c++"], "list")], text) is None


def reference(words: list[str], text: str) -> bool:
    """Search by regular expressions in the normalised text."""
    edge = r"[^\W\u2e80-\U0003ffff]"
    for word in map(normal, words):
        left = rf"(?<!{edge})" if re.match(edge, word) else ""
        right = rf"(?!{edge})" if re.match(edge, word[-1]) else ""
        if re.search(left + re.escape(word) + right, normal(text)):
            return True
    return False


WORDS = ["ab", "abba", "b a", "毒", "毒品a"]


@given(st.text("abAＢ 毒品\u200b.x", max_size=30), st.lists(st.integers(0, 30), max_size=6))
def test_streams_agree_with_a_search_and_leak_nothing(text: str, cuts: list[int]) -> None:
    watch = Words(WORDS, "list").watch()
    edges = sorted({0, *(cut for cut in cuts if cut <= len(text)), len(text)})
    out = "".join(watch.feed(text[a:b]) for a, b in itertools.pairwise(edges)) + watch.end()
    assert (watch.hit is not None) == reference(WORDS, text)
    assert text.startswith(out)
    if watch.hit is None:
        assert out == text
    else:
        assert not reference(WORDS, out)


def test_a_match_across_pieces_is_not_given_out() -> None:
    chain = Chain([Words(["forbidden fruit"], "list"), Words(["苹果树"], "two")])
    out = "".join(chain.feed(piece) for piece in ("He ate the for", "bid", "den fru", "it and"))
    assert out == "He ate the " or (out == "" and chain.hit is not None)
    other = Chain([Words(["forbidden fruit"], "list"), Words(["苹果树"], "two")])
    out = "".join(other.feed(piece) for piece in ("the for", "bidden tree 苹", "果汁")) + other.end()
    assert out == "the forbidden tree 苹果汁"


def test_a_classifier_reads_whole_sentences() -> None:
    asked: list[str] = []

    def ask(text: str) -> str | None:
        asked.append(text)
        return "bad" if "poison" in text else None

    watch = Classifier(ask, "poison").watch()
    assert watch.feed("It is fine") == ""
    assert watch.feed(". Take poi") == "It is fine. "
    assert watch.feed("son. Now") == "" and watch.hit is not None
    assert watch.end() == "" and len(asked) == 2


def test_files_of_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# comment\nevil\n\n毒品\nEVIL\n", encoding="utf-8")
    assert words_of(path).size == 2


def test_false_positives_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [("devil", 0), ("evil genius", 0), ("evil deed", 1), ("nothing", 1)] + [("fine", 0)] * 6
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8")
    found = measured([Words(["evil"], "list")], path)["filters"][0]
    assert (found["false_positives"]["stopped"], found["false_positives"]["of"]) == (1, 8)
    assert (found["caught"]["stopped"], found["caught"]["of"]) == (1, 2) and found["lines"] == [2]
    low, high = wilson(1, 8)                             # Newcombe (1998) gives 0.0224 to 0.4709
    assert low == pytest.approx(0.0224, abs=1e-3) and high == pytest.approx(0.4709, abs=1e-3)


SAID = ["the furnace learns from text", "丹炉 keeps what it reads"] * 20


def test_the_server_stops_questions_and_answers(tmp_path: Path) -> None:
    model = small.decoder(tmp_path, SAID)
    with serving(model) as at:
        plain = httpx.post(f"{at.url}/v1/completions", json={"prompt": "the", "temperature": 0, "max_tokens": 30}).json()
    text = plain["choices"][0]["text"]
    middle = normal(text[len(text) // 2:])[:6].strip()
    path = tmp_path / "words.txt"
    path.write_text(f"poison\n{middle}\n", encoding="utf-8")
    found = opened(str(path), CPU)
    with serving(model, before=(found,), after=(found,)) as at:
        refused = httpx.post(f"{at.url}/v1/completions", json={"prompt": "PoI\u200bson"})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "content_filter"
        assert "poison" not in refused.text.lower()
        whole = httpx.post(f"{at.url}/v1/completions", json={"prompt": "the", "temperature": 0, "max_tokens": 30}).json()
        asked = {"prompt": "the", "temperature": 0, "max_tokens": 30, "stream": True}
        stream = httpx.post(f"{at.url}/v1/completions", json=asked)
        events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
        streamed = "".join(event["choices"][0]["text"] for event in events)
        for said, finish in ((whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]),
                             (streamed, events[-1]["choices"][0]["finish_reason"])):
            if reference([middle], text):
                assert finish == "content_filter" and not reference([middle], said) and text.startswith(said)
        assert httpx.post(f"{at.url}/v1/completions", json={"prompt": "a", "logprobs": 1}).status_code == 400
        assert at.meter("danlu_filtered_total", where="prompt", filter="words") == 1


def test_a_trained_classifier_is_a_filter(tmp_path: Path) -> None:
    start = small.encoder(tmp_path)
    data = small.table(tmp_path / "train.csv", ["text", "label"], small.texts(120, 0))
    run = small.trained(tmp_path, start, [str(data)], steps=60)
    found = opened(f"{run}:bad=0.5", CPU)
    texts = small.texts(40, 9)
    right = sum((found.judge(text) is not None) == (label == "bad") for text, label in texts)
    assert right > 30
