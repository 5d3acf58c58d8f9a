"""Folders against transformers in both directions, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from danlu.errors import ConfigError, DanluError, DataError, IncompatibleError, SecurityError
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder

S: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                     "num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": 2}
G: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "eos_token_id": 3,
                     "bos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

THEIRS: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(**G),
    "gpt2 untied": lambda: GPT2Config(**G, n_inner=40, tie_word_embeddings=False, activation_function="gelu"),
    "llama 2": lambda: LlamaConfig(**S),
    "llama biased, tied": lambda: LlamaConfig(**S, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama 3": lambda: LlamaConfig(**S, num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama linear": lambda: LlamaConfig(**S, rope_parameters=LINEAR),
    "llama yarn": lambda: LlamaConfig(**S, num_key_value_heads=1, rope_parameters=YARN),
    "qwen 2": lambda: Qwen2Config(**S, num_key_value_heads=2),
    "qwen 2 sliding": lambda: Qwen2Config(**S, num_key_value_heads=2, use_sliding_window=True, sliding_window=5,
                                          max_window_layers=1),
    "qwen 3 tied": lambda: Qwen3Config(**S, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**S, num_key_value_heads=2, sliding_window=5),
}


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if p.ndim == 1 and not name.endswith("bias") else 0.0, 0.2)
    return model


@pytest.mark.parametrize("case", THEIRS)
def test_parity_in_both_directions(case: str, tmp_path: Path) -> None:
    theirs, ids = random_model(THEIRS[case]()), torch.randint(61, (2, 40))
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert wanted.std() > 0.5                               # not a comparison of nothing with nothing
        ours = weights.load(tmp_path / "theirs").eval()
        torch.testing.assert_close(ours(ids)["logits"], wanted, atol=1e-5, rtol=0)
        weights.save(tmp_path / "ours", ours, shard_bytes=20_000)
        back, said = AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
        assert not any(said.values()), said
        torch.testing.assert_close(back.eval()(ids).logits, wanted, atol=1e-5, rtol=0)
    again = weights.load(tmp_path / "ours")
    assert again.cfg == ours.cfg
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), ours.parameters(), strict=True))


def configured(family: str, layers: int, heads: int, tied: bool, biased: bool, vocab: int) -> Decoder:  # noqa: PLR0917
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "norm_bias"), biased) if family == "gpt2" else {}
    return Decoder.model_validate({"family": family, "layers": layers, "heads": heads, "width": 4 * heads, "vocab": vocab,
                                   "tied": tied, "context": 8, **biases})


CONFIGS = st.builds(configured, st.sampled_from(["gpt2", "llama", "qwen2", "qwen3", "mistral"]), st.integers(1, 3),
                    st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 20))


@settings(max_examples=25, deadline=None)
@given(CONFIGS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_renaming_is_inverted_bit_for_bit(cfg: Decoder, dtype: torch.dtype, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(t.shape, generator=source).to(dtype) for name, t in build(cfg).state_dict().items()}
    back = weights.from_hf(cfg, dict(weights.to_hf(cfg, state)))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == dtype for name, tensor in state.items())


@settings(max_examples=25, deadline=None)
@given(CONFIGS)
def test_config_json_is_inverted(cfg: Decoder) -> None:
    data = json.loads(json.dumps(weights.decoder_config.write(cfg)))
    assert weights.decoder_config.read(data, where="config.json") == cfg


def test_gpt2_without_biases_opens_in_transformers(tmp_path: Path) -> None:
    cfg = Decoder(family="gpt2", vocab=61, width=16, layers=2, heads=2, context=16, qkv_bias=False, out_bias=False,
                  mlp_bias=False, norm_bias=False)
    ours = build(cfg, "cpu").init(3).eval()
    weights.save(tmp_path / "m", ours)
    theirs, said = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(said.values()), said
    ids = torch.randint(61, (2, 16))
    torch.testing.assert_close(theirs.eval()(ids).logits, ours(ids)["logits"], atol=1e-5, rtol=0)
    again = weights.load(tmp_path / "m")
    assert again.cfg == cfg and again.blocks[0].attention.q.bias is None
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.bias"][2] = 1.0           # somebody trained it further, with biases
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"h\.1\.mlp\.c_fc\.bias"):
        weights.load(tmp_path / "m")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build(Decoder(family="llama", vocab=61, width=16, layers=2, heads=2, context=16, tied=True), "cpu").init(0)
    weights.save(tmp_path / "m", model)
    return tmp_path / "m"


def change(folder: Path, **tensors: Tensor | None) -> None:
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del held[name]
        else:
            held[name] = tensor
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("tensors", "named"), [
    ({UP: None}, UP), ({UP.replace("1", "9"): torch.zeros(1)}, r"layers\.9"), ({UP: torch.zeros(3, 3)}, UP),
    ({"lm_head.weight": torch.zeros(61, 16)}, "lm_head"),
])
def test_weights_that_do_not_fit_are_named(folder: Path, tensors: dict[str, Tensor | None], named: str) -> None:
    change(folder, **tensors)
    with pytest.raises(IncompatibleError, match=named):
        weights.load(folder)


def test_a_copy_of_the_tied_weight_and_old_buffers_are_read(folder: Path) -> None:
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": table.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert torch.equal(weights.load(folder).embed.weight, table)


def test_a_file_of_the_bare_model_is_read(folder: Path) -> None:
    held = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    wanted = weights.load(folder).state_dict()
    save_file(held, folder / "model.safetensors")
    assert all(torch.equal(t, wanted[name]) for name, t in weights.load(folder).state_dict().items())


@pytest.mark.parametrize(("changes", "named"), [
    ({"model_type": "nothing"}, "nothing"), ({"model_type": None}, "None"), ({"model_type": ["llama"]}, "llama"),
    ({"attn_logit_softcap": 30}, "attn_logit_softcap"), ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ({"quantization_config": {}}, "quantization_config"), ({"hidden_act": "mish"}, "mish"),
    ({"hidden_size": "16"}, "width"), ({"num_attention_heads": 3}, "heads=3"), ({"rms_norm_eps": -1.0}, "eps"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
    ({"danlu": {"width": 3}}, "danlu.width"), ({"danlu": 3}, "danlu"), ({"max_position_embeddings": True}, "context"),
])
def test_a_config_that_is_not_known_is_refused(folder: Path, changes: dict[str, Any], named: str) -> None:
    configure(folder, **changes)
    with pytest.raises(IncompatibleError, match=named):
        weights.read_config(folder)


@pytest.mark.parametrize("changes", [
    {"layer_types": "all"}, {"layer_types": ["sliding_attention", "full_attention"]}, {"max_window_layers": "many"},
    {"num_hidden_layers": None}, {"rope_theta": "big"}, {"rope_scaling": "no"}, {"num_hidden_layers": "2"},
])
def test_nonsense_never_gets_past_the_schema(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = build(Decoder(family="qwen2", vocab=61, width=16, layers=2, heads=2, context=16), "cpu").init(0)
    weights.save(tmp_path / "m", model)
    configure(tmp_path / "m", **changes)
    try:
        weights.load(tmp_path / "m")
    except DanluError:
        return
    assert changes in ({"rope_scaling": "no"}, {"layer_types": "all"})      # harmless: taken as absent


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError):
            weights.read_config(path)


def test_pickles_are_refused_unopened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/danlu-pwned'\ntR.")
    with pytest.raises(SecurityError, match=r"pytorch_model\.bin"):
        weights.load(folder)


@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "weights.bin", "a\0b"])
def test_an_index_stays_in_its_folder(folder: Path, file: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(SecurityError):
        weights.load(folder)


def test_damage_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:-100], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"model\.safetensors"):
            weights.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json"):
        weights.load(folder)


def test_shards_and_their_index(folder: Path, tmp_path: Path) -> None:
    model = weights.load(folder)
    weights.save(tmp_path / "s", model, shard_bytes=4000)
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    held = {file: set(load_file(tmp_path / "s" / file)) for file in set(index["weight_map"].values())}
    assert len(held) > 2 and all(f.endswith(f"-of-{len(held):05}.safetensors") for f in held)
    assert {name: f for f, names in held.items() for name in names} == index["weight_map"]
    assert not [p for p in (tmp_path / "s").iterdir() if p.name.startswith(".")]
    other = min(held)
    (tmp_path / "s" / other).rename(tmp_path / "s" / "gone")
    with pytest.raises(DataError, match=other):
        weights.load(tmp_path / "s")


def test_what_is_written_is_readable_and_whole_or_absent(folder: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    mask = os.umask(0o027)
    try:
        weights.save(tmp_path / "a", weights.load(folder))
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").iterdir()} == {0o640}
    with pytest.raises(ConfigError):
        weights.save(folder, weights.load(folder))
    monkeypatch.setattr(weights.tensorfile, "stream", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        weights.save(tmp_path / "b", weights.load(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m"]


def test_other_types_and_the_tokenizer_go_along(folder: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "t"
    tokens.mkdir()
    added = [{"id": 5, "content": "<e>"}, {"id": 1, "content": "<b>"}]
    (tokens / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (tokens / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<e>", "bos_token": {"content": "<b>"}}))
    weights.save(tmp_path / "h", weights.load(folder), dtype=torch.bfloat16, tokenizer=tokens)
    data = json.loads((tmp_path / "h" / "config.json").read_text())
    assert (data["eos_token_id"], data["bos_token_id"], data["pad_token_id"]) == (5, 1, None)
    assert data["torch_dtype"] == "bfloat16"
    assert (tmp_path / "h" / "tokenizer.json").read_text() == (tokens / "tokenizer.json").read_text()
    assert weights.load(tmp_path / "h").embed.weight.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "h").generation_config.eos_token_id == 5
    halved = weights.load(tmp_path / "h", dtype=torch.bfloat16).embed.weight
    assert torch.equal(halved, weights.load(folder).embed.weight.bfloat16())
