"""A folder of ONNX used as a model: judged, asked and served; against the model in PyTorch that it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from danlu import cli
from danlu.data.encode import encode
from danlu.data.example import Similar
from danlu.evaluate import rows
from danlu.evaluate.lines import Line, row_of
from danlu.evaluate.subject import open_subject
from danlu.models import weights
from danlu.models.build import build
from danlu.models.encoder import Encoder
from danlu.objectives import Embed
from tests.evaluate import small
from tests.serve.at import CPU, serving
from tests.serve.test_score import HEADS, TEXTS, post


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """many: an encoder with random heads of every kind; graph: the same as ONNX."""
    home = tmp_path_factory.mktemp("graph")
    start: Any = weights.read_config(small.encoder(home))
    many = Encoder.model_validate(start.model_dump() | {"tasks": HEADS})
    weights.save(home / "many", build(many, "cpu").init(3), tokenizer=home / "tokenizer")
    assert cli.main(["export", str(home / "many"), "--to", "onnx", "--out", str(home / "graph")]) == 0
    return home


def both(home: Path, head: str) -> list[rows.Task]:
    return [rows.task_of(open_subject(home / name, graph=True), rows.How(head=head), CPU) for name in ("many", "graph")]


@pytest.mark.parametrize(("head", "given"), [
    ("mood", [(text, ("good", "bad", "mixed")[n % 3]) for n, text in enumerate(TEXTS)]),
    ("stars", [(text, str(n % 4)) for n, text in enumerate(TEXTS)])])
def test_rows_of_unequal_length_are_judged_alike(home: Path, head: str, given: list[Any], tmp_path: Path) -> None:
    data = small.table(tmp_path / "rows.csv", ["text", "label"], given)
    said = []
    for task in both(home, head):
        found: list[dict[str, Any]] = []
        finding = rows.judged_on(task, str(data), rows.How(head=head), found.append)
        said.append((found, {name: one.value for name, one in finding.judged.figures.items()}))
    assert len(said[0][0]) == len(TEXTS)
    assert said[0][1] == pytest.approx(said[1][1], abs=1e-5)
    for ours, theirs in zip(said[0][0], said[1][0], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5) if head == "stars" else ours["predicted"] == theirs["predicted"]


@pytest.mark.parametrize("alone", [True, False])
def test_two_texts_of_a_row_have_vectors_of_their_own(home: Path, alone: bool) -> None:
    """Texts side by side in a row do not see each other, in rows where one or both of them stand; also beside other heads."""
    if alone:
        cfg: Any = weights.read_config(home / "many")
        made = Encoder.model_validate(cfg.model_dump() | {"tasks": ({"kind": "embed", "name": "meaning"},)})
        model = build(made, "cpu").init(3)
        weights.save(home / "vectors", model, tokenizer=home / "tokenizer")
        assert cli.main(["export", str(home / "vectors"), "--to", "onnx", "--out", str(home / "vectors-graph")]) == 0
    found = []
    for name in ("vectors", "vectors-graph") if alone else ("many", "graph"):
        subject = open_subject(home / name, graph=True)
        task = rows.Task(subject, "meaning", Embed(name="meaning"), 64, "error", "fp32", 8, CPU)
        contents = [Similar(TEXTS[:2]), Similar((TEXTS[2],)), Similar((TEXTS[4], TEXTS[3]))]
        lines = [Line("x", n, {}, None, None, one, tuple(map(row_of, encode(one, task.encoder()))))
                 for n, one in enumerate(contents)]
        subject.model.eval()
        vectors = [np.asarray(said[0]) for _line, said in rows.answered(task, lines)]
        found.append([v[:len(content.texts)] for v, content in zip(vectors, contents, strict=True)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours / np.linalg.norm(ours, axis=-1, keepdims=True), theirs, atol=1e-5)


def test_it_is_served(home: Path) -> None:
    with serving(home / "many") as ours, serving(home / "graph") as theirs:
        for path, body in (("classify", {"input": TEXTS, "head": "mood", "top_k": 3}), ("classify", {
                "input": [["the film", "was fine"]], "head": "mood"}), ("tag", {"words": ["the", "splendid", "film", "电影"]}),
                ("answer", {"question": "what was fine", "context": "the old film"}), ("embeddings", {"input": TEXTS[:3]})):
            right, found = (post(at, path, **body)["data"] for at in (ours, theirs))
            for one, other in zip(right, found, strict=True):
                for name, value in one.items():
                    assert other[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) or name in (
                        "embedding", "probabilities") else value) or name == "top"
        told = httpx.get(f"{theirs.url}/v1/models").json()["data"][0]
    assert told["sha256"] and told["heads"][0]["labels"] == ["bad", "good", "mixed"]


def test_a_run_of_its_own_is_predicted_by_its_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small.table(tmp_path / "rows.csv", ["text", "label"], small.texts(40, 1))
    run = small.trained(tmp_path, small.encoder(tmp_path), [{"path": str(data)}])
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "graph")]) == 0
    capsys.readouterr()
    told = []
    for place in (run, tmp_path / "graph"):
        assert cli.main(["eval", str(place), "--data", str(data), "--json"]) == 0
        told.append(capsys.readouterr().out)
    ours, theirs = (json.loads(one)["results"]["rows"] for one in told)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_what_a_graph_cannot_do_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["quantize", str(home / "graph"), "--out", str(home / "x")], ["explain", str(home / "graph"), "--text", "a"],
                  ["export", str(home / "graph"), "--to", "hf", "--out", str(home / "x")]):
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert "graph" in said and "exported from" in said
    assert not (home / "x").exists()
    assert cli.main(["predict", str(home / "graph"), "--text", "a", "--head", "mood", "--precision", "bf16"]) == 2
    assert "precision" in capsys.readouterr().err


def test_a_graph_that_writes_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = small.decoder(tmp_path, [text for text, _label in small.texts(60, 0)])
    assert cli.main(["export", str(start), "--to", "onnx", "--out", str(tmp_path / "graph")]) == 0
    assert cli.main(["predict", str(tmp_path / "graph"), "--text", "a"]) == 4
    assert "says of texts" in capsys.readouterr().err
