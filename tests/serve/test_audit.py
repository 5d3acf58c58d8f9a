"""The audit log: every change is seen, nothing that a client said stands in it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from danlu.errors import ConfigError, IncompatibleError
from danlu.serve.audit import Log, check
from tests.evaluate import small
from tests.serve.at import serving


def written(path: Path, number: int = 5) -> list[str]:
    log = Log(path)
    for n in range(number):
        log.write({"event": "request", "n": n})
    log.close()
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def test_a_good_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    lines = written(path)
    found = check(path)
    assert (found.lines, found.broken) == (10, None) and found.last == json.loads(lines[-1])["sha256"]
    assert path.stat().st_mode & 0o077 == 0


def test_two_servers_do_not_write_one_log(tmp_path: Path) -> None:
    first = Log(tmp_path / "audit.jsonl")
    with pytest.raises(ConfigError, match="another server"):
        Log(tmp_path / "audit.jsonl")
    first.close()
    Log(tmp_path / "audit.jsonl").close()


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("how", ["value", "gone", "swapped", "space", "half", "again"])
def test_every_change_is_seen(tmp_path: Path, how: str, number: int) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)
    if how == "value":
        lines[number] = lines[number].replace(f'"n": {number}', '"n": 9')
    elif how == "gone":
        del lines[number]
    elif how == "swapped":
        lines[number], lines[number + 1] = lines[number + 1], lines[number]
    elif how == "half":
        lines[number] = lines[number][:20] + "\n"
    elif how == "again":
        lines.insert(number, lines[number])
    else:
        lines[number] = lines[number].replace('"event": "request"', '"event": "request "')
    path.write_text("".join(lines), encoding="utf-8")
    assert check(path).broken in (number + 1, number + 2)
    with pytest.raises(IncompatibleError):
        Log(path)


def test_the_server_tells_what_was_asked_but_no_text(tmp_path: Path) -> None:
    model = small.decoder(tmp_path, ["the furnace learns from text"] * 20)
    path = tmp_path / "audit.jsonl"
    with serving(model, log=Log(path)) as at:
        httpx.post(f"{at.url}/v1/completions", json={"prompt": "SECRET furnace", "max_tokens": 3, "user": "SECRET"})
        httpx.get(f"{at.url}/SECRET?x=SECRET", headers={"Authorization": "Bearer SECRET"})
        httpx.get(f"{at.url}/health")
    text = path.read_text(encoding="utf-8")
    assert "SECRET" not in text and check(path).broken is None
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["began", "request", "request", "ended"]
    asked = lines[1]
    assert asked["path"] == "/v1/completions" and asked["status"] == 200 and asked["completion_tokens"] <= 3
    assert len(asked["model_sha256"]) == 64 and asked["key"] == "local" and asked["seconds"] > 0
