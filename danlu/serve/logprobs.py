"""Log-probabilities of tokens as OpenAI writes them: one way for conversations, another for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from danlu.data.tokenizer import Tokenizer
from danlu.decode import Logprob, Piece

LEAST = -9999.0                                          # JSON has no -inf; this is what OpenAI writes for it


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; bytes that are no whole character are U+FFFD."""
    return tokenizer.decode([token])


def _finite(value: float) -> float:
    return max(value, LEAST)


def _each(pieces: Sequence[Piece]) -> list[Logprob]:
    return [one for piece in pieces for one in piece.logprobs or ()]


def of_chat(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return {"content": …, "refusal": None}."""

    def token(number: int, value: float) -> dict[str, Any]:
        said = spelled(tokenizer, number)
        return {"token": said, "logprob": _finite(value), "bytes": list(said.encode())}

    return {"content": [token(one.id, one.logprob or 0.0) | {"top_logprobs": [token(i, value) for i, value in one.top]}
                        for one in _each(pieces)], "refusal": None}


def of_completion(tokenizer: Tokenizer, pieces: Sequence[Piece], *, offset: int = 0) -> dict[str, Any]:
    """Return tokens, token_logprobs, top_logprobs, text_offset, as long as each other; the first of an echo has none.

    offset: characters before the first token.
    """
    told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in _each(pieces):
        said = spelled(tokenizer, one.id)
        told["tokens"].append(said)
        told["token_logprobs"].append(None if one.logprob is None else _finite(one.logprob))
        told["top_logprobs"].append(None if one.logprob is None else _top(tokenizer, one))
        told["text_offset"].append(offset)
        offset += len(said)
    return told


def _top(tokenizer: Tokenizer, one: Logprob) -> dict[str, float]:
    """Return the likeliest by their spelling; of several with one spelling, the likeliest."""
    found: dict[str, float] = {}
    for number, value in one.top:
        found.setdefault(spelled(tokenizer, number), _finite(value))
    return found
