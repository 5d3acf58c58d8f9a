"""The server beside what it is measured against: `python -m bench.serve classify RUN`, `python -m bench.serve load RUN`.

classify: texts a second in batches of 32 and the median at batch 1 through HTTP, against onnxruntime int8 in this process.
ratio: of the medians and of the texts a second; above 1 the served one is faster.

load: 200 clients, and beside them 50 that send headers a byte at a time and 50 that send bodies of 4 MiB, for a minute.
Normal: what the 200 ask and get (200 OK).  Each asks for the same, about half a second of work (--work): as many new tokens
of one completion, or as many texts to classify, as take that long on this machine.  Each rests a second after an answer and
asks again; if it is refused it comes again when Retry-After says.  Seconds count from the first byte of a request to the last
of its answer.
Unloaded: one such client, without rest, for ten seconds before the crowd comes.  p99_ratio: normal p99 over unloaded p99;
p99_over_p50_alone: over the unloaded median.  Refusals are no part of p99: they are counted by status, and those without
Retry-After.  Clients run in processes of their own (bench/crowd.py), on the machine's same cores.
Memory: the largest of the first and of the last quarter of the minute.  Stopped: how long after four clients went away
nothing is computed for them any more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

TEXTS = ["a gripping film with a fine cast and a story that never lets go", "dull",
         "the second half is far too long , and it shows",
         "warm , funny and , in the end , quite moving", "i have seen worse , but not this year"]


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


def crowd(kind: str, url: str, request: tuple[str, dict[str, Any]], *, clients: int, seconds: float, pause: float = 0.0
          ) -> subprocess.Popen[str]:
    """Start a process of clients that ask for `request` (path and body)."""
    at = httpx.URL(url)
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(f"/v1/{request[0]}\n".encode() + json.dumps(request[1]).encode())
    return subprocess.Popen([sys.executable, "-m", "bench.crowd", kind, f"{at.host}:{at.port}", str(clients), str(seconds),
                             file.name, str(pause)], stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a process of clients saw."""
    said, _none = process.communicate()
    return dict(json.loads(said))


