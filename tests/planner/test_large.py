"""Public models: parameters as transformers builds them, FLOPs as a closed form has them, and what cannot be."""

from __future__ import annotations

import json

import pytest
import torch

from danlu.cli import main
from danlu.errors import ConfigError
from danlu.models.decoder import Decoder, DecoderModel
from danlu.models.decoder_config import write
from danlu.planner import amounts
from danlu.planner.hardware import parse
from danlu.planner.large import impossible, large, refuted, states
from danlu.planner.public import flops, models, parameters, public


@pytest.mark.parametrize("one", models(), ids=lambda one: one.name)
def test_parameters_are_those_that_were_published(one) -> None:          # type: ignore[no-untyped-def]
    off = parameters(one.config) / one.parameters - 1
    assert abs(off) < (0.08 if one.name == "chinchilla-70b" else 0.005)
    assert one.source and (abs(off) < 0.0045 or one.note)


@pytest.mark.parametrize("name", ["gpt2", "llama-3-70b", "llama-65b", "qwen2.5-7b", "qwen3-32b", "mistral-7b"])
def test_parameters_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = public(name).config
    assert isinstance(shape, Decoder)
    told = write(shape)
    settings = transformers.AutoConfig.for_model(told.pop("model_type"), **told)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(settings)
    assert parameters(shape) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama-3-8b"])
def test_flops_are_six_for_each_weight_and_attention(name: str) -> None:
    shape = public(name).config
    assert isinstance(shape, Decoder)
    with torch.device("meta"):
        known = DecoderModel(shape).flops(512)           # counts attention's backward pass as twice the forward pass
    assert known <= flops(shape, 512) <= 1.03 * known    # the kernel computes the scores anew


def test_every_device_at_its_peak_is_too_slow() -> None:
    found = large(public("gpt3-175b"), parse("285xV100"), 300e9, deadline=34 * amounts.DAY)
    problems = list(impossible(found))
    assert len(problems) == 1 and "310%" in problems[0] and "105.4 days" in problems[0]
    assert found.states == states(found.model.config) == pytest.approx(16 * found.parameters, rel=1e-6)
    assert any("1,024 A100" in line for line in refuted(found.model))
    assert not list(impossible(large(public("gpt3-175b"), parse("1024xA100"), 300e9, deadline=34 * amounts.DAY)))


def test_what_does_not_fit_and_what_costs_too_much() -> None:
    told = " ".join(impossible(large(public("llama-2-7b"), parse("2xRTX3090", price=1.0), 1e9, budget=10)))
    assert "memory" in told and "money" in told and "at least 5 are needed" in told


def test_the_verb_says_what_is_impossible(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "gpt3-175b", "--tokens", "300B", "--hardware", "285xV100"]
    assert main([*words, "--deadline", "34d", "--json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert told["count"] == 285 and told["impossible"] and told["refuted"] and told["sources"]
    assert main(words) == 0
    assert "often told" in capsys.readouterr().out


def test_all_that_is_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "gpt3-175", "--tokens", "lots", "--hardware", "24x", "--budget=-3", "--deadline", "soon",
                 "--price", "free"]) == 2
    told = capsys.readouterr().err
    for words in ("did you mean 'gpt3-175b'", "'lots'", "'24x'", "'-3'", "'soon'", "'free'"):
        assert words in told
    assert main(["plan", "--model", "gpt2", "--hardware", "8xH100"]) == 2
    assert "--tokens is needed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="reads 1024 tokens"):
        large(public("gpt2"), parse("here"), 1e9, length=4096)


@pytest.mark.parametrize(("text", "value"), [("300B", 3e11), ("1.4T", 1.4e12), ("5e9", 5e9), ("5,000", 5000), ("3亿", 3e8)])
def test_numbers_of_tokens(text: str, value: float) -> None:
    assert amounts.number(text, where="x") == value


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "", "300Bs", "1e999"])
def test_no_numbers_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError):
        amounts.number(text, where="x")
