"""Heads of tasks against transformers: the same folders, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from danlu.models import weights
from danlu.models.build import Config, build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.nn.tasks import Head

LABELS = ("bad", "good", "so-so")
ROWS, TOKENS, VOCAB = 3, 7, 50


def encoder(family: str, head: Head) -> Encoder:
    return Encoder.model_validate({"family": family, "vocab": VOCAB, "width": 16, "layers": 2, "heads": 2, "context": 32,
                                   "outputs": (), "tasks": (head,)})


def decoder(family: str, head: Head) -> Decoder:
    return Decoder.model_validate({"family": family, "vocab": VOCAB, "width": 16, "layers": 2, "heads": 2, "context": 32,
                                   "lm": False, "tasks": (head,)})


CASES: list[tuple[str, Config]] = [
    *((f"{family} {kind}", encoder(family, Head.model_validate({"kind": kind, "labels": LABELS if kind in ("classify", "tag")
                                                               else ()})))
      for family in ("bert", "roberta") for kind in ("classify", "tag", "answer")),
    *((f"{family} {kind}", decoder(family, Head.model_validate({"kind": kind, "labels": LABELS})))
      for family in ("gpt2", "llama", "qwen2", "mistral") for kind in ("classify", "tag")),
    *((f"{family} answer", decoder(family, Head(kind="answer"))) for family in ("gpt2", "llama", "qwen2", "qwen3", "mistral")),
]
OUT = {"classify": "logits", "tag": "logits", "answer": "start_logits"}
AUTO: dict[str, Any] = {
    "classify": transformers.AutoModelForSequenceClassification, "tag": transformers.AutoModelForTokenClassification,
    "answer": transformers.AutoModelForQuestionAnswering}


@pytest.mark.parametrize(("name", "cfg"), CASES, ids=[name for name, _cfg in CASES])
def test_transformers_opens_what_is_written_and_says_the_same(name: str, cfg: Config, tmp_path: Path) -> None:
    model = build(cfg).to_empty(device="cpu").init(0).eval()
    kind = cfg.tasks[0].kind
    for parameter in model.parameters():                  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    weights.save(tmp_path / "hf", model)
    theirs, told = AUTO[kind].from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    ids = torch.randint(2, VOCAB, (ROWS, TOKENS))
    theirs.eval().config.pad_token_id = 0
    with torch.no_grad():
        ours, other = model(ids)[kind], theirs(input_ids=ids, attention_mask=torch.ones_like(ids))
    if kind == "answer":
        torch.testing.assert_close(ours[..., 1], other["end_logits"], atol=1e-5, rtol=1e-5)
        ours = ours[..., 0]
    torch.testing.assert_close(ours, other[OUT[kind]], atol=1e-5, rtol=1e-5)
    if kind in ("classify", "tag"):
        assert tuple(theirs.config.id2label.values()) == LABELS
    again = weights.load(tmp_path / "hf")
    assert again.cfg.tasks == cfg.tasks and all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_decoder_reads_the_last_token_of_each_row() -> None:
    model = build(decoder("llama", Head(labels=LABELS))).to_empty(device="cpu").init(0).eval()
    ids = torch.randint(0, VOCAB, (2, 9))
    segments = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
    said = model(ids, segments=segments, ends=torch.tensor([4, 8]))["classify"]
    torch.testing.assert_close(said[:1], model(ids[:1, :5])["classify"])
    torch.testing.assert_close(said[1:], model(ids[1:])["classify"])


@pytest.mark.parametrize("heads", [(Head(labels=LABELS), Head(kind="tag", labels=("O", "B-X"), name="names")),
                                   (Head(name="mood", problem="regression"), Head(kind="embed"))])
def test_several_heads_are_written_and_read(heads: tuple[Head, ...], tmp_path: Path) -> None:
    for number, cfg in enumerate((encoder("bert", heads[0]).with_tasks(heads), decoder("llama", heads[0]).with_tasks(heads))):
        model = build(cfg).to_empty(device="cpu").init(0)
        weights.save(tmp_path / str(number), model)
        again = weights.load(tmp_path / str(number))
        assert again.cfg.tasks == heads and again.state_dict().keys() == model.state_dict().keys()
