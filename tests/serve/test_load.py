"""Slow: what schemathesis makes of the description, and a crowd of good, slow and greedy clients."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.evaluate import small
from tests.serve.at import At, serving
from tests.serve.test_score import HEADS
from tests.serve.test_serve import process

pytestmark = pytest.mark.slow
SAID = ["the furnace learns from text", "丹炉 keeps what it reads"] * 20


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["writer", "tasks"])
def test_schemathesis_finds_nothing(kind: str, tmp_path: Path) -> None:
    """All checks but one: a schema cannot say how long a prompt may be, so that what it allows may still be refused (400)."""
    (tmp_path / "schemathesis.toml").write_text(         # it does not know that 413 refuses, too
        "[checks.negative_data_rejection]\nexpected-statuses = [400, 401, 403, 404, 405, 413, 415]\n", encoding="utf-8")
    with serving(model_of(kind, tmp_path), limits={"max_tokens": 8}) as at:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{at.url}/openapi.json", "--checks", "all",
                   "--exclude-checks", "positive_data_acceptance", "--max-examples", "60", "--seed", "1", "--workers", "1"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path)
        assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
        assert httpx.get(f"{at.url}/health").status_code == 200


def model_of(kind: str, folder: Path) -> Path:
    if kind == "writer":
        return small.decoder(folder, SAID)
    from danlu.models import weights
    from danlu.models.build import build
    from danlu.models.encoder import Encoder

    start = small.encoder(folder)
    many = Encoder.model_validate(weights.read_config(start).model_dump() | {"tasks": HEADS})
    weights.save(folder / "many", build(many, "cpu").init(3), tokenizer=folder / "tokenizer")
    return folder / "many"


async def good(at: At, until: float, found: list[tuple[int, float, bool]]) -> None:
    async with httpx.AsyncClient(base_url=at.url, timeout=60) as client:
        while time.monotonic() < until:
            began = time.monotonic()
            answer = await client.post("/v1/completions", json={"prompt": "the furnace", "max_tokens": 4})
            found.append((answer.status_code, time.monotonic() - began, "retry-after" in answer.headers))
            await asyncio.sleep(0.2 if answer.status_code == 200 else 1.0)


async def slow(at: At, until: float) -> None:
    """Sends its headers byte by byte, again and again."""
    while time.monotonic() < until:
        try:
            _reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
            for byte in b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" * 10:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
                if time.monotonic() > until:
                    break
            writer.close()
        except OSError:
            await asyncio.sleep(0.1)


async def greedy(at: At, until: float, codes: Counter[int]) -> None:
    async with httpx.AsyncClient(base_url=at.url, timeout=60) as client:
        while time.monotonic() < until:
            try:
                answer = await client.post("/v1/completions", content=b"x" * (4 << 20))
                codes[answer.status_code] += 1
            except httpx.TransportError:
                codes[0] += 1
            await asyncio.sleep(0.5)


def test_a_crowd(tmp_path: Path) -> None:
    codes: Counter[int] = Counter()
    found: list[tuple[int, float, bool]] = []

    async def crowd(at: At, seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(good(at, until, found) for _n in range(60)), *(slow(at, until) for _n in range(20)),
                             *(greedy(at, until, codes) for _n in range(20)))

    with process(small.decoder(tmp_path, SAID), "--name", "tiny") as (running, told):
        at = At(int(httpx.URL(told["url"]).port or 0), None, None, None)        # type: ignore[arg-type]
        asyncio.run(crowd(at, 4))                        # memory that is kept for good is taken now
        before = resident(running.pid)
        found.clear()
        codes.clear()
        asyncio.run(crowd(at, 8))
        grown = resident(running.pid) - before
        assert httpx.post(f"{at.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    statuses = Counter(status for status, _seconds, _retry in found)
    assert set(statuses) <= {200, 429, 503} and statuses[200] > 50, statuses
    assert all(retry for status, _seconds, retry in found if status in (429, 503))
    assert set(codes) <= {413, 0, 503}, codes
    assert grown < 32 << 20, json.dumps({"grown": grown})
