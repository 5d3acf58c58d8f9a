"""Runs with adapters, end to end: what a checkpoint holds, that it goes on to the bit, and what opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from cli import danlu
from safetensors.torch import load_file

from danlu import config
from danlu.adapt import IA3, BitFit, Bottleneck, Freeze, LoRA, Prefix, Prompt, PTuning, folder
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, IncompatibleError
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.parallel import World
from danlu.train import checkpoint
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.setup import assemble, make_model, open_data, settle

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.1}, "dora": {"kind": "lora", "dora": True, "init": "pissa"},
    "ia3": {"kind": "ia3"}, "bottleneck": {"kind": "bottleneck", "reduction": 4}, "prefix": {"kind": "prefix", "tokens": 3},
    "prompt": {"kind": "prompt", "tokens": 3}, "ptuning": {"kind": "ptuning", "tokens": 3, "hidden": 8},
    "bitfit": {"kind": "bitfit"}, "freeze": {"kind": "freeze", "last": 1},
}


@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny decoder and the corpus's tokenizer."""
    path = tmp_path_factory.mktemp("base") / request.param
    special = Tokenizer.load(corpus / "tokenizer").special
    cfg = Decoder(family=request.param, width=32, layers=2, heads=2, context=64, vocab=special.size)
    weights.save(path, build(cfg, "cpu").init(0), tokenizer=corpus / "tokenizer")
    return path


def recipe(corpus: Path, base: Path, out: Path, **changes: Any) -> Run:
    plain: dict[str, Any] = {
        "out": str(out), "data": [{"path": str(corpus)}], "objective": "causal_lm", "optim": {"kind": "adamw", "lr": 1e-2},
        "start": str(base), "schedule": {"kind": "constant", "warmup": 0}, "steps": 6, "rows": 8, "length": 32,
        "overlong": "split", "precision": "fp32", "every": {"log": 1, "evaluate": 3, "save": 3, "keep": 9}, "threads": 1,
        "device": "cpu",
    }
    return config.validate(Run, plain | changes)


def given(kind: str) -> dict[str, Any]:
    return {"adapt": KINDS[kind], "pack": kind not in ("prompt", "ptuning")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_bit(corpus: Path, base: Path, tmp_path: Path, kind: str) -> None:
    if kind == "bitfit" and base.name == "llama":
        pytest.skip("it has no biases")
    whole = train(recipe(corpus, base, tmp_path / "whole", **given(kind)))
    train(recipe(corpus, base, tmp_path / "halves", **given(kind), steps=3))
    halves = train(recipe(corpus, base, tmp_path / "halves", **given(kind)))
    assert not (whole / "model.safetensors").exists() and not (whole / "config.json").exists()
    for name in (folder.TENSORS, "optimizer.safetensors"):
        then, now = load_file(whole / name), load_file(halves / name)
        assert then.keys() == now.keys() and all(torch.equal(t, now[n]) for n, t in then.items()), name
    model = checkpoint.load_model(tmp_path / "whole")
    stored = folder.tensors(folder.describe(whole))
    assert all(torch.equal(model.state_dict()[name], t) for name, t in stored.items())
    untouched = {n: t for n, t in weights.load(base).state_dict().items() if n not in stored}
    assert untouched and all(torch.equal(model.state_dict()[name], t) for name, t in untouched.items())


def test_peft_opens_a_checkpoint(corpus: Path, base: Path, tmp_path: Path) -> None:
    last = train(recipe(corpus, base, tmp_path / "run", adapt="lora", ema=0.5))
    told = json.loads((last / folder.CONFIG).read_text())
    assert told["base_model_name_or_path"] == str(base.resolve()) and told["peft_type"] == "LORA"
    assert (last / "README.md").is_file() and (last / "tokenizer.json").is_file()
    given_ = torch.arange(12)[None]
    for path in (last, last / "ema"):
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            ours = folder.load(path).eval()(given_)["logits"]
            torch.testing.assert_close(theirs(input_ids=given_).logits, ours, atol=1e-5, rtol=0)
    assert checkpoint.chosen(tmp_path / "run").name == "ema"


def test_what_peft_trained_is_trained_on(corpus: Path, base: Path, tmp_path: Path) -> None:
    target = ["q_proj"] if base.name == "llama" else ["c_attn"]
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=target, r=3, lora_alpha=5, init_lora_weights=False,
                        fan_in_fan_out=base.name == "gpt2"))
    theirs.save_pretrained(tmp_path / "theirs")
    run = recipe(corpus, base, tmp_path / "run", adapt={"start": str(tmp_path / "theirs")})
    world, data = World(run.layout), open_data(run)
    settled, choice = settle(run, data, world, None)
    assert isinstance(settled.adapt, LoRA) and (settled.adapt.rank, settled.adapt.alpha) == (3, 5.0)
    work = assemble(settled, data, make_model(settled, choice, world))
    with torch.no_grad():
        torch.testing.assert_close(work.model.eval().whole(torch.arange(12)[None])["logits"],
                                   theirs.eval()(input_ids=torch.arange(12)[None]).logits, atol=1e-5, rtol=0)
    train(run)
    with pytest.raises(ConfigError, match="another make"):
        train(recipe(corpus, base, tmp_path / "other", adapt={"kind": "lora", "rank": 7, "start": str(tmp_path / "theirs")}))