def told(seen: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return counts and times of answers."""
    ordered = sorted(seen["seconds"]) or [float("nan")]
    refused = sum(count for status, count in seen["statuses"].items() if status in ("429", "503"))
    return {"statuses": seen["statuses"], "refused_without_retry_after": refused - seen["told_when"], "lost": seen["lost"],
            "answers_per_second": len(seen["seconds"]) / seconds, "p50": statistics.median(ordered),
            "p99": ordered[math.ceil(0.99 * len(ordered)) - 1]}


def resident(pid: int) -> float:
    """Return MiB of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def meter(url: str, name: str) -> float:
    """Return a number of the server's /metrics."""
    lines = httpx.get(url.removesuffix("/v1") + "/metrics", timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def sized(url: str, work: float) -> tuple[str, dict[str, Any]]:
    """Return the request that takes about `work` seconds alone: new tokens, or texts, doubled until it does."""
    model = httpx.get(f"{url}/models").json()["data"][0]
    writes, size = "completions" in model["offers"], 8
    while True:
        body: dict[str, Any] = {"prompt": "The", "max_tokens": size} if writes else {"input": [*TEXTS * 64][:size]}
        path = "completions" if writes else "classify"
        took = []
        for _n in range(3):
            began = time.perf_counter()
            httpx.post(f"{url}/{path}", json=body, timeout=120).raise_for_status()
            took.append(time.perf_counter() - began)
        if min(took) > work or size * 2 > (min(1024, model["context"] - 16) if writes else 256):
            return path, body
        size = min(2 * size, max(size + 1, round(size * 1.2 * work / min(took))))


def stopped(url: str, request: tuple[str, dict[str, Any]]) -> float | None:
    """Return how many seconds after four clients went away nothing is computed for them; None: they were done before."""
    path, body = request
    gauge = "danlu_texts_running" if path == "completions" else "danlu_rows_waiting"
    large = json.dumps(body | ({"max_tokens": 4 * body["max_tokens"], "stream": True} if path == "completions" else {
        "input": [*TEXTS * 64][:256]})).encode()
    at = httpx.URL(url)
    sockets = []
    for _n in range(4):
        one = socket.create_connection((at.host, at.port or 80))
        one.sendall(b"POST /v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                    % (path.encode(), len(large)) + large)
        sockets.append(one)
    until = time.perf_counter() + 10
    while meter(url, gauge) == 0:
        if time.perf_counter() > until:
            return None
    for one in sockets:
        one.close()
    began = time.perf_counter()
    while meter(url, gauge) > 0:
        time.sleep(0.01)
    return time.perf_counter() - began


def load(run: Path, *, seconds: float, clients: int, hostile: int, work: float, options: list[str]) -> dict[str, Any]:
    """Return what a crowd of clients got, beside one alone."""
    with server(run, "--max-tokens", "4096", *options) as (url, pid):
        request = sized(url, work)
        alone = told(ended(crowd("ok", url, request, clients=1, seconds=min(10, seconds))), min(10, seconds))
        crowds = [crowd("ok", url, request, clients=clients, seconds=seconds, pause=1.0),
                  *(crowd(kind, url, request, clients=hostile, seconds=seconds) for kind in ("slow", "greedy"))]
        memory, until = list[float](), time.perf_counter() + seconds
        while time.perf_counter() < until:
            memory.append(resident(pid))
            time.sleep(0.5)
        good, mute, large = (ended(one) for one in crowds)
        together = told(good, seconds)
        quarter = max(1, len(memory) // 4)
        return {"request": request if "prompt" in request[1] else [request[0], {"input": f"{len(request[1]['input'])} texts"}],
                "alone": alone, "together": together, "slow": mute["statuses"], "greedy": large["statuses"],
                "p99_ratio": together["p99"] / alone["p99"], "p99_over_p50_alone": together["p99"] / alone["p50"],
                "memory_mib": {name: round(max(part), 1) for name, part in (("first_quarter", memory[:quarter]),
                                                                            ("last_quarter", memory[-quarter:]))},
                "stopped_after_seconds": stopped(url, request), "loadavg": os.getloadavg()[0]}


def classify(run: Path, *, seconds: float, onnx: Path | None) -> dict[str, Any]:
    """Return texts a second and the median of the served classifier, beside those of int8 in onnxruntime in this process.

    Two folders are served one after the other: what `danlu quantize --method dynamic` and what `danlu export --to onnx
    --quantize int8` make of `run`, in a scratch folder; the second is what onnxruntime computes here, too.  onnx: the second,
    if it is there already.
    """
    batch = [TEXTS[n % len(TEXTS)] for n in range(32)]
    with tempfile.TemporaryDirectory() as scratch:
        dynamic, made = Path(scratch) / "dynamic", onnx or Path(scratch) / "onnx"
        exports = [["export", str(run), "--to", "onnx", "--quantize", "int8", "--out", str(made)]] if onnx is None else []
        for words in (["quantize", str(run), "--method", "dynamic", "--out", str(dynamic)], *exports):
            subprocess.run([sys.executable, "-m", "danlu", *words], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = {}
        for name, folder in (("served", dynamic), ("served_onnx", made)):
            with server(folder) as (url, _pid):
                one, many = (told(ended(crowd("ok", url, ("classify", {"input": given}), clients=clients, seconds=seconds)),
                                  seconds) for given, clients in ((TEXTS[0], 1), (batch, 2)))
            found[name] = {"p50_ms": 1e3 * one["p50"], "texts_per_second": 32 * many["answers_per_second"],
                           "statuses": [one["statuses"], many["statuses"]]}
        theirs = inside(run, next(made.glob("*.onnx")))
        alone, together = timed(lambda: theirs(TEXTS[:1]), seconds)[0], timed(lambda: theirs(batch), seconds)[1]
    for name in list(found):
        found[name]["ratio"] = {"p50": 1e3 * alone / found[name]["p50_ms"],
                                "texts_per_second": found[name]["texts_per_second"] * together / 32}
    return found | {"onnxruntime": {"p50_ms": 1e3 * alone, "texts_per_second": 32 / together}, "loadavg": os.getloadavg()[0]}


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
    parser.add_argument("--hostile", type=int, default=50, help="slow ones, and as many greedy ones")
    parser.add_argument("--work", type=float, default=0.5, help="seconds that a request takes alone")
    parser.add_argument("--option", action="append", default=[], help="of danlu serve, as --option=--slots=4")
    parser.add_argument("--onnx", type=Path, help="folder of the same classifier as int8 ONNX")
    given = parser.parse_args()
    found = load(given.run, seconds=given.seconds, clients=given.clients, hostile=given.hostile, work=given.work,
                 options=given.option) if given.what == "load" else \
        classify(given.run, seconds=given.seconds, onnx=given.onnx)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
