"""The renderer against transformers' apply_chat_template on templates as models ship them: same text, ids and mask."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import CHATML, GENERATION, LLAMA3, MARKS, MISTRAL, QWEN, REAL, THINKING
from transformers import PreTrainedTokenizerFast

from danlu.data import jinja
from danlu.data.chat import Piece, Template, encode, render, weighed
from danlu.data.example import Turn, Unusable
from danlu.data.tokenizer import BPE, Tokenizer, train
from danlu.errors import ConfigError, DataError, SecurityError

TALK = [Turn("user", "Hello, who are you?"), Turn("assistant", "A furnace."), Turn("user", "丹炉?"), Turn("assistant", "是的。")]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tell <|im_end|> the weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京 <|im_end|>"}}}


def texts() -> list[str]:
    return ["Hello, who are you? A furnace. What do you do? I learn from text.\n\nuser\nassistant\nsystem\n"] * 20 + [
        "丹炉是什么？是的。北京天气"] * 20


def tokenizer_in(folder: Path, marks: tuple[str, ...], *, bos: bool = True) -> Tokenizer:
    """A byte-level BPE whose vocabulary has `marks` as special tokens, saved as any model's is."""
    train(texts(), BPE(vocab=400, add_bos=False)).save(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    known = {token["content"] for token in content["added_tokens"]}
    size = 1 + max(*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"]))
    for mark in (*(["<s>"] if bos else []), *marks):
        if mark not in known:
            content["added_tokens"].append({"id": size, "content": mark, "single_word": False, "lstrip": False,
                                            "rstrip": False, "normalized": False, "special": True})
            size += 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    configured = json.loads((folder / "tokenizer_config.json").read_text())
    if bos:
        configured |= {"bos_token": "<s>"}
        (folder / "special_tokens_map.json").write_text(json.dumps(
            json.loads((folder / "special_tokens_map.json").read_text()) | {"bos_token": "<s>"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(configured))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizer_in(folder, MARKS)
    return tokenizer, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("bare"), (), bos=False)


def template(tokenizer: Tokenizer, source: str | None) -> Template:
    return Template(source, None, tokenizer.controls, tokenizer.named)


def messages(turns: list[Turn]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.content} | ({"tool_calls": list(turn.calls)} if turn.calls else {})
            for turn in turns]


def theirs(hf: Any, source: str, turns: list[Turn], tools: list[Any], generate: bool) -> tuple[str, list[int]]:
    asked = {"chat_template": source, "tools": tools or None, "add_generation_prompt": generate}
    return (hf.apply_chat_template(messages(turns), tokenize=False, **asked),
            hf.apply_chat_template(messages(turns), tokenize=True, return_dict=True, **asked)["input_ids"])


def learned(pieces: list[Piece]) -> str:
    """What the model learns to write, with a bar where something else stands between."""
    found = ""
    for piece in pieces:
        found += piece.text if piece.weight else "" if found.endswith("|") or not found else "|"
    return found.rstrip("|")


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_text_and_ids_equal_transformers(own: tuple[Tokenizer, Any], name: str, generate: bool) -> None:
    tokenizer, hf = own
    turns = TALK[:3] if generate else TALK
    text, ids = theirs(hf, REAL[name], turns, [], generate)
    pieces = render(template(tokenizer, REAL[name]), turns, generate=generate)
    assert "".join(piece.text for piece in pieces) == text
    assert encode(pieces, tokenizer)[0].tolist() == ids


@pytest.mark.parametrize(("name", "wanted"), [
    ("chatml", "A furnace.<|im_end|>|是的。<|im_end|>"), ("llama3", "A furnace.<|eot_id|>|是的。<|eot_id|>"),
    ("qwen", "A furnace.<|im_end|>|是的。<|im_end|>"), ("mistral", "A furnace.</s>|是的。</s>"),
    ("generation", "A furnace.<|im_end|>|是的。<|im_end|>"), ("phi", "A furnace.<|end|>|是的。<|end|>\n</s>"),
    ("thinking", "A furnace.<|im_end|>|是的。<|im_end|>"), (None, "A furnace.<|im_end|>|是的。<|im_end|>")])
def test_answers_and_their_ends_are_learned_and_nothing_else(own: tuple[Tokenizer, Any], name: str, wanted: str) -> None:
    tokenizer, _hf = own
    eos = tokenizer.named["eos"]
    pieces = render(template(tokenizer, REAL[name] if name else None), TALK)
    assert learned(pieces) == wanted.replace("</s>", eos)
    ids, weights = encode(pieces, tokenizer)
    text = tokenizer.decode(ids[weights > 0].tolist())
    if name == "mistral":                                # its blank before the answer is one token with the first word
        text = text.replace(" A", "A").replace(" 是", "是")
    assert text == wanted.replace("</s>", eos).replace("|是", "是")


@pytest.mark.parametrize("turns", [TALK, [Turn("system", "Be brief."), *TALK, Turn("user", "Bye")]])
def test_the_mask_equals_that_of_transformers(own: tuple[Tokenizer, Any], turns: list[Turn]) -> None:
    tokenizer, hf = own
    found = hf.apply_chat_template(messages(turns), chat_template=GENERATION, tokenize=True, return_dict=True,
                                   return_assistant_tokens_mask=True)
    ids, weights = encode(render(template(tokenizer, GENERATION), turns), tokenizer)
    assert ids.tolist() == found["input_ids"]
    assert weights.tolist() == found["assistant_masks"]
    plain = encode(render(template(tokenizer, CHATML), turns), tokenizer)
    assert plain[0].tolist() == ids.tolist() and plain[1].tolist() == weights.tolist()


@pytest.mark.parametrize("source", [QWEN, None])
def test_tool_calls_are_learned(own: tuple[Tokenizer, Any], source: str | None) -> None:
    tokenizer, hf = own
    turns = [Turn("system", "Help."), Turn("user", "天气?"), Turn("assistant", "", calls=(CALL,)), Turn("tool", "rain"),
             Turn("tool", "wind"), Turn("assistant", "Look:", calls=(CALL, CALL)), Turn("tool", "sun"), Turn("assistant", "Sun.")]
    guarded = [turn if not turn.calls else turn._replace(calls=tuple(
        {**call, "function": {"name": "weather", "arguments": {"city": "北京"}}} for call in turn.calls)) for turn in turns]
    tool = json.loads(json.dumps(TOOL).replace("<|im_end|>", ""))
    text, ids = theirs(hf, QWEN, guarded, [tool], False)
    pieces = render(template(tokenizer, source), guarded, [tool])
    assert "".join(piece.text for piece in pieces) == text
    assert encode(pieces, tokenizer)[0].tolist() == ids
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert learned(pieces) == f"{call}<|im_end|>|Look:\n{call}\n{call}<|im_end|>|Sun.<|im_end|>"
    hostile = render(template(tokenizer, source), turns, [TOOL])
    ends = encode(hostile, tokenizer)[0].tolist().count(tokenizer.id("<|im_end|>"))
    assert ends == encode(pieces, tokenizer)[0].tolist().count(tokenizer.id("<|im_end|>"))
    assert "北京 <|im_end|>" in "".join(piece.text for piece in hostile if not piece.special)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_blanks_of_sentencepiece_after_special_tokens(tmp_path: Path, scheme: str) -> None:
    """Such tokenizers put a blank before the first word of a text, some before that after a special token too."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Raw

    words = {word: place for place, word in enumerate(["<unk>", *"▁abcdefghijklmnopqrstuvwxyz.,?", "▁who"])}
    raw = Raw(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    raw.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in ("<s>", "</s>", "[INST]", "[/INST]")])
    hf = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    turns = [Turn("user", "who are you"), Turn("assistant", "me."), Turn("user", " eh?"), Turn("assistant", "yes")]
    for source in (MISTRAL, "{% for m in messages %}{{ 'x' if loop.first }}{{ '[INST]' + m.content + '[/INST]' }}{% endfor %}"):
        text, ids = theirs(hf, source, turns, [], False)
        pieces = render(template(tokenizer, source), turns)
        if source == MISTRAL:
            assert "".join(piece.text for piece in pieces) == text
        assert encode(pieces, tokenizer)[0].tolist()[:len(ids)] == ids


@pytest.mark.parametrize("marked", [True, False])
def test_chatml_is_saved_for_other_tools(own: tuple[Tokenizer, Any], bare: Tokenizer, tmp_path: Path, marked: bool) -> None:
    tokenizer = own[0] if marked else bare
    tokenizer.save(tmp_path)
    built = template(tokenizer, None)
    built.save(tmp_path)
    hf = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    loaded = Template.load(tokenizer, tmp_path)
    assert loaded.source and loaded.text != built.text
    called = [Turn("system", "Help."), Turn("user", "天气?"), Turn("assistant", "", calls=(CALL, CALL)), Turn("tool", "a"),
              Turn("tool", "b"), Turn("assistant", "Sun.", calls=(CALL,)), Turn("tool", "c"), Turn("assistant", "d")]
    tool = {"type": "function", "function": {"name": "f"}}
    for turns, tools, generate in ((TALK, [], False), (TALK[:1], [], True), (called, [tool], False), (called[1:], [tool], False),
                                   ([Turn("system", "s"), *TALK], [], False)):
        pieces = render(built, turns, tools, generate=generate)
        text = "".join(piece.text for piece in pieces)
        asked = {"tools": tools or None, "add_generation_prompt": generate}
        assert hf.apply_chat_template(messages(turns), tokenize=False, **asked) == text
        again = render(loaded, turns, tools, generate=generate)
        assert [one.tolist() for one in encode(again, tokenizer)] == [one.tolist() for one in encode(pieces, tokenizer)]


def test_which_turns_are_learned() -> None:
    turns = [Turn("user", "a"), Turn("assistant", "b", 2.0), Turn("user", "c"), Turn("assistant", "d", spans=((0, 1, 0.0),)),
             Turn("user", "e")]
    assert weighed(turns, "answers") == tuple(turns)
    assert [turn.weight for turn in weighed(turns, "last")] == [0.0, 0.0, 0.0, None, None]
    assert [turn.weight for turn in weighed(turns, "all")] == [1.0, 2.0, 1.0, 1.0, 1.0]


SAID = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PART = SAID | st.sampled_from(
    [*MARKS, "<s>", "</s>", "<", "|im_end|>", " ", "\n", "[", "<think>", "</think>", "\ue000", "{{ 7*7 }}"])
CONTENT = st.lists(PART, min_size=1, max_size=4).map("".join)


@pytest.mark.parametrize("name", [None, *REAL])
@given(said=st.lists(CONTENT, min_size=2, max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nobody_can_say_a_special_token(own: tuple[Tokenizer, Any], name: str | None, said: list[str]) -> None:
    tokenizer, _hf = own
    said = [one if one.strip() else "x" for one in said[:len(said) // 2 * 2]]
    turns = [Turn("assistant" if place % 2 else "user", one) for place, one in enumerate(said)]
    calm = [turn._replace(content="x") for turn in turns]
    given_template = template(tokenizer, REAL[name] if name else None)
    pieces = render(given_template, turns)
    special = np.flatnonzero(tokenizer.special.reserved)
    ids, weights = encode(pieces, tokenizer)
    other, _weights = encode(render(given_template, calm), tokenizer)
    assert ids[np.isin(ids, special)].tolist() == other[np.isin(other, special)].tolist()
    assert (ids == tokenizer.special.bos).sum() <= 1
    assert len(ids) == len(weights)
    for place in range(1, len(turns), 2):
        mine = [piece for piece in pieces if piece.turn == place]
        assert mine[-1].special and mine[-1].weight == 1
        whole = "".join(piece.text for piece in mine if not piece.special)
        assert name == "thinking" or whole.strip() == turns[place].content.strip()   # it leaves earlier thoughts out


@given(said=st.lists(CONTENT, min_size=2, max_size=2))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_marked_text_is_the_text_of_transformers(own: tuple[Tokenizer, Any], said: list[str]) -> None:
    tokenizer, hf = own
    turns = [Turn("user", said[0]), Turn("assistant", said[1])]
    for source in (LLAMA3, QWEN, THINKING):
        try:
            pieces = render(template(tokenizer, source), turns)
        except DataError:
            assert not said[1].strip()                   # an answer of blanks that the template trims away
            continue
        text = hf.apply_chat_template(messages(turns), chat_template=source, tokenize=False)
        assert "".join(piece.text for piece in pieces) == text


def test_without_markers_they_are_text_and_eos_ends_answers(bare: Tokenizer) -> None:
    pieces = render(Template.load(bare), TALK[:2])
    eos = bare.named["eos"]
    assert [piece for piece in pieces if piece.special] == [Piece(eos, 1.0, True, 1)]
    ids, weights = encode(pieces, bare)
    assert bare.decode(ids.tolist()) == (
        f"<|im_start|>user\nHello, who are you?<|im_end|>\n<|im_start|>assistant\nA furnace.{eos}\n")
    assert bare.decode(ids[weights > 0].tolist()) == f"A furnace.{eos}"


def test_weights_of_turns_and_of_characters(own: tuple[Tokenizer, Any]) -> None:
    tokenizer, _hf = own
    turns = [Turn("user", "Q", weight=0.5), Turn("assistant", "no", weight=0.0), Turn("user", "R"),
             Turn("assistant", "wrong right", weight=None, spans=((0, 6, 0.0), (6, 8, 2.0)))]
    for source in (None, CHATML, LLAMA3, QWEN):
        pieces = render(template(tokenizer, source), turns)
        assert [(piece.text, piece.weight) for piece in pieces if piece.turn == 0] == [("Q", 0.5)]
        assert not any(piece.weight for piece in pieces if piece.turn == 1)
        mine = [(piece.text, piece.weight) for piece in pieces if piece.turn == 3]
        assert mine[:3] == [("wrong ", 0.0), ("ri", 2.0), ("ght", 1.0)] and mine[3][1] == 1.0


def test_thoughts_are_learned_where_the_template_keeps_them(own: tuple[Tokenizer, Any]) -> None:
    tokenizer, hf = own
    thought = "<think>\nhm\n</think>\n\n"
    turns = [Turn("user", "a"), Turn("assistant", f"{thought}b"), Turn("user", "c"), Turn("assistant", f"{thought}d")]
    pieces = render(template(tokenizer, THINKING), turns)
    assert "".join(p.text for p in pieces) == hf.apply_chat_template(messages(turns), chat_template=THINKING, tokenize=False)
    assert learned(pieces) == f"b<|im_end|>|{thought}d<|im_end|>"
    none = "<think>\n\n</think>\n\n"
    assert learned(render(template(tokenizer, THINKING), [turns[0], Turn("assistant", f"{none}b")])) == f"{none}b<|im_end|>"
    called = [turns[0], Turn("assistant", thought, calls=(CALL,)), Turn("tool", "x"), turns[3]]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京 <|im_end|>"}}\n</tool_call>'
    assert learned(render(template(tokenizer, THINKING), called)) == f"{thought}{call}<|im_end|>|{thought}d<|im_end|>"
    off = render(template(tokenizer, THINKING), turns[:1], generate=True, variables={"enable_thinking": False})
    assert "".join(p.text for p in off).endswith("assistant\n<think>\n\n</think>\n\n")


def test_one_bos_from_the_template_or_the_tokenizer(own: tuple[Tokenizer, Any]) -> None:
    tokenizer, _hf = own
    bos = tokenizer.special.bos
    tokenizer.add_bos = True
    try:
        for source in (None, CHATML, LLAMA3, MISTRAL, "{{ bos_token }}" + LLAMA3):
            ids, weights = encode(render(template(tokenizer, source), TALK), tokenizer)
            assert ids[0] == bos and (ids == bos).sum() == 1 and weights[0] == 0
    finally:
        tokenizer.add_bos = False


def test_a_template_without_ends_gets_eos(own: tuple[Tokenizer, Any]) -> None:
    tokenizer, _hf = own
    source = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    pieces = render(template(tokenizer, source), TALK)
    assert pieces[-1] == Piece(tokenizer.named["eos"], 1.0, True, 3)
    assert learned(pieces).startswith("A furnace.|是的。")


def test_what_a_template_cannot_do(own: tuple[Tokenizer, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _hf = own
    with pytest.raises(Unusable, match="roles must alternate"):
        render(template(tokenizer, MISTRAL), [TALK[0], TALK[0]])
    with pytest.raises(DataError, match="cannot be told"):
        render(template(tokenizer, "{% for m in messages %}{{ m.content | length }} {% endfor %}"), TALK)
    with pytest.raises(DataError, match="line 1"):
        render(template(tokenizer, "{% for %}"), TALK)
    with pytest.raises(SecurityError):
        render(template(tokenizer, "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"), TALK)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    jinja._compiled.cache_clear()
    with pytest.raises(ConfigError, match="extra") as caught:
        render(template(tokenizer, CHATML), TALK)
    assert "danlu[chat]" in str(caught.value)
    render(template(tokenizer, None), TALK)


def test_where_templates_are_found(own: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    tokenizer, _hf = own
    assert Template.load(tokenizer).source is None
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": QWEN}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    found = Template.load(tokenizer, tmp_path)
    assert (found.source, found.with_tools) == (CHATML, QWEN)
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    assert Template.load(tokenizer, tmp_path).source == LLAMA3
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "other", "template": "x"}]}))
    with pytest.raises(DataError, match="default"):
        Template.load(tokenizer, tmp_path)
