"""How well a tokenizer suits texts: bytes per token by language and script, what it knows not, what it uses never."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from danlu.data.tokenizer import Tokenizer

SHOWN = 20          # tokens listed of a kind
SLICE = 1 << 14     # characters looked at together


def report(tokenizer: Tokenizer, samples: Mapping[str, Iterator[str]]) -> dict[str, Any]:
    """Return what the tokenizer makes of each sample (texts under a language's name), JSON-ready.

    vocabulary, samples {name: texts, bytes, tokens, bytes_per_token, unk_share, scripts {script: the same}},
    unused {count, share, first}: ids that no sample needed; longest: the tokens with the most bytes.
    """
    used = np.zeros(tokenizer.size, np.int64)
    told = {name: _sample(tokenizer, texts, used) for name, texts in samples.items()}
    plain = np.flatnonzero(~tokenizer.special.reserved)
    idle = plain[used[plain] == 0]
    longest = sorted(plain.tolist(), key=lambda i: -len(tokenizer.pieces[i]))[:SHOWN]
    return {
        "vocabulary": tokenizer.size, "samples": told,
        "unused": {"count": len(idle), "share": len(idle) / max(1, len(plain)),
                   "first": [_text(tokenizer, i) for i in idle[:SHOWN].tolist()]},
        "longest": [_text(tokenizer, i) for i in longest],
    }


def _sample(tokenizer: Tokenizer, texts: Iterator[str], used: np.ndarray) -> dict[str, Any]:
    sizes, tokens = Counter[str](), Counter[str]()
    number = size = unknown = 0
    for text in texts:
        number += 1
        size += len(text.encode())
        for start in range(0, len(text), SLICE):
            part = text[start : start + SLICE]
            ids, spans = tokenizer.encode_spans(part)
            used += np.bincount(ids, minlength=len(used))
            unknown += int((ids == tokenizer.special.unk).sum())
            more_sizes, more_tokens = shares(part, spans)
            sizes, tokens = sizes + more_sizes, tokens + more_tokens
    scripts = {name: {"bytes": sizes[name], "tokens": tokens[name], "bytes_per_token": sizes[name] / tokens[name]}
               for name, _n in sizes.most_common() if tokens[name]}
    return {"texts": number, "bytes": size, "tokens": tokens.total(), "scripts": scripts,
            "bytes_per_token": size / max(1, tokens.total()), "unk_share": unknown / max(1, tokens.total())}


def _text(tokenizer: Tokenizer, index: int) -> str:
    return tokenizer.pieces[index].decode("utf-8", "backslashreplace")


@cache
def script(char: str) -> str:
    """Return the script of a character by its Unicode name: Latin, Han, Kana, Hangul, Digit, Sign …"""
    if char.isdigit():
        return "Digit"
    if not char.isalpha():
        return "Sign"
    name = unicodedata.name(char, "Other").split()[0]
    return {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana", "HALFWIDTH": "Kana",
            "FULLWIDTH": "Latin"}.get(name, name.title())


def shares(text: str, spans: list[tuple[int, int]]) -> tuple[Counter[str], Counter[str]]:
    """Return bytes and tokens by script; a token belongs to the script of the first letter it covers."""
    sizes, tokens, last = Counter[str](), Counter[str](), 0
    for start, end in spans:
        cover = text[start:end]
        name = next((s for c in cover if (s := script(c)) != "Sign"), "Sign")
        tokens[name] += 1
        sizes[name] += len(text[max(start, last) : end].encode())     # parts of one character share its span
        last = max(last, end)
    return sizes, tokens
