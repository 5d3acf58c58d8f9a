"""What looks wrong in texts and in names of classes: characters that were lost, markup, names that differ by case alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from danlu.data.example import Asked, Chat, Chosen, Content, Labelled, Segments, Similar, Tagged

GARBLED = re.compile("\ufffd|Ã[\x80-\xbf]|â€|锟斤拷|ï»¿")          # lost in another encoding, or read twice in the wrong one
MARKUP = re.compile(r"</?(?:a|b|i|p|br|hr|div|span|font|img|ul|ol|li|table|tr|td|th|html|body|script|style|h[1-6])\b[^<>]*>"
                    r"|&(?:nbsp|amp|lt|gt|quot|#\d+);", re.I)
FLAWS = {"garbled": GARBLED, "markup": MARKUP}


def texts(content: Content) -> Iterator[str]:
    """Yield every text of a row."""
    match content:
        case Labelled():
            yield from content.parts
        case Tagged():
            yield " ".join(content.words)
        case Asked():
            yield content.question
            yield content.context
        case Chosen():
            yield content.text
            yield from content.choices
        case Similar():
            yield from content.texts
        case Chat():
            yield from (turn.content for turn in content.turns)
        case Segments():
            yield from (text for text, _weight in content.pieces)
        case _:
            return


def flaws(content: Content) -> Iterator[tuple[str, str]]:
    """Yield (flaw, the text around it) for each kind of flaw that a row has."""
    for name, pattern in FLAWS.items():
        for text in texts(content):
            found = pattern.search(text)
            if found:
                yield name, text[max(0, found.start() - 30) : found.end() + 30]
                break


def alike(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return groups of names that differ only in case, width or white space."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]
