"""GGUF: every tensor back to the bit, text cut as we cut it, and the same logits, in llama.cpp too where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from danlu.data import chat
from danlu.data.kinds import BPE, CUTS, Unigram
from danlu.data.tokenizer import Tokenizer, train
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.export import gguf, llama_cpp
from danlu.export.gguf_read import Gguf
from danlu.models.build import build
from danlu.models.decoder import Decoder

TEXTS = ["The old film was warm and bright, wasn't it? It'll cost 12345 dollars (€99.50).",
         "  two  spaces\n\n\tand tabs \r\nend ",
         "电影很好看,真好!我喜欢这部2024年的老电影。", "Ünïcödé naïve café — “quotes” … 🎉👍🏽 ﷽ \u200b x",
         "def f(x):\n    return x**2  # 平方\n",
         "ALL CAPS'S DON'T WE'LL 'tis", "1 22 333 4444 55555", "مرحبا بالعالم สวัสดีชาวโลก", "<|endoftext|> is text here", "a"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi — 你好"}]


def tokenizer(folder: Path, cut: str = "gpt2", *, chats: bool = False) -> Path:
    cfg = {"vocab": 400, "cut": cut, "min_frequency": 1} | ({"special": ("<|im_start|>", "<|im_end|>")} if chats else {})
    made = train(TEXTS, BPE.model_validate(cfg))
    made.save(folder)
    if chats:
        chat.Template.load(made).save(folder)
    return folder


def decoder(vocab: int, **more: Any) -> Any:
    cfg = Decoder.model_validate({"family": "llama", "width": 64, "layers": 2, "heads": 4, "context": 64, "vocab": vocab,
                                  "init_std": 0.1, **more})
    model = build(cfg, "cpu").init(1).eval()
    for name, p in model.named_parameters():             # so that no bias and no norm is trivial
        if name.endswith("bias") or "norm" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


SHAPES: list[dict[str, Any]] = [
    {}, {"kv_heads": 2, "tied": True}, {"family": "mistral", "kv_heads": 2, "head_width": 32, "window": 24},
    {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "scaling": {"kind": "linear", "factor": 2.0}},
    {"scaling": {"kind": "llama3", "factor": 8.0, "original": 16}}, {"family": "qwen2", "kv_heads": 2},
    {"family": "gpt2"}, {"family": "gpt2", "norm_bias": False, "qkv_bias": False, "mlp_bias": False, "tied": False}]


def written(folder: Path, more: dict[str, Any], kind: Any = "f32", **words: Any) -> tuple[Any, Path, Path]:
    place = tokenizer(folder / "tokenizer", **words)
    model = decoder(Tokenizer.load(place).size, **more)
    (folder / "out").mkdir()
    own = Tokenizer.load(place)
    template = chat.Template.load(own, place) if words.get("chats") else None
    return model, gguf.write(folder / "out", model, tokenizer=own, template=template, kind=kind), place


def ids(vocab: int, length: int = 24) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(3)).tolist()


@torch.no_grad()
def said(model: Any, row: list[int]) -> np.ndarray:
    return model(torch.tensor([row]))["logits"][0].double().numpy()


@pytest.mark.parametrize("more", SHAPES, ids=lambda m: "-".join(map(str, m.values())) or "llama")
def test_every_tensor_comes_back_to_the_bit(more: dict[str, Any], tmp_path: Path) -> None:
    model, path, _place = written(tmp_path, more)
    again = Gguf(path)
    state, own = again.state(), model.state_dict()
    assert own.keys() <= state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, own.get(name, torch.zeros(()))) or (name not in own and not tensor.any()), name
    row = ids(model.cfg.vocab)
    if model.cfg.family != "gpt2" or model.cfg.norm_bias:        # zeros for the biases that it lacks
        assert np.abs(again.logits(row) - said(model, row)).max() < 1e-5


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2)])
def test_rounded_tensors_are_within_their_kind(kind: Any, error: float, tmp_path: Path) -> None:
    model, path, _place = written(tmp_path, {"kv_heads": 2}, kind)
    again, own = Gguf(path), model.state_dict()
    assert again.kind == ("quantized" if kind == "q8_0" else "gguf")
    for name, tensor in again.state().items():
        allowed = 0.0 if tensor.ndim == 1 else error * float(own[name].abs().max())
        assert float((tensor - own[name]).abs().max()) <= allowed, name
    bits = {"f16": 16, "bf16": 16, "q8_0": 8.5}[kind]
    matrices = sum(t.numel() for t in own.values() if t.ndim > 1)
    kept = sum(t.nbytes for t in own.values() if t.ndim == 1)
    from gguf import GGUFReader
    assert sum(t.n_bytes for t in GGUFReader(path).tensors) == matrices * bits / 8 + kept


def test_without_the_rotary_permutation_the_logits_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "interleave", lambda tensor, heads: tensor)
    model, path, _place = written(tmp_path, {"kv_heads": 2})
    row, again = ids(model.cfg.vocab), Gguf(path)
    assert np.abs(again.logits(row[:1]) - said(model, row[:1])).max() < 1e-5         # one token alone is not turned
    assert np.abs(again.logits(row) - said(model, row)).max() > 1e-2


@pytest.mark.parametrize("cut", list(CUTS))
def test_the_file_alone_reads_text_as_the_tokenizer_does(cut: str, tmp_path: Path) -> None:
    _model, path, place = written(tmp_path, {}, cut=cut)
    again, own = Gguf(path), Tokenizer.load(place)
    for text in TEXTS:
        assert again.encode(text) == own.encode(text).tolist(), text
        assert again.decode([own.special.eos, *own.encode(text)]) == "<|endoftext|>" + text
    assert again.told["tokenizer.ggml.pre"] == {"gpt2": "gpt-2", "llama3": "dbrx", "qwen2": "qwen2"}[cut]
    assert again.ends() == {own.special.eos}
    assert again.render(MESSAGES) is None
    assert (path.parent / "Modelfile").read_text().splitlines()[:2] == [f"FROM ./{path.name}", 'TEMPLATE """{{ .Prompt }}"""']


def test_a_chat_model_carries_its_template_and_its_ends(tmp_path: Path) -> None:
    _model, path, place = written(tmp_path, {}, chats=True)
    again, own = Gguf(path), Tokenizer.load(place)
    template = chat.Template.load(own, place)
    wanted = "".join(p.text for p in chat.render(template, [chat.Turn(m["role"], m["content"]) for m in MESSAGES], generate=True))
    assert again.render(MESSAGES) == wanted
    assert again.ends() == {own.special.eos, own.id("<|im_end|>")}
    modelfile = (path.parent / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "{{- range .Messages }}<|im_start|>{{ .Role }}" in modelfile


def test_a_rule_without_a_name_is_refused(tmp_path: Path) -> None:
    place = tokenizer(tmp_path / "own", "danlu")
    model = decoder(Tokenizer.load(place).size)
    with pytest.raises(IncompatibleError, match="no name for the rule") as refused:
        gguf.write(tmp_path, model, tokenizer=Tokenizer.load(place))
    assert "cut: gpt2" in str(refused.value.fix)
    train(TEXTS, Unigram.model_validate({"vocab": 120})).save(tmp_path / "unigram")
    with pytest.raises(IncompatibleError, match="Unigram"):
        gguf.write(tmp_path, model, tokenizer=Tokenizer.load(tmp_path / "unigram"))
    changed = json.loads((place / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (place / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(IncompatibleError, match="Lowercase"):
        gguf.write(tmp_path, model, tokenizer=Tokenizer.load(place))


@pytest.mark.parametrize("more", [
    {"activation": "relu"}, {"family": "qwen3"}, {"family": "gpt2", "activation": "gelu"},
    {"family": "qwen2", "scaling": {"kind": "llama3", "factor": 8.0, "original": 16}},
    {"scaling": {"kind": "yarn", "factor": 4.0, "original": 16}}], ids=lambda m: "-".join(map(str, m.values())))
def test_what_llama_cpp_computes_otherwise_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    place = tokenizer(tmp_path / "tokenizer")
    own = Tokenizer.load(place)
    with pytest.raises(IncompatibleError):
        gguf.write(tmp_path, decoder(own.size, **more), tokenizer=own)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    _model, path, _place = written(tmp_path, {})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError):
        Gguf(path)


def test_without_llama_cpp_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    with pytest.raises(ConfigError, match="llama-cpp-python"):
        llama_cpp.LlamaCpp(tmp_path / "x.gguf")


# ---- in llama.cpp itself ----

inside = pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed")


@inside
@pytest.mark.slow
@pytest.mark.parametrize("more", SHAPES, ids=lambda m: "-".join(map(str, m.values())) or "llama")
def test_llama_cpp_says_the_same(more: dict[str, Any], tmp_path: Path) -> None:
    """float32 weights, and keys and values; GPT-2's activation llama.cpp looks up in a table of float16."""
    model, path, _place = written(tmp_path, more)
    row = ids(model.cfg.vocab)
    there, here = llama_cpp.LlamaCpp(path).logits(row), said(model, row)
    assert np.abs(there - here).max() < (1e-3 if model.cfg.family == "gpt2" else 1e-5) * np.ptp(here)


