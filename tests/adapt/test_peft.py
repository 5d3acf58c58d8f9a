"""Folders of adapters against `peft`: what one writes the other opens, and both say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapt.tiny import KINDS, MODELS, adapted, base, ids, logits, shake
from safetensors.torch import load_file
from torch import Tensor

from danlu.adapt import Adapter, LoRA, folder
from danlu.adapt.peft import TYPES
from danlu.adapt.targets import kept
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.models import weights
from danlu.nn.tasks import Head

transformers.logging.set_verbosity_error()
MORE: dict[str, Adapter] = {
    "rates": LoRA(rank=2, alpha=3.0, target=("q", "o", "down"), ranks={"down": 5}, alphas={"down": 7.0}),
    "q alone": LoRA(rank=2, target=("q",)), "position": LoRA(rank=2, target=("position",)),
    "layers": LoRA(rank=2, target=("blocks.1.*",)),
}
OURS = [pytest.param(family, kind, id=f"{family} {kind}") for family in MODELS for kind in (KINDS | MORE)
        if (KINDS | MORE)[kind].kind in TYPES and not (kind == "position" and family == "llama")]


def bases(folder_: Path, family: str) -> Path:
    weights.save(folder_ / "base", base(MODELS[family]))
    return folder_ / "base"


def theirs(path: Path, family: str) -> Any:
    cls = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    return cls.from_pretrained(path, dtype=torch.float32).eval()


def said(model: Any, given: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids() if given is None else given, attention_mask=torch.ones(3, 11)).logits[:, -11:]
    return out


def written(tmp_path: Path, family: str, adapt: Adapter) -> tuple[Any, Path]:
    """A moved adapter of ours, and the folder that it is written to."""
    cfg, on = MODELS[family], bases(tmp_path, family)
    model = adapted(cfg, adapt)
    names = set(kept(model, cfg))
    shake(model, {n for n in names if not n.endswith("0")})
    (tmp_path / "adapter").mkdir()
    folder.write(tmp_path / "adapter", cfg, adapt, {n: t for n, t in model.state_dict().items() if n in names},
                 base=folder.Base.of(on))
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("family, kind", OURS)
def test_peft_opens_ours(tmp_path: Path, family: str, kind: str) -> None:
    adapt = (KINDS | MORE)[kind]
    model, path = written(tmp_path, family, adapt)
    if family == "bert" and kind in ("prompt", "prefix", "ptuning"):
        path.joinpath(folder.CONFIG).write_text(                # PEFT has no virtual tokens without a task; this one adds no head
            json.dumps(json.loads((path / folder.CONFIG).read_text()) | {"task_type": "FEATURE_EXTRACTION"}))
    opened = peft.PeftModel.from_pretrained(theirs(tmp_path / "base", family), path).eval()
    assert not torch.allclose(said(opened), logits(base(MODELS[family])), atol=1e-3)
    torch.testing.assert_close(said(opened), logits(model), atol=1e-5, rtol=0)
    again = {name.removesuffix(".default") for name in peft.get_peft_model_state_dict(opened)}
    ours = set(load_file(path / folder.TENSORS))
    assert ours == {name for name in again if ".base_layer." not in name}, "exactly the names that peft writes"


@pytest.mark.parametrize("family, kind", [
    pytest.param(family, kind, id=f"{family} {kind}") for family in MODELS for kind in KINDS
    if not (kind == "bitfit" and family == "llama")])
def test_ours_come_back(tmp_path: Path, family: str, kind: str) -> None:
    model, path = written(tmp_path, family, KINDS[kind])
    assert folder.is_adapter(path) and folder.read_config(path) == MODELS[family]
    again = folder.load(path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items()), "to the bit"
    assert torch.equal(logits(again), logits(model))
    assert ("peft_type" in json.loads((path / folder.CONFIG).read_text())) == (KINDS[kind].kind in TYPES)


LORA = {"init_lora_weights": False, "r": 4, "lora_alpha": 12}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layer.1.attention.self.query|h.1.attn.c_attn|layers.1.self_attn.q_proj": 2},
                 "alpha_pattern": {"o_proj|mlp.c_proj|attention.output.dense": 3}},
}
TARGETS = {"bert": ["query", "attention.output.dense", "intermediate.dense"], "gpt2": ["c_attn", "mlp.c_proj"],
           "llama": ["q_proj", "o_proj", "down_proj"]}
EMBEDDED = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens"}


def config(kind: str, family: str) -> Any:
    task = None if family == "bert" else "CAUSAL_LM"
    turned = {"fan_in_fan_out": True} if family == "gpt2" else {}
    if kind in CONFIGS:
        return peft.LoraConfig(task_type=task, target_modules=TARGETS[family], **turned, **LORA, **CONFIGS[kind])
    if kind == "embeddings":
        return peft.LoraConfig(task_type=task, target_modules=[EMBEDDED[family]], **LORA)
    if kind == "expression":
        return peft.LoraConfig(task_type=task, target_modules=rf".*\.1\..*({'|'.join(TARGETS[family])})", **turned, **LORA)
    if kind == "ia3":
        return peft.IA3Config(task_type=task, init_ia3_weights=False, **turned)
    virtual = {"task_type": task or "FEATURE_EXTRACTION", "num_virtual_tokens": 4}
    return {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig, "ptuning": peft.PromptEncoderConfig}[kind](
        **virtual, **({"encoder_hidden_size": 8} if kind == "ptuning" else {}))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", [*CONFIGS, "embeddings", "expression", "ia3", "prompt", "prefix", "ptuning"])
def test_we_open_what_peft_wrote(tmp_path: Path, family: str, kind: str) -> None:
    path = bases(tmp_path, family)
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(path, family), config(kind, family)).eval()
    model.save_pretrained(tmp_path / "adapter")
    ours = folder.load(tmp_path / "adapter").eval()
    assert not torch.allclose(logits(ours), logits(base(MODELS[family])), atol=1e-3)
    torch.testing.assert_close(logits(ours), said(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", MODELS)
def test_a_head_travels_with_the_adapter(tmp_path: Path, family: str) -> None:
    path = bases(tmp_path, family)
    head = Head(kind="classify", labels=("a", "b", "c"))
    cfg = MODELS[family].with_tasks((head,))
    adapt = LoRA(rank=2, modules_to_save=("pooler",) if family == "bert" else ())
    model = weights.build(cfg, "cpu").init(7)
    model.load_state_dict({n: t for n, t in base(MODELS[family]).state_dict().items() if n in model.state_dict()}, strict=False)
    adapt.apply(model)
    adapt.begin(model, 3)
    names = set(kept(model, cfg))
    shake(model.eval(), names)
    (tmp_path / "adapter").mkdir()
    state = {n: t for n, t in model.state_dict().items() if n in names}
    folder.write(tmp_path / "adapter", cfg, adapt, state, base=folder.Base.of(path))
    with torch.no_grad():
        expected = model(ids())["classify"]
        assert torch.equal(folder.load(tmp_path / "adapter").eval()(ids())["classify"], expected)
    told = json.loads((tmp_path / "adapter" / folder.CONFIG).read_text())
    assert told["task_type"] == "SEQ_CLS" and {"classifier", "score"} & set(told["modules_to_save"])
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=3, pad_token_id=0 if family == "bert" else -1)
    opened = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids()).logits, expected, atol=1e-5, rtol=0)
    opened.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(folder.load(tmp_path / "theirs").eval()(ids())["classify"], expected, atol=1e-5, rtol=0)


def test_another_base_is_refused(tmp_path: Path) -> None:
    _model, path = written(tmp_path, "llama", LoRA(rank=2))
    weights.save(tmp_path / "other", base(MODELS["llama"], seed=8))
    with pytest.raises(IncompatibleError, match="not those that the adapter was trained on"):
        folder.describe(path, base=tmp_path / "other")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="is not there"):
        folder.describe(path)
    assert folder.describe(path, base=tmp_path / "moved").adapt == LoRA(rank=2)


@pytest.mark.parametrize("change, said_", [
    (lambda t: t.pop(next(iter(t))), "gives"), (lambda t: t.update(stray=torch.zeros(1)), "stray"),
    (lambda t: t.update({next(iter(t)): torch.zeros(3, 3)}), "shape"),
])
def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path: Path, change: Any, said_: str) -> None:
    from safetensors.torch import save_file

    _model, path = written(tmp_path, "llama", LoRA(rank=2))
    tensors = load_file(path / folder.TENSORS)
    change(tensors)
    save_file(tensors, path / folder.TENSORS)
    with pytest.raises(IncompatibleError, match=said_):
        folder.load(path)
    (path / folder.TENSORS).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="damaged"):
        folder.load(path)


@pytest.mark.parametrize("key, value, said_", [
    ("layers_to_transform", [1], "layers_to_transform"), ("bias", "all", "bias"), ("peft_type", "LOHA", "LOHA"),
    ("init_lora_weights", "pissa", "path_initial_model"), ("lora_bias", True, "lora_bias"),
])
def test_what_we_would_get_wrong_is_refused(tmp_path: Path, key: str, value: Any, said_: str) -> None:
    path = bases(tmp_path, "llama")
    peft.get_peft_model(theirs(path, "llama"), config("lora", "llama")).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / folder.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(IncompatibleError, match=said_):
        folder.load(tmp_path / "adapter")
