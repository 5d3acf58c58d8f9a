"""What one row of fine-tuning data says, before any tokenizer: texts, answers, labels, weights.

A reader makes one of these from a record (the columns of a row), whatever the file's format; `data/examples.py` turns
them into ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Unusable(Exception):
    """A record that cannot be learned from.  `reason` is a word for counting, `detail` says what is wrong with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Labelled(NamedTuple):
    """One text or two, and what is to be said of them: a class, several classes, a score, or nothing yet."""

    parts: tuple[str, ...]
    label: str | tuple[str, ...] | float | None


class Tagged(NamedTuple):
    """Words and a tag for each; None where the tags are to be predicted."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None


class Asked(NamedTuple):
    """A question whose answer is a stretch of the context; no answers: it cannot be answered from there."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]                 # (text, first character in the context)
    key: str = ""                                        # the data set's own name of the row


class Chosen(NamedTuple):
    """A text and its possible endings; `label` is the number of the right one, None if it is to be predicted."""

    text: str
    choices: tuple[str, ...]
    label: int | None


class Similar(NamedTuple):
    """An anchor, a text like it and texts unlike it; or two texts and how alike they are."""

    texts: tuple[str, ...]
    score: float | None = None


class Turn(NamedTuple):
    """What one side says.  weight: of its loss; None: 1 for the assistant, 0 for all others."""

    role: str                                            # system, user, assistant, tool
    content: str
    weight: float | None = None
    calls: tuple[dict[str, Any], ...] = ()               # tool calls, as OpenAI writes them
    spans: tuple[tuple[int, int, float], ...] = ()       # weights of stretches of characters (first, end, weight)


class Chat(NamedTuple):
    """A conversation, to be rendered by a template."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Segments(NamedTuple):
    """Stretches of text with a loss weight each, to be tokenised as they are: plain text, prompt and completion."""

    pieces: tuple[tuple[str, float], ...]
    ends: bool = True                                    # whether the last stretch ends with the tokenizer's eos


class Tokens(NamedTuple):
    """A row that is tokenised already; a weight of 0 is a label of -100."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


Content = Labelled | Tagged | Asked | Chosen | Similar | Chat | Segments | Tokens
