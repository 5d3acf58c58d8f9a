"""Who may ask: keys of a file, kept as hashes, and the browser session that a one-time token opens."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import stat
import time
from pathlib import Path

from danlu.errors import ConfigError, SecurityError
from danlu.words import _

LEAST = 22                                               # characters of base64 that hold 128 bits
VARIED = 10                                              # different characters in them: aaaa… is no key
OPENS = 8                                                # browsers that may have a session at a time


class Keys:
    """Keys as SHA-256; a text is compared with all of them, and each comparison takes the same time."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self.hashes = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self.hashes)

    def who(self, said: str) -> str | None:
        """Return the id of the key `said`, the beginning of its hash, or None."""
        mine, found = hashlib.sha256(said.encode("utf-8", "surrogateescape")).digest(), None
        for one in self.hashes:                          # no early exit
            if hmac.compare_digest(one, mine):
                found = one.hex()[:12]
        return found


def read(path: Path) -> Keys:
    """Return the keys of a file, one a line; empty lines and those that begin with # do not count.

    Raises SecurityError where others may read or change the file, or a key is shorter than 128 bits can be written.
    """
    try:
        mode, lines = path.stat().st_mode, path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_("the key file cannot be read: {why}").format(why=error), where=str(path)) from None
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        raise SecurityError(_("others may read or change the key file"), where=str(path), fix=f"chmod 600 {path}")
    found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not found:
        raise SecurityError(_("the key file holds no key"), where=str(path), fix=_("make one: {command}").format(
            command=f"openssl rand -hex 32 > {path}"))
    for number, key in enumerate(found, 1):
        if len(key) < LEAST or len(set(key)) < VARIED or not key.isascii() or not key.isprintable() or " " in key:
            raise SecurityError(_("key {n} is easy to guess: a key has at least {least} random characters").format(
                n=number, least=LEAST), where=str(path), fix="openssl rand -hex 32")
    return Keys(tuple(found))


class Sessions:
    """One token, good once, and the browsers that came with one.  A new token is made when one was used up by `fresh`."""

    COOKIE = "danlu_session"

    def __init__(self, *, seconds: float = 12 * 3600) -> None:
        self.seconds = seconds
        self.token: str | None = None
        self.open: dict[bytes, float] = {}               # hash of the cookie: until when

    def fresh(self) -> str:
        """Return a token that opens one session; the one before it is no longer good."""
        self.token = secrets.token_urlsafe(24)
        return self.token

    def enter(self, token: str) -> str | None:
        """Return the cookie of a new session, or None for a token that is wrong or used up."""
        if self.token is None or not hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self.token.encode()):
            return None
        self.token = None
        cookie = secrets.token_urlsafe(24)
        while len(self.open) >= OPENS:
            del self.open[next(iter(self.open))]
        self.open[hashlib.sha256(cookie.encode()).digest()] = time.monotonic() + self.seconds
        return cookie

    def knows(self, cookie: str) -> bool:
        """Return whether a browser has a session."""
        mine, found = hashlib.sha256(cookie.encode("utf-8", "surrogateescape")).digest(), False
        for one, until in list(self.open.items()):
            if hmac.compare_digest(one, mine) and time.monotonic() < until:
                found = True
        return found


class Rate:
    """At most so many requests a minute for each key, with a minute's worth at once."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self.left: dict[str, tuple[float, float]] = {}   # key: (requests left, when that was so)

    def wait(self, who: str) -> float:
        """Return 0 and count one request, or the seconds until there is room for it."""
        if self.per_minute is None:
            return 0.0
        now, most = time.monotonic(), max(1.0, self.per_minute)
        left, then = self.left.get(who, (most, now))
        left = min(most, left + (now - then) * self.per_minute / 60)
        if left < 1:
            self.left[who] = (left, now)
            return (1 - left) * 60 / self.per_minute
        self.left[who] = (left - 1, now)
        return 0.0
