"""Lineage: one byte changed anywhere in the line is named, with everything that came after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluate import small

from danlu import cli, files
from danlu.export import check, lineage
from danlu.train import checkpoint


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a LoRA run on rows from a file, and the merged model that was exported from it."""
    place = tmp_path_factory.mktemp("line")
    base = small.encoder(place)
    small.table(place / "rows.csv", ["text", "label"], small.texts(40, 1))
    small.trained(place, base, [str(place / "rows.csv")], steps=4, adapt={"kind": "lora", "rank": 2}, every={"log": 2})
    assert cli.main(["export", str(place / "run"), "--to", "hf", "--out", str(place / "merged")]) == 0
    return place


def prepared(place: Path) -> Path:
    return next((place / "run" / "data").glob("rows-*"))


def last(place: Path) -> Path:
    return checkpoint.chosen(place / "run")


def test_the_line_goes_back_to_the_raw_file(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lineage", str(line / "merged"), "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)
    by = {node["what"]: node for node in nodes}
    assert set(by) == {"artefact", "adapter", "config", "model", "data", "tokenizer", "raw file"}
    assert by["raw file"]["sha256"] == files.sha256(line / "rows.csv") and Path(by["raw file"]["path"]) == line / "rows.csv"
    assert by["model"]["files"]["model.safetensors"] == files.sha256(line / "model" / "model.safetensors")
    assert by["adapter"]["number"] in by["artefact"]["made_from"] and by["raw file"]["number"] in by["data"]["made_from"]
    assert cli.main(["lineage", str(line / "run")]) == 0
    told = capsys.readouterr().out
    assert "rows.csv" in told and files.sha256(line / "rows.csv")[:12] in told


def test_what_nobody_touched_is_whole(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (line / "merged", line / "run", last(line), prepared(line)):
        assert cli.main(["verify", str(path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["whole"] and {one["state"] for one in told["found"]} == {"whole"}, told
        assert [one["not_checked"] for one in told["found"] if one["not_checked"]] == []


def flipped(path: Path) -> None:
    """Change one bit of the middle byte of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CASES: dict[str, tuple[Any, str, set[str]]] = {
    "raw file": (lambda p: p / "rows.csv", "raw file", {"data", "adapter", "artefact"}),
    "shard": (lambda p: next(prepared(p).glob("train/*.safetensors")), "data", {"adapter", "artefact"}),
    "tokenizer": (lambda p: prepared(p) / "tokenizer" / "tokenizer.json", "tokenizer", {"data", "adapter", "artefact"}),
    "tokenizer's settings": (lambda p: prepared(p) / "tokenizer" / "tokenizer_config.json", "tokenizer",
                             {"data", "adapter", "artefact"}),
    "manifest of the data": (lambda p: prepared(p) / "manifest.json", "data", {"adapter", "artefact"}),
    "base": (lambda p: p / "model" / "model.safetensors", "model", {"adapter", "artefact"}),
    "base's config": (lambda p: p / "model" / "config.json", "model", {"adapter", "artefact"}),
    "adapter": (lambda p: last(p) / "adapter_model.safetensors", "adapter", {"artefact"}),
    "weight": (lambda p: p / "merged" / "model.safetensors", "artefact", set()),
    "parity.json": (lambda p: p / "merged" / "parity.json", "artefact", set()),
    "recipe": (lambda p: p / "run" / "run.json", "config", {"adapter", "artefact"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_byte_is_named_with_everything_after_it(line: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    where, what, spoiled = CASES[case]
    file = where(line)
    kept = file.read_bytes()
    try:
        if case == "recipe":
            told = json.loads(kept)
            told["run"]["seed"] = 77
            file.write_text(json.dumps(told))
        else:
            flipped(file)
        assert cli.main(["verify", str(line / "merged"), "--json"]) == 4
        out, err = capsys.readouterr()
        found = json.loads(out)["found"]
        changed = [one for one in found if one["state"] == "changed"]
        assert [one["what"] for one in changed] == [what], found
        if case != "recipe":
            assert file.name in " ".join(changed[0]["changed"])
        after = {one["what"] for one in found if one["state"] == "spoiled"}
        assert after == spoiled and all(one["spoiled_by"] == [changed[0]["path"]] for one in found if one["state"] == "spoiled")
        assert str(changed[0]["path"]) in json.loads(err)["what"]
    finally:
        file.write_bytes(kept)


def test_what_cannot_be_checked_is_said(line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = line / "rows.csv"
    rows.rename(line / "away.csv")
    try:
        assert cli.main(["verify", str(line / "merged")]) == 0
        out, err = capsys.readouterr()
        assert "gone: raw file" in out and "not there any more" in out and "not all could be checked" in err
    finally:
        (line / "away.csv").rename(rows)
    alone = tmp_path / "alone"                               # a folder that nobody has a receipt of
    shutil.copytree(line / "model", alone)
    (only,) = check.check(lineage.walk(alone))
    assert only.state == "not recorded" and only.untold
    (line / "merged" / "stray.txt").write_text("x")
    try:
        assert cli.main(["verify", str(line / "merged")]) == 0
        assert "stray.txt: no receipt knows it" in capsys.readouterr().out
    finally:
        (line / "merged" / "stray.txt").unlink()


def test_a_file_that_grew_after_it_was_read_in_part_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n} of a text\n" for n in range(200)))
    (tmp_path / "p.json").write_text(json.dumps({"out": str(tmp_path / "data"), "inputs": [str(tmp_path / "a.txt")],
                                                 "tokenizer": {"kind": "chars"}}))
    assert cli.main(["prepare", str(tmp_path / "p.json")]) == 0
    assert cli.main(["verify", str(tmp_path / "data")]) == 0
    with (tmp_path / "a.txt").open("a") as file:
        file.write("later\n")
    assert cli.main(["verify", str(tmp_path / "data")]) == 0
    flipped(tmp_path / "a.txt")
    capsys.readouterr()
    assert cli.main(["verify", str(tmp_path / "data")]) == 4
    assert "a.txt" in capsys.readouterr().err
