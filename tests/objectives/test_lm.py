"""Labels by brute force, torch's own cross-entropy, and a million tokens counted."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from danlu.errors import IncompatibleError
from danlu.objectives import CausalLM, MaskedLM
from tests.objectives.small import CLS, MASK, PAD, SEP, SIZE, STOP, rng, row, text, vocab


def scores(logits, batch):
    """Return what a head returns, the long way."""
    index = batch["weights"].flatten().nonzero().flatten()
    logp = logits.flatten(0, 1)[index].log_softmax(-1)
    return SimpleNamespace(
        logp=logp.gather(1, batch["labels"].flatten()[index][:, None])[:, 0], mean=logp.mean(-1),
        logz=logits.flatten(0, 1)[index].logsumexp(-1), index=index,
    )


def test_causal_labels_by_brute_force():
    weights = [1, 0, 2, 1, 1, 0.5]
    rows = [row(text(5, 1), text(4, 2)), row(text(10, 3)), row([7]), row(text(3, 4), [8], text(2, 5), weights=weights)]
    batch = CausalLM().collate(rows, vocab(), rng(), 9)
    for b, r in enumerate(rows):
        n = len(r["ids"])
        for t in range(9):
            seen = {c: column[b, t].item() for c, column in batch.items()}
            if t >= n - 1:
                assert seen == {"ids": PAD, "labels": -100, "weights": 0, "positions": 0, "segments": 0}
                continue
            same = r["segments"][t] == r["segments"][t + 1]
            weight = r["weights"][t + 1] if same else 0
            begin = int(np.flatnonzero(r["segments"] == r["segments"][t])[0])
            assert seen == {
                "ids": r["ids"][t], "labels": r["ids"][t + 1] if weight else -100, "weights": weight,
                "positions": t - begin, "segments": r["segments"][t],
            }
    assert batch["ids"].dtype == batch["labels"].dtype == batch["positions"].dtype == torch.int64
    assert (batch["weights"].dtype, batch["segments"].dtype) == (torch.float32, torch.int32)


def test_causal_full_rows_need_no_positions():
    batch = CausalLM().collate([row(text(9, 1)), row(text(9, 2))], vocab(), rng(), 8)
    assert set(batch) == {"ids", "labels", "weights"}
    assert {"positions", "segments"} <= set(CausalLM().collate([row(text(5, 1), text(4, 2))], vocab(), rng(), 8))


def test_pieces_of_a_split_document_teach_each_token_once():
    ids, length = text(30, 1), 8
    _, overlap, _ = CausalLM().room(length)
    pieces = [row(ids[i : i + length + 1]) for i in range(0, 29, length + 1 - overlap)]
    batch = CausalLM().collate(pieces, vocab(), rng(), length)
    assert batch["labels"][batch["weights"] > 0].tolist() == ids[1:].tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_causal_loss_is_torch_cross_entropy(smoothing):
    torch.manual_seed(0)
    rows = [row(text(9, 1), text(4, 2)), row(text(6, 3), weights=[1, 1, 0, .5, 2, 1])]
    objective = CausalLM(smoothing=smoothing, z_loss=1e-3)
    batch, logits = objective.collate(rows, vocab(), rng(), 12), torch.randn(2, 12, SIZE)
    each = functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"], label_smoothing=smoothing, reduction="none")
    z = logits.logsumexp(-1).square()
    expected = torch.stack([(each * batch["weights"]).sum(), (z * batch["weights"]).sum()])
    torch.testing.assert_close(objective.loss({"lm": scores(logits, batch)}, batch), expected)
    assert (objective.terms, objective.scales) == (("lm", "z"), (1.0, 1e-3))
    assert objective.count(batch).tolist() == [batch["weights"].sum().item()] * 2
    assert objective.count(batch).dtype == torch.float64


def test_masked_rates_over_a_million_tokens():
    rows = [row(text(510, i), key=i) for i in range(1961)]
    batch = MaskedLM().collate(rows, vocab(), rng(), 512)
    chosen = batch["weights"] > 0
    labels, shown = batch["labels"][chosen], batch["ids"][chosen]
    total, n = sum(len(r["ids"]) for r in rows), int(chosen.sum())
    assert total > 1e6
    assert n / total == pytest.approx(0.15, rel=0.005)
    changed = (shown != MASK) & (shown != labels)
    by_chance = 1 / (SIZE - STOP)                               # a random token may be the same one
    assert (shown == MASK).sum() / n == pytest.approx(0.8, rel=0.005)
    assert changed.sum() / n == pytest.approx(0.1 * (1 - by_chance), rel=0.01)
    assert (shown == labels).sum() / n == pytest.approx(0.1 + 0.1 * by_chance, rel=0.01)
    assert shown[changed].min() >= STOP                         # never a special token
    assert len(shown[changed].unique()) == SIZE - STOP          # and every other one
    where = chosen.sum(0)[1:511] / len(rows)                    # each place is as likely: 6 standard deviations
    assert (where - 0.15).abs().max() < 6 * (0.15 * 0.85 / len(rows)) ** 0.5


@pytest.mark.parametrize("length", [3, 7, 62, 63])
@pytest.mark.parametrize("whole_word", [False, True])
def test_masked_rate_has_no_rounding_bias(length, whole_word):
    rows = [row(text(length, i), key=i) for i in range(3000)]
    batch = MaskedLM(whole_word=whole_word).collate(rows, vocab(), rng(), length + 2)
    per_row = (batch["weights"] > 0).sum(1).double()
    assert per_row.min() >= 1
    if 0.15 * length >= (2 if whole_word else 1):            # "at least one" shows below
        assert per_row.mean() == pytest.approx(0.15 * length, rel=0.02)
    if not whole_word:
        assert per_row.max() - per_row.min() <= 1


def test_masked_marks_and_labels_by_brute_force():
    rows = [row(text(5, 1), text(4, 2), key=1), row(text(11, 3), key=2), row([9], key=3)]
    batch = MaskedLM(rate=0.5).collate(rows, vocab(), rng(), 13)
    for b, r in enumerate(rows):
        full = [(i, s, p) for s in range(1, r["segments"].max() + 1)
                for p, i in enumerate([CLS, *r["ids"][r["segments"] == s], SEP])]
        full += [(PAD, 0, 0)] * (13 - len(full))
        for t, (i, s, p) in enumerate(full):
            learned = batch["weights"][b, t] > 0
            assert (batch["segments"][b, t], batch["positions"][b, t]) == (s, p)
            assert batch["labels"][b, t] == (i if learned else -100)
            assert learned or batch["ids"][b, t] == i
            assert not learned or i >= STOP


def test_masked_full_rows_need_no_positions():
    batch = MaskedLM().collate([row(text(6, 1)), row(text(6, 2))], vocab(), rng(), 8)
    assert set(batch) == {"ids", "labels", "weights"}


def test_marks_that_are_there_are_not_doubled():
    bare, marked = text(6, 1), [CLS, *text(6, 1), SEP]
    mixed = [row(bare, [CLS, *text(3, 2)]), row(marked, [*text(3, 2), SEP]), row(bare, text(3, 2))]
    a, b, c = MaskedLM().collate(mixed, vocab(), rng(), 16)["ids"]
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, c)


def test_masked_respects_weights_and_special_tokens():
    ids = np.where(np.arange(400) % 4 == 0, SEP + 1, text(400, 1))
    weights = (np.arange(400) % 3 > 0) * 0.5
    batch = MaskedLM(rate=0.9).collate([row(ids, weights=weights)], vocab(), rng(), 402)
    learned = batch["weights"][0, 1:401].numpy()
    assert not learned[weights == 0].any() and not learned[ids < STOP].any()
    assert set(learned.tolist()) == {0, 0.5}
    assert MaskedLM().count(batch).item() == learned.sum()
    none = MaskedLM().collate([row(ids, weights=np.zeros(400))], vocab(), rng(), 402)
    assert MaskedLM().count(none).item() == 0


def test_whole_words_go_together():
    rows = [row(text(60, i), text(50, i + 100), key=i) for i in range(200)]
    batch = MaskedLM(whole_word=True).collate(rows, vocab(), rng(), 128)
    words = 0
    for b, r in enumerate(rows):
        hidden = batch["weights"][b].numpy() > 0
        place = np.arange(110) + np.where(r["segments"] == 1, 1, 3)
        for t in range(1, 110):
            if r["ids"][t] % 3 == 0 and r["segments"][t] == r["segments"][t - 1]:       # not the start of a word
                assert hidden[place[t]] == hidden[place[t - 1]]
                words += hidden[place[t]]
    assert words > 100
    assert (batch["weights"] > 0).sum() / (200 * 110) == pytest.approx(0.15, rel=0.02)


def test_no_word_reaches_over_a_border():
    """Not into the next document, nor over a token that is only read, even if no token is said to begin a word."""
    nothing_begins = vocab(starts=np.zeros(SIZE, bool))
    rows = [row([10, 11], [12, 13], [14, 15, 16], weights=[1, 1, 1, 1, 1, 0, 1], key=k) for k in range(200)]
    batch = MaskedLM(whole_word=True, rate=0.4).collate(rows, nothing_begins, rng(), 13)
    hidden = batch["weights"].numpy() > 0
    words = hidden[:, [1, 2]], hidden[:, [5, 6]], hidden[:, [9]], hidden[:, [11]]
    assert all((word == word[:, :1]).all() for word in words)
    assert len(np.unique(np.concatenate([word[:, :1] for word in words], 1), axis=0)) > 5


@pytest.mark.parametrize("objective", [CausalLM(), MaskedLM(), MaskedLM(whole_word=True)])
def test_any_split_gives_the_same_columns(objective):
    rows = [row(text(5 + i, i), text(9 - i, i + 50), key=i) for i in range(8)]
    whole = objective.collate(rows, vocab(), rng(), 20)
    for cuts in ([0, 3, 8], [0, 1, 2, 7, 8]):
        parts = [objective.collate(rows[a:b], vocab(), rng(), 20) for a, b in pairwise(cuts)]
        for name, column in whole.items():
            assert torch.equal(torch.cat([p[name] for p in parts]), column)
        assert sum(objective.count(p) for p in parts) == objective.count(whole)
    longer = objective.collate(rows, vocab(), rng(), 31)
    assert torch.equal(longer["labels"][:, :20], whole["labels"])      # nor does the padding change the masks


def test_masks_depend_on_seed_and_key():
    one = MaskedLM().collate([row(text(60, 1), key=k) for k in (1, 2, 1)], vocab(), rng(), 62)["labels"]
    assert torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])
    assert not torch.equal(MaskedLM().collate([row(text(60, 1), key=1)], vocab(), rng(9), 62)["labels"][0], one[0])


def test_a_tokenizer_without_mask_is_refused():
    with pytest.raises(IncompatibleError, match=r"\[MASK\]"):
        MaskedLM().collate([row(text(6))], vocab(mask=None), rng(), 8)
    with pytest.raises(IncompatibleError, match=r"\[CLS\], \[SEP\]"):
        MaskedLM().collate([row(text(6))], vocab(cls=None, sep=None), rng(), 8)


def test_shares_above_one_are_refused():
    with pytest.raises(ValueError, match="more than 1"):
        MaskedLM(replace=0.8, random=0.3)
    assert MaskedLM(replace=0.9, random=0.1)


def test_without_pad_token_the_padding_is_id_0():
    batch = CausalLM().collate([row(text(4, 1))], vocab(pad=None), rng(), 6)
    assert batch["ids"][0, 3:].tolist() == [0, 0, 0] and batch["segments"][0].tolist() == [1, 1, 1, 0, 0, 0]
