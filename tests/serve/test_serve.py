"""`danlu serve` as a process: what it says, what it refuses, how it ends; adapters by name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli import danlu

from danlu import cli
from danlu.adapt import folder as adapters
from danlu.generate import generate
from tests.evaluate import small
from tests.serve.at import serving

SAID = ["the furnace learns from text", "丹炉 keeps what it reads"] * 20
KEY = "k3Jx9mQ2vT7pL5sW8zR1aB4c"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.decoder(tmp_path_factory.mktemp("decoder"), SAID, context=2048)


@contextmanager
def process(*words: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The server, and what it says once it listens."""
    command = [sys.executable, "-m", "danlu", "serve", *map(str, words), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None and running.stderr is not None
            line = running.stdout.readline()
            assert line, running.stderr.read()
            yield running, json.loads(line)
        finally:
            running.kill()


def test_sigterm_lets_answers_finish(folder: Path, tmp_path: Path) -> None:
    with process(folder, "--audit", tmp_path / "audit.jsonl", "--max-tokens", 2000) as (running, told):
        answers: list[httpx.Response] = []
        body = {"prompt": "the furnace", "max_tokens": 500, "seed": 1}
        asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{told['url']}/completions", json=body, timeout=60)))
        page = httpx.get(told["page"])
        asking.start()
        while "danlu_requests_under_way 2.0" not in httpx.get(told["url"].replace("/v1", "/metrics")).text:
            pass
        running.send_signal(signal.SIGTERM)
        asking.join()
        assert running.wait(30) == 143
    assert page.status_code == 303
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] > 10
    checked = danlu("serve", "--check-audit", tmp_path / "audit.jsonl", "--json")
    assert checked.code == 0 and json.loads(checked.out)["broken"] is None
    lines = (tmp_path / "audit.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "audit.jsonl").write_text("".join([lines[0].replace("began", "begun"), *lines[1:]]))
    assert danlu("serve", "--check-audit", tmp_path / "audit.jsonl").code == 4


@pytest.mark.parametrize(("words", "code"), [
    (["--host", "0.0.0.0"], 7), (["--host", "::"], 7), (["--key-file", "open"], 7), (["--key-file", "none"], 2),
    (["--slots", "0"], 2), (["--adapter", "x"], 2), (["--adapter", "../x=run"], 2), (["--adapter", "x=model"], 2),
    (["--filter", "nothing"], 2), (["--port", "99999"], 2)])
def test_what_is_refused_at_the_start(folder: Path, tmp_path: Path, words: list[str], code: int,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open").write_text(KEY)
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "model").symlink_to(folder)
    assert cli.main(["serve", str(folder), "--port", "0", *words]) == code


def test_all_addresses_with_a_key(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(KEY)
    path.chmod(0o600)
    with process(folder, "--host", "0.0.0.0", "--key-file", path) as (_running, told):
        assert told["page"] is None
        at = told["url"].replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{at}/models").status_code == 401
        assert httpx.get(f"{at}/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx.get(f"{at}/models", headers={"Authorization": f"Bearer {KEY}", "Host": "evil.example"}).status_code == 421


def test_filters_are_tried_without_a_server(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("evil\n", encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text('{"text": "devil"}\n{"text": "Evil!"}\n', encoding="utf-8")
    ended = danlu("serve", "--filter", tmp_path / "words.txt", "--filter-test", tmp_path / "texts.jsonl", "--json")
    assert ended.code == 0 and json.loads(ended.out)["filters"][0]["false_positives"]["stopped"] == 1


def test_adapters_are_chosen_by_name(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text * 8}) + "\n" for text in SAID), encoding="utf-8")
    runs = {}
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        runs[name] = small.trained(tmp_path / name, folder, [str(data)], objective="causal_lm", adapt={"kind": "lora", "rank": 4},
                                   steps=8, length=32, rows=8, seed=seed, optim={"kind": "adamw", "lr": 3e-2})
    with serving(folder, runs, name="base") as at:
        listed = [one["id"] for one in httpx.get(f"{at.url}/v1/models").json()["data"]]
        assert listed == ["base", "one", "two"]
        ids = at.shelf.first.subject.tokenizer.encode("the furnace").tolist()
        said = {}
        for name in listed:
            asked = {"model": name, "prompt": ids, "temperature": 0, "max_tokens": 12}
            answer = httpx.post(f"{at.url}/v1/completions", json=asked)
            said[name] = answer.json()["choices"][0]["text"]
            one = at.shelf.models[name]
            alone: Any = adapters.load(one.subject.folder).eval()
            new = list(generate(alone, ids, max_new_tokens=12, temperature=0, eos=one.ends))
            assert said[name] == one.subject.tokenizer.decode(new, special=False)
        assert said["base"] != said["one"]
        assert httpx.post(f"{at.url}/v1/completions", json={"model": "three", "prompt": "a"}).status_code == 404


def test_the_page_of_runs_needs_no_model(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text('{"kind": "train", "metrics": {"eval/loss": 1.5}}')
    with process("--runs", tmp_path) as (_running, told):
        at = told["url"].replace("/v1", "")
        with httpx.Client(base_url=at) as browser:
            assert browser.get("/page/runs").status_code == 403
            assert browser.get(told["page"]).status_code == 303
            assert [(one["name"], one["results"]) for one in browser.get("/page/runs").json()["runs"]] == [
                ("one", {"eval/loss": 1.5})]
            assert browser.post("/v1/completions", json={"prompt": "a"}).status_code == 404
            assert browser.get("/openapi.json").status_code == 200
    assert danlu("serve", "--runs", tmp_path, "--no-page").code == 2
    assert danlu("serve", "--runs", tmp_path / "none").code == 2
