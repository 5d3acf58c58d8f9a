"""Who is let in: keys, names and origins, sizes and speeds; what happens to the work of a client that goes away."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from danlu.errors import ConfigError, SecurityError
from danlu.serve import keys
from danlu.serve.keys import Sessions
from tests.evaluate import small
from tests.serve.at import At, serving, until

SAID = ["the furnace learns from text", "丹炉 keeps what it reads", "and never lies 炼丹"] * 20
KEY = "k3Jx9mQ2vT7pL5sW8zR1aB4c"
QUICK = {"header_seconds": 1.0, "body_seconds": 1.0, "send_seconds": 1.0, "slots": 2, "queue": 2, "max_tokens": 4096,
         "connections": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a long context, so that an answer takes seconds."""
    return small.decoder(tmp_path_factory.mktemp("decoder"), SAID, context=4096)


@pytest.fixture(scope="module")
def at(folder: Path) -> Iterator[At]:
    with serving(folder, limits=QUICK) as found:
        yield found


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[At]:
    with serving(folder, keys=(KEY, KEY[::-1]), limits=QUICK, sessions=Sessions()) as found:
        yield found


def raw(at: At, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes back for bytes, until the server closes or says nothing more."""
    with socket.create_connection(("127.0.0.1", at.port), timeout=seconds) as sock:
        sock.sendall(data)
        found = b""
        try:
            while part := sock.recv(65536):
                found += part
                if b"\r\n\r\n" in found and b"chunked" not in found:
                    break
        except TimeoutError:
            pass
        return found


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


LONG: dict[str, Any] = {"prompt": "the furnace", "max_tokens": 3000, "temperature": 1.0, "seed": 1}


# ------------------------------------------------------------------------------------------------------------ who may ask

@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "a/health?", "localhost@evil", "", "127.0.0.1:x",
                                  "127.0.0.1:8000, evil"])
def test_other_names_are_not_answered(at: At, host: str) -> None:
    answer = raw(at, f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert status(answer) in (400, 421)
    assert b'"status"' not in answer


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "https://127.0.0.1"},
                                     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}])
def test_pages_of_other_origins_are_not_answered(at: At, headers: dict[str, str]) -> None:
    assert httpx.get(f"{at.url}/v1/models", headers=headers).status_code == 403
    assert httpx.get(f"{at.url}/v1/models", headers={"Origin": at.url, "Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_no_answer_allows_other_origins(at: At) -> None:
    answer = httpx.get(f"{at.url}/v1/models")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"},
                                     {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer"}, {"X-Api-Key": KEY}])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_without_a_key_nothing_is_told(locked: At, headers: dict[str, str], path: str) -> None:
    answer = httpx.get(f"{locked.url}{path}?key={KEY}&api_key={KEY}", headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_each_key_opens(locked: At) -> None:
    for key in (KEY, KEY[::-1]):
        assert httpx.get(f"{locked.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert httpx.get(f"{locked.url}/health").status_code == 200


def test_keys_are_kept_as_hashes_and_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    held, calls = keys.Keys((KEY, KEY[::-1], "x" * 30)), []
    assert KEY not in repr(vars(held))
    real = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: calls.append(1) or real(a, b))
    assert held.who(KEY) is not None and len(calls) == 3


@pytest.mark.parametrize(("text", "mode", "error"), [
    (KEY, 0o644, SecurityError), (KEY, 0o602, SecurityError), ("short", 0o600, SecurityError), ("a" * 40, 0o600, SecurityError),
    ("# none\n\n", 0o600, SecurityError), (None, 0o600, ConfigError)])
def test_key_files_that_protect_nothing(tmp_path: Path, text: str | None, mode: int, error: type[Exception]) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text + "\n", encoding="utf-8")
        path.chmod(mode)
    with pytest.raises(error):
        keys.read(path)


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# mine\n{KEY}\n\n{KEY[::-1]}\n", encoding="utf-8")
    path.chmod(0o600)
    assert keys.read(path).who(KEY) and keys.read(path).who(KEY[::-1]) and not keys.read(path).who("# mine")


def test_the_page_opens_once_with_its_token(locked: At) -> None:
    token = locked.door.sessions.fresh()
    with httpx.Client(base_url=locked.url) as browser:
        assert browser.get("/").status_code == 403
        assert browser.get("/?token=wrong").status_code == 403
        entered = browser.get(f"/?token={token}")
        assert entered.status_code == 303 and "HttpOnly" in entered.headers["set-cookie"]
        assert "SameSite=strict" in entered.headers["set-cookie"]
        page = browser.get("/", headers={"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.5"})
        assert 'lang="zh-CN"' in page.text and "发送" in page.text and "{" not in page.text
        assert 'lang="en"' in browser.get("/", headers={"Accept-Language": "de, en;q=0.4"}).text
        assert browser.get("/page/file/page.js").headers["content-type"].startswith("text/javascript")
        assert browser.get("/page/file/..%2f..%2fkeys.py").status_code == 404
        assert browser.get("/v1/models").status_code == 200                      # the session stands for a key
        assert browser.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    assert httpx.get(f"{locked.url}/?token={token}").status_code == 403          # used up
    assert httpx.get(f"{locked.url}/page/file/page.js").status_code == 403


def test_a_key_asks_so_often_and_no_more(folder: Path) -> None:
    with serving(folder, keys=(KEY, KEY[::-1]), limits={"rate": 5}) as at:
        mine, other = ({"Authorization": f"Bearer {key}"} for key in (KEY, KEY[::-1]))
        found = [httpx.get(f"{at.url}/v1/models", headers=mine) for _n in range(8)]
        assert [one.status_code for one in found] == [200] * 5 + [429] * 3
        assert 1 <= int(found[-1].headers["retry-after"]) <= 13
        assert httpx.get(f"{at.url}/v1/models", headers=other).status_code == 200


# ------------------------------------------------------------------------------------------------------- sizes and speeds

def test_bodies_that_are_too_large(at: At) -> None:
    body = b'{"prompt": "' + b"a" * (3 << 20) + b'"}'
    assert httpx.post(f"{at.url}/v1/completions", content=body, headers={"Content-Type": "application/json"}).status_code == 413

    def parts() -> Iterator[bytes]:
        for _n in range(48):
            yield b"a" * 65536

    assert httpx.post(f"{at.url}/v1/completions", content=parts()).status_code == 413
    waits = raw(at, b"POST /v1/tag HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
    assert status(waits) == 413


@pytest.mark.parametrize("size", [20_000, 300_000])
def test_headers_that_are_too_large(at: At, size: int) -> None:
    answer = raw(at, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * size + b"\r\n\r\n")
    assert status(answer) in (400, 431)


@pytest.mark.parametrize("begun", [
    b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_clients_that_do_not_go_on_are_let_go(at: At, begun: bytes) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", at.port), timeout=10) as sock:
        sock.sendall(begun)
        found = b""
        try:
            while part := sock.recv(65536):
                found += part
        except ConnectionResetError:
            pass
    assert time.monotonic() - began < 4
    assert not found or status(found) == 408


def test_a_header_every_now_and_then_is_let_go_too(at: At) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", at.port), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(OSError):
            for _n in range(60):
                time.sleep(0.1)
                sock.sendall(b"X: 1\r\n")
    assert time.monotonic() - began < 4


def test_mute_connections_make_room(at: At) -> None:
    """More of them than there may be connections: one that asks properly is answered at once."""
    mute = []
    try:
        for _n in range(QUICK["connections"] + 20):                             # type: ignore[operator]
            mute.append(socket.create_connection(("127.0.0.1", at.port)))
        began = time.monotonic()
        assert httpx.get(f"{at.url}/health").status_code == 200
        assert time.monotonic() - began < 1
    finally:
        for one in mute:
            one.close()


def test_lies_about_the_length(at: At) -> None:
    lie = raw(at, b"POST /v1/tag HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
              b'{"prompt": "x"}')
    assert status(lie) == 400
    assert status(raw(at, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n")) == 400
    both = raw(at, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}")
    assert status(both) == 400


# --------------------------------------------------------------------------------------------- work nobody waits for, drain

def under_way(at: At) -> int:
    return int(at.door.under_way)


def test_too_many_are_told_to_come_again(at: At) -> None:
    statuses, heads = [], []

    def ask() -> None:
        answer = httpx.post(f"{at.url}/v1/completions", json=LONG | {"max_tokens": 200}, timeout=60)
        statuses.append(answer.status_code)
        heads.append(answer.headers.get("retry-after"))

    threads = [threading.Thread(target=ask) for _n in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert set(statuses) == {200, 503}
    assert all((code == 503) == (head is not None) for code, head in zip(statuses, heads, strict=True))


@pytest.mark.parametrize("stream", [True, False])
def test_the_work_of_a_client_that_went_away_ends(at: At, stream: bool) -> None:
    before = at.meter("danlu_cancelled_total")
    body = json.dumps(LONG | {"stream": stream}).encode()
    sock = socket.create_connection(("127.0.0.1", at.port))
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: under_way(at) == 1)
    if stream:
        assert b"200 OK" in sock.recv(4096)
    sock.close()
    assert until(lambda: under_way(at) == 0) < 1
    assert at.meter("danlu_cancelled_total") == before + 1
    assert until(lambda: idle(at)) < 1                                          # the slot is free, too


def idle(at: At) -> bool:
    found = httpx.post(f"{at.url}/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1})
    return found.status_code == 200


def test_a_client_that_does_not_read_holds_up_nobody(at: At) -> None:
    body = json.dumps(LONG | {"stream": True, "logprobs": 20}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", at.port))
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: under_way(at) == 1)
    began = time.monotonic()
    assert httpx.post(f"{at.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert time.monotonic() - began < 2
    until(lambda: under_way(at) == 0, 60)
    sock.close()


def test_an_answer_that_takes_too_long_ends(folder: Path) -> None:
    with serving(folder, limits={"request_seconds": 0.5, "max_tokens": 4096}) as at:
        answer = httpx.post(f"{at.url}/v1/completions", json=LONG)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        with httpx.stream("POST", f"{at.url}/v1/completions", json=LONG | {"stream": True}) as streamed:
            text = streamed.read().decode()
        assert '"code": "timeout"' in text and text.endswith("data: [DONE]\n\n")


def test_what_is_under_way_is_answered_before_the_end(folder: Path) -> None:
    answers: list[httpx.Response] = []
    with serving(folder, limits={"drain_seconds": 30, "max_tokens": 4096}) as at:
        asking = threading.Thread(target=lambda: answers.append(httpx.post(
            f"{at.url}/v1/completions", json=LONG | {"max_tokens": 400}, timeout=60)))
        asking.start()
        until(lambda: under_way(at) == 1)
        at.server.end()
        until(lambda: at.door.draining)
        ready = httpx.get(f"{at.url}/ready")
        assert ready.status_code == 503 and ready.headers["retry-after"]
        refused = httpx.post(f"{at.url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] > 0


def test_answers_wait_for_no_acknowledgement(folder: Path) -> None:
    """An answer of two packets on a connection that is kept: without TCP_NODELAY the second waits 40 ms for an ACK."""
    with serving(folder) as at, socket.create_connection(("127.0.0.1", at.port)) as one:
        took = []
        for _n in range(20):
            began = time.perf_counter()
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while not said.endswith(b'"ok"}'):
                said += one.recv(4096)
            took.append(time.perf_counter() - began)
        assert min(took[10:]) < 0.03
