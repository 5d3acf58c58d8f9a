"""Merging: one model that says what the adapter on its base said, or none at all.  And several adapters on one base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapt.test_peft import written
from adapt.tiny import KINDS, MODELS, base, ids, logits
from cli import danlu

from danlu.adapt import LoRA, folder
from danlu.adapt.merge import merge
from danlu.adapt.switch import Switch
from danlu.errors import ConfigError, IncompatibleError, NumericError
from danlu.models import weights
from danlu.nn import packed
from danlu.nn.forms import Int8

MERGING = [pytest.param(family, kind, id=f"{family} {kind}") for family in MODELS for kind, adapt in KINDS.items()
           if adapt.merges and not (family == "llama" and kind == "bitfit") and not (family == "bert" and kind == "lora embed")]


@pytest.mark.parametrize("family, kind", MERGING)
def test_transformers_says_of_the_merged_what_we_said_before(tmp_path: Path, family: str, kind: str) -> None:
    model, path = written(tmp_path, family, KINDS[kind])
    found = merge(path, tmp_path / "merged")
    assert found.difference <= 1e-4 * found.largest and found.agreement == 1.0 and found.dtype == "fp32"
    cls = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    theirs = cls.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids()).logits, logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family, kind", MERGING)
def test_opened_merged_it_says_the_same(tmp_path: Path, family: str, kind: str) -> None:
    """As what is made smaller is opened: a head that read the embedding before it was adapted reads that still."""
    _model, path = written(tmp_path, family, KINDS[kind])
    merged, apart = (logits(folder.load(path, merged=way).eval()) for way in (True, False))
    torch.testing.assert_close(merged, apart, atol=2e-5, rtol=1e-5)


def test_rounded_once(tmp_path: Path) -> None:
    model, path = written(tmp_path, "llama", LoRA(rank=4))
    merge(path, tmp_path / "merged", dtype="bf16")
    here = weights.read_tensors(tmp_path / "merged")["model.layers.0.self_attn.q_proj.weight"]
    q = model.blocks[0].attention.q
    exact = q.weight.double() + q.scale * q.lora_b.double() @ q.lora_a.double()
    assert here.dtype == torch.bfloat16 and torch.equal(here, exact.float().bfloat16())


def test_what_differs_leaves_nothing_behind(tmp_path: Path) -> None:
    _model, path = written(tmp_path, "llama", LoRA(rank=4))
    with pytest.raises(NumericError, match="does not say the same"):
        merge(path, tmp_path / "merged", dtype="bf16", tolerance=1e-6)
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.parametrize("kind", ["prompt", "prefix", "houlsby"])
def test_what_is_no_part_of_a_weight_is_not_merged(tmp_path: Path, kind: str) -> None:
    _model, path = written(tmp_path, "gpt2", KINDS[kind])
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge(path, tmp_path / "merged")
    with pytest.raises(ConfigError, match="cannot be merged"):
        folder.load(path, merged=True)
    with pytest.raises(ConfigError, match="no adapter to merge"):
        merge(tmp_path / "base", tmp_path / "merged")


def test_an_encoders_tied_embedding_is_refused(tmp_path: Path) -> None:
    _model, path = written(tmp_path, "bert", KINDS["lora embed"])
    with pytest.raises(ConfigError, match="two of them"):
        merge(path, tmp_path / "merged")


def test_the_command_line_merges_a_run(corpus: Path, tmp_path: Path) -> None:
    from danlu.models.build import build
    from danlu.models.decoder import Decoder

    cfg = Decoder(family="gpt2", width=32, layers=2, heads=2, context=64, vocab=320)
    weights.save(tmp_path / "base", build(cfg, "cpu").init(0), tokenizer=corpus / "tokenizer")
    recipe = {"out": str(tmp_path / "run"), "data": [str(corpus)], "objective": "causal_lm", "schedule": "constant",
              "optim": {"kind": "adamw", "lr": 0.01}, "start": str(tmp_path / "base"), "steps": 3, "rows": 4, "length": 32,
              "overlong": "split", "precision": "fp32", "threads": 1, "device": "cpu",
              "adapt": {"kind": "lora", "rank": 2, "target": ["embed", "c_attn"]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert danlu("train", tmp_path / "recipe.yaml").clean().code == 0
    ended = danlu("merge", tmp_path / "run", "--json").clean()
    told = json.loads(ended.out)
    assert ended.code == 0 and told["top1_agreement"] == 1.0 and told["compared"] == 4 * 64
    assert (tmp_path / "run" / "merged" / "tokenizer.json").is_file()
    assert danlu("generate", tmp_path / "run" / "merged", "--max-new-tokens", 3).clean().code == 0
    assert "exists already" in danlu("merge", tmp_path / "run").clean().last
    refused = danlu("merge", tmp_path / "run", "--out", tmp_path / "half", "--dtype", "bf16", "--tolerance", 1e-9).clean()
    assert refused.code == 6 and not (tmp_path / "half").exists()


def test_adapters_are_switched_without_reading_the_base_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    for name in ("lora", "ia3", "prefix", "bitfit", "prompt"):
        (tmp_path / name).mkdir()
        made[name] = written(tmp_path / name, "gpt2", KINDS[name])
    switch = Switch(tmp_path / "lora" / "base")
    monkeypatch.setattr(weights, "read_tensors", lambda folder: pytest.fail("the base was read again"))
    for name, (_model, path) in made.items():
        switch.add(name, path)
    for name in ("ia3", None, "prompt", "lora", "bitfit", "prefix", None, "lora"):
        expected = logits(base(MODELS["gpt2"])) if name is None else logits(made[name][0])
        torch.testing.assert_close(logits(switch.use(name)), expected, atol=1e-6, rtol=0)
    held = {name: switch.use(name).blocks[0].attention.q.weight.data_ptr() for name in switch.names}
    assert len(set(held.values())) == 1, "one base in memory"
    with pytest.raises(ConfigError, match="there are lora"):
        switch.use("none")
    with pytest.raises(ConfigError, match="already"):
        switch.add("lora", made["lora"][1])
    switch.drop("prefix")
    assert "prefix" not in switch.names


def test_an_adapter_of_another_base_is_not_added(tmp_path: Path) -> None:
    _model, path = written(tmp_path, "gpt2", KINDS["lora"])
    weights.save(tmp_path / "other", base(MODELS["gpt2"], seed=9))
    with pytest.raises(IncompatibleError):
        Switch(tmp_path / "other").add("lora", path)
    assert folder.describe(path).base == (tmp_path / "base").resolve()


def test_adapters_are_not_put_on_packed_weights(tmp_path: Path) -> None:
    model = base(MODELS["llama"])
    packed.become(model.embed, Int8(), Int8().pack(model.embed.weight.detach()))
    weights.write_packed(tmp_path, model.cfg, model.state_dict(), table=packed.forms(model))
    with pytest.raises(IncompatibleError, match="whole ones are needed"):
        Switch(tmp_path)
