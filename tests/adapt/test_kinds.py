"""Every kind of adapter on every family: what changes, what does not, and what is left after merging."""

from __future__ import annotations

import copy

import pytest
import torch
from adapt.tiny import KINDS, LOOKED_AT, MODELS, adapted, base, ids, logits, shake

from danlu.adapt import IA3, QAT, Adapter, LoRA
from danlu.adapt.layers import LoRALinear
from danlu.adapt.targets import kept
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.objectives.lm import CausalLM, MaskedLM
from danlu.optim import AdamW
from danlu.parallel.place import alone
from danlu.train.step import Engine

EVERY = [pytest.param(family, kind, id=f"{family} {kind}") for family in MODELS for kind in KINDS
         if not (kind == "bitfit" and family == "llama")]


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family, kind", EVERY)
def test_nothing_changes_at_first_and_the_base_stays(family: str, kind: str) -> None:
    cfg, adapt = MODELS[family], KINDS[kind]
    before, model = base(cfg), adapted(cfg, adapt)
    told = before.state_dict()
    assert told.keys() <= model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in told.items())
    same = torch.equal(logits(before), logits(model))
    close = torch.allclose(logits(before), logits(model), atol=2e-6, rtol=0)
    assert same == (kind not in LOOKED_AT and "dora" not in kind) or (close and "dora" in kind)
    assert trained(model)
    added = set(model.state_dict()) - set(told)
    if kind not in ("bitfit", "freeze"):
        assert trained(model) <= added == set(kept(model, cfg))


@pytest.mark.parametrize("family, kind", EVERY)
def test_only_the_adapter_moves(family: str, kind: str) -> None:
    cfg = MODELS[family]
    model = adapted(cfg, KINDS[kind])
    learning, before = trained(model), {n: t.clone() for n, t in model.state_dict().items()}
    objective = CausalLM() if cfg.kind == "decoder" else MaskedLM()
    engine = Engine(alone(model.train()), objective, precision="fp32", clip=1.0, seed=0)
    optimizer = AdamW(lr=1e-2).build((leaf.name, leaf.local) for leaf in engine.leaves)
    batch = {"ids": ids(), "labels": ids(seed=1), "weights": torch.ones(3, 11)}
    for step in range(3):
        engine.forward_backward(batch, step=step)
        engine.update(optimizer, 1e-2, allow=lambda norm: True)
        assert all(p.grad is None for p in model.parameters())
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == learning


