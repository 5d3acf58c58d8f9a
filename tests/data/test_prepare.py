"""Prepared data against the rows it was made from, whatever the workers, the kills and the order of things."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from danlu import config, fault
from danlu.data import pool, progress
from danlu.data.prepare import Prepare, prepare
from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, DataError, ResourceError

CHARS = {"kind": "chars", "eos": "<eos>"}
draw = random.Random(7)
TEXTS = [f"{i}: " + "".join(draw.choices("abcdefg 炉丹火水\n", k=draw.randint(1, 60))) for i in range(600)]


def quiet(_text: str) -> None:
    pass


def run(out: Path, inputs: Any, **more: Any) -> Path:
    data = {"out": str(out), "inputs": inputs, "tokenizer": CHARS, "workers": 0} | more
    return prepare(config.validate(Prepare, data), say=quiet)


def put(folder: Path, name: str, texts: list[str], **columns: list[Any]) -> str:
    rows = [{"text": text} | {key: values[i] for key, values in columns.items()} for i, text in enumerate(texts)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def documents(out: Path, split: str) -> list[tuple[str, str, dict[str, float]]]:
    """Return (file:line, text, columns) of each document of a split, decoded."""
    shards, tokenizer = Shards(out, split, verify=True), Tokenizer.load(out / "tokenizer")
    found = []
    for number in range(shards.documents):
        one = shards.document(number)
        assert one.ids[-1] == tokenizer.special.eos
        found.append((shards.where(number), tokenizer.decode(one.ids[:-1]), one.columns))
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_every_row_arrives_once_with_its_place_and_size(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", TEXTS)
    out = run(tmp_path / "out", path, split={"val": 0.1, "test": 0.1}, shard_tokens=3000)
    found = {place: (split, text, columns) for split in ("train", "val", "test")
             for place, text, columns in documents(out, split)}
    assert {place: text for place, (_split, text, _columns) in found.items()} == {
        f"{path}:{line}": text for line, text in enumerate(TEXTS, 1)}
    assert all(columns["bytes"] == len(text.encode()) for _split, text, columns in found.values())
    counts = Counter(split for split, _text, _columns in found.values())
    assert min(counts.values()) > 20 and counts["train"] > 400
    assert len(Shards(out, "train").entries) > 3
    assert all(entry.tokens >= 3000 for entry in Shards(out, "train").entries[:-1])
    assert report(out)["rows"] == {"read": 600, "blank": 0, "rejected": 0, "filtered": 0, "duplicates": 0, "kept": 600}


@pytest.mark.parametrize("kind", ["chars", "bpe", "wordpiece"])
def test_rows_are_framed_as_the_tokenizer_frames_them(tmp_path: Path, kind: str) -> None:
    cfg = {"kind": kind, "vocab": 400} | ({"bos": "<s>", "add_bos": True} if kind == "bpe" else {})
    out = run(tmp_path / "out", put(tmp_path, "a.jsonl", TEXTS), split={"by": "none"}, tokenizer=cfg)
    tokenizer, shards = Tokenizer.load(out / "tokenizer"), Shards(out)
    for number, text in enumerate(TEXTS):
        assert np.array_equal(shards.document(number).ids, tokenizer.frame(tokenizer.encode(text)))


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    body = " ".join(TEXTS).replace("\n", " ")[:10_000]
    text = "".join(f"{i} {body[i % 97:]}\n" for i in range(230)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    assert len(text) > 3 << 20                               # several blocks
    options: dict[str, Any] = {"split": {"val": 0.05}, "shard_tokens": 300_000}
    one = run(tmp_path / "one", str(tmp_path / "a.txt"), workers=0, **options)
    three = run(tmp_path / "three", str(tmp_path / "a.txt"), workers=3, **options)
    assert contents(one) == contents(three)
    assert len(Shards(one).entries) > 5


def test_duplicates_leave_the_first_one(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", ["a", "b", "A ", "a", "c", "b"])
    kept = run(tmp_path / "exact", path, split={"by": "none"})
    assert [(place[-1], text) for place, text, _columns in documents(kept, "train")] == [
        ("1", "a"), ("2", "b"), ("3", "A "), ("5", "c")]
    assert report(kept)["rows"]["duplicates"] == 2
    loose = run(tmp_path / "loose", path, split={"by": "none"}, dedup="loose")
    assert [text for _place, text, _columns in documents(loose, "train")] == ["a", "b", "c"]
    every = run(tmp_path / "none", path, split={"by": "none"}, dedup="none")
    assert [text for _place, text, _columns in documents(every, "train")] == ["a", "b", "A ", "a", "c", "b"]


def test_the_tokenizer_learns_from_training_rows_only(tmp_path: Path) -> None:
    train = put(tmp_path, "train.jsonl", ["abc"] * 3)
    held = put(tmp_path, "val.jsonl", ["xyz"])
    out = run(tmp_path / "out", [train, {"path": held, "split": "val"}])
    tokenizer = Tokenizer.load(out / "tokenizer")
    assert tokenizer.id("a") is not None and tokenizer.id("x") is None
    assert [text for _place, text, _columns in documents(out, "train")] == ["abc"]
    assert set(Shards(out, "val").document(0).ids[:-1]) == {tokenizer.special.unk}


def test_the_tail_of_one_long_text_validates(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(TEXTS))
    text = (tmp_path / "long.txt").read_text()
    out = run(tmp_path / "out", {"path": str(tmp_path / "long.txt"), "sample_by": "document"},
              split={"by": "tail", "val": 0.1}, tokenizer=CHARS | {"eos": None})
    whole = {split: Tokenizer.load(out / "tokenizer").decode(Shards(out, split).document(0).ids)
             for split in ("train", "val")}
    cut = int(len(text) * 0.9)
    assert whole == {"train": text[:cut], "val": text[cut:]}


@pytest.mark.realdata
def test_tinyshakespeare_is_split_as_nanogpt_does(tmp_path: Path, realdata: Path) -> None:
    path = realdata / "shakespeare" / "input.txt"
    text = path.read_text()
    out = run(tmp_path / "out", {"path": str(path), "sample_by": "document"}, split={"by": "tail", "val": 0.1},
              tokenizer={"kind": "chars", "eos": None, "pad": None, "unk": None})
    chars = sorted(set(text))
    assert Tokenizer.load(out / "tokenizer").size == len(chars) == 65
    wanted = {"train": text[: int(len(text) * 0.9)], "val": text[int(len(text) * 0.9):]}
    for split, part in wanted.items():
        assert Tokenizer.load(out / "tokenizer").decode(Shards(out, split).document(0).ids) == part
    assert Shards(out, "train").tokens == 1_003_854 and Shards(out, "val").tokens == 111_540


def test_classes_keep_their_shares(tmp_path: Path) -> None:
    labels = ["rare" if i % 50 == 0 else "often" for i in range(600)]
    path = put(tmp_path, "a.jsonl", TEXTS, label=labels)
    out = run(tmp_path / "out", {"path": path, "label": "label"}, split={"val": 0.25})
    names = json.loads((out / "manifest.json").read_text())["labels"]
    assert names == ["often", "rare"]
    found = Counter((split, names[int(columns["label"])]) for split in ("train", "val")
                    for _place, _text, columns in documents(out, split))
    assert found == {("train", "rare"): 9, ("val", "rare"): 3, ("train", "often"): 441, ("val", "often"): 147}
    for _place, text, columns in documents(out, "val"):
        assert names[int(columns["label"])] == labels[TEXTS.index(text)]


def test_labels_that_are_numbers_keep_their_order(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", TEXTS[:30], label=[(10, 9, -1)[i % 3] for i in range(30)])
    out = run(tmp_path / "out", {"path": path, "label": "label"})
    assert json.loads((out / "manifest.json").read_text())["labels"] == ["-1", "9", "10"]


def test_a_text_in_two_splits_leaves_training_and_is_told(tmp_path: Path) -> None:
    train = put(tmp_path, "train.jsonl", ["a", "both", "c"])
    test = put(tmp_path, "test.jsonl", ["x", "both"])
    inputs = [{"path": train, "split": "train"}, {"path": test, "split": "test"}]
    out = run(tmp_path / "out", inputs)
    assert report(out)["leaks"] == {"train+test": 1} and report(out)["leaked"] == [f"{train}:2 train+test"]
    assert [text for _place, text, _columns in documents(out, "train")] == ["a", "c"]
    assert [place for place, _text, _columns in documents(out, "test")] == [f"{test}:1", f"{test}:2"]
    plain = run(tmp_path / "plain", inputs, dedup="none")
    assert report(plain)["leaks"] == {"train+test": 1} and Shards(plain, "train").documents == 3
    with pytest.raises(DataError, match=r"train\.jsonl:2: 1 texts stand in two splits"):
        run(tmp_path / "strict", inputs, split={"strict": True})
    assert not (tmp_path / "strict" / "manifest.json").exists()


def test_filters_and_rejects_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = "".join(f'{{"text": "good text {i}"}}\n' for i in range(95))
    path.write_text(good + '{"text": ""}\n\n{"text": "x"}\n{\n[]\n')
    out = run(tmp_path / "out", str(path), clean={"min_chars": 3}, rejects=0.05)
    got = report(out)
    assert got["rows"] == {"read": 99, "blank": 1, "rejected": 2, "filtered": 2, "duplicates": 0, "kept": 95}
    assert got["filters"] == {"too_short": 2} and got["rejects"] == {"json": 1, "not_object": 1}
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"], line["reason"]) for line in lines] == [
        (str(path), 99, "json"), (str(path), 100, "not_object")]


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", TEXTS)
    out = run(tmp_path / "out", path)
    before = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    began = time.monotonic()
    assert run(tmp_path / "out", path, workers=2, rejects=0.5) == out
    assert time.monotonic() - began < 1
    assert {name: (out / name).stat().st_mtime_ns for name in contents(out)} == before
    with pytest.raises(ConfigError, match=r"split\.val, tokenizer\.min_frequency differ.*overwrite"):
        run(tmp_path / "out", path, split={"val": 0.3}, tokenizer=CHARS | {"min_frequency": 2})
    put(tmp_path, "a.jsonl", TEXTS[:10])
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed"):
        run(tmp_path / "out", path)
    again = run(tmp_path / "out", path, overwrite=True)
    assert Shards(again).documents + report(again)["splits"].get("val", {"documents": 0})["documents"] == 10


def test_overwriting_removes_what_it_wrote_and_nothing_else(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", TEXTS)
    out = run(tmp_path / "out", path, shard_tokens=1000)
    (out / "train" / "notes.md").write_text("mine")
    (out / "thesis.txt").write_text("mine")
    run(tmp_path / "out", path, shard_tokens=100_000, overwrite=True)
    assert (out / "train" / "notes.md").exists() and (out / "thesis.txt").exists()
    assert len(list((out / "train").glob("*.safetensors"))) == 1
    stranger = tmp_path / "stranger" / "train"
    stranger.mkdir(parents=True)
    (stranger / "00000.safetensors").write_text("not ours")
    with pytest.raises(ConfigError, match="no manifest says"):
        run(tmp_path / "stranger", path)
    assert (stranger / "00000.safetensors").read_text() == "not ours"


def test_a_loaded_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", TEXTS)
    first = run(tmp_path / "first", path)
    second = run(tmp_path / "second", put(tmp_path, "b.jsonl", ["abc"]), tokenizer={"path": str(first / "tokenizer")},
                 split={"by": "none"})
    assert Tokenizer.load(second / "tokenizer").sha256 == Tokenizer.load(first / "tokenizer").sha256
    with pytest.raises(DataError, match="none"):
        run(tmp_path / "third", path, tokenizer={"path": str(tmp_path / "none")})


def test_the_manifest_names_what_was_read(tmp_path: Path) -> None:
    data = "".join(text.replace("\n", " ") + "\n" for text in TEXTS).encode()
    packed = gzip.compress(data)
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(packed)
    out = run(tmp_path / "out", [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt.gz"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["inputs"] == [
        {"path": f"{tmp_path}/{name}", "bytes": len(read), "sha256": hashlib.sha256(read).hexdigest(), "rows": 600}
        for name, read in (("a.txt", data), ("b.txt.gz", packed))]
    assert "workers" not in manifest["config"] and manifest["config"]["seed"] == 0


def test_the_configuration_takes_short_forms_and_other_tools_names(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("output_dir: x\ndataset: [a.txt, {path: b.csv, label: y}]\nval_size: 0.2\n"
                                     "preprocessing_num_workers: 3\ntokenizer: {path: t}\n")
    cfg = config.load(Prepare, tmp_path / "p.yaml")
    assert [item.path for item in cfg.inputs] == ["a.txt", "b.csv"] and cfg.inputs[1].label == "y"
    assert (cfg.out, cfg.split.val, cfg.workers, cfg.tokenizer.kind) == (Path("x"), 0.2, 3, "loaded")
    assert config.validate(Prepare, config.dump(cfg)) == cfg
    (tmp_path / "q.yaml").write_text("out: x\ninputs: a.txt\ntokenizer: wordpiece\n")
    assert config.load(Prepare, tmp_path / "q.yaml").tokenizer.kind == "wordpiece"


def test_a_full_disk_is_told_as_such_and_can_be_resumed(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", TEXTS)
    fault.arm("shards.before_fsync:enospc:3")
    with pytest.raises(ResourceError, match="cannot be written"):
        run(tmp_path / "out", path, shard_tokens=3000)
    wanted = run(tmp_path / "whole", path, shard_tokens=3000)
    assert contents(run(tmp_path / "out", path, shard_tokens=3000)) == contents(wanted)


def test_a_folder_is_prepared_by_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with progress.alone(tmp_path / "out"), pytest.raises(ConfigError, match="another process"):
        run(tmp_path / "out", put(tmp_path, "a.jsonl", TEXTS))


def test_answers_come_in_the_order_of_the_questions() -> None:
    asked: list[int] = []

    def questions() -> Any:
        for number in range(40):
            asked.append(number)
            yield number * 7 % 40

    answers = pool.ordered(questions(), math.factorial, workers=3, name=str)
    assert next(answers) == 1 and len(asked) <= 13                     # only so many are open
    assert list(answers) == [math.factorial(number * 7 % 40) for number in range(1, 40)]


def test_the_report_says_what_the_tokenizer_makes_of_the_rows(tmp_path: Path) -> None:
    han, latin = ["炉火纯青炼丹" * 5] * 10, ["furnace " * 9] * 10
    out = run(tmp_path / "out", put(tmp_path, "a.jsonl", han + latin), dedup="none", split={"by": "none"})
    scripts = report(out)["tokenizer"]["samples"]["train"]["scripts"]
    assert scripts["Han"] == {"bytes": 900, "tokens": 300, "bytes_per_token": 3.0}
    assert scripts["Latin"]["tokens"] == 630
