"""Losses of tasks against transformers' own, and against closed forms where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from objectives.small import rng, vocab
from torch import Tensor

from danlu.errors import DataError
from danlu.models import weights
from danlu.models.build import build
from danlu.models.encoder import Encoder, EncoderModel
from danlu.objectives import Answer, Choose, Classify, Embed, Regress, Tag
from danlu.objectives.answer import best_spans

VOCAB, LABELS = 50, ("O", "B-X", "I-X", "B-Y")
RNG, draw = np.random.default_rng(0), rng()
SPECIAL = vocab(VOCAB)


def row(ids: Any, **columns: Any) -> dict[str, Any]:
    ids = np.asarray(ids, np.int64)
    return {"ids": ids, "weights": np.ones(len(ids), np.float32), "segments": np.ones(len(ids), np.int32),
            "key": np.zeros(4, np.int64)} | columns


def text(size: int) -> np.ndarray:
    return np.concatenate([[2], RNG.integers(5, VOCAB, size - 2), [3]])


def ours(objective: Any) -> EncoderModel:
    model = build(Encoder.model_validate({
        "vocab": VOCAB, "width": 16, "layers": 2, "heads": 2, "context": 64, "outputs": (), "tasks": objective.tasks()}))
    model = model.to_empty(device="cpu").init(0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model        # type: ignore[return-value]


def said(model: EncoderModel, objective: Any, batch: dict[str, Tensor]) -> Any:
    return model(**{name: batch[name] for name in objective.inputs if name in batch})


def mean(model: EncoderModel, objective: Any, batch: dict[str, Tensor]) -> Tensor:
    total: Tensor = objective.loss(said(model, objective, batch), batch)[0] / objective.count(batch)[0]
    return total


def theirs(model: EncoderModel, folder: Path, kind: str) -> Any:
    weights.save(folder / kind, model)
    return getattr(transformers, f"BertFor{kind}").from_pretrained(folder / kind).eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), atol=1e-5, rtol=1e-5)


SIZES = (9, 6, 7)


@pytest.mark.parametrize("class_weights", ["none", {"B-X": 3.0, "O": 0.5}])
def test_tags_are_learned_as_transformers_learns_them(class_weights: Any, tmp_path: Path) -> None:
    objective = Tag(labels=LABELS, class_weights=class_weights)
    rows = [row(text(n), tags=np.where(RNG.random(n) < 0.7, RNG.integers(0, 4, n), -100).astype(np.int16)) for n in SIZES]
    model, batch = ours(objective), objective.collate(rows, SPECIAL, draw, max(SIZES))
    labels = torch.full((len(rows), max(SIZES)), -100)
    for line, one in zip(labels, rows, strict=True):
        line[: len(one["tags"])] = torch.from_numpy(one["tags"].astype(np.int64))
    there = (torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]).long()
    found = theirs(model, tmp_path, "TokenClassification")(input_ids=batch["ids"], attention_mask=there, labels=labels)
    if class_weights == "none":
        close(mean(model, objective, batch), found.loss)
    else:
        given = torch.tensor([class_weights.get(name, 1.0) for name in LABELS])
        close(mean(model, objective, batch), F.cross_entropy(found.logits.flatten(0, 1), labels.flatten(), given))


def test_answers_are_learned_as_transformers_learns_them(tmp_path: Path) -> None:
    objective = Answer()
    rows = [row(text(8), answer=np.array(a), parts=np.array([3, 5])) for a in ((4, 6), (-1, -1), (5, 5))]
    model, batch = ours(objective), objective.collate(rows, SPECIAL, draw, 8)
    other = theirs(model, tmp_path, "QuestionAnswering")
    found = other(input_ids=batch["ids"], token_type_ids=batch["types"], start_positions=torch.tensor([4, 0, 5]),
                  end_positions=torch.tensor([6, 0, 5]))
    close(mean(model, objective, batch), found.loss)
    longer = objective.collate(rows, SPECIAL, draw, 12)
    close(mean(model, objective, longer), found.loss)     # padding takes no part, though theirs would let it


def test_choices_in_one_row_are_as_each_in_a_row_of_its_own(tmp_path: Path) -> None:
    objective = Choose()
    choices = [[(text(n), m) for n, m in each] for each in (((9, 4), (7, 4), (6, 2)), ((5, 3), (8, 3), (7, 3)))]
    rows = [row(np.concatenate([ids for ids, _m in each]), label=np.int32(number),
                parts=np.array([[m, len(ids) - m] for ids, m in each]).ravel()) for number, each in enumerate(choices)]
    model, batch = ours(objective), objective.collate(rows, SPECIAL, draw, 24)
    ids, types, there = torch.zeros(3, 2, 3, 10, dtype=torch.long)
    for b, each in enumerate(choices):
        for p, (one, m) in enumerate(each):
            ids[b, p, : len(one)], types[b, p, m : len(one)], there[b, p, : len(one)] = torch.from_numpy(one), 1, 1
    found = theirs(model, tmp_path, "MultipleChoice")(input_ids=ids, token_type_ids=types, attention_mask=there,
                                                      labels=torch.tensor([0, 1]))
    close(said(model, objective, batch)["choose"], found.logits)
    close(mean(model, objective, batch), found.loss)


def test_rows_may_have_different_numbers_of_choices() -> None:
    objective = Choose(smoothing=0.1)
    rows = [row(text(12), parts=np.array([6, 0, 6, 0, 0, 0]), label=np.int32(1)),
            row(text(12), parts=np.array([4, 0, 4, 0, 4, 0]), label=np.int32(2))]
    model = ours(objective)
    both = objective.collate(rows, SPECIAL, draw, 14)
    each = [objective.collate([one], SPECIAL, draw, 12) for one in rows]
    assert [batch["starts"].shape[1] for batch in (both, *each)] == [3, 2, 3]
    total = sum(objective.loss(said(model, objective, batch), batch) for batch in each)
    close(objective.loss(said(model, objective, both), both), total)      # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_classes_and_scores_are_learned_as_transformers_learns_them(kind: str, tmp_path: Path) -> None:
    objective: Any = Regress() if kind == "regression" else Classify(labels=LABELS, several=kind == "multi")
    label: Any = {"single": [np.int32(n) for n in (0, 3, 1)], "multi": list(RNG.integers(0, 2, (3, 4)).astype(np.uint8)),
                  "regression": [np.float32(n) for n in (0.5, -1.0, 3.0)]}[kind]
    model = ours(objective)
    batch = objective.collate([row(text(8), label=one) for one in label], SPECIAL, draw, 8)
    found = theirs(model, tmp_path, "SequenceClassification")(input_ids=batch["ids"], labels=batch["label"])
    close(mean(model, objective, batch), found.loss)


def vectors(model: EncoderModel, texts: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        found = np.stack([model(torch.from_numpy(one)[None])["embed"][0, 0].double().numpy() for one in texts])
    return found / np.linalg.norm(found, axis=1, keepdims=True)     # type: ignore[no-any-return]


def test_the_contrastive_loss_is_the_papers() -> None:
    objective = Embed(temperature=0.1)
    groups = [[text(5), text(8), text(6)], [text(7), text(4)]]
    rows = [row(np.concatenate(each), parts=np.array([len(one) for one in each])) for each in groups]
    model, batch = ours(objective), objective.collate(rows, SPECIAL, draw, 24)
    v = [vectors(model, each) for each in groups]
    others = np.concatenate([each[1:] for each in v])                # the positive of row 0, its negative, that of row 1
    total = 0.0
    for anchor, own in ((v[0][0], 0), (v[1][0], 2)):
        scores = others @ anchor / 0.1
        total += float(np.log(np.exp(scores).sum()) - scores[own])
    close(objective.loss(said(model, objective, batch), batch)[0], torch.tensor(total))
    assert float(objective.count(batch)) == 2


def test_cosines_are_pulled_towards_scores() -> None:
    objective = Embed(loss="cosine", scores=(0.0, 5.0))
    pairs = [[text(5), text(8)], [text(7), text(4)]]
    rows = [row(np.concatenate(each), parts=np.array([len(one) for one in each]), label=np.float32(score))
            for each, score in zip(pairs, (5.0, 1.0), strict=True)]
    model, batch = ours(objective), objective.collate(rows, SPECIAL, draw, 16)
    v = [vectors(model, each) for each in pairs]
    total = (v[0][0] @ v[0][1] - 1) ** 2 + (v[1][0] @ v[1][1] - 0.2) ** 2
    close(objective.loss(said(model, objective, batch), batch)[0], torch.tensor(total))


def test_scores_and_the_loss_must_go_together() -> None:
    pair = row(text(8), parts=np.array([4, 4]))
    with pytest.raises(DataError, match=r"objective\.loss=cosine"):
        Embed().collate([pair | {"label": np.float32(1)}], SPECIAL, draw, 8)
    with pytest.raises(DataError, match=r"objective\.loss=contrastive"):
        Embed(loss="cosine").collate([pair], SPECIAL, draw, 8)
    with pytest.raises(DataError, match=r"objective\.scores"):
        Embed(loss="cosine").collate([pair | {"label": np.float32(4)}], SPECIAL, draw, 8)


def test_every_piece_of_a_word_may_learn_its_tag() -> None:
    tags = np.array([-100, 1, -100, 0, -100, 3, -100, -100], np.int16)       # [CLS] B-X . O . B-Y . [SEP]
    batch = Tag(labels=LABELS, pieces="all").collate([row(text(8), tags=tags)], SPECIAL, draw, 10)
    assert batch["tags"].tolist() == [[-100, 1, 2, 0, 0, 3, 3, -100, -100, -100]]        # there is no I-Y
    assert batch["words"].tolist() == [[-1, 0, -1, 1, -1, 2, -1, -1, -1, -1]]


def test_the_best_span_is_the_one_a_search_finds() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 15, 2, generator=draw)
    window = torch.tensor([[4, 8, 30]] * 20)
    found = best_spans(logits, {"ends": torch.full((20,), 12), "window": window}, most=3)
    for line, (score, start, stop, none) in zip(logits.double(), found.tolist(), strict=True):
        best = max((float(line[a, 0] + line[b, 1]), a, b) for a in range(4, 12) for b in range(a, min(a + 3, 12)))
        assert (score, start, stop) == (pytest.approx(best[0]), best[1] + 26, best[2] + 26)
        assert none == pytest.approx(float(line[0].sum()))
