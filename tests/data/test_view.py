"""What is shown of a row is what the row says."""

from __future__ import annotations

import io
import json

import numpy as np
from data import corpus
from rich.console import Console

from danlu.data import view
from danlu.data.tokenizer import BPE, Tokenizer, WordPiece, train


def tokenizer() -> Tokenizer:
    return train(corpus.english(20), BPE(vocab=300, masked=True))


def row(ids: np.ndarray, **columns: list[int]) -> dict[str, np.ndarray]:
    return {"ids": ids, "weights": np.ones(len(ids), np.float32), "segments": np.ones(len(ids), np.int32)} | {
        name: np.array(values) for name, values in columns.items()}


def test_tokens_segments_and_weights() -> None:
    one = tokenizer()
    ids = one.encode("if x: 天\n")
    lines = view.row_view(row(ids, weights=[0] + [1] * (len(ids) - 1), segments=[1, 1] + [2] * (len(ids) - 2)), one)
    assert [len(line) for line in lines] == [2, len(ids) - 2]
    tokens = [token for line in lines for token in line]
    assert [t["id"] for t in tokens] == ids.tolist() and [t["weight"] for t in tokens] == [0.0] + [1.0] * (len(ids) - 1)
    assert "".join(t["text"] for t in tokens) == "if x: <E5><A4><A9>\n"
    assert json.loads(json.dumps(lines)) == lines


def test_next_token_labels_weigh_on_the_token_they_ask_for() -> None:
    one = tokenizer()
    ids = one.encode("the import statement")
    learned = [0, 1] + [1] * (len(ids) - 3)
    lines = view.row_view(row(ids[:-1], labels=ids[1:].tolist(), weights=learned), one)
    assert [t["id"] for t in lines[0]] == ids.tolist()
    assert [t["weight"] for t in lines[0]] == [0.0, *map(float, learned)]
    assert not any("label" in t for t in lines[0])


def test_hidden_tokens_show_what_they_hide() -> None:
    one = tokenizer()
    ids = one.encode("the import statement")
    shown, weights = ids.copy(), [0] * len(ids)
    shown[1], weights[1], weights[2] = one.special.mask, 1, 1        # one hidden, one asked for as it is
    lines = view.row_view(row(shown, labels=ids.tolist(), weights=weights), one)
    assert lines[0][1]["text"] == "<|mask|>" and lines[0][1]["label"] == one.pieces[int(ids[1])].decode()
    assert [("label" in t) for t in lines[0]] == [i == 1 for i in range(len(ids))]


def test_show_colours_what_carries_loss() -> None:
    one = train(corpus.english(20), WordPiece(vocab=300))
    ids = one.encode("if if")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="256", width=200)
    view.show(row(ids, weights=[0] * (len(ids) - 1) + [1]), one, ids=True, console=console)
    text = out.getvalue()
    assert f"{len(ids)} tokens, 1 of them" in text and f"·{ids[0]}" in text
    assert text.count("48;5;") == 1                              # one background: the last token
