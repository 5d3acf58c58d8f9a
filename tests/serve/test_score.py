"""Tasks over HTTP, against what evaluate/rows gives for each row alone; rows that wait together are computed together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from danlu.decode import Patience
from danlu.evaluate import rows
from danlu.evaluate.subject import open_subject
from danlu.models import weights
from danlu.models.build import build
from danlu.models.encoder import Encoder
from danlu.serve.gather import Gather
from danlu.serve.limits import Refused
from danlu.serve.meters import Meters
from danlu.verbs.predict import said_of
from tests.evaluate import small
from tests.serve.at import CPU, At, serving, until

HEADS = ({"kind": "classify", "name": "mood", "labels": ["bad", "good", "mixed"]},
         {"kind": "classify", "name": "stars", "problem": "regression"},
         {"kind": "tag", "name": "parts", "labels": ["O", "B-X", "I-X"]}, {"kind": "answer", "name": "where"},
         {"kind": "embed", "name": "meaning"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random heads of every kind."""
    home = tmp_path_factory.mktemp("encoder")
    start = small.encoder(home)
    cfg: Any = weights.read_config(start)
    assert isinstance(cfg, Encoder)
    many = Encoder.model_validate(cfg.model_dump() | {"tasks": HEADS})
    weights.save(home / "many", build(many, "cpu").init(3), tokenizer=home / "tokenizer")
    return home / "many"


@pytest.fixture(scope="module")
def at(folder: Path) -> Iterator[At]:
    with serving(folder, limits={"inputs": 40, "waiting": 100}) as found:
        yield found


def post(at: At, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{at.url}/v1/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


TEXTS = [text for text, _label in small.texts(30, 4)]


def test_classes_are_those_of_each_row_alone(at: At, folder: Path) -> None:
    task = rows.task_of(open_subject(folder), rows.How(head="mood"), CPU)
    told = post(at, "classify", input=TEXTS, head="mood", top_k=3)
    for text, one in zip(TEXTS, told["data"], strict=True):
        alone = said_of(task, (text,), top=3)
        assert one["label"] == alone["prediction"]
        assert one["probability"] == pytest.approx(alone["probability"], abs=1e-5)
        assert [top["label"] for top in one["top"]] == [name for name, _chance in alone["top"]]
    assert told["usage"]["prompt_tokens"] > len(TEXTS)
    pair = post(at, "classify", input=[["the film", "was fine"]], head="mood")["data"][0]
    assert pair["probability"] == pytest.approx(said_of(task, ("the film", "was fine"), top=0)["probability"], abs=1e-5)


def test_scores(at: At, folder: Path) -> None:
    task = rows.task_of(open_subject(folder), rows.How(head="stars"), CPU)
    told = post(at, "classify", input="the film was fine", head="stars")
    assert told["data"][0]["score"] == pytest.approx(said_of(task, ("the film was fine",), top=0)["prediction"], abs=1e-5)


def test_a_head_is_named_where_there_are_several(at: At) -> None:
    answer = httpx.post(f"{at.url}/v1/classify", json={"input": "a"})
    assert answer.status_code == 400 and "mood, stars" in answer.json()["error"]["message"]
    assert httpx.post(f"{at.url}/v1/classify", json={"input": "a", "head": "parts"}).status_code == 400
    assert httpx.post(f"{at.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}).status_code == 400


def test_tags_of_words(at: At) -> None:
    told = post(at, "tag", words=["the", "splendid", "film", "电影"])["data"][0]
    assert told["words"] == ["the", "splendid", "film", "电影"]
    assert len(told["tags"]) == len(told["probabilities"]) == 4 and set(told["tags"]) <= {"O", "B-X", "I-X"}
    both = post(at, "tag", words=[["the", "splendid", "film", "电影"], ["a", "story"]])["data"]
    assert both[0]["tags"] == told["tags"] and len(both[1]["tags"]) == 2
    assert both[0]["probabilities"] == pytest.approx(told["probabilities"], abs=1e-5)


def test_answers_stand_in_their_contexts(at: At) -> None:
    context = "the old film with music was splendid"
    told = post(at, "answer", question="what was splendid", context=context)["data"][0]
    assert told["answer"] in context and told["score"] > -1e9
    two = [{"question": "what was splendid", "context": context}, {"question": "who", "context": "a day"}]
    many = post(at, "answer", input=two)
    assert many["data"][0]["answer"] == told["answer"]


def test_vectors_are_the_means_of_the_tokens(at: At, folder: Path) -> None:
    """Through OpenAI's client, which asks for base64; against the model's own forward pass."""
    client = openai.OpenAI(base_url=f"{at.url}/v1", api_key="none")
    found = client.embeddings.create(model="tiny", input=TEXTS[:3])
    subject: Any = open_subject(folder)
    model = subject.model.eval()
    for text, one in zip(TEXTS, found.data, strict=False):
        ids, _parts = subject.tokenizer.together(subject.tokenizer.encode_batch([text]))
        with torch.no_grad():
            out = model(ids=torch.tensor(ids)[None])
        mean = out["meaning"][0].reshape(-1, model.cfg.width)[0].double().numpy()
        assert np.allclose(one.embedding, mean / np.linalg.norm(mean), atol=1e-5)
        assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-5)
    assert post(at, "embeddings", input=TEXTS[0])["data"][0]["embedding"] == pytest.approx(found.data[0].embedding, abs=1e-6)


def test_what_is_too_long_or_too_much(at: At) -> None:
    long = httpx.post(f"{at.url}/v1/classify", json={"input": "film " * 500, "head": "mood"})
    assert long.status_code == 400 and "500 tokens" in long.json()["error"]["message"]
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert httpx.post(f"{at.url}/v1/classify", json={"input": ["a"] * 41, "head": "mood"}).status_code == 400


def test_rows_that_wait_together_are_computed_together(at: At) -> None:
    alone = [post(at, "classify", input=text, head="mood")["data"][0] for text in TEXTS[:24]]
    before, rows_before = at.meter("danlu_batch_rows_count"), at.meter("danlu_batch_rows_sum")
    found: dict[int, dict[str, Any]] = {}

    def ask(number: int) -> None:
        found[number] = post(at, "classify", input=TEXTS[number], head="mood")["data"][0]

    real = rows.answered
    slow, go = threading.Event(), threading.Event()

    def waits(*args: Any, **more: Any) -> Any:
        slow.set()
        go.wait(10)
        return real(*args, **more)

    rows.answered = waits
    try:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for one in threads:
            one.start()
        slow.wait(10)
        first = int(at.meter("danlu_batch_rows_sum") - rows_before)
        until(lambda: at.meter("danlu_rows_waiting") == 24 - first)
        go.set()
        for one in threads:
            one.join()
    finally:
        rows.answered = real
    assert at.meter("danlu_batch_rows_count") == before + 2
    for number, one in enumerate(alone):
        assert found[number]["label"] == one["label"]
        assert found[number]["probability"] == pytest.approx(one["probability"], abs=1e-6)


def test_more_rows_than_may_wait(at: At) -> None:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(httpx.post(
        f"{at.url}/v1/classify", json={"input": TEXTS + TEXTS[:10], "head": "mood"}, timeout=60))) for _n in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert {one.status_code for one in answers} <= {200, 503}
    assert all("retry-after" in one.headers for one in answers if one.status_code == 503)


