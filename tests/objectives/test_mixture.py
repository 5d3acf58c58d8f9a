"""A mixture is the weighted sum of its parts, over the same rows."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from danlu import config
from danlu.errors import ConfigError
from danlu.objectives import CausalLM, MaskedLM, Mixture, NextSentence, Objectives, Part, SentenceOrder
from tests.objectives.small import CLS, SEP, rng, row, text, vocab

BERT = Mixture(parts=(Part(objective=MaskedLM()), Part(objective=NextSentence(), weight=0.5)))
ALBERT = Mixture(parts=(Part(objective=SentenceOrder()), Part(objective=MaskedLM(rate=0.3))))
THREE = Mixture(parts=(Part(objective=NextSentence()), Part(objective=SentenceOrder()), Part(objective=MaskedLM())))


class Recipe(config.Model):
    """A recipe with nothing but an objective."""

    objective: Objectives = CausalLM()


def rows(count, length=40):
    return [row(text(length, k), key=k, other=text(length, k + 999)) for k in range(count)]


def test_facts_are_derived_from_the_parts():
    assert (BERT.terms, BERT.scales, BERT.heads) == (("mlm", "nsp"), (1.0, 0.5), ("mlm", "nsp"))
    assert BERT.inputs == ("ids", "positions", "segments", "labels", "weights", "types")
    assert BERT.room(128) == (128, 0, 3) and BERT.partner and not BERT.packs
    assert ALBERT.terms == ("sop", "mlm") and not ALBERT.partner
    alone = Mixture(parts=(Part(objective=CausalLM(z_loss=0.1), weight=3),))
    assert alone.scales == (3.0, pytest.approx(0.3)) and alone.room(8) == (9, 1, 0) and alone.packs


@pytest.mark.parametrize("mixture", [BERT, ALBERT])
def test_masks_lie_over_the_pairs(mixture):
    pair, masked = sorted((p.objective for p in mixture.parts), key=lambda o: o.terms == ("mlm",))
    both, plain = (o.collate(rows(50), vocab(), rng(), 43) for o in (mixture, pair))
    name = pair.terms[0]
    for column in ("types", name, f"{name}_weights"):
        assert torch.equal(both[column], plain[column])
    hidden = both["weights"] > 0
    assert torch.equal(torch.where(hidden, both["labels"], both["ids"]), plain["ids"])
    assert not ((plain["ids"] == CLS) | (plain["ids"] == SEP))[hidden].any()
    assert hidden.sum() / (50 * 40) == pytest.approx(masked.rate, rel=0.15)


def test_two_pair_objectives_take_turns():
    batch = THREE.collate(rows(300), vocab(), rng(), 43)
    nsp, sop = batch["nsp_weights"], batch["sop_weights"]
    assert ((nsp > 0) ^ (sop > 0)).all()
    assert nsp.mean() == pytest.approx(0.5, abs=0.12)
    assert THREE.count(batch).tolist() == [nsp.sum(), sop.sum(), batch["weights"].sum()]
    alone = {"nsp": NextSentence(), "sop": SentenceOrder()}
    whole = torch.where(batch["weights"] > 0, batch["labels"], batch["ids"])
    for name, objective in alone.items():
        expected, mine = objective.collate(rows(300), vocab(), rng(), 43), batch[f"{name}_weights"] > 0
        assert torch.equal(whole[mine], expected["ids"][mine])
        assert torch.equal(batch[name][mine], expected[name][mine])


def test_loss_and_count_stand_in_the_order_of_terms():
    batch = BERT.collate(rows(4), vocab(), rng(), 43)
    index = batch["weights"].flatten().nonzero().flatten()
    out = {"mlm": SimpleNamespace(logp=torch.full((len(index),), -2.0), index=index), "nsp": torch.zeros(4, 2)}
    torch.testing.assert_close(BERT.loss(out, batch), torch.tensor([2.0 * len(index), 4 * math.log(2)]))
    assert BERT.count(batch).tolist() == [len(index), 4]
    assert BERT.enrich(batch, {}) is batch


def test_any_split_gives_the_same_columns():
    whole = THREE.collate(rows(9), vocab(), rng(), 50)
    parts = [THREE.collate(rows(9)[i : i + 4], vocab(), rng(), 50) for i in range(0, 9, 4)]
    for name, column in whole.items():
        assert torch.equal(torch.cat([p[name] for p in parts]), column)


def test_pairs_without_masks_carry_no_labels():
    both = Mixture(parts=("next_sentence", "sentence_order"))
    batch = both.collate(rows(3), vocab(), rng(), 43)
    assert set(batch) == {"ids", "types", "nsp", "nsp_weights", "sop", "sop_weights"}


@pytest.mark.parametrize("other", ["masked_lm", "next_sentence", "sentence_order"])
def test_causal_and_masked_do_not_mix(other):
    with pytest.raises(ValidationError, match="one model cannot learn both"):
        Mixture(parts=("causal_lm", other))


def test_one_kind_twice_is_refused():
    with pytest.raises(ValidationError, match="masked_lm stands twice"):
        Mixture(parts=("masked_lm", "masked_lm"))
    with pytest.raises(ValidationError):
        Mixture(parts=())


@pytest.mark.parametrize("text", [
    "objective: [masked_lm, next_sentence]",
    "objective: [{kind: masked_lm}, {objective: {kind: next_sentence}, weight: 1}]",
    "objective: {kind: mixture, parts: [masked_lm, next_sentence]}",
    "objective: {kind: mixture, parts: [{objective: {kind: masked_lm}, weight: 1}, {objective: next_sentence}]}",
    "objective: {kind: mixture, parts: [{objective: masked_lm}, {objective: next_sentence}]}",
])
def test_yaml_forms_of_a_mixture(text, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(text)
    read = config.load(Recipe, tmp_path / "run.yaml").objective
    assert read == Mixture(parts=(Part(objective=MaskedLM()), Part(objective=NextSentence())))
    assert config.validate(Recipe, config.dump(Recipe(objective=read))).objective == read


def test_yaml_form_of_a_single_objective(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("objective: sentence_order")
    assert config.load(Recipe, tmp_path / "run.yaml").objective == SentenceOrder()
    assert TypeAdapter(Objectives).validate_python({"kind": "causal_lm", "smoothing": 0.1}) == CausalLM(smoothing=0.1)


def test_yaml_errors_name_the_key(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("objective: [causal_lm, masked_lm]")
    with pytest.raises(ConfigError, match="one model cannot learn both"):
        config.load(Recipe, tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("objective: {kind: masked_lm, rat: 0.2}")
    with pytest.raises(ConfigError, match="did you mean 'rate'"):
        config.load(Recipe, tmp_path / "run.yaml")
