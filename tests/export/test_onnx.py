"""ONNX against the model in PyTorch: every head, any batch and length, padding, a cache, int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.export import onnx
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.nn.tasks import Head

CONTEXT, VOCAB = 24, 50
HEADS = {
    "classify": Head(kind="classify", labels=("a", "b", "c")), "regress": Head(kind="classify", problem="regression"),
    "tag": Head(kind="tag", labels=("O", "B", "I")), "answer": Head(kind="answer"), "embed": Head(kind="embed"),
    "choose": Head(kind="choose"),
}


def encoder(family: str = "bert", heads: tuple[Head, ...] = (), outputs: tuple[str, ...] = ()) -> Any:
    cfg = Encoder.model_validate({"family": family, "width": 32, "layers": 2, "heads": 4, "context": CONTEXT, "vocab": VOCAB,
                                  "init_std": 0.2, "tasks": heads, "outputs": outputs})
    return build(cfg, "cpu").init(1).eval()


def decoder(family: str = "llama", **more: Any) -> Any:
    cfg = Decoder.model_validate({"family": family, "width": 32, "layers": 2, "heads": 4, "context": CONTEXT, "vocab": VOCAB,
                                  "init_std": 0.2, **more})
    return build(cfg, "cpu").init(1).eval()


def rows(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(batch * 100 + tokens))


def opened(folder: Path, model: Any, **more: Any) -> onnx.Onnx:
    folder.mkdir(parents=True)
    onnx.write(folder, model, **more)
    return onnx.Onnx(folder, threads=1)


def ours(kind: str, said: torch.Tensor) -> np.ndarray:
    """What our head says, as the graph has it."""
    if kind == "embed":
        said = torch.nn.functional.normalize(said[:, 0], dim=-1)
    return said.detach().numpy()


def theirs(kind: str, out: dict[str, np.ndarray]) -> np.ndarray:
    if kind == "answer":
        return np.stack([out["start_logits"], out["end_logits"]], -1)
    return out["sentence_embedding" if kind == "embed" else "logits"]


@pytest.mark.parametrize(("family", "name"), [
    pytest.param(family, name, marks=[] if family == "bert" or (family, name) == ("llama", "classify") else pytest.mark.slow)
    for family in ("bert", "roberta", "llama") for name in HEADS])
def test_every_head_says_the_same_whatever_batch_length_and_padding(name: str, family: str, tmp_path: Path) -> None:
    head = HEADS[name]
    kind, chooses = head.kind, head.kind == "choose"
    model = decoder(family, kv_heads=2, lm=False, tasks=(head,)) if family == "llama" else encoder(family, (head,))
    found = opened(tmp_path / "x", model)
    for batch, tokens in ((1, 1), (3, 5), (1, CONTEXT), (2, CONTEXT)):
        ids = rows(batch, tokens)
        types = (ids % 2) if family == "bert" else None
        with torch.no_grad():
            right = ours(kind, model(ids, types=types)[head.name])
        if chooses:                                      # each row one choice of one question
            out = found.run(ids[None].numpy(), types=None if types is None else types[None].numpy())
            said = out["logits"].reshape(right.shape)
        else:
            said = theirs(kind, found.run(ids.numpy(), types=None if types is None else types.numpy()))
        assert said.shape == right.shape
        assert np.abs(said - right).max() < 1e-4
        if tokens < CONTEXT:                             # padding at the end changes nothing
            longer = np.concatenate([ids.numpy(), np.zeros((batch, 4), np.int64)], 1)
            mask = (np.arange(tokens + 4) < tokens).astype(np.int64)[None].repeat(batch, 0)
            more = None if types is None else np.pad(types.numpy(), ((0, 0), (0, 4)))
            if chooses:
                out = found.run(longer[None], mask[None], types=None if more is None else more[None])
                padded = out["logits"].reshape(right.shape)
            else:
                padded = theirs(kind, found.run(longer, mask, types=more))
            padded = padded[:, :tokens] if kind in ("tag", "answer") else padded
            assert np.abs(padded - right).max() < 1e-4
    assert np.abs(found.logits(ids[0].tolist()) - ours(kind, model(ids[:1])[head.name])[0]).max() < 1e-4


@pytest.mark.parametrize("more", [
    {"family": "llama", "kv_heads": 2}, *(pytest.param(each, marks=pytest.mark.slow) for each in (
        {"family": "gpt2"}, {"family": "qwen2", "kv_heads": 1, "tied": True},
        {"family": "qwen3", "kv_heads": 2, "head_width": 16, "window": 6, "full_layers": 1}, {"family": "mistral", "window": 5},
        {"family": "llama", "scaling": {"kind": "llama3", "factor": 8.0, "original": 16}})),
], ids=lambda m: "-".join(map(str, m.values())) if isinstance(m, dict) else "")
def test_a_decoder_says_the_same_with_and_without_a_cache(more: dict[str, Any], tmp_path: Path) -> None:
    model = decoder(**more)
    plain, cached = opened(tmp_path / "plain", model, cache=False), opened(tmp_path / "cached", model)
    assert not any(name.startswith("present") for name in plain.outputs)
    assert cached.outputs[1:3] == ["present.0.key", "present.0.value"]
    for batch, tokens in ((1, 1), (3, 7), (2, CONTEXT)):
        ids = rows(batch, tokens)
        with torch.no_grad():
            right = model(ids)["logits"].numpy()
        assert np.abs(plain.run(ids.numpy())["logits"] - right).max() < 1e-4
        for first in {1, tokens // 2, tokens - 1} - {0, tokens}:
            out = cached.run(ids[:, :first].numpy())
            parts = [out["logits"]]
            for at in range(first, tokens):              # token by token after that
                out = cached.run(ids[:, at : at + 1].numpy(), past=out)
                parts.append(out["logits"])
            assert np.abs(np.concatenate(parts, 1) - right).max() < 1e-4
        out = cached.run(ids[:, : tokens // 2 + 1].numpy())
        if tokens > 2:                                   # several new tokens after several old ones
            rest = cached.run(ids[:, tokens // 2 + 1 :].numpy(), past=out)["logits"]
            assert np.abs(rest - right[:, tokens // 2 + 1 :]).max() < 1e-4


def test_padding_in_front_changes_nothing(tmp_path: Path) -> None:
    """So that rows of unequal length are continued together."""
    model = decoder(kv_heads=2, window=None)
    found = opened(tmp_path / "x", model)
    short, long = rows(1, 4), rows(1, 9)
    ids = torch.cat((torch.nn.functional.pad(short, (5, 0)), long)).numpy()
    mask = np.array([[0] * 5 + [1] * 4, [1] * 9])
    out = found.run(ids, mask)
    new = np.array([[7], [8]])
    after = found.run(new, np.concatenate([mask, np.ones((2, 1), np.int64)], 1), past=out)["logits"]
    for row, alone in enumerate((short, long)):
        right = model(torch.cat((alone, torch.tensor(new[row : row + 1])), 1))["logits"][0, -1].detach().numpy()
        assert np.abs(after[row, 0] - right).max() < 1e-4


def test_a_masked_language_model_and_a_bare_encoder(tmp_path: Path) -> None:
    for outputs in (("mlm",), ("mlm", "nsp"), ()):
        model, ids = encoder(outputs=outputs), rows(3, 6)
        found, right = opened(tmp_path / str(len(outputs)), model), model(ids)
        wanted = {("mlm",): {"logits": "logits"}, (): {"last_hidden_state": "hidden", "pooler_output": "pooled"},
                  ("mlm", "nsp"): {"prediction_logits": "logits", "seq_relationship_logits": "nsp"}}[outputs]
        assert found.outputs == list(wanted)
        for name, ours_ in wanted.items():
            assert np.abs(found.run(ids.numpy())[name] - right[ours_].detach().numpy()).max() < 1e-4


def test_several_heads_at_once(tmp_path: Path) -> None:
    heads = (Head(kind="classify", name="mood", labels=("a", "b")), Head(kind="tag", name="who", labels=("O", "B")))
    model, ids = encoder(heads=heads), rows(2, 5)
    found = opened(tmp_path / "x", model)
    assert found.outputs == ["mood_logits", "who_logits"]
    out = found.run(ids.numpy())
    for name in ("mood", "who"):
        assert np.abs(out[f"{name}_logits"] - model(ids)[name].detach().numpy()).max() < 1e-4


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="cache"):
        onnx.write(tmp_path, encoder(heads=(HEADS["tag"],)), cache=True)
    model = decoder()
    model.ahead.keys = 2
    with pytest.raises(IncompatibleError, match="before the tokens"):
        onnx.write(tmp_path, model)


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.onnx"):
        onnx.Onnx(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(DataError):
        onnx.Onnx(tmp_path)
    with pytest.raises(ConfigError, match="TensorrtExecutionProvider"):
        onnx.Onnx(tmp_path, provider="tensorrt")