def test_a_run_is_served_as_it_was_trained(tmp_path: Path) -> None:
    """A classifier out of a run folder: its recipe's length, its policy for long rows, its labels."""
    start = small.encoder(tmp_path)
    data = small.table(tmp_path / "train.csv", ["text", "label"], small.texts(48, 0))
    run = small.trained(tmp_path, start, [str(data)], steps=12)
    task = rows.task_of(open_subject(run), rows.How(), CPU)
    with serving(run, name="mood") as at:
        long = "fine " * 200
        told = post(at, "classify", input=[long, TEXTS[0]], model="mood")["data"]
        assert told[0]["tokens_cut"] > 0 and "tokens_cut" not in told[1]
        assert told[1]["label"] == said_of(task, (TEXTS[0],), top=0)["prediction"]
        assert httpx.get(f"{at.url}/v1/models").json()["data"][0]["heads"][0]["labels"] == ["bad", "good"]


def test_many_who_ask_for_much_are_refused_before_their_texts_are_read() -> None:
    gather = Gather(most=10_000, meters=Meters(), patience=Patience(1.5, 0.1))
    try:
        for _step in range(20):
            gather.pace.saw(1, 64, 64 * 10, 0.5)         # a batch of 64 rows of 10 tokens takes half a second
        with gather.reading(64, 64 * 40) as read:      # 40 characters are about 10 tokens
            with pytest.raises(Refused, match="much longer"), gather.reading(64, 64 * 40):
                raise AssertionError("it was read")
            with gather.reading(1, 40):                  # a short one waits a little longer than it would alone
                pass
            read.found = 64 * 10
        with gather.reading(64, 64 * 40):                # the place is free again
            pass
        with pytest.raises(ZeroDivisionError), gather.reading(64, 64 * 40):
            raise ZeroDivisionError
        assert not gather.read
    finally:
        gather.close()