@pytest.mark.parametrize("family, kind", EVERY)
def test_merged_says_the_same(family: str, kind: str) -> None:
    cfg, adapt = MODELS[family], KINDS[kind]
    if not adapt.merges or (kind == "lora embed" and cfg.tied):
        return
    model = adapted(cfg, adapt)
    shake(model, trained(model))
    said = logits(model)
    assert not torch.allclose(said, logits(base(cfg)), atol=1e-3)
    merged = copy.deepcopy(model)
    adapt.merge(merged)
    assert merged.state_dict().keys() == weights.shapes(cfg).keys()
    assert {type(m) for m in merged.modules()} == {type(m) for m in base(cfg).modules()}
    torch.testing.assert_close(logits(merged), said, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_the_first_values_are_the_same_for_every_layout(family: str) -> None:
    cfg = MODELS[family]
    names = {name: p for name, p in adapted(cfg, LoRA(rank=2)).named_parameters() if name.endswith("lora_a")}
    only = adapted(cfg, LoRA(rank=2, target=("v",)))
    assert all(torch.equal(p, names[name]) for name, p in only.named_parameters() if name.endswith("lora_a"))


def test_lora_is_the_formula() -> None:
    linear = torch.nn.Linear(6, 4).double()
    x, weight, bias = torch.randn(5, 6, dtype=torch.float64), linear.weight, linear.bias
    LoRALinear.of(linear, rank=2, scale=1.5, dropout=0.0, dora=True, pissa=False)
    for p in (linear.lora_a, linear.lora_b, linear.magnitude):
        torch.nn.init.normal_(p)
    whole = weight + 1.5 * linear.lora_b @ linear.lora_a
    expected = x @ (linear.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)).T + bias
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("family", MODELS)
def test_virtual_tokens_are_tokens(family: str) -> None:
    """Prompt tuning with the vectors of words is the model with those words in front."""
    cfg = MODELS[family]
    model, words = adapted(cfg, KINDS["prompt"]), ids(1, 5, seed=9)
    with torch.no_grad():
        model.ahead.prompt.weight.copy_(model.embed.weight[words[0]])
    longer = torch.cat((words.expand(3, -1), ids()), 1)
    torch.testing.assert_close(logits(model), logits(base(cfg), longer)[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", LOOKED_AT)
def test_padding_changes_nothing(family: str, kind: str) -> None:
    model, given = adapted(MODELS[family], KINDS[kind]), ids()
    padded = torch.cat((given, torch.zeros(3, 4, dtype=torch.int64)), 1)
    segments = torch.tensor([[1] * 11 + [0] * 4]).expand(3, -1)
    torch.testing.assert_close(logits(model, padded, segments=segments)[:, :11], logits(model, given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["plain", "block", "sdpa"])
def test_a_prefix_is_seen_on_every_path(path: str) -> None:
    model = adapted(MODELS["llama"], KINDS["prefix"])
    said = logits(model)
    for block in model.blocks:
        block.attention.path = path
    torch.testing.assert_close(logits(model), said, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["nothing", "head", "types"])
def test_a_target_that_is_not_there_is_named(target: str) -> None:
    with pytest.raises(ConfigError, match=target):
        LoRA(target=(target,)).apply(base(MODELS["bert"]))


@pytest.mark.parametrize("target, ours", [
    (("query",), {"q"}), (("attention.output.dense",), {"o"}), (("output.dense",), {"o", "down"}), (("mlp.up",), {"up"}),
    ("all", {"q", "k", "v", "o", "up", "down"}), (("blocks.0.attention.*",), {"q", "k", "v", "o"}),
])
def test_targets_are_named_as_users_know_them(target: tuple[str, ...] | str, ours: set[str]) -> None:
    model = base(MODELS["bert"])
    LoRA(target=target).apply(model)
    found = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert found == ours


def test_c_attn_is_three_of_ours() -> None:
    model = base(MODELS["gpt2"])
    LoRA(target=("c_attn",)).apply(model)
    assert {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, LoRALinear)} == {"q", "k", "v"}


@pytest.mark.parametrize("adapt, said", [
    (LoRA(target=("q", "v"), dora=True), "dora must take all of q, k, v"),
    (LoRA(modules_to_save=("attention.q",)), "name all of them"), (LoRA(rank=4, alpha=8, ranks={"q": 2}), "need the same scale"),
    (LoRA(modules_to_save=("embed",)), "cannot be saved"), (LoRA(modules_to_save=("nothing",)), "no module 'nothing'"),
])
def test_what_has_no_place_in_a_fused_or_tied_matrix_is_refused(adapt: LoRA, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adapt.apply(base(MODELS["gpt2"]))
    if adapt.ranks:
        adapt.apply(base(MODELS["llama"]))


def test_every_kind_is_here() -> None:
    from typing import get_args

    assert {type(k) for k in KINDS.values()} | {QAT} == set(get_args(Adapter)), "QAT, which adds nothing, has tests of its own"


@pytest.mark.parametrize("family", MODELS)
def test_what_is_frozen_costs_no_backward_pass(family: str) -> None:
    model = adapted(MODELS[family], LoRA(rank=2, target=("blocks.1.attention.v",))).train()
    seen: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(given[0].requires_grad))
    out = model(ids())["logits"]
    assert seen == [False, False] and out.requires_grad, "nothing before the adapter remembers what it computed"
    out.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"blocks.1.attention.v.lora_{part}" for part in "ab"}


@pytest.mark.parametrize("target", [("c_attn",), ("k", "v", "down")])
def test_ia3_scales_no_inputs_of_a_part_of_a_fused_matrix(target: tuple[str, ...]) -> None:
    adapt = IA3(target=target, feedforward=target)
    with pytest.raises(ConfigError, match=r"inputs of k, .*v cannot be scaled.*c_attn"):
        adapt.apply(base(MODELS["gpt2"]))
    IA3(target=("c_attn", "down")).apply(base(MODELS["gpt2"]))
    if "k" in target:
        adapt.apply(base(MODELS["llama"]))
