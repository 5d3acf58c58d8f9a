"""Classification with adapters, from a file of rows to predictions: the head travels with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from evaluate import small

from danlu import cli
from danlu.adapt import folder
from danlu.data.kinds import WordPiece
from danlu.data.tokenizer import train
from danlu.models import weights
from danlu.models.build import build
from danlu.models.encoder import Encoder
from danlu.train import checkpoint


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT for hidden words: it has no pooler, which a classifier needs."""
    path = tmp_path_factory.mktemp("bert")
    tokenizer = train([text for text, _label in small.texts(60, 0, 3)], WordPiece.model_validate({"vocab": 200}))
    tokenizer.save(path / "tokenizer")
    cfg = Encoder.model_validate({"width": 32, "layers": 2, "heads": 2, "context": 64, "init_std": 0.1, "outputs": ("mlm",)})
    weights.save(path / "model", build(cfg.filled(vocab=tokenizer.size), "cpu").init(1), tokenizer=path / "tokenizer")
    return path / "model"


@pytest.mark.parametrize("adapt", [
    {"kind": "lora", "rank": 4, "target": ["query", "value"]}, {"kind": "prompt", "tokens": 4}, {"kind": "prefix", "tokens": 4},
    {"kind": "bottleneck", "reduction": 4}, {"kind": "bitfit"}], ids=lambda a: a["kind"])
def test_from_rows_to_predictions(start: Path, tmp_path: Path, adapt: dict[str, Any]) -> None:
    data = small.table(tmp_path / "train.csv", ["text", "label"], small.texts(240, 1))
    new = small.table(tmp_path / "new.csv", ["text"], [[text] for text, _label in small.texts(10, 2)])
    run = small.trained(tmp_path, start, str(data), adapt=adapt, guard={"reload": True}, optim={"kind": "adamw", "lr": 1e-2})
    last = checkpoint.chosen(run)
    stored = folder.tensors(folder.describe(last))
    assert {"pooler.weight", "heads.classify.out.weight"} <= stored.keys(), "what the base lacks is trained and kept"
    assert folder.read_config(last).tasks[0].labels == ("bad", "good")
    assert cli.main(["eval", str(run), "--out", str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["results"]
    assert cli.main(["predict", str(run), "--data", str(new), "--out", str(tmp_path / "said.jsonl")]) == 0
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 10
    if adapt["kind"] not in ("lora", "prompt", "prefix"):
        return
    base = transformers.AutoModelForSequenceClassification.from_pretrained(start, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, last).eval()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        ours = checkpoint.load_model(run)(ids)["classify"]
        torch.testing.assert_close(theirs(input_ids=ids, attention_mask=torch.ones(1, 12)).logits, ours, atol=1e-5, rtol=0)


def test_a_classifier_is_merged(start: Path, tmp_path: Path) -> None:
    data = small.table(tmp_path / "train.csv", ["text", "label"], small.texts(60, 1))
    run = small.trained(tmp_path, start, str(data), adapt="lora", steps=5)
    assert cli.main(["merge", str(run)]) == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, checkpoint.load_model(run)(ids)["classify"], atol=1e-5, rtol=0)
