"""Every token of a pair is traced back to where it came from."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from danlu.errors import ConfigError, IncompatibleError
from danlu.objectives import NextSentence, SentenceOrder
from danlu.objectives.pairs import _fit
from tests.objectives.small import CLS, PAD, SEP, STOP, rng, row, text, vocab


def stretches(batch, b):
    """Return (A, B) as lists, after checking marks, types, segments and positions."""
    ids, types = batch["ids"][b].tolist(), batch["types"][b].tolist()
    segments = batch["segments"][b] if "segments" in batch else torch.ones(len(ids))
    positions = batch["positions"][b] if "positions" in batch else torch.arange(len(ids))
    n = int((segments > 0).sum())
    middle = ids.index(SEP)
    assert ids[0] == CLS and ids[n - 1] == SEP and ids[n:] == [PAD] * (len(ids) - n)
    assert types == [0] * (middle + 1) + [1] * (n - middle - 1) + [0] * (len(ids) - n)
    assert segments.tolist() == [1] * n + [0] * (len(ids) - n)
    assert positions.tolist() == [*range(n), *[0] * (len(ids) - n)]
    return ids[1:middle], ids[middle + 1 : n - 1]


def rows_with_strangers(count):
    """Return rows of even ids whose `other` holds odd ids; both end sentences with 5."""
    made = []
    for i in range(count):
        mine, other = text(40 + i % 20, i), text(30 + i % 40, 1000 + i)
        mine, other = (np.where(x == STOP, STOP, 6 + (x - 6) // 2 * 2 + odd) for odd, x in enumerate((mine, other)))
        made.append(row(mine, key=i, other=other))
    return made


def test_next_sentence_by_brute_force():
    rows = rows_with_strangers(400)
    batch = NextSentence().collate(rows, vocab(), rng(), 70)
    cuts = set()
    for b, r in enumerate(rows):
        ids, other = r["ids"].tolist(), r["other"].tolist()
        first, second = stretches(batch, b)
        assert first == ids[: len(first)]
        assert STOP not in ids[:-1] or first[-1] == STOP
        true = ids[len(first) :]
        cuts.add(len(first))
        if batch["nsp"][b] == 0:
            assert second == true
        else:
            assert 0 < len(second) <= len(true)
            assert any(other[i : i + len(second)] == second for i in range(len(other)))
    assert batch["nsp_weights"].tolist() == [1.0] * 400
    assert batch["nsp"].double().mean() == pytest.approx(0.5, abs=0.1)      # 4 standard deviations
    assert len(cuts) > 20
    assert batch["nsp"].dtype == torch.int64 and set(batch) == {
        "ids", "types", "segments", "positions", "nsp", "nsp_weights"}


def test_the_border_is_any_sentence_end():
    ids = np.array([10, STOP, 11, 12, STOP, 13, STOP])
    batch = NextSentence().collate([row(ids, key=k, other=[7, 7, 7]) for k in range(300)], vocab(), rng(), 10)
    cuts = [len(stretches(batch, b)[0]) for b in range(300)]
    assert sorted(set(cuts)) == [2, 5]
    assert cuts.count(2) / 300 == pytest.approx(0.5, abs=0.12)


def test_without_a_sentence_end_the_middle_is_the_border():
    rows = [row([10, 11, 12, 13, 14, 15], key=k, other=range(20, 30)) for k in range(9)]
    batch = NextSentence().collate(rows, vocab(), rng(), 9)
    assert {len(stretches(batch, b)[0]) for b in range(9)} == {3}
    assert {x for b in range(9) for x in stretches(batch, b)[1]} == {13, 14, 15, 25, 26, 27}


def test_neither_length_nor_ending_gives_the_answer_away():
    """Half of the rows end with a sentence; a stranger cut anywhere would do so in 5 % of cases only."""
    mine = [[*text(59, i, stop=0.05), [STOP, 9][i % 2]] for i in range(600)]
    rows = [row(ids, key=i, other=text(400, i + 5000, stop=0.05)) for i, ids in enumerate(mine)]
    batch = NextSentence().collate(rows, vocab(), rng(), 63)
    second = [stretches(batch, b)[1] for b in range(600)]
    answer = batch["nsp"].numpy() == 1
    ended = np.array([s[-1] == STOP for s in second])
    assert ended[answer].mean() == pytest.approx(ended[~answer].mean(), abs=0.2)
    cut = ~ended & answer
    assert all(len(second[b]) + len(stretches(batch, b)[0]) == 60 for b in np.flatnonzero(cut))


@pytest.mark.parametrize("other", [None, []])
def test_without_a_partner_the_row_weighs_nothing_and_is_not_wrong(other):
    rows = [row(text(20, k), key=k, other=other) for k in range(20)]
    batch = NextSentence().collate(rows, vocab(), rng(), 23)
    assert NextSentence().count(batch).item() == 0 and batch["nsp"].sum() == 0
    for b in range(20):
        first, second = stretches(batch, b)
        assert first + second == rows[b]["ids"].tolist()


@pytest.mark.parametrize("objective", [NextSentence(), SentenceOrder()])
def test_one_token_cannot_be_cut(objective):
    batch = objective.collate([row([9], other=[8, 7])], vocab(), rng(), 6)
    assert batch["ids"].tolist() == [[CLS, 9, SEP, PAD, PAD, PAD]]
    assert objective.count(batch).item() == 0


def test_sentence_order_by_brute_force():
    rows = [row(text(30 + k % 9, k), key=k) for k in range(400)]
    batch = SentenceOrder().collate(rows, vocab(), rng(), 50)
    for b, r in enumerate(rows):
        first, second = stretches(batch, b)
        assert first and second
        assert (second + first if batch["sop"][b] else first + second) == r["ids"].tolist()
    assert batch["sop"].double().mean() == pytest.approx(0.5, abs=0.1)
    assert SentenceOrder().count(batch).item() == 400


@pytest.mark.parametrize("a", range(0, 9))
@pytest.mark.parametrize("b", range(0, 9))
def test_truncation_takes_from_the_longer(a, b):
    for room in range(2, 12):
        x, y = a, b
        while x + y > room:
            x, y = (x - 1, y) if x > y else (x, y - 1)
        assert _fit(a, b, room) == (x, y)


def test_truncation_keeps_the_border():
    rows = [row([10, 11, 12, 13, STOP, 15, 16, 17, 18, 19], key=k) for k in range(8)]
    batch = SentenceOrder().collate(rows, vocab(), rng(), 9)
    assert {tuple(map(tuple, stretches(batch, b))) for b in range(8)} == {
        ((12, 13, STOP), (15, 16, 17)), ((17, 18, 19), (10, 11, 12))}


def test_full_rows_need_no_positions():
    batch = SentenceOrder().collate([row(text(7, 1)), row(text(7, 2))], vocab(), rng(), 10)
    assert set(batch) == {"ids", "types", "sop", "sop_weights"}


def test_marks_that_are_there_are_not_doubled():
    bare = [row(text(20, k), key=k, other=text(20, k + 50)) for k in range(20)]
    marked = [row([CLS, *r["ids"], SEP], key=k, other=[CLS, *r["other"], SEP]) for k, r in enumerate(bare)]
    for name, column in NextSentence().collate(bare, vocab(), rng(), 24).items():
        assert torch.equal(column, NextSentence().collate(marked, vocab(), rng(), 24)[name])


@pytest.mark.parametrize(("objective", "name"), [(NextSentence(), "nsp"), (SentenceOrder(), "sop")])
def test_loss_is_cross_entropy_and_any_split_gives_the_same(objective, name):
    rows = [row(text(9, k), key=k, other=text(9, k + 50) if k % 3 else None) for k in range(9)]
    batch, logits = objective.collate(rows, vocab(), rng(), 12), torch.randn(9, 2, generator=torch.manual_seed(0))
    kept = batch[f"{name}_weights"] > 0
    expected = functional.cross_entropy(logits[kept], batch[name][kept], reduction="sum")
    torch.testing.assert_close(objective.loss({name: logits}, batch), expected[None])
    assert objective.count(batch).item() == kept.sum()
    parts = [objective.collate(rows[i : i + 2], vocab(), rng(), 12) for i in range(0, 9, 2)]
    for column in ("ids", "types", name, f"{name}_weights"):
        assert torch.equal(torch.cat([p[column] for p in parts]), batch[column])


@pytest.mark.parametrize("objective", [NextSentence(), SentenceOrder()])
def test_packed_rows_are_refused(objective):
    assert not objective.packs
    with pytest.raises(ConfigError, match="pack: false"):
        objective.collate([row(text(5), text(5), other=text(5))], vocab(), rng(), 20)


def test_a_tokenizer_without_marks_is_refused():
    with pytest.raises(IncompatibleError, match=r"\[CLS\]"):
        SentenceOrder().collate([row(text(6))], vocab(cls=None), rng(), 9)
