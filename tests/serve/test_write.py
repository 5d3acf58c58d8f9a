"""Conversations and completions through OpenAI's own client, against danlu.generate and full forward passes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from danlu.data import chat
from danlu.data.example import Turn
from danlu.generate import endings, generate
from tests.evaluate import small
from tests.serve.at import At, serving

SAID = ["the furnace learns from text", "丹炉 keeps what it reads", "and never lies 炼丹", "<|im_start|>user\nhi<|im_end|>"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.decoder(tmp_path_factory.mktemp("decoder"), SAID)


@pytest.fixture(scope="module")
def at(folder: Path) -> Iterator[At]:
    with serving(folder, limits={"slots": 4}) as found:
        yield found


@pytest.fixture(scope="module")
def client(at: At) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{at.url}/v1", api_key="none", max_retries=0)


def written(at: At, ids: list[int], most: int, **more: Any) -> tuple[list[int], str]:
    one = at.shelf.first
    model: Any = one.subject.model
    new = list(generate(model, ids, max_new_tokens=most, eos=one.ends, **{"temperature": 0.0, **more}))
    return new, one.subject.tokenizer.decode(new, special=False)


def asked(at: At, messages: list[dict[str, str]]) -> list[int]:
    one = at.shelf.first
    turns = [Turn(m["role"], m["content"]) for m in messages]
    ids, _weights = chat.encode(chat.render(one.template, turns, generate=True), one.subject.tokenizer)
    return ids.tolist()


MESSAGES: Any = [{"role": "system", "content": "你是丹炉"}, {"role": "user", "content": "what does the furnace learn?"}]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_greedy_answers_are_those_of_generate(at: At, client: openai.OpenAI) -> None:
    ids = asked(at, MESSAGES)
    new, text = written(at, ids, 24)
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=24)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == ("length" if len(new) == 24 else "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(new))


def test_a_stream_says_the_same(at: At, client: openai.OpenAI) -> None:
    _new, text = written(at, asked(at, MESSAGES), 24)
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=24,
                                                 stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_completions_of_texts_and_of_ids(at: At, client: openai.OpenAI) -> None:
    tokenizer = at.shelf.first.subject.tokenizer
    ids = tokenizer.encode("the furnace").tolist()
    start = [tokenizer.special.bos, *ids] if tokenizer.add_bos else ids
    _new, text = written(at, start, 16)
    one = client.completions.create(model="tiny", prompt="the furnace", temperature=0)
    assert one.choices[0].text == text
    several = client.completions.create(model="tiny", prompt=[start, start[:-1]], temperature=0, max_tokens=9)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[1].text == written(at, start[:-1], 9)[1]
    streamed = client.completions.create(model="tiny", prompt=start, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_more_prompts_than_slots_are_all_answered(at: At, client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=["the", "furnace", "learns", "from", "text"] * 5, temperature=0,
                                      max_tokens=3)
    assert [choice.index for choice in found.choices] == list(range(25))
    assert found.choices[0].text == found.choices[5].text


def test_a_seed_repeats_and_stop_ends(at: At, client: openai.OpenAI) -> None:
    hot: Any = {"model": "tiny", "prompt": "the furnace", "temperature": 1.5, "max_tokens": 20}
    found = [client.completions.create(seed=seed, **hot) for seed in (3, 3, 4)]
    texts = [one.choices[0].text for one in found]
    assert texts[0] == texts[1] != texts[2]
    greedy = client.completions.create(model="tiny", prompt="the furnace", temperature=0, max_tokens=20).choices[0].text
    mark = greedy[len(greedy) // 2:][:2]
    cut = client.completions.create(model="tiny", prompt="the furnace", temperature=0, max_tokens=20, stop=[mark])
    assert cut.choices[0].text == greedy[: greedy.index(mark)]
    assert cut.choices[0].finish_reason == "stop"


def test_echoed_logprobs_are_those_of_a_full_forward(at: At) -> None:
    """As lm-eval's local-completions asks for the likelihood of a text."""
    one = at.shelf.first
    ids = one.subject.tokenizer.encode("the furnace learns from text and keeps 丹炉").tolist()
    answer = httpx.post(f"{at.url}/v1/completions", json={
        "model": "tiny", "prompt": [ids, ids[:5]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True})
    assert answer.status_code == 200, answer.text
    with torch.inference_mode():
        logits = one.subject.model(torch.tensor([ids]))["logits"][0].double()
    logp = torch.log_softmax(logits, -1)
    told = answer.json()["choices"][0]["logprobs"]
    assert told["token_logprobs"][0] is None and len(told["tokens"]) == len(ids) + 1
    for place in range(1, len(ids)):
        assert told["token_logprobs"][place] == pytest.approx(float(logp[place - 1, ids[place]]), abs=1e-4)
        assert max(told["top_logprobs"][place].values()) == pytest.approx(float(logp[place - 1].max()), abs=1e-4)
    only = httpx.post(f"{at.url}/v1/completions", json={"prompt": ids, "max_tokens": 0, "logprobs": 1, "echo": True}).json()
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert only["usage"]["completion_tokens"] == 0


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3)               # type: ignore[arg-type]
    again = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=3).choices           # type: ignore[arg-type]
    again = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=3).choices           # type: ignore[arg-type]


