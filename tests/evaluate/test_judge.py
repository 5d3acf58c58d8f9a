"""What a model says of rows that were cut into windows, put together again: every word and every question once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from objectives.small import rng
from seqeval.metrics import f1_score

from danlu.data.encode import Encoder, encode
from danlu.data.example import Asked, Content, Tagged
from danlu.data.tokenizer import Tokenizer, WordPiece, train
from danlu.errors import DataError
from danlu.evaluate.judge import Said, answered, judge, real, tagged
from danlu.figures import HIGHER
from danlu.objectives import Answer, Choose, Embed, Objective, Tag

LABELS = ("B-LOC", "B-PER", "I-PER", "O")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["anna lives in paris and boris in oslo near the sea . where who is ?"] * 20, WordPiece(vocab=70))


def rows_of(contents: list[Content], by: Encoder) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows as a stream reads them, and the texts kept of them."""
    rows, texts = [], []
    for number, content in enumerate(contents):
        for made in encode(content, by):
            texts += [] if made.text is None else [made.text]
            n = len(made.ids)
            rows.append({"ids": made.ids, "weights": np.ones(n, np.float32), "segments": np.ones(n, np.int32), "key": np.zeros(4),
                         "example": np.int64(number)} | made.columns | ({} if made.tags is None else {"tags": made.tags}))
    return rows, texts


def batches(objective: Objective, rows: list[dict[str, Any]], tokenizer: Tokenizer, of: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches of `of` rows, the last filled up with one that weighs nothing."""
    made = []
    for start in range(0, len(rows), of):
        part = rows[start : start + of]
        spare = of - len(part)
        part = part + [rows[0]] * spare
        batch = objective.collate(part, tokenizer.special, rng(), max(len(row["ids"]) for row in part))
        if spare:
            batch["row_weights"][-spare:] = 0
        made.append(batch)
    return made


@pytest.mark.parametrize("overlong", ["split", "cut"])
@pytest.mark.parametrize("pieces", ["first", "all"])
def test_every_word_of_every_sentence_is_judged_once(overlong: Any, pieces: Any, tokenizer: Tokenizer,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    words = ("anna", "paris", "lives", "livesin", "boris", ".")
    sentences = [Tagged(tuple(draw.choice(words, n)), tuple(draw.choice(LABELS, n))) for n in draw.integers(1, 14, 20)]
    objective = Tag(labels=LABELS, pieces=pieces)
    rows, texts = rows_of(list(sentences), Encoder(tokenizer, 10, overlong, LABELS))
    said = Said(objective, 10)
    said.begin(texts)
    guess = [tuple(draw.choice(LABELS, len(one.words))) for one in sentences]
    for batch in batches(objective, rows, tokenizer):
        logits = torch.zeros(*batch["ids"].shape, len(LABELS))
        for line, example, at in zip(logits, batch["example"].tolist(), batch["words"].tolist(), strict=True):
            for place, word in enumerate(at):
                if word >= 0:
                    line[place, LABELS.index(guess[example][word])] = 1
        said.add({"tag": logits}, batch)
    told, unseen = tagged(objective, real(said.arrays()), said.texts)
    kept = [len(one.words) if overlong == "split" else max(row["window"][1] for row in rows if row["example"] == n)
            for n, one in enumerate(sentences)]
    whole = [list(one[:n]) + ["O"] * (len(one) - n) for one, n in zip(guess, kept, strict=True)]
    assert told == whole and unseen == sum(len(one) for one in guess) - sum(kept)
    truth = [list(one.tags or ()) for one in sentences]
    found = judge(objective, said.arrays(), said.texts, resamples=0)
    assert found.figures["f1"].value == pytest.approx(f1_score(truth, whole))
    lost = sum(len(one) for one in guess) - sum(kept)
    assert (f"{lost} words were cut off" in capsys.readouterr().err) == (overlong == "cut" and lost > 0)


def test_the_best_answer_of_all_windows_counts(tokenizer: Tokenizer) -> None:
    filler = "the sea and " * 12
    contents: list[Content] = [
        Asked("where is anna ?", f"{filler}anna lives in Paris near {filler}", (("Paris", len(filler) + 14),), "a"),
        Asked("who is in oslo ?", f"boris in oslo . {filler}", (("boris", 0),), "b"), Asked("who ?", filler, (), "c")]
    objective = Answer()
    rows, texts = rows_of(contents, Encoder(tokenizer, 32, "error", stride=8))
    assert len(rows) > 6
    for null, threshold, right in ((5.0, 0.0, 1.0), (5.0, -1e3, 1 / 3), (30.0, 0.0, 1 / 3), (30.0, 25.0, 1.0)):
        objective = Answer(null_threshold=threshold, may_be_empty=True)
        said = Said(objective, 32)
        said.begin(texts)
        for batch in batches(objective, rows, tokenizer):
            logits = torch.zeros(*batch["ids"].shape, 2)
            logits[:, 0] = null / 2
            for line, answer, example in zip(logits, batch["answer"], batch["example"], strict=True):
                if answer[0]:
                    line[answer[0], 0] = line[answer[1], 1] = 10
                elif example < 2:
                    line[0] = null / 2 + 20              # of a window without the answer: the surest counts, not this one
            said.add({"answer": logits}, batch)
        found = judge(objective, said.arrays(), said.texts, resamples=0)
        assert found.figures["exact_match"].value == pytest.approx(right), (null, threshold)
    told = answered(Answer(), real(said.arrays()), [*said.texts[:2], {**said.texts[2], "answers": ["x"]}])
    assert [one["said"] for one in told[:2]] == ["Paris", "boris"]
    told = answered(Answer(null_threshold=-1e3), real(said.arrays()), said.texts)
    assert all(one["said"] for one in told), "what `predict` says, too: a model that may not be silent"


def test_rows_without_their_texts_are_not_judged() -> None:
    with pytest.raises(DataError, match="prepared again"):
        judge(Answer(), {"example": torch.zeros(1, dtype=torch.int64), "said": torch.zeros(1, 4), "counts": torch.ones(1)})


def test_choices_are_right_or_wrong() -> None:
    batch = {"label": torch.tensor([1, 0, 1]), "label_weights": torch.ones(3), "row_weights": torch.tensor([1.0, 1, 0]),
             "there": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]])}
    said = Said(Choose())
    said.add({"choose": torch.tensor([[0.0, 1, 9], [0, 0, 1], [0, 0, 0]])}, batch)
    found = judge(Choose(), said.arrays(), resamples=0).figures
    expected = (np.log(np.exp([0, 1]).sum()) - 1 + np.log(np.exp([0, 0, 1]).sum())) / 2
    assert found["accuracy"].value == 0.5 and found["loss"].value == pytest.approx(expected)


def test_retrieval_ranks_each_text_among_all() -> None:
    draw = np.random.default_rng(0)
    queries = draw.normal(size=(50, 4))
    texts = queries + draw.normal(size=(50, 4))
    said = Said(Embed())
    said.add({"embed": torch.from_numpy(np.stack([queries, texts], 1))}, {"row_weights": torch.ones(50)})
    found = judge(Embed(), said.arrays(), resamples=0).figures
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (queries, texts)]
    ranks = [sorted(-unit[0][n] @ other for other in unit[1]).index(-unit[0][n] @ unit[1][n]) + 1 for n in range(50)]
    assert found["accuracy_at_1"].value == np.mean([r == 1 for r in ranks])
    assert found["mrr"].value == pytest.approx(np.mean([1 / r for r in ranks]))
    assert set(found) <= set(HIGHER)
