"""The server beside what it is measured against: `python -m bench.serve classify RUN`, `python -m bench.serve load RUN`.

classify: texts a second and the median at batch 1 through HTTP, against the same model in onnxruntime int8 in this process.
load: 200 clients with 50 slow and 50 greedy ones for a minute; p99 against that of one client alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

TEXTS = ["a gripping film with a fine cast and a story that never lets go", "dull",
         "the second half is far too long , and it shows",
         "warm , funny and , in the end , quite moving", "i have seen worse , but not this year"]
BODY = b"x" * (4 << 20)


@contextmanager
def server(run: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Start `danlu serve` and yield its address and process id."""
    command = [sys.executable, "-m", "danlu", "serve", str(run), "--port", "0", "--json", "--name", "it", "--no-page", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            yield json.loads(running.stdout.readline())["url"], running.pid
        finally:
            running.terminate()


async def asked(url: str, path: str, body: dict[str, Any], *, clients: int, seconds: float, pause: float = 0.0) -> dict[str, Any]:
    """Return counts and seconds of what so many clients got."""
    statuses, times = Counter[int](), list[float]()
    until = time.perf_counter() + seconds

    async def one(client: httpx.AsyncClient) -> None:
        while time.perf_counter() < until:
            began = time.perf_counter()
            answer = await client.post(f"{url}/{path}", json=body)
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                times.append(time.perf_counter() - began)
            await asyncio.sleep(pause if answer.status_code == 200 else float(answer.headers.get("retry-after", 1)))

    most = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=120, limits=most) as client:        # one, because each makes a TLS context of its own
        await asyncio.gather(*(one(client) for _n in range(clients)))
    ordered = sorted(times) or [float("nan")]
    return {"statuses": dict(statuses), "answers": len(times), "p50": statistics.median(ordered),
            "p99": ordered[int(0.99 * (len(ordered) - 1))]}


async def slow(url: str, seconds: float) -> None:
    """Send headers a byte at a time."""
    at, until = httpx.URL(url), time.perf_counter() + seconds
    while time.perf_counter() < until:
        try:
            _reader, writer = await asyncio.open_connection(at.host, at.port)
            for byte in b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" * 10:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.2)
                if time.perf_counter() > until:
                    break
            writer.close()
        except OSError:
            await asyncio.sleep(0.5)


async def greedy(url: str, seconds: float) -> None:
    """Send bodies that are too large."""
    until = time.perf_counter() + seconds
    async with httpx.AsyncClient(timeout=60) as client:
        while time.perf_counter() < until:
            with suppress(httpx.TransportError):
                await client.post(f"{url}/completions", content=BODY)
            await asyncio.sleep(1.0)


def resident(pid: int) -> float:
    """Return MiB of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def load(run: Path, *, seconds: float, clients: int) -> dict[str, Any]:
    """Return what a crowd of clients got, beside one alone."""
    chats = "completions"
    with server(run) as (url, pid):
        offers = httpx.get(f"{url}/models").json()["data"][0]["offers"]
        path = chats if chats in offers else "classify"
        body: dict[str, Any] = {"prompt": "The", "max_tokens": 8} if path == chats else {"input": TEXTS[0]}
        alone = asyncio.run(asked(url, path, body, clients=1, seconds=min(10, seconds)))
        before = resident(pid)

        async def crowd() -> dict[str, Any]:
            found, *_rest = await asyncio.gather(
                asked(url, path, body, clients=clients, seconds=seconds, pause=1.0),
                *(slow(url, seconds) for _n in range(50)), *(greedy(url, seconds) for _n in range(50)))
            return found

        together = asyncio.run(crowd())
        return {"alone": alone, "together": together, "p99_ratio": together["p99"] / alone["p99"],
                "memory_mib": [round(before, 1), round(resident(pid), 1)]}


def classify(run: Path, *, seconds: float, onnx: Path | None) -> dict[str, Any]:
    """Return texts a second and the median of the served classifier, and of an int8 ONNX file of it if there is one."""
    with server(run) as (url, _pid):
        one = asyncio.run(asked(url, "classify", {"input": TEXTS[0]}, clients=1, seconds=seconds))
        batch = [TEXTS[n % len(TEXTS)] for n in range(32)]
        many = asyncio.run(asked(url, "classify", {"input": batch}, clients=2, seconds=seconds))
    found: dict[str, Any] = {"served": {"p50_ms": 1e3 * one["p50"], "texts_per_second": 32 * many["answers"] / seconds}}
    if onnx is not None:
        theirs = inside(run, onnx)
        found["onnxruntime"] = {"p50_ms": 1e3 * timed(lambda: theirs(TEXTS[:1]), seconds)[0],
                                "texts_per_second": 32 / timed(lambda: theirs(batch), seconds)[1]}
        found["ratio"] = found["served"]["texts_per_second"] / found["onnxruntime"]["texts_per_second"]
    return found


def inside(run: Path, path: Path) -> Callable[[list[str]], Any]:
    """Return what computes texts by an ONNX file in this process, tokenising as the server does."""
    import numpy as np
    import onnxruntime

    from danlu.evaluate.subject import open_subject

    session, tokenizer = onnxruntime.InferenceSession(str(path)), open_subject(run).tokenizer
    names = [one.name for one in session.get_inputs()]

    def compute(texts: list[str]) -> Any:
        rows = [tokenizer.together([ids])[0] for ids in tokenizer.encode_batch(texts)]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        known = {"input_ids": ids, "ids": ids, "attention_mask": mask, "mask": mask, "token_type_ids": np.zeros_like(ids)}
        return session.run(None, {name: known[name] for name in names})

    return compute


def timed(work: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Return median and mean seconds of a call."""
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times), statistics.fmean(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["classify", "load"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--onnx", type=Path, help="int8 ONNX file of the same classifier")
    given = parser.parse_args()
    found = load(given.run, seconds=given.seconds, clients=given.clients) if given.what == "load" else \
        classify(given.run, seconds=given.seconds, onnx=given.onnx)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
