"""A base in few bits: refused where bitsandbytes is not, and exact arithmetic on what was packed where it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.test_adapter_run import recipe
from adapt.tiny import MODELS, adapted, base, ids, logits, shake

from danlu.adapt import LoRA, folder, quantize
from danlu.adapt.merge import merge
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.train import checkpoint
from danlu.train.run import train

needed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
BITS = ("nf4", "int8")
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Path:
    special = Tokenizer.load(corpus / "tokenizer").special
    cfg = Decoder(family="llama", width=32, layers=2, heads=2, context=64, vocab=special.size, init_std=0.1)
    weights.save(tmp_path / "base", build(cfg, "cpu").init(0), tokenizer=corpus / "tokenizer")
    return tmp_path / "base"


def test_without_bitsandbytes_it_is_refused(corpus: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*danlu\[bnb\]"):
        train(recipe(corpus, start, tmp_path / "run", adapt={"kind": "lora", "base": "nf4"}))


@needed
@pytest.mark.parametrize("kind", BITS)
def test_products_and_gradients_are_those_of_the_unpacked_matrix(kind: Any) -> None:
    weight, bias = torch.randn(48, 32), torch.randn(48)
    packed = quantize.pack(weight, kind)
    whole = packed.dense()
    if kind == "nf4":                                    # the paper's table, by blocks of 64; their scales are in 8 bits
        blocks = weight.view(-1, 64)
        scaled = blocks / blocks.abs().amax(1, keepdim=True)
        nearest = NF4[(scaled[..., None] - NF4).abs().argmin(-1)] * blocks.abs().amax(1, keepdim=True)
        torch.testing.assert_close(whole, nearest.view(48, 32), atol=0.1, rtol=0)
    else:
        expected = (weight / weight.abs().amax(1, keepdim=True) * 127).round() * weight.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(whole, expected, atol=0.04, rtol=0)
    x, y = (torch.randn(5, 32).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    out, expected = quantize.product(x, packed, bias), torch.nn.functional.linear(y, whole, bias)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@needed
@pytest.mark.parametrize("adapt", [LoRA(rank=4), LoRA(rank=4, target=("q",), dora=True)], ids=["all", "q, dora"])
@pytest.mark.parametrize("kind", BITS)
def test_the_model_is_that_of_the_unpacked_base(kind: Any, adapt: LoRA) -> None:
    cfg = MODELS["llama"]
    plain = base(cfg)
    model = build(cfg)
    adapt.apply(model)
    done = quantize.pack_all(model, plain.state_dict(), kind, "cpu")
    assert {name.split(".")[-2] for name in done} == {"q", "k", "v", "o", "up", "gate", "down"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in plain.state_dict():
                p.copy_(plain.state_dict()[name])
            assert name not in done
    adapt.begin(model, 3)
    dense = adapted(cfg, adapt)
    with torch.no_grad():
        for name, module in model.named_modules():
            if f"{name}.weight" in done:
                dense.get_submodule(name).weight.copy_(module.packed.dense())
    adapt.begin(dense, 3)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    said = logits(shake(model.eval(), names))
    torch.testing.assert_close(said, logits(shake(dense, names)), atol=1e-5, rtol=1e-5)
    adapt.merge(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(model), said, atol=1e-5, rtol=1e-5)


@needed
@pytest.mark.parametrize("kind", BITS)
def test_a_run_on_a_packed_base(corpus: Path, start: Path, tmp_path: Path, kind: str) -> None:
    adapt = {"kind": "lora", "rank": 4, "base": kind}
    last = train(recipe(corpus, start, tmp_path / "run", adapt=adapt, steps=3))
    train(recipe(corpus, start, tmp_path / "run", adapt=adapt, steps=5))
    model: Any = checkpoint.load_model(last)
    assert model.blocks[0].attention.q.packed is not None and model.blocks[0].attention.q.weight is None
    found = merge(last, tmp_path / "merged")
    assert found.difference <= 1e-4 * found.largest
    with torch.no_grad():
        torch.testing.assert_close(weights.load(tmp_path / "merged").eval()(ids())["logits"], model(ids())["logits"],
                                   atol=1e-4, rtol=1e-4)
    assert folder.describe(last).adapt == LoRA(rank=4, base=kind)


@needed
@pytest.mark.parametrize("adapt", [LoRA(rank=4), LoRA(rank=4, target=("q",))], ids=["all", "q"])
@pytest.mark.parametrize("kind", BITS)
def test_a_packed_matrix_goes_where_its_layer_goes_and_keeps_its_type(kind: Any, adapt: LoRA) -> None:
    """To "meta", which moves as any other device does but for the numbers."""
    model = build(MODELS["llama"], "cpu").init(0)
    adapt.apply(model)
    names = set(model.state_dict()) - quantize.pack_all(model, model.state_dict(), kind, "cpu")
    assert set(model.state_dict()) == names
    for layer in (model.blocks[0].attention.q, model.blocks[0].attention.k):
        before, dense = tensors_of(layer.packed), layer.packed.dense()
        layer.bfloat16()
        assert [(t.dtype, t.data_ptr()) for t in tensors_of(layer.packed)] == [(t.dtype, t.data_ptr()) for t in before]
        assert torch.equal(layer.packed.dense(), dense)
    model.to("meta", torch.float16)
    for layer in (model.blocks[0].attention.q, model.blocks[0].attention.k):
        moved = tensors_of(layer.packed)
        assert {t.device.type for t in moved} == {"meta"} and {t.dtype for t in moved} == {t.dtype for t in before}


def tensors_of(packed: quantize.Packed) -> list[torch.Tensor]:
    """What `packed` computes with."""
    state = packed.state
    if packed.kind == "int8":
        return [packed.data, state]
    return [packed.data, state.code, state.absmax, state.offset, state.state2.code, state.state2.absmax]
