"""Connections and the life of the server: deadlines that uvicorn has not, an orderly end at SIGTERM."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from danlu.errors import ConfigError
from danlu.serve.limits import Limits
from danlu.words import _

NOTICE = 1.0                                             # seconds in which /ready says 503, at least, before the port closes
FULL = (b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
        b'{"error":{"message":"too many connections","type":"server_error","param":null,"code":"overloaded"}}')


class Bounded(H11Protocol):
    """Ends connections whose headers do not come, and those whose client does not read."""

    limits = Limits()
    unheard: asyncio.TimerHandle | None = None       # since the first byte of headers, or the beginning
    unread: asyncio.TimerHandle | None = None        # since there is no more room for what is written

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and not self._made_room():
            transport.write(FULL)
            transport.close()
            return
        self.unheard = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _made_room(self) -> bool:
        """End the connection that has waited longest for its headers; those who ask properly are served."""
        mute: list[Any] = [one for one in self.connections if one is not self and getattr(one, "unheard", None) is not None]
        if not mute:
            return False
        min(mute, key=lambda one: one.unheard.when()).transport.abort()
        return True

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if not waits and self.unheard is not None:
            self.unheard.cancel()
            self.unheard = None
        elif waits and self.unheard is None:
            self.unheard = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _too_slow(self) -> None:
        self.unheard = None
        if not self.transport.is_closing():
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(self.limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():   # closing waits for a client that does not read
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.unheard, self.unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        if self.unread is not None:
            self.unread.cancel()


def protocol(limits: Limits) -> type[Bounded]:
    """Return it with these limits: a class, because uvicorn makes one object of it for each connection."""
    return type("Limited", (Bounded,), {"limits": limits})


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on host and port (0: a free one).  Raises ConfigError."""
    if not 0 <= port < 1 << 16:                          # the resolver would take the rest of a division
        raise ConfigError(_("there is no port {port}").format(port=port), where="--port", fix=_("choose one up to 65535"))
    try:
        family, _kind, _proto, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)     # of proto 0 asyncio does not set TCP_NODELAY, …
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)               # … and every answer waits 40 ms for an ACK
        sock.bind(address)
    except OSError as error:
        raise ConfigError(_("cannot listen on {host}:{port}: {why}").format(host=host, port=port, why=error.strerror or error),
                          where="--host, --port", fix=_("choose another port, or end what listens there")) from None
    return sock


class Server:
    """uvicorn with one app on one socket, until told to end."""

    def __init__(self, app: Any, sock: socket.socket, *, limits: Limits, door: Any, began: Callable[[], None] = lambda: None
                 ) -> None:
        self.limits, self.door, self.sock, self.began = limits, door, sock, began
        self.signal: int | None = None
        cfg = uvicorn.Config(app, http=protocol(limits), ws="none", lifespan="on", loop="asyncio", log_level="error",
                             access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=5,
                             timeout_graceful_shutdown=5, h11_max_incomplete_event_size=limits.headers)
        self.inner = uvicorn.Server(cfg)
        self.inner.handle_exit = self._told               # type: ignore[method-assign, assignment]
        self.loop: asyncio.AbstractEventLoop | None = None
        self.ending: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.sock.getsockname()[1])

    def run(self) -> int | None:
        """Serve until told to end; return the signal that told so.  Call it in the main thread to hear signals."""
        with closing(self.sock):
            asyncio.run(self._run())
        return self.signal

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self.inner.serve(sockets=[self.sock]))
        while not self.inner.started and not serving.done():
            await asyncio.sleep(0.01)
        if self.inner.started:
            self.began()
        await serving

    def _told(self, number: int, frame: Any) -> None:
        if self.signal is not None:                      # the second time: at once
            self.inner.should_exit = self.inner.force_exit = True
        self.signal = number
        self.end()

    def end(self) -> None:
        """Take no new requests, let those under way finish, then stop.  May be called from any thread."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._drain)
        else:
            self.inner.should_exit = True

    def _drain(self) -> None:
        self.door.draining = True
        if self.ending is None:
            self.ending = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        assert self.loop is not None
        since = self.loop.time()
        while self.loop.time() < since + self.limits.drain_seconds:
            if self.door.under_way == 0 and self.loop.time() >= since + NOTICE:
                break
            await asyncio.sleep(0.05)
        self.inner.should_exit = True
