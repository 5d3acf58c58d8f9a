"""Words and their pieces, texts and their windows: every word once, every character of a context in some window.

n ids of a text, W words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from danlu.data.example import Unusable
from danlu.data.tokenizer import Tokenizer

Spans = Sequence[tuple[int, int]]                        # first character and the one after the last, of each token


def pieces(words: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the ids of each word, at least one each: a word of which a tokenizer leaves nothing is unknown.

    Where a tokenizer tells words by the blank before them, there is one, except at the start and beside East Asian
    characters.  Raises Unusable for a word without ids where there is no unk token.
    """
    spaced = tokenizer.encode(" a").tolist() != tokenizer.encode("a").tolist()
    texts = [f" {word}" if spaced and number and not (_wide(words[number - 1][-1:]) or _wide(word[:1])) else word
             for number, word in enumerate(words)]
    found, unk = tokenizer.encode_batch(texts), tokenizer.special.unk
    for number, ids in enumerate(found):
        if not len(ids):
            if unk is None:
                raise Unusable("empty_word", f"word {number + 1}, {words[number]!r}, gives no token")
            found[number] = np.array([unk], np.int64)
    return found


def _wide(char: str) -> bool:
    return bool(char) and unicodedata.east_asian_width(char) in "WF"


def runs(sizes: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Return (first, past the last) of each run of words whose sizes fit into `room` together, every word in one run.

    A word that is larger than `room` has a run of its own.
    """
    made, first, held = list[tuple[int, int]](), 0, 0
    for number, size in enumerate(sizes):
        if number > first and held + size > room:
            made.append((first, number))
            first, held = number, 0
        held += size
    return [*made, (first, len(sizes))] if sizes else made


def windows(size: int, room: int, shared: int) -> list[tuple[int, int]]:
    """Return (first, past the last) of each window of at most `room` of `size` tokens; neighbours share `shared`."""
    assert 0 <= shared < room
    made = [(0, min(room, size))]
    while made[-1][1] < size:
        first = made[-1][0] + room - shared
        made.append((first, min(first + room, size)))
    return made


def covering(spans: Spans, start: int, stop: int) -> tuple[int, int] | None:
    """Return the first and last token that hold some of the characters start:stop; None where no token does."""
    inside = [number for number, (first, last) in enumerate(spans) if first < stop and last > start and last > first]
    return (inside[0], inside[-1]) if inside else None
