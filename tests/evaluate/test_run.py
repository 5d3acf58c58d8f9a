"""`danlu eval` against the same figures computed with transformers, one document at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from danlu import cli
from danlu.data.kinds import BPE, WordPiece
from danlu.data.tokenizer import Tokenizer, train
from danlu.errors import ConfigError, DataError
from danlu.evaluate import run as evaluation
from danlu.evaluate import tradeoff
from danlu.evaluate.score import Document, score
from danlu.evaluate.subject import open_subject
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.objectives import CausalLM

TEXTS = [
    "The furnace is hot. The furnace was cold before.", "丹炉很热。丹炉以前很冷。", "ab", "x",
    "A long line that does not fit into one row of the model, and so is cut into pieces that share one token: " * 3,
    *(f"Line {n} says {n * n} and nothing more." for n in range(12)),
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = train(TEXTS * 2, BPE.model_validate({"vocab": 320}))
    tokenizer.save(folder / "tokenizer")
    cfg = Decoder.model_validate({"width": 32, "layers": 2, "heads": 2, "context": 64, "vocab": tokenizer.size,
                                  "init_std": 0.3})
    model = build(cfg, "cpu").init(1)
    weights.save(folder / "model", model, tokenizer=folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with both heads, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train(TEXTS * 2, WordPiece.model_validate({"vocab": 200}))
    tokenizer.save(folder / "tokenizer")
    cfg = Encoder.model_validate({"width": 32, "layers": 2, "heads": 2, "context": 64, "init_std": 0.3}).filled(
        vocab=tokenizer.size, heads=("mlm", "nsp"))
    weights.save(folder / "model", build(cfg, "cpu").init(1), tokenizer=folder / "tokenizer")
    return folder / "model"


def held_out(folder: Path) -> Path:
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS), encoding="utf-8")
    return path


def brute(folder: Path, text: str, length: int) -> tuple[float, int, int]:
    """Return (nats, tokens, bytes of them), every token after the first from what stands before it in its piece."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    nats = 0.0
    for start in range(0, len(ids) - 1, length):
        piece = torch.tensor([ids[start : start + length + 1]])
        with torch.no_grad():
            logits = model(piece[:, :-1]).logits[0]
        nats += float(functional.cross_entropy(logits.double(), piece[0, 1:], reduction="sum"))
    first = tokenizer.convert_ids_to_tokens(ids[0])          # byte-level: one letter for each byte
    return nats, len(ids) - 1, len(text.encode()) - len(first)


