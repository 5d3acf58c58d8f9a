"""Training with rounded weights: what it computes, what is stored, what quantising makes of it, and what it is good for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from cli import danlu
from torch import nn

from danlu import config
from danlu.adapt import QAT, folder
from danlu.compress.quantize import Quantize, quantize
from danlu.data.tokenizer import Tokenizer
from danlu.models import weights
from danlu.nn import packed, rounded
from danlu.nn.forms import Int4, Int8
from danlu.train import checkpoint
from danlu.train.recipe import Run
from danlu.train.run import train

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
sys.path.insert(0, str(Path(__file__).parent.parent / "compress"))
import several
import small

# up to 16 rows a packed layer has kernels that compute in bfloat16: with more, a pooler has the whole matrix, too
MANY = [{"ids": torch.randint(5, small.VOCAB, (20, 40), generator=torch.Generator().manual_seed(1))}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, rows, and a classifier and a decoder trained as usual."""
    home = tmp_path_factory.mktemp("qat")
    several.tokenizer(home / "tok")
    several.tokenizer(home / "bytes", "bpe")
    several.labelled(home / "mood.jsonl", 80)
    several.texts(home / "words.jsonl")
    train(learning(home, home / "dense", steps=30, model=several.ENCODER))
    return home


def learning(world: Path, out: Path, **changes: Any) -> Run:
    base: dict[str, Any] = {"objective": "classify", "tokenizer": str(world / "tok"),
                            "data": [{"path": str(world / "mood.jsonl")}]}
    if changes.get("objective") == "causal_lm":
        base |= {"tokenizer": str(world / "bytes"), "length": 48, "data": [{"path": str(world / "words.jsonl")}],
                 "model": several.DECODER}
    return several.recipe(out, **base | changes)


def test_rounding_is_torchs_own_fake_quantisation() -> None:
    weight = torch.randn(6, 40, requires_grad=True)
    found = rounded.straight(weight, Int8())
    scales = weight.detach().abs().amax(1) / 127
    wanted = torch.fake_quantize_per_channel_affine(weight.detach(), scales, torch.zeros(6, dtype=torch.int32), 0, -127, 127)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-6, atol=0)
    upstream = torch.randn(6, 40)
    found.backward(upstream)
    assert weight.grad is not None and torch.equal(weight.grad, upstream), "straight through"


@pytest.mark.parametrize("form", [Int8(), Int4(group=32), Int4(group=24)])
def test_a_layer_computes_what_the_packed_one_does(form: Int8 | Int4) -> None:
    plain = nn.Linear(80, 24)
    learning, x = nn.Linear(80, 24), torch.randn(40, 80)
    learning.load_state_dict(plain.state_dict())
    rounded.become(learning, form)
    packed.become(plain, form, form.pack(plain.weight))
    assert torch.equal(learning(x), plain(x))
    rounded.settle(learning)
    assert type(learning) is nn.Linear and torch.equal(learning.weight, plain.weight)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_says_the_very_same(family: str, bits: Any) -> None:
    model, rows = small.model(family), MANY
    QAT(bits=bits, group=32).apply(model)
    learned = small.said(model, rows)
    other = small.model(family)
    quantize(other, Quantize(bits=bits, group=32))
    assert torch.equal(learned, small.said(other, rows))
    assert not torch.equal(learned, small.said(small.model(family), rows))


@pytest.mark.parametrize("changes", [{}, {"objective": "causal_lm"}])
def test_a_run_is_evaluated_and_quantised_as_it_was_trained(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run = learning(world, tmp_path / "run", adapt={"kind": "qat", "bits": 4, "group": 32}, steps=10, **(
        changes or {"start": str(world / "dense")}))
    last = train(run)
    assert danlu("quantize", tmp_path / "run", "--out", tmp_path / "small", "--json", "--data",
                 world / ("words.jsonl" if changes else "mood.jsonl")).code == 0
    told = json.loads((tmp_path / "small" / "run.json").read_text())
    assert told["options"]["bits"] == 4 and told["options"]["group"] == 32
    before, after = checkpoint.load_model(last), checkpoint.load_model(tmp_path / "small")
    ids = torch.randint(5, 60, (20, 40))
    with torch.no_grad():
        a, b = before(ids), after(ids)
    assert all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor))
    latent: Any = weights.load(last)
    assert not torch.equal(latent.blocks[0].mlp.up.weight, before.blocks[0].mlp.up.weight)     # type: ignore[union-attr, index]
    assert folder.rounding(last) == run.adapt
    measured = [line["eval/loss"] for line in several.lines(tmp_path / "run") if "eval/loss" in line][-1]
    said = json.loads(danlu("eval", tmp_path / "small", "--json").out)["results"]
    assert next(iter(said.values()))["loss,none"] == pytest.approx(measured, rel=2e-2), "kernels of few rows compute in bfloat16"


