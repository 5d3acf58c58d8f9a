"""The decoder's config, first weights, isolation of documents, counts of weights and FLOPs."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from danlu.errors import IncompatibleError
from danlu.models.build import build
from danlu.models.decoder import PRESETS, Decoder, DecoderModel
from danlu.nn.cache import Cache
from danlu.nn.paths import Choice

TINY = {"vocab": 61, "width": 16, "layers": 2, "heads": 4, "context": 32}
FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "mistral"]

# As their authors' files have them, with their vocabulary.
SIZES = {"gpt2": (50257, 124_439_808), "gpt2-medium": (50257, 354_823_168), "gpt2-large": (50257, 774_030_080),
         "gpt2-xl": (50257, 1_557_611_200), "llama2-7b": (32000, 6_738_415_616), "llama3-8b": (128256, 8_030_261_248),
         "llama3.1-8b": (128256, 8_030_261_248), "llama3.2-1b": (128256, 1_235_814_400),
         "qwen2.5-0.5b": (151936, 494_032_768), "qwen2.5-7b": (152064, 7_615_616_512),
         "qwen3-0.6b": (151936, 596_049_920), "qwen3-8b": (151936, 8_190_735_360), "mistral-7b": (32000, 7_241_732_096)}


def tiny(**settings: object) -> DecoderModel:
    model = build(Decoder.model_validate(TINY | settings), "cpu")
    assert isinstance(model, DecoderModel)
    return model.init(0).eval()


def test_a_short_recipe_is_enough() -> None:
    cfg = Decoder(family="llama", width=128, layers=4, heads=4)
    assert (cfg.kv_heads, cfg.head_width, cfg.hidden, cfg.norm, cfg.position) == (4, 32, 384, "rms", "rotary")
    gpt = Decoder(family="gpt2", width=128, layers=4, heads=4)
    assert (gpt.hidden, gpt.norm, gpt.position, gpt.tied) == (512, "layer", "learned", True)
    assert gpt.activation == "gelu_tanh"


def test_what_is_given_wins_over_the_preset() -> None:
    cfg = Decoder(preset="nano", layers=7)
    assert (cfg.family, cfg.width, cfg.layers, cfg.context) == ("gpt2", 128, 7, 256)
    assert cfg.model_dump(exclude_unset=True) == {"preset": "nano", "layers": 7}
    assert Decoder.model_validate(cfg.model_dump()) == cfg
    assert Decoder.model_validate_json(cfg.model_dump_json(), strict=True) == cfg


@pytest.mark.parametrize(("settings", "named"), [
    ({"preset": "gpt5"}, "gpt2-xl"), ({"heads": 3}, "heads=3"), ({"kv_heads": 3}, "kv_heads=3"),
    ({"family": "gpt2", "position": "rotary"}, "position=rotary"), ({"family": "gpt2", "kv_heads": 2}, "kv_heads=2"),
    ({"norm": "layer"}, "norm=layer"), ({"family": "mistral", "qkv_bias": True}, "qkv_bias=True"),
    ({"qkv_bias": True}, "out_bias=False"), ({"family": "qwen3", "qk_norm": False}, "qk_norm=False"),
    ({"head_width": 5}, "head_width"), ({"full_layers": 3, "family": "qwen2", "window": 4}, "full_layers=3"),
    ({"widht": 4}, "widht"), ({"scaling": {"kind": "linear", "factor": 0.5}}, "factor"),
])
def test_a_wrong_setting_is_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Decoder.model_validate({"width": 16, "layers": 2, "heads": 4, **settings})


def test_filled_takes_the_vocabulary_and_knows_its_head() -> None:
    assert Decoder(preset="nano").filled(vocab=99, heads=("lm",)).vocab == 99
    assert Decoder(preset="nano", vocab=128).filled(vocab=99).vocab == 128
    with pytest.raises(IncompatibleError, match="mlm"):
        Decoder(preset="nano").filled(vocab=9, heads=("mlm", "nsp"))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_sizes_of_their_models(preset: str) -> None:
    vocab, count = SIZES.get(preset, (100, None))
    model = build(Decoder(preset=preset).filled(vocab=vocab))
    assert count is None or sum(p.numel() for p in model.parameters()) == count


def test_first_weights_follow_the_paper() -> None:
    model = tiny(family="gpt2", width=64, layers=3, vocab=500)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert p.eq(1.0 if name.endswith("weight") else 0.0).all()
        elif name.endswith("bias"):
            assert p.eq(0).all()
        else:
            std = 0.02 / math.sqrt(6) if ".o." in name or ".down." in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel())


def test_first_weights_depend_on_seed_and_name_alone() -> None:
    two, three = tiny(layers=2), tiny(layers=3)
    state = three.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in two.state_dict().items())
    assert not torch.equal(two.blocks[0].mlp.up.weight, two.blocks[1].mlp.up.weight)
    assert not torch.equal(two.embed.weight, tiny().init(1).embed.weight)
    late = build(two.cfg).to_empty(device="cpu").init(0)        # made on meta first, as training does
    assert all(torch.equal(p, q) for p, q in zip(two.parameters(), late.parameters(), strict=True))
    ids = torch.arange(12)[None]
    assert torch.equal(late.eval()(ids)["logits"], two(ids)["logits"])


@pytest.mark.parametrize("path", ["plain", "block", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_documents_are_as_each_alone(family: str, path: str) -> None:
    window = 4 if family == "mistral" else None
    model = tiny(family=family, window=window).use(Choice(attention=path))      # type: ignore[arg-type]
    first, second = torch.randint(61, (9,)), torch.randint(61, (6,))
    ids = torch.cat((first, second, torch.zeros(5, dtype=torch.int64)))[None]
    segments = torch.tensor([[1] * 9 + [2] * 6 + [0] * 5])
    positions = torch.tensor([[*range(9), *range(6), *range(5)]])
    packed = model(ids, segments=segments, positions=positions)["logits"][0]
    torch.testing.assert_close(packed[:9], model(first[None])["logits"][0], atol=2e-6, rtol=0)
    torch.testing.assert_close(packed[9:15], model(second[None])["logits"][0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_logits(family: str) -> None:
    model = tiny(family=family)
    ids, labels = torch.randint(61, (2, 10)), torch.randint(61, (2, 10))
    weights = (torch.rand(2, 10) < 0.6).float()
    logp = model(ids)["logits"].log_softmax(-1).gather(2, labels[..., None])[..., 0]
    got = model(ids, labels=labels, weights=weights)["lm"]
    assert torch.equal(got.index, weights.flatten().nonzero()[:, 0])
    torch.testing.assert_close(got.logp, logp.flatten()[got.index], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(ids, labels=labels)["lm"].logp, logp.flatten(), atol=1e-5, rtol=0)
    # … and so are the gradients, of every weight
    torch.autograd.backward(-(got.logp * 2).sum())
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logp = model(ids)["logits"].log_softmax(-1).gather(2, labels[..., None])[..., 0]
    torch.autograd.backward(-(logp * 2 * weights).sum())
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_in_parts_is_reading_at_once(family: str) -> None:
    window = {"mistral": 5, "qwen2": 6}.get(family)
    model = tiny(family=family, window=window, full_layers=1 if family == "qwen2" else 0)
    ids = torch.randint(61, (2, 14))
    whole, cache, parts = model(ids)["logits"], Cache(2, 32), []
    for part in ids.split([6, 1, 4, 1, 1, 1], 1):
        parts.append(model(part, cache=cache)["logits"])
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=0)
    torch.testing.assert_close(model(ids, last=True)["logits"], whole[:, -1:], atol=2e-6, rtol=0)


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"33 tokens .* 32"):
        tiny()(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_counted(family: str) -> None:
    model = tiny(family=family, kv_heads=4 if family == "gpt2" else 2, vocab=64).use(Choice(attention="plain"))
    ids = torch.randint(61, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids)["lm"].logp.sum().backward()
    unseen = 2 * 64 * 16 * 64                                   # the head's weight gradient: added in place, not counted
    mean = 2 * 64 * 16                                          # `mean` of the scores: one dot product a token
    assert counter.get_total_flops() == pytest.approx(model.flops(32) * 64 - unseen, abs=mean)


def test_bfloat16_autocast_stays_near() -> None:
    model = tiny(family="gpt2", dropout=0.0)
    ids = torch.randint(61, (2, 32))
    with torch.no_grad():
        exact = model(ids, labels=ids)["lm"].logp
        for path in ("plain", "block", "sdpa"):
            with torch.autocast("cpu", torch.bfloat16):
                rounded = model.use(Choice(attention=path))(ids, labels=ids)["lm"].logp     # type: ignore[arg-type]
            assert rounded.dtype == torch.float32
            torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0)


def test_dropout_only_in_training_and_by_the_seed() -> None:
    model = tiny(dropout=0.5, attention_dropout=0.3)
    ids = torch.randint(61, (1, 12))
    assert torch.equal(model(ids)["logits"], model(ids)["logits"])
    model.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(ids)["logits"])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
