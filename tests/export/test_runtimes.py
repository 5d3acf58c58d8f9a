"""Trained models through the gate into each runtime, and what stands in the folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx as library
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("gguf")

from danlu.adapt.lora import LoRA
from danlu.data import chat
from danlu.data.kinds import BPE
from danlu.data.tokenizer import Tokenizer, train
from danlu.errors import ConfigError, IncompatibleError
from danlu.evaluate.subject import Subject, open_subject
from danlu.export import gate, gguf, onnx
from danlu.export.table import EXPORTERS, Options, opened
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder
from tests.evaluate import small

SAID = ["the old film was warm and bright", "a day with music, and a story", "电影真好"] * 4


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("classifier")
    data = small.table(folder / "rows.csv", ["text", "label"], small.texts(240, 1))
    return open_subject(small.trained(folder, small.encoder(folder), str(data), steps=60))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("writer")
    tokenizer = train(SAID, BPE.model_validate({"vocab": 300, "cut": "gpt2", "special": ("<|im_start|>", "<|im_end|>")}))
    tokenizer.save(folder / "tokenizer")
    chat.Template.load(tokenizer).save(folder / "tokenizer")
    cfg = Decoder.model_validate({"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 128, "vocab": tokenizer.size})
    model = build(cfg, "cpu").init(1)
    learn = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(90):                               # until it knows the three texts by heart, so that margins are wide
        ids = torch.from_numpy(tokenizer.encode(SAID[step % 3]))[None]
        loss = torch.nn.functional.cross_entropy(model(ids)["logits"][0, :-1], ids[0, 1:])
        learn.zero_grad()
        loss.backward()
        learn.step()
    weights.save(folder / "model", model, tokenizer=folder / "tokenizer")
    return open_subject(folder / "model")


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_a_trained_classifier_passes_the_gate(to: str, classifier: Subject, tmp_path: Path) -> None:
    report = gate.export(classifier, to, tmp_path / "out", options=Options(), rows=gate.rows_for(classifier))
    assert report.green
    assert json.loads((tmp_path / "out/parity.json").read_text())["green"] is True
    again = opened(tmp_path / "out")
    assert again is not None and again.kind == to
    assert again.labels() == ("bad", "good")            # type: ignore[attr-defined]


@pytest.mark.parametrize("to", ["onnx", "torch-export", "gguf"])
def test_a_writer_passes_the_gate_with_its_text_and_its_template(to: str, writer: Subject, tmp_path: Path) -> None:
    report = gate.export(writer, to, tmp_path / "out", options=Options(), rows=gate.rows_for(writer))
    assert report.green
    assert {c.name for c in report.checks if c.state == "not compared"} <= {"labels", "KL"}
    again = opened(tmp_path / "out")
    assert again is not None and again.kind == to


@pytest.mark.parametrize(("to", "options"), [
    ("gguf", Options(dtype="fp16")), ("gguf", Options(dtype="bf16")), ("gguf", Options(quantize="q8_0")),
    ("onnx", Options(quantize="int8"))], ids=str)
def test_a_rounded_writer_passes_the_gate(to: str, options: Options, writer: Subject, tmp_path: Path) -> None:
    rows = [writer.tokenizer.encode(text).tolist() for text in SAID[:3]]
    report = gate.export(writer, to, tmp_path / "out", options=options, rows=rows)
    assert report.green
    assert report.b[1] == ("quantized" if options.quantize else "gguf")


def test_a_gguf_without_the_rotary_permutation_is_red(writer: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "interleave", lambda tensor, heads: tensor)
    with pytest.raises(IncompatibleError, match="logits") as refused:
        gate.export(writer, "gguf", tmp_path / "out", options=Options(), rows=gate.rows_for(writer))
    assert "rotary" in str(refused.value.fix)
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.red/parity.json").read_text())["green"] is False


def test_int8_finds_the_same_class_of_most_rows_in_a_quarter_of_the_bytes(classifier: Subject, tmp_path: Path) -> None:
    for name, options in (("plain", Options()), ("few", Options(quantize="int8"))):
        gate.export(classifier, "onnx", tmp_path / name, options=options, rows=gate.rows_for(classifier))
    found = onnx.Onnx(tmp_path / "few", threads=1)
    same = []
    for text, _label in small.texts(60, 9):
        row, _kinds = classifier.tokenizer.together((classifier.tokenizer.encode(text),))
        with torch.no_grad():
            right = classifier.model(torch.tensor([row.tolist()]))["classify"][0]
        same.append(int(found.logits(row.tolist()).argmax()) == int(right.argmax()))
    assert np.mean(same) > 0.95
    held = library.load(tmp_path / "few/model_quantized.onnx").graph.initializer
    assert {t.data_type for t in held if len(t.dims) == 2} == {library.TensorProto.INT8, library.TensorProto.UINT8}
    assert not (tmp_path / "few/model.onnx").exists()


def test_an_adapter_is_merged_on_the_way(writer: Subject, tmp_path: Path) -> None:
    from danlu.adapt import folder as adapters

    model: Any = weights.load(writer.folder)
    adapt = LoRA(rank=4)
    adapt.apply(model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    from danlu.adapt import peft

    there = tmp_path / "adapter"
    there.mkdir()
    state = {name: t for name, t in model.state_dict().items() if name in peft.shapes(adapt, model.cfg)}
    adapters.write(there, model.cfg, adapt, state, base=adapters.Base.of(writer.folder), tokenizer=writer.folder)
    subject = open_subject(there)
    assert gate.export(subject, "onnx", tmp_path / "out", options=Options(), rows=gate.rows_for(subject)).green
    ids = Tokenizer.load(there).encode("the old film").tolist()
    plain, merged = writer.model(torch.tensor([ids]))["logits"][0], onnx.Onnx(tmp_path / "out").logits(ids)
    assert np.abs(plain.detach().numpy() - merged).max() > 0.1


@pytest.mark.slow
def test_the_folders_hold_what_each_runtime_looks_for(writer: Subject, classifier: Subject, tmp_path: Path) -> None:
    """vLLM, SGLang and TGI serve the folder of `--to hf`; optimum that of `--to onnx`."""
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "parity.json"}
    for to, own in (("hf", {"model.safetensors", "chat_template.jinja"}), ("onnx", {"model.onnx", "chat_template.jinja"}),
                    ("torch-export", {"model.pt2", "chat_template.jinja"})):
        gate.export(writer, to, tmp_path / to, options=Options(), rows=gate.rows_for(writer))
        assert beside | own <= {p.name for p in (tmp_path / to).iterdir()}
        told = json.loads((tmp_path / to / "config.json").read_text())
        assert (told["architectures"], told["model_type"], told["torch_dtype"]) == (["LlamaForCausalLM"], "llama", "float32")
        assert "auto_map" not in told
        ends = json.loads((tmp_path / to / "generation_config.json").read_text())["eos_token_id"]
        assert set(ends) == {writer.tokenizer.id("<|im_end|>"), writer.tokenizer.special.eos}
    gate.export(writer, "gguf", tmp_path / "gguf", options=Options(), rows=gate.rows_for(writer))
    assert {p.suffix or p.name for p in (tmp_path / "gguf").iterdir()} == {".gguf", "Modelfile", ".json"}
    session = onnx.Onnx(tmp_path / "onnx").session
    assert [i.name for i in session.get_inputs()][:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert session.get_inputs()[3].shape == ["batch_size", 2, "past_sequence_length", 8]
    gate.export(classifier, "onnx", tmp_path / "c", options=Options(), rows=gate.rows_for(classifier))
    assert json.loads((tmp_path / "c/config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.parametrize(("to", "options"), [
    ("onnx", Options(dtype="fp16")), ("onnx", Options(quantize="nf4")), ("gguf", Options(quantize="nf4")),
    ("torch-export", Options(quantize="int8"))], ids=str)
def test_what_an_exporter_cannot_write_is_told(to: str, options: Options, writer: Subject, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp32"):
        EXPORTERS[to].write(writer, tmp_path, options)