def test_the_command_line_trains_evaluates_and_writes(corpus: Path, base: Path, tmp_path: Path) -> None:
    run = recipe(corpus, base, tmp_path / "run")
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(run, only_set=True), encoding="utf-8")
    ended = danlu("train", file, "adapt=lora", "adapt.rank=8", "steps=3").clean()
    assert ended.code == 0, ended.err
    assert "are trained" in ended.err
    assert folder.describe(Path(ended.out.strip())).adapt == LoRA(rank=8)
    assert danlu("train", file, "adapt=lora", "adapt.rank=8", "steps=4").clean().code == 0
    repeated = danlu("train", tmp_path / "run" / "recipe.yaml", f"out={tmp_path / 'repeated'}").clean()
    assert repeated.code == 0, repeated.err
    same = [load_file(checkpoint.listing(tmp_path / name)[-1] / folder.TENSORS) for name in ("run", "repeated")]
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items()), "the written recipe repeats the run"
    changed = danlu("train", file, "adapt=lora", "adapt.rank=4", "steps=5").clean()
    assert changed.code == 4 and "adapter is not the one" in changed.last
    score = danlu("eval", tmp_path / "run", "--json").clean()
    assert score.code == 0 and json.loads(score.out)["results"]
    text = danlu("generate", tmp_path / "run", "--prompt", "the furnace", "--max-new-tokens", 5).clean()
    assert text.code == 0 and text.out.startswith("the furnace")
    assert danlu("ckpt", "hash", tmp_path / "run").clean().code == 0
    refused = danlu("train", file, f"start={tmp_path / 'run'}", f"out={tmp_path / 'again'}", "adapt=lora").clean()
    assert refused.code == 2 and "adapt.start" in refused.last


@pytest.mark.parametrize("words, adapt", [
    ({"adapt": "lora"}, LoRA()), ({"lora_rank": 8, "lora_alpha": 16}, LoRA(rank=8, alpha=16.0)),
    ({"finetuning_type": "lora", "lora_target": "q_proj,v_proj"}, LoRA(target=("q_proj", "v_proj"))),
    ({"adapter": "lora", "lora_r": 4, "lora_target_modules": ["q", "v"], "lora_dropout": 0.1},
     LoRA(rank=4, target=("q", "v"), dropout=0.1)),
    ({"adapter": "qlora"}, LoRA(base="nf4")), ({"finetuning_type": "full"}, None), ({"target_modules": "all-linear"}, LoRA()),
    ({"adapt": "lora", "use_rslora": True, "use_dora": True}, LoRA(rslora=True, dora=True)), ({"adapt": "ia3"}, IA3()),
    ({"finetuning_type": "freeze", "freeze_trainable_layers": 2}, Freeze(last=2)), ({"adapt": {"kind": "bitfit"}}, BitFit()),
    ({"adapt": {"kind": "bottleneck", "style": "houlsby"}}, Bottleneck(style="houlsby")), ({"adapt": "prefix"}, Prefix()),
    ({"adapt": "prompt", "pack": False}, Prompt()), ({"adapt": "ptuning", "pack": False}, PTuning()),
    ({"loraplus_lr_ratio": 16.0, "additional_target": ["embed"]}, LoRA(rate_ratio=16.0, modules_to_save=("embed",))),
])
def test_adapters_are_called_as_users_call_them(tmp_path: Path, words: dict[str, Any], adapt: Any) -> None:
    file = tmp_path / "recipe.yaml"
    plain = {"out": "out", "data": ["data"], "objective": "causal_lm", "optim": "adamw", "start": "base", "schedule": "constant",
             "steps": 6, "rows": 8, "length": 32}
    file.write_text(json.dumps(plain | words))
    assert config.load(Run, file).adapt == adapt
    flat = [f"{k}={json.dumps(v)}" for k, v in words.items() if not isinstance(v, dict)]
    if len(flat) == len(words):
        file.write_text(json.dumps(plain))
        assert config.load(Run, file, flat).adapt == adapt


