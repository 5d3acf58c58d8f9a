"""What every request passes first: Host and Origin, key, rate, size and speed of its body; and what every answer gets.

Plain ASGI, outermost.  Nothing behind it runs for a request that is refused here.
"""

from __future__ import annotations

import asyncio
import http.cookies
import ipaddress
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from danlu.files import canonical
from danlu.serve.audit import Log
from danlu.serve.keys import Keys, Rate, Sessions
from danlu.serve.limits import Limits, Refused, busy
from danlu.serve.meters import Meters
from danlu.words import _

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::(\d{1,5}))?")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
OPEN = frozenset({"/health", "/ready"})                  # say nothing that is worth a key
DRAINING = OPEN | {"/metrics"}                           # still answered while the server ends
SWALLOWED, SWALLOW_SECONDS = 8 << 20, 2.0                # of bodies that are too large, so that their senders read the refusal, …
REFILL = 1 << 19                                         # … and bytes a second after that: others are closed on, and cost nothing
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"),
           (b"x-frame-options", b"DENY"), (b"cross-origin-resource-policy", b"same-origin"),
           (b"content-security-policy",
            b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
            b"form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"))


class Gone(Exception):
    """The client went away."""


class Door:
    """Lets requests in to `app`, or not.

    hosts: names that the Host header may have.  sessions: of the page; None: there is none.  paths: those that the meters
    know by name.
    """

    def __init__(self, app: App, *, limits: Limits, keys: Keys, hosts: frozenset[str], meters: Meters, log: Log | None = None,
                 sessions: Sessions | None = None, paths: frozenset[str] = frozenset(), literal: bool = False) -> None:
        self.app, self.limits, self.keys, self.hosts = app, limits, keys, hosts
        self.meters, self.log, self.sessions, self.paths = meters, log, sessions, paths
        self.literal = literal                           # whether any address may stand in the Host header
        self.rate = Rate(limits.rate)
        self.under_way, self.draining = 0, False
        self.spare, self.spent = float(SWALLOWED), 0.0   # bytes that may be read and forgotten, as of a time

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        began, told = time.perf_counter(), dict[str, Any]()
        scope.setdefault("state", {})["told"] = told
        answer = _Answer(send)
        told["request"] = answer.id
        try:
            try:
                body = await self._admit(scope, receive, told)
            except Refused as refused:
                self.meters.refused.labels(refused.code or str(refused.status)).inc()
                await answer.refuse(refused)
                return
            self.under_way += 1
            self.meters.under_way.set(self.under_way)
            try:
                await self.app(scope, _replayed(body, receive), answer)
            finally:
                self.under_way -= 1
                self.meters.under_way.set(self.under_way)
        except Gone:
            pass
        finally:
            self._tell(scope, told, answer.status, time.perf_counter() - began)

    async def _admit(self, scope: MutableMapping[str, Any], receive: Receive, told: dict[str, Any]) -> bytes:
        """Return the body of a request that may come in; tell who asks.  Raises Refused or Gone."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope.get("raw_path") or b"")
        if size + len(scope["query_string"]) > self.limits.headers:
            raise Refused(431, _("the headers have more than {n} bytes").format(n=self.limits.headers), close=True)
        self._same_place(headers, scope["scheme"])
        path = scope["path"]
        if self.draining and path not in DRAINING:
            raise Refused(503, _("the server is about to end"), kind="server_error", code="draining", retry=5, close=True)
        if path not in OPEN:
            told["key"] = self._who(scope)
            wait = self.rate.wait(told["key"])
            if wait:
                raise Refused(429, _("more than {n:g} requests a minute").format(n=self.limits.rate), kind="rate_limit_error",
                              code="rate_limit_exceeded", retry=int(wait) + 1)
            if self.under_way >= self.limits.requests:
                raise busy(_("{n} requests are under way; come again later").format(n=self.under_way))
        return await self._body(headers, receive)

    def _same_place(self, headers: list[tuple[bytes, bytes]], scheme: str) -> None:
        """Refuse what a page of another site would send, under our address or under a name that it made lead here."""
        told = [value for name, value in headers if name == b"host"]
        host = told[0].decode("latin-1").lower() if len(told) == 1 else ""
        found = HOST.fullmatch(host)
        if found is None or not (found[1] in self.hosts or (self.literal and _is_address(found[1]))):
            raise Refused(421, _("this server is not called {host!r}").format(host=host[:100]), code="wrong_host")
        origins = [value.decode("latin-1").lower() for name, value in headers if name == b"origin"]
        if any(origin != f"{scheme}://{host}" for origin in origins):
            raise Refused(403, _("pages of another origin may not ask here"), code="wrong_origin")
        sites = [value for name, value in headers if name == b"sec-fetch-site"]
        if any(site not in (b"same-origin", b"none") for site in sites):
            raise Refused(403, _("pages of another origin may not ask here"), code="wrong_origin")

    def _who(self, scope: MutableMapping[str, Any]) -> str:
        """Return who asks: the id of a key, page or local.  Raises Refused."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        path, page = scope["path"], self.sessions is not None and self.sessions.knows(_cookie(headers, Sessions.COOKIE))
        if self.sessions is not None and (path == "/" or path.startswith("/page/")):
            if page or path == "/":                      # / looks at the token itself, and asks for one
                return "page" if page else "nobody"
            raise Refused(403, _("open the page with the address that the server printed when it began"), code="no_session")
        if not self.keys:
            return "page" if page else "local"
        said = [value.decode("latin-1") for name, value in headers if name == b"authorization"]
        kind, _blank, key = said[0].partition(" ") if len(said) == 1 else ("", "", "")
        who = self.keys.who(key.strip()) if kind.lower() == "bearer" else None
        if who is None and page and not said:
            return "page"
        if who is None:
            raise Refused(401, _("the key is wrong") if said else _("a key is needed: Authorization: Bearer KEY"),
                          kind="authentication_error", code="invalid_api_key")
        return who

    async def _body(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes:
        limit, named = self.limits.body, dict(headers)
        if int(named.get(b"content-length", b"0")) > limit:
            if named.get(b"expect", b"").lower() != b"100-continue":
                await self._swallow(receive)
            raise _too_large(limit)
        held = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while (message := await receive())["type"] == "http.request":
                    held += message.get("body", b"")
                    if len(held) > limit:
                        held.clear()
                        await self._swallow(receive)
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return bytes(held)
        except TimeoutError:
            raise Refused(408, _("the body was not there after {n:g} seconds").format(n=self.limits.body_seconds),
                          code="body_too_slow", close=True) from None
        raise Gone

    async def _swallow(self, receive: Receive) -> None:
        """Read and forget a body, up to a limit: a sender whose connection is closed while it writes may not see the answer."""
        now = asyncio.get_running_loop().time()
        self.spare, self.spent = min(float(SWALLOWED), self.spare + REFILL * (now - self.spent)), now
        try:
            async with asyncio.timeout(SWALLOW_SECONDS):
                while self.spare > 0:
                    message = await receive()
                    self.spare -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def _tell(self, scope: MutableMapping[str, Any], told: dict[str, Any], status: int | None, seconds: float) -> None:
        """Count the request, and write it into the audit log if it asked for anything."""
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.meters.requests.labels(path, str(status or 499)).inc()
        self.meters.seconds.labels(path).observe(seconds)
        if self.log is not None and path not in (*OPEN, "/metrics"):
            self.log.write({"event": "request", "path": path, "method": scope["method"][:16], "status": status or 499,
                            "seconds": round(seconds, 4), **told})


class _Answer:
    """Sends an answer with the headers that each gets, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self.send, self.id = send, secrets.token_hex(8)
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {name for name, _value in message["headers"]}
            message["headers"] = [*message["headers"], *(pair for pair in HEADERS if pair[0] not in own),
                                  (b"x-request-id", self.id.encode())]
        await self.send(message)

    async def refuse(self, refused: Refused) -> None:
        body = canonical(refused.record)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
        await self({"type": "http.response.start", "status": refused.status,
                    "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()]})
        await self({"type": "http.response.body", "body": body})


def _too_large(limit: int) -> Refused:
    return Refused(413, _("the body has more than {n} bytes").format(n=limit), code="body_too_large", close=True)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return what gives the body that was read, and then what comes after it."""
    held = [body]

    async def again() -> Message:
        if held:
            return {"type": "http.request", "body": held.pop(), "more_body": False}
        return await receive()

    return again


def _cookie(headers: list[tuple[bytes, bytes]], name: str) -> str:
    jar: http.cookies.SimpleCookie = http.cookies.SimpleCookie()
    try:
        for key, value in headers:
            if key == b"cookie":
                jar.load(value.decode("latin-1"))
    except http.cookies.CookieError:
        return ""
    return jar[name].value if name in jar else ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
