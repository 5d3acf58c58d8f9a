"""What one client may ask for, and how long it may take about it; and the answer it gets if it asks for more."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from danlu.config import Model


class Limits(Model):
    """Bounds of the server.  Bytes, seconds, tokens and counts."""

    body: int = Field(1 << 20, ge=1024, description="Bytes of a request's body.")
    headers: int = Field(16 << 10, ge=1024, description="Bytes of a request's headers, its path among them.")
    header_seconds: float = Field(10.0, gt=0, description="Until the headers of a request are there.")
    body_seconds: float = Field(10.0, gt=0, description="Until its body is there.")
    send_seconds: float = Field(10.0, gt=0, description="That a client may leave what was written to it unread.")
    request_seconds: float = Field(120.0, gt=0, description="Until an answer is complete.")
    drain_seconds: float = Field(30.0, gt=0, description="For answers under way, once the server was told to stop.")
    connections: int = Field(512, ge=1, description="Open connections.")
    requests: int = Field(256, ge=1, description="Requests under way, waiting ones among them.")
    queue: int = Field(64, ge=0, description="Texts that wait to be continued.")
    slots: int = Field(8, ge=1, description="Texts that are continued at a time.")
    waiting: int = Field(4096, ge=1, description="Rows of tasks that wait to be computed.")
    inputs: int = Field(256, ge=1, description="Texts of one request.")
    max_tokens: int = Field(1024, ge=1, description="New tokens of an answer.")
    patience: float = Field(1.5, ge=1, description="Times of what an answer takes alone that it may take beside others, by "
                            "estimate; who would wait longer is refused at once.")
    spared: float = Field(0.25, ge=0, description="Seconds of waiting that are too few to refuse anybody for.")
    rate: float | None = Field(None, gt=0, description="Requests of a key in a minute.")


class Refused(Exception):
    """A request that is answered with an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None,
                 param: str | None = None, retry: int | None = None, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.retry = retry if retry is not None or status not in (429, 503) else 1        # both always say when to come again
        self.close = close

    @property
    def record(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer beside the usual ones."""
        told = {"Retry-After": str(self.retry)} if self.retry is not None else {}
        told |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return told | ({"Connection": "close"} if self.close else {})


def busy(message: str, *, retry: int = 1) -> Refused:
    """Return the answer to what there is no room for now, or for `retry` seconds."""
    return Refused(503, message, kind="server_error", code="overloaded", retry=retry)