def test_a_schema_that_is_none_is_the_clients_fault(at: At) -> None:
    for path, more in (("completions", {"prompt": "a"}), ("completions", {"prompt": ["a", "b"]}),
                       ("chat/completions", {"messages": MESSAGES})):
        answer = httpx.post(f"{at.url}/v1/{path}", json={"max_tokens": 4, **more, "response_format": {
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}})
        assert answer.status_code == 400, (path, answer.text)


def test_lm_eval_reads_the_likelihoods(at: At) -> None:
    models = pytest.importorskip("lm_eval.models.openai_completions")
    one = at.shelf.first
    ids = one.subject.tokenizer.encode("the furnace learns from text").tolist()
    payload = models.LocalCompletionsAPI._create_payload(type("As", (), {"model": "tiny"})(), [ids])
    outputs = httpx.post(f"{at.url}/v1/completions", json=payload).json()
    (logprob, greedy), = models.LocalCompletionsAPI.parse_logprobs(outputs, [ids], [2])
    with torch.inference_mode():
        logp = torch.log_softmax(one.subject.model(torch.tensor([ids]))["logits"][0].double(), -1)
    assert logprob == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in range(2, len(ids))), abs=1e-3)
    assert greedy == all(int(logp[i - 1].argmax()) == ids[i] for i in range(2, len(ids)))


def test_logprobs_of_a_conversation(at: At, client: openai.OpenAI) -> None:
    ids = asked(at, MESSAGES)
    new, _text = written(at, ids, 5)
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True,
                                            top_logprobs=2)
    with torch.inference_mode():
        logp = torch.log_softmax(at.shelf.first.subject.model(torch.tensor([[*ids, *new]]))["logits"][0].double(), -1)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    for place, one in enumerate(answer.choices[0].logprobs.content):
        assert one.logprob == pytest.approx(float(logp[len(ids) + place - 1, new[place]]), abs=1e-4)
        assert len(one.top_logprobs) == 2


@pytest.mark.parametrize(("more", "said"), [
    ({"messages": []}, "messages"), ({"temperature": 3}, "temperature"), ({"n": 2}, "n"), ({"lerning": 1}, "lerning"),
    ({"max_tokens": -1}, "max_tokens"), ({"top_logprobs": 3}, "top_logprobs"), ({"stop": ["x"] * 17}, "stop"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "image_url"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"seed": 1.5}, "seed"), ({"stream": "yes"}, "stream"),
    ({"max_tokens": 5000}, "5000"), ({"messages": [{"role": "user", "content": "furnace " * 300}]}, "context of 128"),
])
def test_what_cannot_be_done_is_refused_by_name(at: At, more: dict[str, Any], said: str) -> None:
    answer = httpx.post(f"{at.url}/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **more})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in f"{error['message']} {error['param']}"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nonsense", b'{"messages": NaN}', b'{"prompt": "\\ud800"}', b"\xff\xfe",
                                  b"[" * 50000, b'{"prompt": ' + b"9" * 6000 + b"}"])
def test_broken_bodies_are_the_clients_fault(at: At, body: bytes) -> None:
    answer = httpx.post(f"{at.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(f"{at.url}/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


def test_an_answer_obeys_a_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"heat": {"enum": ["low", "high"]}}, "required": ["heat"],
              "additionalProperties": False}
    asked: Any = {"type": "json_schema", "json_schema": {"name": "heat", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES[1:], max_tokens=40, seed=1, response_format=asked)
    assert json.loads(answer.choices[0].message.content or "")["heat"] in ("low", "high")
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=MESSAGES[1:], response_format=broken)


def test_ignored_fields_are_told(at: At) -> None:
    answer = httpx.post(f"{at.url}/v1/completions", json={"prompt": "a", "max_tokens": 1, "user": "me", "store": False})
    assert answer.headers["x-danlu-ignored"] == "user, store"


def test_other_paths_and_methods(at: At) -> None:
    assert httpx.get(f"{at.url}/v1/nothing").status_code == 404
    answer = httpx.get(f"{at.url}/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert json.loads(answer.text)["error"]["code"] == "method_not_allowed"
    assert httpx.get(f"{at.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{at.url}/ready").status_code == 200
    assert "danlu_requests_total" in httpx.get(f"{at.url}/metrics").text
    assert httpx.post(f"{at.url}/v1/embeddings", json={"input": "a"}).json()["error"]["code"] == "wrong_task"
    assert endings(at.shelf.first.template, at.shelf.first.subject.tokenizer) == at.shelf.first.ends
