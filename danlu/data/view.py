"""A row as the model sees it: which token carries loss, and which document it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

import numpy as np
from rich.console import Console
from rich.text import Text

from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer
from danlu.words import _

SHADES = ("grey0 on light_sky_blue1", "grey0 on thistle1")     # learned tokens, in turn, so that borders show
SILENT = ("grey50", "grey62")                                   # tokens that are only read


class Token(TypedDict):
    """One place of a row.  `label` is what must be said there, where that is not the token itself."""

    text: str
    id: int
    weight: float
    segment: int
    label: NotRequired[str]


def document(shards: Shards, number: int) -> dict[str, np.ndarray]:
    """Return a stored document as a row of one segment."""
    ids, weights, _columns = shards.document(number)
    return {
        "ids": ids.astype(np.int64), "segments": np.ones(len(ids), np.int32),
        "weights": np.ones(len(ids), np.float32) if weights is None else weights.astype(np.float32),
        "documents": np.array([number]), "key": np.array([0, 0, 0, number]),
    }


def row_view(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> list[list[Token]]:
    """Return the tokens of a row, a list for each segment in order; JSON-ready.

    A row of a batch has `labels` too.  Where its labels are its own ids moved by one (next-token prediction), the
    weight of a label is shown on the token it asks for; elsewhere (masked tokens) the label stands beside the token.
    """
    ids = np.asarray(row["ids"])
    weights = np.asarray(row.get("weights", np.ones(len(ids))))
    segments = np.asarray(row.get("segments", np.ones(len(ids), np.int32)))
    labels = row.get("labels")
    hidden: list[int | None] = [None] * len(ids)
    if labels is not None:
        labels, carried = np.asarray(labels), np.flatnonzero(weights)
        inside = carried[carried + 1 < len(ids)]
        if inside.size and (labels[inside] == ids[inside + 1]).all():
            weights, ids, segments = _shifted(ids, labels, weights, segments)
            hidden = [None] * len(ids)
        else:
            hidden = [int(label) if weight else None for label, weight in zip(labels, weights, strict=True)]
    lines: list[list[Token]] = []
    for place, index in enumerate(ids.tolist()):
        label = hidden[place]
        token = Token(text=_readable(tokenizer, index), id=index, weight=float(weights[place]),
                      segment=int(segments[place]))
        if label is not None and label != index:
            token["label"] = _readable(tokenizer, label)
        if not lines or lines[-1][-1]["segment"] != token["segment"]:
            lines.append([])
        lines[-1].append(token)
    return lines


def _shifted(ids: np.ndarray, labels: np.ndarray, weights: np.ndarray,
             segments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights, ids and segments with the last label as one more token, each weight on the token it asks for."""
    more = bool(weights[-1])
    ids = np.append(ids, labels[-1:] if more else ids[:0])
    segments = np.append(segments, segments[-1:] if more else segments[:0])
    return np.append(0, weights)[: len(ids)], ids, segments


def _readable(tokenizer: Tokenizer, index: int) -> str:
    """Return the text of one id; bytes that are no whole character by their numbers, as <E4><BD>."""
    piece = tokenizer.pieces[index] if 0 <= index < tokenizer.size else b""
    try:
        return piece.decode() if piece else f"<{index}>"
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in piece)


def show(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, *, ids: bool = False,
         console: Console | None = None) -> None:
    """Print a row: tokens that carry loss on a colour, others grey, each segment under its number."""
    console = console or Console()
    lines = row_view(row, tokenizer)
    tokens = [token for line in lines for token in line]
    learned = sum(token["weight"] != 0 for token in tokens)
    places = ", ".join(f"{name} {np.asarray(row[name]).tolist()}" for name in ("documents", "key") if name in row)
    console.print(Text(_("{n} tokens, {learned} of them carry loss").format(n=len(tokens), learned=learned)
                       + (f" ({places})" if places else "")))
    for line in lines:
        text = Text.assemble((f"[{line[0]['segment']}] ", "bold"))
        for place, token in enumerate(line):
            text.append_text(_drawn(token, place % 2, ids))
        console.print(text, soft_wrap=True)


def _drawn(token: Token, turn: int, ids: bool) -> Text:
    shown = token["text"].replace("\n", "⏎\n").replace("\t", "⇥\t")
    text = Text.assemble((shown, SHADES[turn] if token["weight"] else SILENT[turn]))
    if "label" in token:
        text.append(f"→{token['label']}", style="bold red")
    if ids:
        text.append(f"·{token['id']}", style="dim")
    if token["weight"] not in (0.0, 1.0):
        text.append(f"×{token['weight']:g}", style="dim")
    return text