def test_it_goes_on_to_the_bit(world: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"start": str(world / "dense"), "adapt": {"kind": "qat", "bits": 4, "group": 16}, "steps": 8}
    whole = train(learning(world, tmp_path / "whole", **changes))
    again = learning(world, tmp_path / "cut", **changes | {"every": {"log": 1, "evaluate": 0, "save": 3, "keep": 9}})
    train(again)
    for path in checkpoint.listing(tmp_path / "cut"):
        if path.name not in ("checkpoint-0", "checkpoint-3"):
            path.rename(path.with_name(f"gone-{path.name}"))
    last = train(again)
    a, b = weights.load(whole).state_dict(), weights.load(last).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_exported_is_rounded(world: Path, tmp_path: Path) -> None:
    last = train(learning(world, tmp_path / "run", start=str(world / "dense"), adapt={"kind": "qat", "bits": 8}, steps=4))
    assert danlu("export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf").code == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(5, 60, (4, 12))
    with torch.no_grad():
        ours: Any = checkpoint.load_model(last)(ids)["classify"]
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-5)
    up = theirs.bert.encoder.layer[0].intermediate.dense.weight
    assert all(len(row.unique()) <= 255 for row in up) and not torch.equal(up, weights.load(last).blocks[0].mlp.up.weight)
    assert danlu("lineage", tmp_path / "run").code == danlu("verify", tmp_path / "run").code == 0


def test_a_model_of_transformers_learns_so_too(world: Path, tmp_path: Path) -> None:
    size = Tokenizer.load(world / "tok").special.size
    cfg = transformers.DistilBertConfig(vocab_size=size, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64)
    transformers.DistilBertForMaskedLM(cfg).save_pretrained(tmp_path / "start")
    Tokenizer.load(world / "tok").save(tmp_path / "start")
    run = learning(world, tmp_path / "run", start=str(tmp_path / "start"), pack=False, steps=4, adapt={"kind": "qat", "bits": 8},
                   sparsify={"kind": "magnitude", "begin": 1, "until": 3, "every": 1})
    last = train(run)
    model: Any = checkpoint.load_model(last)
    layer = model.inner.distilbert.transformer.layer[0].ffn.lin1
    assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05) and len(layer.weight[0].unique()) <= 255


def test_learning_to_be_rounded_beats_rounding_afterwards(world: Path, tmp_path: Path) -> None:
    """A decoder with a few large inputs, as large models have them: 4 bits for a whole row have little left for the others."""
    hard: dict[str, Any] = {"objective": "causal_lm", "held_out": 0, "every": {"log": 50}}
    dense: Any = checkpoint.load_model(train(learning(world, tmp_path / "dense", steps=150, **hard)))
    before = loss(dense, world)
    with torch.no_grad():
        for block in dense.blocks:
            for norm, layers in ((block.norm1, (block.attention.q, block.attention.k, block.attention.v)),
                                 (block.norm2, (block.mlp.up, block.mlp.gate))):
                norm.weight[:4] /= 40
                for layer in layers:
                    layer.weight[:, :4] *= 40
    assert loss(dense, world) == pytest.approx(before, rel=1e-4), "it says the same as before"
    weights.save(tmp_path / "start", dense, tokenizer=world / "bytes")
    said = {}
    for name, adapt in (("after", None), ("qat", {"kind": "qat", "bits": 4, "group": 64, "embeddings": "keep"})):
        path = train(learning(world, tmp_path / name, steps=60, model=None, start=str(tmp_path / "start"), adapt=adapt, **hard))
        model: Any = weights.load(path).eval()
        quantize(model, Quantize(bits=4, group=64, embeddings="keep"))
        said[name] = loss(model, world)
    print(before, said)
    assert said["qat"] < 0.5 * said["after"]


@torch.no_grad()
def loss(model: Any, world: Path) -> float:
    """Nats a token of what the decoder has learned."""
    tokenizer, total, number = Tokenizer.load(world / "bytes"), 0.0, 0
    for line in (world / "words.jsonl").read_text().splitlines():
        ids = torch.from_numpy(tokenizer.encode(json.loads(line)["text"]))[None]
        total += float(F.cross_entropy(model(ids)["logits"][0, :-1], ids[0, 1:], reduction="sum"))
        number += ids.shape[1] - 1
    return total / number


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_layout_changes_nothing(world: Path, tmp_path: Path, bits: int) -> None:
    layouts = {"one": (), "ddp": ("layout.dp=2",), "fsdp": ("layout.dp=2", "layout.shard=full"), "tp": ("layout.tp=2",),
               "pp": ("layout.pp=2", "layout.micro=2")}
    told = {}
    for name, layout in layouts.items():
        run = learning(world, tmp_path / name, objective="causal_lm", steps=6, every={"log": 1, "evaluate": 0},
                       adapt={"kind": "qat", "bits": bits, "group": 24})
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(config.to_yaml(run), encoding="utf-8")
        assert danlu("train", recipe, *layout).code == 0
        told[name] = [line for line in several.lines(tmp_path / name) if "train/loss" in line]
    for name in list(layouts)[1:]:
        for mine, theirs in zip(told["one"], told[name], strict=True):
            assert theirs["train/loss"] == pytest.approx(mine["train/loss"], rel=1e-3)
