"""Every usual form of fine-tuning data against what its rows plainly say; bad rows and bad columns against their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.detect import READERS, reader, registered
from danlu.data.example import Asked, Chat, Chosen, Content, Labelled, Segments, Similar, Tagged, Tokens, Turn, Unusable
from danlu.data.records import read
from danlu.errors import DataError, SecurityError

U, A = (lambda said: Turn("user", said)), (lambda said, weight=None: Turn("assistant", said, weight))


def one(row: dict[str, Any], want: str, *, more: list[dict[str, Any]] | None = None, **names: str) -> Content:
    """What the first row of a file says, when these are its rows."""
    return reader(list(row), [row, *(more or [])], want, names)(row)


@pytest.mark.parametrize(("row", "parts", "label"), [
    ({"text": "a", "label": "x"}, ("a",), "x"), ({"label": 1, "text_a": "a"}, ("a",), "1"),
    ({"text_a": "a", "text_b": "b", "label": 2.0}, ("a", "b"), "2"), ({"sentence": "a", "label": True}, ("a",), "true"),
    ({"idx": 3, "sentence1": "a", "sentence2": "b", "label": "0"}, ("a", "b"), "0"),
    ({"premise": "a", "hypothesis": "b", "label": "n"}, ("a", "b"), "n"), ({"Review": "a", "Sentiment": "pos"}, ("a",), "pos"),
    ({"question": "a", "sentence": "b", "label": 1}, ("a", "b"), "1"), ({"文本": "a", "标签": "好"}, ("a",), "好"),
    ({"0": "a long text", "1": "1"}, ("a long text",), "1"), ({"0": "1", "1": "a long text"}, ("a long text",), "1"),
    ({"0": "one text", "1": "another", "2": "0"}, ("one text", "another"), "0")])
def test_classes(row: dict[str, Any], parts: tuple[str, ...], label: str) -> None:
    assert one(row, "label") == Labelled(parts, label)


def test_columns_the_user_names() -> None:
    row = {"title": "t", "body": "b", "kind": "k", "text": "x"}
    assert one(row, "label", text="body", label="kind") == Labelled(("b",), "k")
    assert one(row, "label", text="title", pair="body", label="kind") == Labelled(("t", "b"), "k")
    assert one({"0": "a", "1": "b", "2": "c", "3": "d"}, "label", text="2", label="0") == Labelled(("c",), "a")
    assert one({"s": "a b", "t": "O O"}, "tags", text="s", label="t") == Tagged(("a", "b"), ("O", "O"))
    assert one({"q": "a", "choices": ["x", "y"], "r": 1}, "choice", question="q", answer="r") == Chosen("a", ("x", "y"), 1)
    assert one({"q": "a", "r": "b"}, "chat", question="q", answer="r") == Chat((U("a"), A("b")))


def test_several_classes() -> None:
    assert one({"text": "a", "labels": ["x", "y", "x"]}, "labels") == Labelled(("a",), ("x", "y"))
    assert one({"text": "a", "labels": "x| y"}, "labels") == Labelled(("a",), ("x", "y"))
    assert one({"text": "a", "labels": []}, "labels") == Labelled(("a",), ())
    assert one({"id": "7", "text": "a", "toxic": "1", "rude": "0", "mean": 1}, "labels") == Labelled(("a",), ("toxic", "mean"))


def test_scores() -> None:
    assert one({"sentence1": "a", "sentence2": "b", "score": "3.5"}, "score") == Labelled(("a", "b"), 3.5)
    assert one({"0": "one", "1": "another", "2": "5.0"}, "score") == Labelled(("one", "another"), 5.0)
    assert one({"text": "a", "label": 2}, "score") == Labelled(("a",), 2.0)


def test_tags() -> None:
    assert one({"tokens": ["a", "b"], "ner_tags": [0, 1]}, "tags") == Tagged(("a", "b"), ("0", "1"))
    assert one({"words": "a b", "tags": "O B-X"}, "tags") == Tagged(("a", "b"), ("O", "B-X"))


def test_answers() -> None:
    row = {"id": "q", "context": "Bo and Bo", "question": "Who?", "answers": {"text": ["Bo"], "answer_start": [7]}}
    assert one(row, "answer") == Asked("Who?", "Bo and Bo", (("Bo", 7),), "q")
    listed = row | {"answers": [{"text": "Bo", "answer_start": 0}]}
    assert one(listed, "answer") == Asked("Who?", "Bo and Bo", (("Bo", 0),), "q")
    assert one(row | {"answers": {"text": [], "answer_start": []}}, "answer") == Asked("Who?", "Bo and Bo", (), "q")
    flat = {"context": "Bo and Bo", "question": "Who?", "answer": "and"}
    assert one(flat, "answer") == Asked("Who?", "Bo and Bo", (("and", 3),))
    assert one(flat | {"answer": "Bo", "answer_start": 7}, "answer") == Asked("Who?", "Bo and Bo", (("Bo", 7),))


@pytest.mark.parametrize(("row", "right"), [
    ({"question": "q", "choices": ["a", "b"], "answer": 1}, 1), ({"question": "q", "choices": ["x", "y"], "answer": "B"}, 1),
    ({"question": "q", "choices": ["x", "y"], "answer": "y"}, 1), ({"ctx": "q", "endings": ["x", "y", "z"], "label": "2"}, 2),
    ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, 1),
    ({"question": "q", "A": "x", "B": "y", "C": "z", "answer": "C"}, 2),
    ({"sent1": "q", "ending0": "x", "ending1": "y", "label": 0}, 0),
    ({"question": "q", "options": ["x", "y"], "answer": "(A)"}, 0)])
def test_choices(row: dict[str, Any], right: int) -> None:
    found = one(row, "choice")
    assert isinstance(found, Chosen) and (found.text, found.label) == ("q", right)


def test_choices_numbered_from_one_are_told_by_the_first_rows() -> None:
    rows = [{"sentence": "q", "option1": "x", "option2": "y", "answer": answer} for answer in ("1", "2", "2")]
    assert one(rows[0], "choice", more=rows[1:]) == Chosen("q", ("x", "y"), 0)


def test_alike() -> None:
    assert one({"anchor": "a", "positive": "b"}, "similar") == Similar(("a", "b"))
    assert one({"query": "a", "pos": "b", "negatives": ["c", "d"]}, "similar") == Similar(("a", "b", "c", "d"))
    assert one({"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}, "similar") == Similar(("a", "b", "c", "d"))
    assert one({"sentence1": "a", "sentence2": "b", "score": 0.5}, "similar") == Similar(("a", "b"), 0.5)
    assert one({"0": "one", "1": "another", "2": "5.0"}, "similar") == Similar(("one", "another"), 5.0)


TALK = (U("q"), A("r"))
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(("row", "wanted"), [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}, Chat(TALK)),
    ({"messages": json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}])}, Chat(TALK)),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                   {"role": "assistant", "content": "r"}]}, Chat(TALK)),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "s"},
     Chat((Turn("system", "s"), *TALK))),
    ({"conversation": [{"human": "q", "assistant": "r"}, {"human": "t", "assistant": "u"}]}, Chat((*TALK, U("t"), A("u")))),
    ({"conversations": [{"from": "human", "value": "q"},
                        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                        {"from": "observation", "value": "o"}, {"from": "gpt", "value": "r"}], "tools": json.dumps([TOOL])},
     Chat((U("q"), Turn("assistant", "", None, (CALLED,)), Turn("tool", "o"), A("r")), (TOOL,))),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}, "id": None}]}], "tools": [TOOL]},
     Chat((U("q"), Turn("assistant", "", None, (CALLED,))), (TOOL,))),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r", "reasoning_content": "h"}]},
     Chat((U("q"), A("<think>\nh\n</think>\n\nr")))),
    ({"instruction": "q", "input": "", "output": "r"}, Chat(TALK)),
    ({"instruction": "q", "input": "i", "output": "r", "system": "s", "history": [["a", "b"]]},
     Chat((Turn("system", "s"), U("a"), A("b"), U("q\ni"), A("r")))),
    ({"query": "q", "response": "r", "history": None}, Chat(TALK)), ({"question": "q", "answer": "r"}, Chat(TALK)),
    ({"prompt": "q", "completion": "r"}, Segments((("q", 0.0), ("r", 1.0)))),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "q"}],
      "completion": [{"role": "assistant", "content": "r"}]},
     Chat((Turn("user", "a", 0.0), A("b", 0.0), Turn("user", "q", 0.0), A("r")))),
    ({"segments": [{"text": "q", "label": False}, {"text": "r", "label": True}]}, Segments((("q", 0.0), ("r", 1.0)))),
    ({"input_ids": [1, 2, 3, 0], "labels": [-100, 2, 3, -100], "attention_mask": [1, 1, 1, 0]},
     Tokens((1, 2, 3), (0.0, 1.0, 1.0))),
    ({"text": "t"}, Segments((("t", 1.0),)))])
def test_conversations(row: dict[str, Any], wanted: Content) -> None:
    assert one(row, "chat") == wanted


def test_weights_of_turns_and_characters() -> None:
    turns = [{"role": "user", "content": "q", "loss": True}, {"role": "assistant", "content": "no", "loss": False},
             {"role": "assistant", "content": "ok", "loss_weight": 0.5},
             {"role": "assistant", "content": "ok", "loss_scale": "2"},
             {"role": "assistant", "content": "wrong right", "train": True,
              "train_detail": [{"begin_offset": 0, "end_offset": 4, "train": False}, {"begin_offset": 5, "end_offset": 10}]}]
    found = one({"messages": turns}, "chat")
    assert isinstance(found, Chat)
    assert [turn.weight for turn in found.turns] == [1.0, 0.0, 0.5, 2.0, 1.0]
    assert found.turns[-1].spans == ((0, 5, 0.0), (5, 11, 1.0))


BAD = [
    ("label", {"text": "", "label": "x"}, "empty"), ("label", {"text": None, "label": "x"}, "missing"),
    ("label", {"text": 3, "label": "x"}, "not_text"), ("label", {"text": ["a", "b"], "label": "x"}, "not_text"),
    ("label", {"text": "a", "label": None}, "missing"), ("label", {"text": "a", "label": ""}, "label"),
    ("label", {"text": "a", "label": float("nan")}, "label"), ("label", {"label": "x"}, "missing"),
    ("labels", {"text": "a", "label": None}, "missing"), ("labels", {"text": "a", "label": [""]}, "label"),
    ("score", {"text": "a", "score": "high"}, "score"), ("score", {"text": "a", "score": float("inf")}, "score"),
    ("tags", {"tokens": ["a", "b"], "tags": ["O"]}, "tags"), ("tags", {"tokens": [], "tags": []}, "tokens"),
    ("tags", {"tokens": [1], "tags": ["O"]}, "tokens"),
    ("answer", {"context": "Bo", "question": "q", "answers": {"text": ["Bo"], "answer_start": [1]}}, "answer_start"),
    ("answer", {"context": "Bo", "question": "q", "answers": {"text": [""], "answer_start": [0]}}, "answer"),
    ("answer", {"context": "Bo Bo", "question": "q", "answers": "Bo"}, "answer_start"),
    ("answer", {"context": "Bo", "question": "q", "answers": {"text": ["Bo"], "answer_start": []}}, "answer_start"),
    ("choice", {"question": "q", "choices": ["a", "b"], "answer": 5}, "choice"),
    ("choice", {"question": "q", "choices": ["a"], "answer": 0}, "choice"),
    ("similar", {"anchor": "a", "positive": " "}, "empty"),
    ("chat", {"messages": [{"role": "wizard", "content": "q"}]}, "role"), ("chat", {"messages": [{"content": "q"}]}, "role"),
    ("chat", {"messages": [{"role": "user", "content": "q"}]}, "no_answer"), ("chat", {"messages": []}, "no_answer"),
    ("chat", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "empty_answer"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not_text"),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "tool_call"),
    ("chat", {"messages": [{"role": "assistant", "content": "a", "loss": -1}]}, "weight"),
    ("chat", {"messages": [{"role": "assistant", "content": "a",
                            "train_detail": [{"begin_offset": 0, "end_offset": 1}]}]}, "weight"),
    ("chat", {"instruction": "q", "output": ""}, "empty"),
    ("chat", {"instruction": "q", "output": "r", "history": [["x"]]}, "history"),
    ("chat", {"prompt": "q", "completion": ""}, "empty"), ("chat", {"segments": [{"text": "q", "label": False}]}, "no_answer"),
    ("chat", {"input_ids": [1, 2], "labels": [2, 1]}, "tokens"), ("chat", {"input_ids": [1], "labels": [1, 2]}, "tokens"),
]
GOOD = {"label": {"text": "a", "label": "x"}, "labels": {"text": "a", "label": ["x"]}, "score": {"text": "a", "score": 1}}


@pytest.mark.parametrize(("want", "row", "reason"), BAD)
def test_a_bad_row_says_what_is_wrong(want: str, row: dict[str, Any], reason: str) -> None:
    names = list(GOOD.get(want, row))
    with pytest.raises(Unusable) as caught:
        reader(names, [row], want, {})(row)
    assert caught.value.reason == reason and caught.value.detail


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=6) | st.sampled_from(
    ["user", "assistant", "[", '[{"role": "user"}]', "{}", "A"]), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "text", "answer_start", "label", "tool_calls", "function", "name",
                         "arguments", "loss", "train_detail", "begin_offset", "human", "assistant"]), inner,
        max_size=4), max_leaves=8)
SHAPES = [("label", ["text", "label"]), ("labels", ["text", "labels"]), ("score", ["text", "score"]),
          ("tags", ["tokens", "tags"]), ("answer", ["context", "question", "answers"]),
          ("choice", ["question", "choices", "answer"]),
          ("similar", ["anchor", "positive", "negative"]), ("chat", ["messages", "tools", "system"]),
          ("chat", ["instruction", "input", "output", "history"]), ("chat", ["prompt", "completion"]), ("chat", ["segments"]),
          ("chat", ["input_ids", "labels", "attention_mask"]), ("text", ["text"])]


def test_choices_whose_marks_are_no_list_are_unusable() -> None:
    rows = [{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "A"}] * 3
    understand = reader(["question", "choices", "answer"], rows, "choice", {})
    assert understand(rows[0]).label == 0
    with pytest.raises(Unusable):
        understand({"question": None, "choices": {"label": True}, "answer": None})


@pytest.mark.parametrize(("want", "names"), SHAPES)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_row_is_content_or_unusable(want: str, names: list[str], data: st.DataObject) -> None:
    read_row = reader(names, [], want, {})
    row = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(names, VALUES)))
    try:
        assert isinstance(read_row(row), tuple)
    except Unusable as error:
        assert error.reason and error.detail


TEXT = st.text(st.characters(exclude_categories=["Cs", "Zs", "Cc"]), min_size=1, max_size=8)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(lambda pairs: tuple(
    turn for asked, said in pairs for turn in (U(asked), A(said))))


def openai(turns: tuple[Turn, ...]) -> dict[str, Any]:
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}


def sharegpt(turns: tuple[Turn, ...]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[turn.role], "value": turn.content} for turn in turns]}


def swift(turns: tuple[Turn, ...]) -> dict[str, Any]:
    return {"conversation": [{"human": a.content, "assistant": b.content} for a, b in zip(turns[::2], turns[1::2], strict=True)]}


def alpaca(turns: tuple[Turn, ...]) -> dict[str, Any]:
    pairs = [[a.content, b.content] for a, b in zip(turns[::2], turns[1::2], strict=True)]
    return {"instruction": pairs[-1][0], "output": pairs[-1][1], "history": pairs[:-1]}


def query(turns: tuple[Turn, ...]) -> dict[str, Any]:
    row = alpaca(turns)
    return {"query": row["instruction"], "response": row["output"], "history": row["history"]}


@pytest.mark.parametrize("write", [openai, sharegpt, swift, alpaca, query])
@given(turns=TURNS)
@settings(max_examples=40, deadline=None)
def test_a_conversation_comes_back_from_every_form(write: Any, turns: tuple[Turn, ...]) -> None:
    assert one(write(turns), "chat") == Chat(turns)


@pytest.mark.parametrize(("names", "want", "told"), [
    (["txt", "label"], "label", "text=txt"), (["content", "lable"], "label", "label=lable"),
    (["instruction", "output"], "label", "they fit: chat"), (["text", "label"], "tags", "they fit: label"),
    (["token", "tag"], "tags", "tokens=token tags=tag"), (["ctx", "question", "answers"], "answer", "context=")])
def test_columns_that_do_not_fit(names: list[str], want: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        reader(names, [dict.fromkeys(names, "a")], want, {})
    assert told in str(caught.value) and all(name in caught.value.what for name in names) and want in caught.value.what


def test_names_of_the_user_are_checked() -> None:
    with pytest.raises(DataError, match="text: body"):
        one({"body": "a", "label": "b"}, "label", text="bdy")
    with pytest.raises(DataError, match="did you mean label"):
        one({"text": "a", "label": "b"}, "label", lable="label")


def test_swapped_columns_are_told() -> None:
    rows = [{"text": str(n % 2), "label": f"a long review with the number {n}"} for n in range(20)]
    with pytest.raises(DataError, match="swapped") as caught:
        reader(["text", "label"], rows, "label", {})
    assert "--columns text=label label=text" in str(caught.value.fix)
    right = [{"text": row["label"], "label": row["text"]} for row in rows]
    reader(["text", "label"], right, "label", {})
    reader(["text", "label"], rows, "label", {"text": "label", "label": "text"})


def test_rows_to_predict_need_no_label() -> None:
    for want, row in (("label", {"text": "a"}), ("score", {"sentence1": "a", "sentence2": "b"}), ("tags", {"tokens": ["a"]}),
                      ("answer", {"context": "a", "question": "b"}), ("choice", {"question": "q", "choices": ["a", "b"]}),
                      ("chat", {"messages": [{"role": "user", "content": "a"}]}), ("chat", {"instruction": "a"})):
        assert reader(list(row), [row], want, {}, unlabelled=True)(row)
    with pytest.raises(DataError):
        reader(["text"], [{"text": "a"}], "label", {})
    assert set(READERS) == {"label", "labels", "score", "tags", "answer", "choice", "similar", "chat", "text"}


def test_the_registry_of_llama_factory(tmp_path: Path) -> None:
    assert registered(tmp_path, "x") is None
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "a": {"file_name": "a.json", "columns": {"prompt": "ask", "query": "more", "response": "say"}, "num_samples": 3},
        "b": {"file_name": "b.json", "formatting": "sharegpt", "columns": {"messages": "talk"},
              "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"}},
        "c": {"hf_hub_url": "o/n", "subset": "s"}, "d": {"script_url": "x.py"}, "e": {"file_name": "e", "ranking": True}}))
    a, b, c = (registered(tmp_path, name) for name in "abc")
    assert a and (a.path, a.take) == (str(tmp_path / "a.json"), 3)
    assert one({"ask": "q", "more": "", "say": "r"}, "chat", **a.names) == Chat(TALK)
    assert b and one({"talk": [{"who": "me", "what": "q"}, {"who": "it", "what": "r"}]}, "chat", **b.names) == Chat(TALK)
    assert c and (c.path, c.subset) == ("hf://o/n", "s")
    assert registered(tmp_path, "none") is None
    with pytest.raises(SecurityError):
        registered(tmp_path, "d")
    with pytest.raises(DataError, match="preferences"):
        registered(tmp_path, "e")


@pytest.mark.realdata
@pytest.mark.parametrize(("file", "want", "kind"), [
    ("sst2/train.tsv", "label", Labelled), ("chnsenticorp/dev.tsv", "label", Labelled), ("stsb/zh-dev.csv", "score", Labelled),
    ("stsb/en-dev.csv", "similar", Similar), ("wikiann/dev.tsv", "tags", Tagged), ("xquad/en.json", "answer", Asked),
    ("xquad/zh.json", "answer", Asked), ("gsm8k/test.jsonl", "chat", Chat)])
def test_public_data_is_understood_without_a_word(realdata: Path, file: str, want: str, kind: type) -> None:
    found = [record.columns for record in read(str(realdata / file))]
    make = reader(list(found[0]), found[:200], want, {})
    bad = list[str]()
    for row in found:
        try:
            assert isinstance(make(row), kind)
        except Unusable as error:
            bad.append(error.detail)
    assert bad == []
    if file.startswith(("sst2", "chn")):
        assert {make(row).label for row in found} == {"0", "1"}


def test_preferences_are_refused_and_one_answer_of_them_can_be_named() -> None:
    row = {"prompt": "q", "chosen": "r", "rejected": "s"}
    with pytest.raises(DataError, match="preferences") as caught:
        reader(list(row), [row], "chat", {})
    assert "query=prompt response=chosen" in str(caught.value)
    assert reader(list(row), [row], "chat", {"query": "prompt", "response": "chosen"})(row) == Chat(TALK)


LATER: list[tuple[list[dict[str, Any]], dict[str, Any], Content]] = [
    ([{"instruction": "q", "output": "r"}] * 70, {"instruction": "q", "input": "x", "output": "r"}, Chat((U("q\nx"), A("r")))),
    ([{"query": "q", "response": "r"}], {"query": "q", "response": "r", "history": [["a", "b"]]},
     Chat((U("a"), A("b"), U("q"), A("r")))),
    ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}],
     {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "system": "s"},
     Chat((Turn("system", "s"), U("q"), A("r")))),
]


@pytest.mark.parametrize(("first", "later", "said"), LATER)
def test_a_column_that_comes_later_is_read(first: list[dict[str, Any]], later: dict[str, Any], said: Content) -> None:
    make = reader(list(first[0]), first, "chat", {})
    assert make(first[0]) != said and make(later) == said
    assert make(first[0]) == reader(list(first[0]), first, "chat", {})(first[0])      # rows without it are as before


def test_columns_that_nothing_is_taken_from_are_known() -> None:
    row = {"id": 7, "instruction": "q", "input": "", "output": "r", "source": "web"}
    make = reader(list(row), [row], "chat", {})
    assert make.unread == ["id", "source"]
    make({**row, "note": "later", "history": []})
    assert make.unread == ["id", "source", "note"]
    assert reader(["text", "label"], [{"text": "a", "label": "x"}], "label", {}).unread == []


@pytest.mark.parametrize("row", [
    {"prompt": "q", "completion": "bad", "label": False}, {"query": "q", "response": "bad", "label": "False"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "label": True},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": "r", "rejected": "s"}])
def test_answers_of_which_some_are_bad_are_not_learned(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"preferences|good"):
        reader(list(row), [row], "chat", {})


def test_what_is_asked_about_is_part_of_the_question() -> None:
    assert one({"instruction": "q", "context": "c", "response": "r"}, "chat") == Chat((U("q\nc"), A("r")))
    assert one({"question": "q", "context": "c", "answer": "r"}, "chat") == Chat((U("c\nq"), A("r")))
    for row in ({"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"},
                {"question": "q", "choices": ["1", "2"], "answer": "1"}):
        with pytest.raises(DataError, match="choices") as caught:
            one(row, "chat")
        assert "objective: choose" in str(caught.value)


def test_an_odd_value_among_classes_is_at_fault_and_not_the_class() -> None:
    rows = [{"text": "a", "toxic": "1", "threat": "0"}] * 30 + [{"text": "a", "toxic": "0", "threat": "-1"}]
    make = reader(list(rows[0]), rows, "labels", {})
    assert make(rows[0]) == Labelled(("a",), ("toxic",))
    with pytest.raises(Unusable, match="threat"):
        make(rows[-1])
    with pytest.raises(Unusable, match="rude"):
        make({**rows[0], "rude": 1})


@pytest.mark.parametrize(("answer", "start", "said"), [
    ("copper", "4", (("copper", 4),)), ("copper", 4.0, (("copper", 4),)), ("", "", ()), ("", "-1", ()),
    ('{"text": ["copper"], "answer_start": [4]}', None, (("copper", 4),)), ('{"text": [], "answer_start": []}', None, ())])
def test_answers_as_a_table_writes_them(answer: str, start: Any, said: tuple[tuple[str, int], ...]) -> None:
    row = {"context": "the copper", "question": "what?", "answer": answer} | ({} if start is None else {"answer_start": start})
    assert one(row, "answer") == Asked("what?", "the copper", said, "")


def test_a_registry_that_names_preferences_or_pictures_is_refused(tmp_path: Path) -> None:
    table = {"kto": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}},
             "seen": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}},
             "corpus": {"file_name": "c.jsonl", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(table))
    for name, key in (("kto", "kto_tag"), ("seen", "images")):
        with pytest.raises(DataError, match=key):
            registered(tmp_path, name)
    corpus = registered(tmp_path, "corpus")
    assert corpus is not None and corpus.names == {"text": "text"}