def test_a_decoder_scores_as_transformers_says(decoder: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "result.json", str(held_out(tmp_path))
    code = cli.main(["eval", str(decoder), "--data", data, "--length", "32", "--out", str(out), "--json",
                     "--samples", str(tmp_path / "samples.jsonl")])
    printed = json.loads(capsys.readouterr().out)
    found = json.loads(out.read_text())
    each = [brute(decoder, text, 32) for text in TEXTS]
    nats, tokens, size = (sum(column) for column in zip(*each, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{data}:{n + 1}" for n in range(len(TEXTS))]
    assert [line["loss"] for line in lines] == pytest.approx([one[0] / one[1] for one in each], rel=1e-4)
    assert [(line["predicted"], line["bytes"]) for line in lines] == [one[1:] for one in each]
    figures = found["results"]["heldout"]
    assert code == 0 and printed["results"] == found["results"]
    assert figures["loss,none"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity,none"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert figures["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["facts"]["heldout"]["first_tokens"] == len(TEXTS)
    for name in ("loss", "perplexity", "bits_per_byte"):
        low, high = found["intervals"]["heldout"][name]
        assert low < figures[f"{name},none"] < high and figures[f"{name}_stderr,none"] > 0


def test_every_token_is_predicted_once_however_rows_are_cut(decoder: Path) -> None:
    subject = open_subject(decoder)
    ids = subject.tokenizer.encode(TEXTS[4])
    for length in (7, 16, 64):
        tally = score(subject.model, subject.tokenizer, [Document(ids, len(TEXTS[4]))], CausalLM(), length=length,
                      device=torch.device("cpu"))
        assert sum(tally.counts["loss"]) == len(ids) - 1
        assert len(tally.document) == math.ceil((len(ids) - 1) / length)
        assert tally.unit == "pieces"


def test_bos_gives_the_first_token_something_to_stand_on(decoder: Path) -> None:
    subject = open_subject(decoder)
    ids = np.concatenate([[subject.tokenizer.special.eos], subject.tokenizer.encode("ab")])
    tally = score(subject.model, subject.tokenizer, [Document(ids, 2)], CausalLM(), length=16,
                  device=torch.device("cpu"))
    assert (tally.first, tally.bytes) == (0, [2])


def test_weights_of_zero_are_not_counted_and_bytes_mean_nothing_then(decoder: Path) -> None:
    subject = open_subject(decoder)
    ids = subject.tokenizer.encode(TEXTS[0])
    learn = np.ones(len(ids), np.float32)
    learn[:5] = 0
    tally = score(subject.model, subject.tokenizer, [Document(ids, 50, learn)] * 12, CausalLM(), length=32,
                  device=torch.device("cpu"))
    assert sum(tally.counts["loss"]) == 12 * (len(ids) - 5)
    assert "bits_per_byte" not in tally.estimates()


def test_an_encoder_scores_as_transformers_says(encoder: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches that are scored go through transformers too."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForPreTraining.from_pretrained(encoder).eval()
    seen, totals = [], dict.fromkeys(("mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"), np.zeros(2))
    real = evaluation.score.__globals__["_measured"]
    monkeypatch.setitem(evaluation.score.__globals__, "_measured",
                        lambda m, o, batch: seen.append(batch) or real(m, o, batch))
    result = evaluation.evaluate(open_subject(encoder), evaluation.read_text(
        str(held_out(tmp_path)), Tokenizer.load(encoder), sample_by="line", text="text"), task="t", length=32)
    for batch in seen:
        attend = batch["segments"] > 0 if "segments" in batch else torch.ones_like(batch["ids"])
        with torch.no_grad():
            out = model(batch["ids"], attention_mask=attend.long(), token_type_ids=batch["types"])
        learned = batch["weights"] > 0
        for name, logits, labels, counts in (
                ("mlm", out.prediction_logits[learned], batch["labels"][learned], torch.ones(int(learned.sum()))),
                ("nsp", out.seq_relationship_logits, batch["nsp"], batch["nsp_weights"])):
            loss = functional.cross_entropy(logits, labels, reduction="none") * counts
            right = (logits.argmax(-1) == labels) * counts
            for kind, values in (("loss", loss), ("accuracy", right)):
                totals[f"{name}_{kind}"] = totals[f"{name}_{kind}"] + np.array([float(values.sum()), float(counts.sum())])
    found = result.tally.estimates()
    for name, (total, count) in totals.items():
        assert found[name].value == pytest.approx(total / count, rel=1e-4), name
    assert totals["nsp_loss"][1] >= 12 and totals["mlm_loss"][1] > 20


def test_refusals_name_the_remedy(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="context"):
        evaluation.evaluate(open_subject(decoder), iter([]), task="t", length=65)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        open_subject(decoder).held_out()
    (tmp_path / "one.txt").write_text("")
    with pytest.raises(DataError, match="no token"):
        evaluation.evaluate(open_subject(decoder), evaluation.read_text(
            str(tmp_path / "one.txt"), Tokenizer.load(decoder), sample_by="line", text="text"), task="t")


def test_the_table_says_what_it_rests_on(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(decoder), "--data", str(held_out(tmp_path)), "--length", "32"]) == 0
    shown = capsys.readouterr().out
    assert "bits per byte" in shown and f"{len(TEXTS)} documents" in shown and "first tokens" in shown


def test_results_of_one_name_are_told_apart() -> None:
    assert evaluation.told_apart(["d", "e", "d"], ["val", "val", "test"]) == ["d-val", "e", "d-test"]
    assert evaluation.told_apart(["d", "d"], ["val", "val"]) == ["d-val", "d-val-2"]


def test_smaller_models_are_ranked_by_what_all_errors_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"precision_macro": 1.0, "recall_macro": 0.1, "f1_macro": 0.2}
    found = SimpleNamespace(judged=SimpleNamespace(figures=figures))
    monkeypatch.setattr(tradeoff.rows, "judged_on", lambda *given: found)
    monkeypatch.setattr(tradeoff.rows, "task_of", lambda *given: None)
    subject: Any = SimpleNamespace(cfg=SimpleNamespace(tasks=("a",)))
    assert tradeoff.judged(subject, "x", tradeoff.rows.How()) == ("f1_macro", 0.2)
