"""The parity gate: red for each thing that is corrupted, green for what says the same; against transformers and peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapt.test_peft import written
from adapt.tiny import KINDS
from evaluate import small
from safetensors.torch import load_file, save_file

from danlu import cli, files
from danlu.adapt import folder
from danlu.data.kinds import BPE, WordPiece
from danlu.data.tokenizer import train
from danlu.errors import IncompatibleError
from danlu.evaluate.subject import open_subject
from danlu.export import artefacts, gate, parity, table
from danlu.export.parity import Limits, Report
from danlu.export.texts import TEXTS
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.nn.tasks import Head
from danlu.verbs import table as verbs

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template."""
    made = small.decoder(tmp_path_factory.mktemp("decoder"), [text for text, _label in small.texts(60, 0)],
                         special=["<|im_start|>", "<|im_end|>"])
    (made / "chat_template.jinja").write_text(TEMPLATE)
    out = made.parent / "exported"                           # where generation_config.json stops at <|im_end|>, too
    assert cli.main(["export", str(made), "--to", "hf", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head of three classes."""
    place = tmp_path_factory.mktemp("classifier")
    base = small.encoder(place)
    cfg: Any = weights.read_config(base)
    cfg = cfg.with_tasks((Head(kind="classify", labels=("bad", "good", "mixed")),))
    assert isinstance(cfg, Encoder)
    weights.save(place / "head", build(cfg, "cpu").init(3), tokenizer=base)
    return place / "head"


def copied(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})


def compared(a: Path, b: Path, **more: Any) -> Report:
    first = artefacts.opened(a)
    second = table.EXPORTERS["hf"].open(b)
    return parity.compare(first, second, gate.rows_for(first.subject), TEXTS, **more)


LAYER = "model.layers.0.self_attn"


def swap(tensors: dict[str, torch.Tensor]) -> None:
    q, k = f"{LAYER}.q_proj.weight", f"{LAYER}.k_proj.weight"
    tensors[q], tensors[k] = tensors[k], tensors[q]


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    name = f"{LAYER}.o_proj.weight"
    tensors[name] = tensors[name].T


def interleave(tensors: dict[str, torch.Tensor]) -> None:
    """As Meta lays rotary pairs out, side by side: what a converter that forgets the permutation writes."""
    for n in range(2):
        for kind in ("q", "k"):
            name = f"model.layers.{n}.self_attn.{kind}_proj.weight"
            w = tensors[name]
            tensors[name] = w.view(2, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


@pytest.mark.parametrize(("corrupt", "cause"), [(swap, "tokens see each other"), (transpose, "even a row of one token"),
                                                (interleave, "rotary")])
def test_a_changed_weight_is_red(decoder: Path, tmp_path: Path, corrupt: Any, cause: str) -> None:
    other = copied(decoder, tmp_path / "other")
    changed(other, corrupt)
    found = compared(decoder, other)
    assert "logits" in found.red and cause in " ".join(found.causes)
    assert not {"ids", "prompts", "stops"} & set(found.red)


def another_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text(TEMPLATE.replace("\n{{ m.content", " {{ m.content"))


def no_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()


def another_tokenizer(path: Path) -> None:
    train([text for text, _label in small.texts(200, 9, 3)], BPE.model_validate({"vocab": 280})).save(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)


def another_eos(path: Path) -> None:
    told = files.read_json(path / "generation_config.json")
    (path / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": 7}))


@pytest.mark.parametrize(("corrupt", "red"), [(another_template, {"prompts"}), (no_template, {"prompts"}),
                                              (another_eos, {"stops"}), (another_tokenizer, {"ids"})])
def test_another_text_around_the_same_weights_is_red(decoder: Path, tmp_path: Path, corrupt: Any, red: set[str]) -> None:
    other = copied(decoder, tmp_path / "other")
    corrupt(other)
    found = compared(decoder, other)
    assert red <= set(found.red) and "logits" not in found.red
    assert found.causes


def test_permuted_labels_are_red(classifier: Path, tmp_path: Path) -> None:
    other = copied(classifier, tmp_path / "names")
    told = files.read_json(other / "config.json")
    (other / "config.json").write_text(json.dumps(told | {
        "id2label": {"0": "good", "1": "bad", "2": "mixed"}, "label2id": {"good": 0, "bad": 1, "mixed": 2}}))
    found = compared(classifier, other)
    assert found.red == ("labels",) and "id2label" in found.causes[0]
    rows = copied(classifier, tmp_path / "rows")
    changed(rows, lambda t: t.update({n: x[[1, 0, 2]] for n, x in t.items() if n.startswith("classifier.")}))
    found = compared(classifier, rows)
    assert "logits" in found.red and "order of classes" in " ".join(found.causes)


def test_the_same_folder_is_green_in_transformers(decoder: Path, classifier: Path) -> None:
    found = compared(decoder, decoder)
    states = {c.name: c.state for c in found.checks}
    assert found.green and found.causes == ()
    assert states == {"logits": "green", "KL": "shown", "top-1": "green", "greedy": "green", "ids": "green",
                      "round trip": "green", "prompts": "green", "stops": "green", "labels": "not compared"}
    found = compared(classifier, classifier)
    assert found.green and {c.name: c.state for c in found.checks}["labels"] == "green"


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_an_adapter_is_green_in_peft(tmp_path: Path, kind: str) -> None:
    _model, path = written(tmp_path, "llama", KINDS[kind])
    tokenizer = train(["a b c"], WordPiece.model_validate({"vocab": 64}))
    tokenizer.save(path)
    assert table.EXPORTERS["peft"].holds(path)
    made = table.opened(path)
    assert made is not None and made.kind == "peft"
    first = artefacts.opened(path)
    found = parity.compare(first, made, [[1, 5, 9, 33, 2], [3, 3, 4]], TEXTS)
    assert found.green, found
    tensors = load_file(path / folder.TENSORS)
    save_file({n: t * 1.1 for n, t in tensors.items()}, path / folder.TENSORS, metadata={"format": "pt"})
    again = table.opened(path)
    assert again is not None and "logits" in parity.compare(first, again, [[1, 5, 9, 33, 2]], ()).red


def test_export_merges_and_says_so(tmp_path: Path) -> None:
    _model, path = written(tmp_path, "llama", KINDS["lora"])
    train(["a b c"], WordPiece.model_validate({"vocab": 64})).save(path)
    assert cli.main(["export", str(path), "--to", "hf", "--out", str(tmp_path / "merged")]) == 0
    told = files.read_json(tmp_path / "merged" / parity.FILE)
    assert told["green"] and told["a"]["kind"] == "adapter" and told["b"]["kind"] == "hf"
    assert told["source"]["sha256"]["adapter_model.safetensors"] == files.sha256(path / "adapter_model.safetensors")
    assert told["files"]["model.safetensors"] == files.sha256(tmp_path / "merged" / "model.safetensors")
    assert cli.main(["export", str(path), "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert {p.name for p in (tmp_path / "peft").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "parity.json"}
    assert cli.main(["parity", str(tmp_path / "peft"), str(tmp_path / "merged"), "--limit", "kl=0.001"]) == 0


def test_transformers_own_rules_around_a_vocabulary_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """AutoTokenizer normalises for model type qwen2, and the tokenizer that was trained does not."""
    tokenizer = train([text for text, _label in small.texts(60, 0)], BPE.model_validate({"vocab": 300}))
    tokenizer.save(tmp_path / "tokenizer")
    cfg = Decoder.model_validate({"family": "qwen2", "width": 32, "layers": 2, "heads": 2, "context": 64,
                                  "vocab": tokenizer.size, "init_std": 0.1})
    weights.save(tmp_path / "model", build(cfg, "cpu").init(1), tokenizer=tmp_path / "tokenizer")
    assert cli.main(["export", str(tmp_path / "model"), "--to", "hf", "--out", str(tmp_path / "out")]) == 4
    assert "Qwen2Tokenizer" in capsys.readouterr().err and (tmp_path / "out.red").is_dir()
    words = ["export", str(tmp_path / "model"), "--to", "hf", "--out", str(tmp_path / "out"), "--limit", "ids=false", "--json"]
    assert cli.main(words) == 0
    states = {c["name"]: c["state"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert states["ids"] == "shown" and states["logits"] == states["greedy"] == "green"


@pytest.mark.parametrize("heads", [("tag",), ("answer",), ("choose",), ("embed",), ("classify", "tag")])
def test_every_head_is_compared(tmp_path: Path, heads: tuple[str, ...]) -> None:
    base = small.encoder(tmp_path)
    cfg: Any = weights.read_config(base)
    made = tuple(Head.model_validate({"kind": kind, "labels": ("a", "b", "c") if kind in ("tag", "classify") else ()})
                 for kind in heads)
    weights.save(tmp_path / "head", build(cfg.with_tasks(made), "cpu").init(3), tokenizer=base)
    assert cli.main(["export", str(tmp_path / "head"), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    told = files.read_json(tmp_path / "out" / parity.FILE)
    assert ("transformers" in told["b"]["name"]) == (len(heads) == 1)        # which has no class for two heads
    name = "layer.1.attention.output.dense.weight"
    changed(tmp_path / "out", lambda t: t.update({n: x * 1.05 for n, x in t.items() if name in n}))
    assert "logits" in parity.compare(artefacts.opened(tmp_path / "head"), table.EXPORTERS["hf"].open(tmp_path / "out"),
                                      [[2, 9, 30, 14, 3]], ()).red


def test_a_spoilt_second_head_is_seen(tmp_path: Path) -> None:
    base = small.encoder(tmp_path)
    cfg: Any = weights.read_config(base)
    made = (Head(kind="classify", name="mood", labels=("a", "b")), Head(kind="tag", name="who", labels=("O", "B")))
    model = build(cfg.with_tasks(made), "cpu").init(3)
    weights.save(tmp_path / "two", model, tokenizer=base)
    rows = [[2, 9, 30, 14, 3]]
    for to in ("onnx", "torch-export", "hf"):
        assert cli.main(["export", str(tmp_path / "two"), "--to", to, "--out", str(tmp_path / to)]) == 0
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "who" in name and x.ndim == 2:
                x.mul_(-1)
    weights.save(tmp_path / "other", model, tokenizer=base)
    for to in ("onnx", "torch-export", "hf"):
        report = parity.compare(artefacts.opened(tmp_path / "other"), table.EXPORTERS[to].open(tmp_path / to), rows, ())
        assert "logits" in report.red and "who" in next(c.told for c in report.checks if c.name == "logits"), to
        assert parity.compare(artefacts.opened(tmp_path / "two"), table.EXPORTERS[to].open(tmp_path / to), rows, ()).green


def test_rows_that_are_none_make_nothing_green(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, spoilt = tmp_path / "rows.jsonl", copied(decoder, tmp_path / "spoilt")
    changed(spoilt, swap)
    rows.write_text('{"text": "the film"}')                              # without an end of line
    assert cli.main(["parity", f"danlu:{decoder}", f"danlu:{spoilt}", "--data", str(rows)]) == 4
    for text, said in (("", "no row"), ("{", "not JSON"), ("[1]", "ids, text or messages"),
                       ('{"ids": [4, 999999]}', "not those of a row"), ('{"ids": ' + str([4] * 5000) + "}", "5000 ids")):
        rows.write_text(text)
        capsys.readouterr()
        assert cli.main(["parity", f"danlu:{decoder}", f"danlu:{decoder}", "--data", str(rows)]) == 3, text
        assert said in capsys.readouterr().err
    assert not parity.compare(artefacts.opened(decoder), artefacts.opened(decoder), [], ["the film"]).green


def test_a_red_export_is_not_done(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(subject: Any, made: Path, options: Any) -> None:
        table.hf.write(subject, made, options)
        changed(made, swap)

    monkeypatch.setitem(table.EXPORTERS, "hf", table.EXPORTERS["hf"]._replace(write=spoiled))
    with pytest.raises(IncompatibleError, match="logits"):
        gate.export(open_subject(decoder), "hf", tmp_path / "out", options=table.Options(), rows=[[3, 4, 5, 6]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.red"]
    assert files.read_json(tmp_path / "out.red" / parity.FILE)["green"] is False


def test_the_verb_ends_with_4_and_takes_rows(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(r) for r in (
        {"text": "the film"}, {"ids": [4, 5, 6]}, {"messages": [{"role": "user", "content": "hi"}]})) + "\n")
    assert cli.main(["parity", str(decoder), f"danlu:{decoder}", "--data", str(rows), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["green"] and told["rows"] == 3 and told["a"]["name"].count("transformers") == 1
    other = copied(decoder, tmp_path / "other")
    another_eos(other)
    assert cli.main(["parity", f"danlu:{decoder}", str(other)]) == 4
    assert "stops" in capsys.readouterr().err
    assert cli.main(["parity", str(decoder), str(decoder), "--limit", "nothing=1"]) == 2


class Fixed:
    """An artefact that says what it is told."""

    kind = "fixed"

    def __init__(self, said: np.ndarray) -> None:
        self.name, self.said = "fixed", said

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.said

    def encode(self, text: str) -> None:
        return None

    def render(self, messages: Any) -> None:
        return None

    def ends(self) -> None:
        return None


def of(first: list[float], second: list[float], **limits: Any) -> dict[str, parity.Check]:
    found = parity.compare(Fixed(np.array(first)), Fixed(np.array(second)), [[1]], (), limits=Limits(**limits))
    return {c.name: c for c in found.checks}


def test_figures_in_closed_form() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    found = of(np.log(p).tolist(), (np.log(q) + 3).tolist(), difference=None, kl=0.2, top1=0.5)
    assert found["KL"].value == pytest.approx(0.25 * np.log(2)) and found["KL"].state == "green"
    assert found["top-1"].value == 0.0 and found["top-1"].state == "red" and found["logits"].state == "shown"
    assert of([0.0, 1.0], [0.0, float("nan")])["logits"].state == "red"
    found = of([0.0, 1.0, 0.9999], [0.0, 0.9999, 1.0])       # a tie: either is right
    assert found["logits"].state == found["top-1"].state == "green"
    assert of([0.0, 0.0], [0.0, 0.0])["logits"].state == "green"
    assert of([0.0, 1.0], [0.0, 1.0, 2.0])["shape"].state == "red"


class Telling(Fixed):
    """Fixed numbers that say what they are."""

    def __init__(self, numbers: np.ndarray, says: parity.Says) -> None:
        super().__init__(numbers)
        self.kind_of_numbers = says

    def says(self) -> parity.Says:
        return self.kind_of_numbers


def test_vectors_are_compared_by_their_direction_and_answers_over_places() -> None:
    def of(first: Any, second: Any, says: parity.Says) -> dict[str, parity.Check]:
        found = parity.compare(Telling(np.array(first), says), Telling(np.array(second), says), [[1, 2, 3]], (),
                               limits=parity.QUANTIZED[8])
        return {c.name: c for c in found.checks}

    found = of([3.0, 4.0], [4.0, 3.0], "vector")
    assert found["cosine"].value == pytest.approx(24 / 25) and found["cosine"].state == "red"
    assert "KL" not in found and "top-1" not in found
    assert of([3.0, 4.0], [6.0, 8.1], "vector")["cosine"].state == "green"
    start, end = np.array([0.1, 5.0, 0.0]), np.array([0.0, 4.9, 5.5])       # the answer: places 1 to 2
    found = of(np.stack([start, end], -1), np.stack([start + 3, end - 3], -1), "places")
    assert found["KL"].value == pytest.approx(0, abs=1e-12) and found["top-1"].value == 1.0      # a shift changes no answer
    assert of(np.stack([start, end], -1), np.stack([start + 3, end - 3], -1), "classes")["top-1"].value != 1.0
    found = of(np.stack([start, end], -1), np.stack([start, end[[0, 2, 1]]], -1), "places")
    assert found["top-1"].value == 0.5 and found["top-1"].state == "red"


def test_rows_of_unequal_length_have_answers_of_their_own() -> None:
    two = [np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 0.0], [3.0, 0.0]])]
    found = parity._over_places(two)
    assert found.shape == (4, 3) and found.argmax(-1).tolist() == [0, 1, 2, 0]
    assert float(parity._kl(found, found).max()) == 0.0


@pytest.mark.parametrize("kind", ["answer", "embed"])
def test_int8_of_answers_and_vectors_is_judged_by_what_they_are(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    base = small.encoder(tmp_path)
    cfg: Any = weights.read_config(base)
    weights.save(tmp_path / "head", build(cfg.with_tasks((Head.model_validate({"kind": kind}),)), "cpu").init(3), tokenizer=base)
    words = ["export", str(tmp_path / "head"), "--to", "onnx", "--quantize", "int8", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    checks = {one["name"]: one for one in files.read_json(tmp_path / "out" / parity.FILE)["checks"]}
    assert checks["cosine" if kind == "embed" else "top-1"]["state"] == "green"
    assert ("KL" in checks) == (kind == "answer")


def test_nothing_compared_is_not_green() -> None:
    found = parity.compare(Fixed(np.zeros(2)), Fixed(np.zeros(2)), [], ())
    assert not found.green and found.red == ()


def test_the_command_line_knows_every_exporter() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    verbs.verbs()["export"].arguments(parser)
    choices = next(a.choices for a in parser._actions if a.dest == "to")
    assert choices is not None and set(choices) == set(table.EXPORTERS)
