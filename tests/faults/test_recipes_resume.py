"""Every shipped recipe, killed at three random steps, ends with the weights of the uninterrupted run; BERT's both losses fall."""

from __future__ import annotations

import json
import random
import re
import signal
from pathlib import Path
from pydoc_data import topics

import pytest
from cli import danlu, weights_hash

RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = 24
# recipe: (what prepares its data, what makes it small)
SMALL = {
    "pretrain-gpt": ("corpus", ["model={kind: decoder, family: llama, width: 48, layers: 2, heads: 2, context: 64}",
                                "length=64"]),
    "pretrain-bert": ("corpus-bert", ["model={kind: encoder, preset: bert-tiny}", "length=64"]),
    "shakespeare-char": ("shakespeare", ["model.layers=1", "schedule.warmup=2"]),
    "shakespeare-muon": ("shakespeare", ["model.layers=1", "schedule.warmup=2"]),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data of each recipe, from Python's own help pages."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [text for _name, text in sorted(topics.topics.items())]
    (folder / "topics.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    plain = re.sub(r"[^a-z .\n]", "", "\n".join(texts).lower())     # few characters, so that the end holds no new one
    (folder / "play.txt").write_text(plain[:200_000], encoding="utf-8")
    out = {}
    for name, source, more in (("corpus", "topics.jsonl", ["tokenizer.vocab=1024", "split.val=0.1"]),
                               ("corpus-bert", "topics.jsonl", ["tokenizer.vocab=1024", "split.val=0.1"]),
                               ("shakespeare", "play.txt", [])):
        out[name] = folder / name
        ended = danlu("prepare", RECIPES / f"{name}.yaml", f"out={out[name]}",
                      f"inputs=[{{path: {folder / source}, sample_by: document}}]", *more)
        assert ended.code == 0, ended.err
    return out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(SMALL))
def test_killed_three_times_it_ends_with_the_same_weights(recipe: str, prepared: dict[str, Path], tmp_path: Path) -> None:
    data, smaller = SMALL[recipe]
    words = ["train", RECIPES / f"{recipe}.yaml", f"data={prepared[data]}", *smaller, f"steps={STEPS}", "rows=4", "threads=1",
             "every={log: 1, evaluate: 8, save: 3}"]
    assert danlu(*words, f"out={tmp_path / 'whole'}").clean().code == 0
    draw = random.Random(recipe)
    killed = tmp_path / "killed"
    for _kill in range(3):
        # the n-th visit of this attempt: an attempt goes on from the newest checkpoint, so it may end before the n-th
        ended = danlu(*words, f"out={killed}", fault=f"train.step:kill:{draw.randint(2, 7)}")
        assert ended.code in (0, -signal.SIGKILL), ended.err
    assert danlu(*words, f"out={killed}").clean().code == 0
    assert weights_hash(killed) == weights_hash(tmp_path / "whole")


@pytest.mark.slow
def test_both_losses_of_bert_fall(prepared: dict[str, Path], tmp_path: Path) -> None:
    ended = danlu("train", RECIPES / "pretrain-bert.yaml", f"data={prepared['corpus-bert']}", f"out={tmp_path / 'bert'}",
                  "model={kind: encoder, preset: bert-tiny}", "length=64", "steps=500", "rows=32", "optim.lr=2e-3",
                  "every={log: 50, evaluate: 100, save: 0}", timeout=900)
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in (tmp_path / "bert" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval/mlm_loss" in line]
    assert measured[-1]["eval/mlm_loss"] < measured[0]["eval/mlm_loss"] - 1.0
    assert min(line["eval/nsp_loss"] for line in measured) < 0.69 < measured[0]["eval/nsp_loss"]
