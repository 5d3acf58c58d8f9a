"""`danlu generate` in its other ways: files of prompts, several answers, beams, drafts, schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
from tiny import made, tokenizer

from danlu import cli
from danlu.decode.pack import able
from danlu.models import weights
from danlu.nn import packed
from danlu.nn.forms import Int8
from danlu.verbs.generate import _prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written")
    tokenizer().save(path / "tokenizer")
    for name, seed in (("model", 1), ("draft", 2)):
        weights.save(path / name, made("gpt2", seed), tokenizer=path / "tokenizer")
    return path


def said(capsys: pytest.CaptureFixture[str], folder: Path, *words: object) -> Any:
    assert cli.main(["generate", str(folder / "model"), "--max-new-tokens", "20", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_file_of_prompts_gives_what_each_gives_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["abc", "丹", "a b c d e f g", "z"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"prompt": prompts[0]}, prompts[1], {"text": prompts[2]}, {"prompt": prompts[3]})), encoding="utf-8")
    done = said(capsys, folder, "--data", folder / "prompts.jsonl", "--out", folder / "out.jsonl", "--batch", 3, "--n", 2)
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [p for p in prompts for _n in range(2)]
    assert done["answers"] == 8 and done["tokens"] == sum(row["tokens"] for row in rows)
    for row in rows:
        assert row["text"] == said(capsys, folder, "--prompt", row["prompt"], "--seed", row["number"])["text"]


def test_several_answers_to_one_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = said(capsys, folder, "--prompt", "abc", "--n", 3)["texts"]
    assert texts == [said(capsys, folder, "--prompt", "abc", "--seed", n)["text"] for n in range(3)]


def test_drafts_and_one_beam_change_no_greedy_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = said(capsys, folder, "--prompt", "abc", "--temperature", 0)
    assert said(capsys, folder, "--prompt", "abc", "--temperature", 0, "--draft", folder / "draft") == plain
    assert said(capsys, folder, "--prompt", "abc", "--num-beams", 3)["text"]


def test_answers_obey_a_schema(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    (folder / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    for text in said(capsys, folder, "--prompt", "abc", "--schema", folder / "schema.json", "--n", 3)["texts"]:
        jsonschema_rs.validate(schema, json.loads(text))


@pytest.mark.skipif(not able(8) or not able(16), reason="this processor has no such kernel")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_write(precision: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, folder, "--prompt", "abc", "--precision", precision)["text"]


@pytest.mark.parametrize("words", [
    ["--num-beams", "2", "--n", "2"], ["--data", "x"], ["--data", "x", "--out", "y", "--prompt", "z"], ["--n", "0"],
    ["--schema", "missing.json"]])
def test_what_does_not_go_together_is_refused(words: list[str], folder: Path) -> None:
    assert cli.main(["generate", str(folder / "model"), *words]) == 2


def test_a_broken_file_of_prompts_is_told_with_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.jsonl").write_text('"a"\n{"promt": "b"}\n', encoding="utf-8")
    words = ["generate", str(folder / "model"), "--data", str(folder / "broken.jsonl"), "--out", str(folder / "o"), "--json"]
    assert cli.main(words) == 3
    assert "broken.jsonl:2" in capsys.readouterr().err


def test_a_line_of_prompts_ends_at_its_end_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two\u0085three"}\n"four"\n', encoding="utf-8")
    assert list(_prompts(path)) == ["one\u2028two\u0085three", "four"]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_weights_in_fewer_bits_are_written_with_as_they_are(precision: str, folder: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    model = made("gpt2")
    for layer in [model.embed, *(m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear))]:
        packed.become(layer, Int8(), Int8().pack(layer.weight.detach()))
    weights.write_packed(tmp_path, model.cfg, model.state_dict(), table=packed.forms(model), tokenizer=folder / "tokenizer")
    words = ["generate", str(tmp_path), "--prompt", "abc", "--max-new-tokens", "3"]
    assert cli.main([*words, "--precision", precision]) == 2
    assert "leave the precision as it is" in capsys.readouterr().err
    assert cli.main(words) == 0