@pytest.mark.parametrize("words, said", [
    ({"adapt": "prompt"}, "set pack=false"), ({"adapt": "prompt", "pack": False, "layout": {"cp": 2}}, "layout.cp"),
    ({"adapt": "prompt", "pack": False, "layout": {"pp": 2, "micro": 2}}, "layout.pp=1"),
    ({"adapt": {"kind": "freeze", "last": 1}, "layout": {"pp": 2, "micro": 2}}, "layout.pp=1"),
    ({"adapt": {"kind": "freeze"}}, "adapt.last"),
    ({"adapt": {"kind": "lora", "base": "nf4"}, "layout": {"tp": 2}}, "layout.tp=1"),
])
def test_what_cannot_be_is_refused_at_the_door(tmp_path: Path, words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(tmp_path, tmp_path, tmp_path, **words)
    with pytest.raises(ConfigError, match="give `start`"):
        recipe(tmp_path, tmp_path, tmp_path, **{"adapt": "lora", "start": None, "model": {"kind": "decoder"}})


def test_a_changed_base_is_noticed(corpus: Path, base: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(base, tmp_path / "base")
    train(recipe(corpus, tmp_path / "base", tmp_path / "run", adapt="lora", steps=3))
    shutil.rmtree(tmp_path / "base")
    weights.save(tmp_path / "base", build(weights.read_config(base), "cpu").init(1), tokenizer=corpus / "tokenizer")
    with pytest.raises(IncompatibleError, match="not those that the adapter was trained on"):
        train(recipe(corpus, tmp_path / "base", tmp_path / "run", adapt="lora"))


def test_learning_rates_by_depth_and_part(corpus: Path, base: Path, tmp_path: Path) -> None:
    def scales(**changes: Any) -> dict[str, float]:
        run = recipe(corpus, base, tmp_path / "run", **changes)
        world, data = World(run.layout), open_data(run)
        settled, choice = settle(run, data, world, None)
        work = assemble(settled, data, make_model(settled, choice, world))
        return {name: g["scale"] for g in work.optimizer.param_groups for name in g["names"]}

    plus = scales(adapt={"kind": "lora", "rate_ratio": 16.0})
    assert {name.rsplit(".", 1)[-1]: scale for name, scale in plus.items()} == {"lora_a": 1.0, "lora_b": 16.0}
    deep = scales(optim={"kind": "adamw", "layer_decay": 0.5})
    assert deep["embed.weight"] == 0.125 and deep["blocks.0.norm1.weight"] == 0.25 and deep["blocks.1.attention.q.weight"] == 0.5
    assert deep["norm.weight"] == 1.0


def test_blocks_thaw_from_the_top(corpus: Path, base: Path, tmp_path: Path) -> None:
    last = train(recipe(corpus, base, tmp_path / "run", adapt={"kind": "freeze", "last": 1, "thaw": [3]}))
    begun = weights.load(base).state_dict()
    moved = {}
    for step in (3, 6):
        stored = folder.tensors(folder.describe(last.with_name(f"checkpoint-{step}")))
        moved[step] = {name.split(".")[1] for name, t in stored.items()
                       if name.startswith("blocks.") and not torch.equal(t, begun[name])}
    assert moved == {3: {"1"}, 6: {"0", "1"}}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["layout.tp=2", pytest.param("layout.dp=2 layout.shard=full", marks=pytest.mark.slow),
                                    pytest.param("layout.pp=2 layout.micro=2", marks=pytest.mark.slow)])
def test_a_checkpoint_of_several_processes_is_that_of_one(corpus: Path, base: Path, tmp_path: Path, layout: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe(corpus, base, tmp_path / "run", adapt={"kind": "lora", "dora": True}), only_set=True))
    ended = danlu("train", file, "steps=3", "ema=0.5", *layout.split(), timeout=200).clean()
    assert ended.code == 0, ended.err
    alone = train(recipe(corpus, base, tmp_path / "alone", adapt={"kind": "lora", "dora": True}, steps=3, ema=0.5))
    for inside in (".", "ema"):
        then, now = (folder.tensors(folder.describe(path / inside)) for path in (alone, Path(ended.out.strip())))
        assert then.keys() == now.keys()
        for name, tensor in then.items():
            torch.testing.assert_close(now[name], tensor, atol=2e-4, rtol=0)
    assert danlu("train", file, "steps=4", "ema=0.5", timeout=200).clean().code == 0, "goes on under another layout"