@inside
@pytest.mark.slow
@pytest.mark.parametrize("cut", list(CUTS))
def test_llama_cpp_reads_text_the_same(cut: str, tmp_path: Path) -> None:
    _model, path, place = written(tmp_path, {}, cut=cut, chats=True)
    there, own = llama_cpp.LlamaCpp(path), Tokenizer.load(place)
    for text in TEXTS:
        assert there.encode(text) == own.encode(text).tolist(), text
        assert there.decode([own.special.eos, *own.encode(text)]) == "<|endoftext|>" + text
    assert there.ends() == {own.special.eos, own.id("<|im_end|>")}
    assert there.render(MESSAGES) == Gguf(path).render(MESSAGES)


@inside
@pytest.mark.slow
def test_llama_cpp_parts_without_the_rotary_permutation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "interleave", lambda tensor, heads: tensor)
    model, path, _place = written(tmp_path, {"kv_heads": 2})
    row = ids(model.cfg.vocab)
    there, here = llama_cpp.LlamaCpp(path).logits(row), said(model, row)
    assert np.abs(there - here).max() > 2e-2 * np.ptp(here)


@inside
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_llama_cpp_and_the_file_read_again_agree_on_rounded_weights(kind: Any, tmp_path: Path) -> None:
    model, path, _place = written(tmp_path, {"kv_heads": 2}, kind)
    row = ids(model.cfg.vocab)
    there, again = llama_cpp.LlamaCpp(path).logits(row), Gguf(path).logits(row)
    assert np.abs(there - again).max() < 3e-2 * np.ptp(again)     # llama.cpp rounds activations to 8 bits, too
