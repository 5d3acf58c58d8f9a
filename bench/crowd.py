"""Clients of a server, in a process of their own: `python -m bench.crowd ok|slow|greedy HOST:PORT N SECONDS FILE PAUSE`.

Sockets and no HTTP library, so that it is the server that is measured; 200 of them wait most of the time and cost little.
ok: ask what FILE holds, over and over, and come again when told to.  slow: send headers a byte at a time.  greedy: send bodies of
4 MiB.  Prints JSON: how often each status came, how often 429 and 503 said when to come again, seconds of the answers.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LARGE = 4 << 20
PIECE = b"x" * (64 << 10)


class Plan(NamedTuple):
    """What a client does."""

    host: str
    port: int
    request: bytes
    until: float                                         # of time.perf_counter
    pause: float                                         # seconds after an answer


class Seen:
    """What the clients got."""

    def __init__(self) -> None:
        self.statuses, self.told, self.lost = Counter[int](), 0, 0
        self.seconds: list[float] = []

    def record(self) -> dict[str, object]:
        return {"statuses": dict(self.statuses), "told_when": self.told, "lost": self.lost, "seconds": self.seconds}


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Return status and headers of an answer, its body read."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _colon, value in (line.partition(":") for line in head[1:] if line)}
    await reader.readexactly(int(headers.get("content-length", "0")))
    return int(head[0].split()[1]), headers


async def ok(plan: Plan, seen: Seen) -> None:
    """Ask, wait, ask again, on one connection as long as it lasts."""
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    while time.perf_counter() < plan.until:
        began = time.perf_counter()
        try:
            if streams is None:
                streams = await asyncio.open_connection(plan.host, plan.port)
            streams[1].write(plan.request)
            status, headers = await answer(streams[0])
        except (OSError, asyncio.IncompleteReadError):
            if streams is not None:                      # an idle connection that the server closed: not an answer that was lost
                seen.lost += time.perf_counter() - began > 1
                streams[1].close()
                streams = None
            await asyncio.sleep(0.1)
            continue
        seen.statuses[status] += 1
        seen.told += status in (429, 503) and "retry-after" in headers
        if status == 200:
            seen.seconds.append(time.perf_counter() - began)
        if headers.get("connection", "").lower() == "close":
            streams[1].close()
            streams = None
        wait = plan.pause if status == 200 else float(headers.get("retry-after", 1))
        await asyncio.sleep(min(wait * random.uniform(1.0, 1.2), max(0.0, plan.until - time.perf_counter())))
    if streams is not None:
        streams[1].close()


async def slow(plan: Plan, seen: Seen) -> None:
    """Send headers a byte at a time."""
    while time.perf_counter() < plan.until:
        try:
            _reader, writer = await asyncio.open_connection(plan.host, plan.port)
            for byte in b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" * 10:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.2)
                if time.perf_counter() > plan.until:
                    break
            writer.close()
        except OSError:
            seen.statuses[0] += 1
            await asyncio.sleep(0.5)


async def greedy(plan: Plan, seen: Seen) -> None:
    """Send a body that is too large, as fast as it is taken, and read what comes."""
    while time.perf_counter() < plan.until:
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(plan.host, plan.port)

            async def body(writer: asyncio.StreamWriter = writer) -> None:
                with suppress(OSError):
                    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                                 b"Content-Length: %d\r\n\r\n" % LARGE)
                    for _n in range(LARGE // len(PIECE)):
                        writer.write(PIECE)
                        await writer.drain()

            sending = asyncio.ensure_future(body())
            try:
                status, _headers = await answer(reader)
                seen.statuses[status] += 1
            except (OSError, asyncio.IncompleteReadError):
                seen.statuses[0] += 1                    # closed before it was read
            finally:
                sending.cancel()
                writer.close()
        await asyncio.sleep(min(1.0, max(0.0, plan.until - time.perf_counter())))


KINDS = {"ok": ok, "slow": slow, "greedy": greedy}


async def crowd(kind: str, plan: Plan, *, clients: int, over: float) -> Seen:
    """Return what so many clients saw; they come one by one within `over` seconds."""
    seen = Seen()

    async def one(number: int) -> None:
        await asyncio.sleep(number / clients * over)
        await KINDS[kind](plan, seen)

    await asyncio.gather(*(one(number) for number in range(clients)))
    return seen


def main() -> None:
    kind, at, clients, seconds, file, pause = sys.argv[1:]
    host, _colon, port = at.partition(":")
    path, _blank, body = Path(file).read_bytes().partition(b"\n")            # "/v1/…", then the body
    request = (b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
               % (path, len(body))) + body
    plan = Plan(host, int(port), request, time.perf_counter() + float(seconds), float(pause))
    seen = asyncio.run(crowd(kind, plan, clients=int(clients), over=min(1.0, float(seconds) / 4)))
    print(json.dumps(seen.record()))


if __name__ == "__main__":
    main()
