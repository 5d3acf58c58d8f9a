"""From tokens to pieces of text, as they come: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from danlu.decode.sampling import Logprob

Finish = Literal["stop", "length", "cancelled"]


class Piece(NamedTuple):
    """Some of an answer.  All pieces in order are the answer."""

    text: str
    ids: tuple[int, ...]                                # tokens told by now that no piece before held
    logprobs: tuple[Logprob, ...] | None                # … and their probabilities, if asked for
    finish: Finish | None                               # why it ended; only of the last piece


class Speech:
    """The text of one answer, fed token by token.

    A token of a byte-level tokenizer may hold some bytes of a character: `decode` then ends in U+FFFD, and the text waits for
    the tokens that complete it, or for the end.  What may be the beginning of a stop string waits, too.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [s for s in stop if s]
        self._ids: list[int] = []
        self._start = self._told = 0                    # ids[start:told] is the piece before, already told
        self._held = ""                                 # text that may begin a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain now; after the first stop string `stopped` is true, and nothing follows."""
        self._ids.append(token)
        before, now = self._decode(self._ids[self._start:self._told]), self._decode(self._ids[self._start:])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return self._take(now[len(before):])

    def end(self) -> str:
        """Return what was still held back."""
        rest = self._decode(self._ids[self._start:])[len(self._decode(self._ids[self._start:self._told])):]
        said = "" if self.stopped else self._take(rest)
        said, self._held = said + self._held, ""
        return said

    def _take(self, text: str) -> str:
        held = self._held + text
        found = [at for at in (held.find(s) for s in self._stop) if at >= 0]
        if found:
            self._held, self.stopped = "", True
            return held[: min(found)]
        safe = len(held) - max((n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        self._held = held[safe:]
        return held[:safe]
