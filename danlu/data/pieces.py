"""What each id of a vocabulary looks like as bytes, which ones start a word, and which ones end a sentence."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

STOPS = tuple(".!?。！？…．｡؟।")
CLOSERS = "\"'”’»)）］】」』》〉"
_HEX = re.compile(r"<0x([0-9A-F]{2})>")


def read(text: str, size: int, vocab: Mapping[str, int]) -> list[bytes]:
    """Return the bytes of each id [size] of the tokenizer.json `text`; b"" where an id has no token."""
    content = json.loads(text)
    kinds, model = set(_types(content["decoder"])) | set(_types(content["pre_tokenizer"])), content["model"]["type"]
    added = {t["content"] for t in content["added_tokens"]}
    table = _byte_table()
    result = [b""] * size
    for token, index in vocab.items():
        if token in added:
            result[index] = token.encode()
        elif "ByteLevel" in kinds and all(c in table for c in token):
            result[index] = bytes(table[c] for c in token)
        elif model == "WordPiece":
            result[index] = token.removeprefix("##").encode()
        elif "Metaspace" in kinds or "▁" in token:
            match = _HEX.fullmatch(token)
            result[index] = bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()
        else:
            result[index] = token.encode()
    return result


def _types(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node["type"]
        for child in node.values():
            yield from _types(child)
    elif isinstance(node, list):
        for child in node:
            yield from _types(child)


@cache
def _byte_table() -> dict[str, int]:
    """Return the byte behind each letter of byte-level vocabularies (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


def starts(pieces: list[bytes]) -> np.ndarray:
    """Return which pieces start a word [size]: those that begin with a space, a sign or a Han character."""
    return np.array([_starts(piece) for piece in pieces], bool)


def _starts(piece: bytes) -> bool:
    if not piece or 0x80 <= piece[0] < 0xC0:             # the middle of a character
        return False
    width = 1 if piece[0] < 0x80 else 2 if piece[0] < 0xE0 else 3 if piece[0] < 0xF0 else 4
    if len(piece) < width:                               # the first part of one: Han from E3 on
        return piece[0] >= 0xE3
    char = piece[:width].decode("utf-8", "replace")
    return _alone(char) or not (char.isalnum() or unicodedata.category(char).startswith("M"))


def _alone(char: str) -> bool:
    """Tell whether a character belongs to a script written without spaces."""
    code = ord(char)
    return (0x2E80 <= code < 0x3200 or 0x3400 <= code < 0xA000 or 0xF900 <= code < 0xFB00 or 0x20000 <= code < 0x40000
            or 0x0E00 <= code < 0x0F00 or 0x1000 <= code < 0x10A0 or 0x1780 <= code < 0x1800)


def ends(pieces: list[bytes]) -> np.ndarray:
    """Return which pieces end a sentence [size]: a stop, perhaps before closing quotes or brackets."""
    texts = (piece.decode("utf-8", "ignore") for piece in pieces)
    return np.array([text.rstrip().rstrip(CLOSERS).endswith(STOPS) for text in texts], bool)
