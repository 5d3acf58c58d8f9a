"""`danlu prepare` survives bad input, killed processes and bombs: the same bytes in the end, or one clear sentence."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from cli import Ended, command, danlu, environment, measured

from danlu import config
from danlu.data import prepare as preparing
from danlu.errors import DanluError

draw = random.Random(3)
TEXTS = ["".join(draw.choices("abc def 丹炉 ", k=draw.randint(20, 2000))) + f" {i}" for i in range(4500)]
RECIPE = "{inputs: [%s], out: %s, tokenizer: %s, split: {val: 0.05}, shard_tokens: 300000, workers: %d}"


def recipe(folder: Path, inputs: object, *, workers: int = 0, tokenizer: str = "{kind: chars}") -> Path:
    path = folder / "p.yaml"
    path.write_text(RECIPE % (inputs, folder / "out", tokenizer, workers))
    return path


def prepare(folder: Path, inputs: object, *words: str, fault: str = "", workers: int = 0) -> Ended:
    path = recipe(folder, inputs, workers=workers)
    return danlu("prepare", path, *words, fault=fault, PYTHONPATH=str(folder))


def within(folder: Path, inputs: object, *words: str) -> Ended:
    """Prepare in this process, which starts sooner; what the command line would exit with and say."""
    said: list[str] = []
    try:
        preparing.prepare(config.load(preparing.Prepare, recipe(folder, inputs), words), say=said.append)
    except DanluError as error:
        return Ended(error.code, "", str(error), 0)
    return Ended(0, "", "\n".join(said), 0)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def refused(ended: Ended, code: int, *words: str) -> None:
    """One sentence, no traceback, the right exit code."""
    assert ended.clean().code == code, ended.err
    for word in words:
        assert word in ended.last, ended.err


def alive(folder: Path) -> list[str]:
    """Worker processes that nobody ended; PYTHONPATH=folder told them from those of other tests."""
    found = subprocess.run(["pgrep", "-f", f"danlu.data.pool import serve.*{folder}"], capture_output=True, text=True,
                           check=False)
    return found.stdout.split()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Four MB of rows in two files, one packed; and what an undisturbed preparation makes of them."""
    folder = tmp_path_factory.mktemp("reference")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:2500]) + "{\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[2400:]).encode(), mtime=0))
    assert prepare(folder, f"{folder}/a.jsonl, {folder}/b.jsonl.gz").code == 0
    return folder, contents(folder / "out")


@pytest.mark.parametrize("fault, workers", [
    ("prepare.shard:kill:4", 0), ("prepare.read:kill:8", 0), ("prepare.before_manifest:kill", 0),
    ("shards.before_fsync:kill:3", 2), *(pytest.param(fault, 0, marks=pytest.mark.slow) for fault in (
        "prepare.shard:kill:1", "prepare.shard:kill:9", "shards.before_rename:kill:5")),
])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
        reference: tuple[Path, dict[str, bytes]], tmp_path: Path, fault: str, workers: int) -> None:
    folder, wanted = reference
    inputs = f"{folder}/a.jsonl, {folder}/b.jsonl.gz"
    assert prepare(tmp_path, inputs, fault=fault, workers=workers).code == -signal.SIGKILL
    out = tmp_path / "out"
    assert not (out / "manifest.json").exists() and (out / "progress.json").exists()
    held = json.loads((out / "progress.json").read_text()).get("commit", {"held": {}})["held"]
    done = [out / entry["file"] for split in held.values() for entry in split["entries"]]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done}
    assert before or "kill:1" in fault or "shards" in fault or "read" in fault
    ended = prepare(tmp_path, inputs, workers=workers).clean()
    assert ended.code == 0 and ("shards stand already" in ended.err) == bool(before), ended.err
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done} == before     # none was written again
    assert contents(out) == wanted


@pytest.mark.slow
def test_killed_at_random_times_it_goes_on_to_the_same_bytes(
        reference: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, wanted = reference
    path = recipe(tmp_path, f"{folder}/a.jsonl, {folder}/b.jsonl.gz", workers=2)
    for attempt in range(40):                                # later ones live longer, however slow the machine is
        process = subprocess.Popen(command("prepare", path), env=environment(), stderr=subprocess.PIPE)
        try:
            _out, err = process.communicate(timeout=draw.uniform(0.3, 2 + 0.7 * attempt))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        assert process.returncode == 0, err
        break
    assert contents(tmp_path / "out") == wanted


def test_an_unfinished_folder_is_not_mixed_with_another_configuration(
        reference: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, _wanted = reference
    assert prepare(tmp_path, f"{folder}/a.jsonl", fault="prepare.shard:kill:4").code == -signal.SIGKILL
    other = prepare(tmp_path, f"{folder}/a.jsonl", "seed=5", "clean.min_chars=2")
    refused(other, 2, "clean.min_chars, seed differ", "overwrite")
    ended = prepare(tmp_path, f"{folder}/a.jsonl", "seed=5", "overwrite=true").clean()
    assert ended.code == 0 and json.loads((tmp_path / "out/manifest.json").read_text())["config"]["seed"] == 5


def test_a_worker_that_dies_is_replaced(reference: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, wanted = reference
    ended = prepare(tmp_path, f"{folder}/a.jsonl, {folder}/b.jsonl.gz", fault="data.worker:kill:3", workers=2).clean()
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "out") == wanted


def test_a_worker_that_always_dies_is_told_and_leaves_nothing_behind(
        reference: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, _wanted = reference
    ended = prepare(tmp_path, f"{folder}/a.jsonl", fault="data.worker:kill:1", workers=2)
    refused(ended, 3, "a.jsonl:", "died 3 times")
    assert alive(tmp_path) == []


def test_the_workers_of_a_killed_parent_end(reference: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, _wanted = reference
    assert prepare(tmp_path, f"{folder}/a.jsonl", fault="prepare.shard:kill:2", workers=2).code == -signal.SIGKILL
    for _attempt in range(100):
        if not alive(tmp_path):
            return
        time.sleep(0.1)
    raise AssertionError(alive(tmp_path))


@pytest.mark.parametrize("rows, code", [(1000, 0), (400, 3)])
def test_malformed_rows_are_listed_and_too_many_stop_it(tmp_path: Path, rows: int, code: int) -> None:
    good = [json.dumps({"text": f"row {i}"}) for i in range(rows - 5)]
    bad = {10: "{", 20: '{"text": "x",}', 30: '["text"]', 40: '{"text": NaN}', 50: "Infinity"}
    lines = good[:]
    for place, text in bad.items():
        lines.insert(place - 1, text)
    lines.insert(60, "")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    ended = prepare(tmp_path, f"{tmp_path}/a.jsonl").clean()
    listed = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in listed] == [
        (10, "json"), (20, "json"), (30, "not_object"), (40, "not_a_number"), (50, "not_a_number")]
    assert all(one["file"] == f"{tmp_path}/a.jsonl" and one["detail"] for one in listed)
    assert json.loads((tmp_path / "out/report.json").read_text())["rows"]["blank"] == 1
    assert ended.code == code, ended.err
    if code:
        refused(ended, 3, "a.jsonl:10", "5 of 400 rows", "rejects")


def test_nan_in_a_label_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n')
    ended = within(tmp_path, f"{{path: {tmp_path}/a.jsonl, label: label}}")
    refused(ended, 3, "a.jsonl:2", "not_a_number")


@pytest.mark.parametrize("data, reason, place", [
    ("中文，一二三。\n".encode("gb18030") * 3, "encoding", "a.txt:1"), (b"fine\ncaf\xe9\n", "encoding", "a.txt:2"),
    (b"fine\nnul\0\n", "nul", "a.txt:2"), (b"fine\n\xed\xa0\x80\n", "encoding", "a.txt:2"),
])
def test_other_encodings_are_told_and_never_garbled(tmp_path: Path, data: bytes, reason: str, place: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    refused(within(tmp_path, f"{tmp_path}/a.txt"), 3, place, reason)
    if reason == "encoding":
        assert "offset" in (tmp_path / "out/rejects.jsonl").read_text()
        assert "encoding: gb18030" in within(tmp_path, f"{tmp_path}/a.txt").last


def test_a_lone_surrogate_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    refused(within(tmp_path, f"{tmp_path}/a.jsonl"), 3, "a.jsonl:2", "surrogate")


@pytest.mark.parametrize("data, words, told", [
    ("", [], "the inputs hold no row"), ("\n\n", [], "the inputs hold no row"),
    ("short\n", ["clean.min_chars=50"], "0 rows left after filter too_short (1 of 1 rows)"),
    ("a\n", ["split.by=none", "inputs.0={path: %s, split: val}"], "0 rows left to train on"),
])
def test_nothing_left_is_told_quickly(tmp_path: Path, data: str, words: list[str], told: str) -> None:
    (tmp_path / "a.txt").write_text(data)
    words = [word.replace("%s", f"{tmp_path}/a.txt") for word in words]
    ended = within(tmp_path, f"{tmp_path}/a.txt", *words)
    refused(ended, 3, told, "a.txt")
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_row_of_200_mb_is_rejected_in_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _mib in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "two"}\n')
    path = recipe(tmp_path, f"{tmp_path}/a.jsonl")
    done = subprocess.run(measured(tmp_path / "peak", "prepare", path, "rejects=0.5"), env=environment(), check=False)
    assert done.returncode == 0
    assert int((tmp_path / "peak").read_text()) < 250 * 1024                      # KiB
    listed = json.loads((tmp_path / "out/rejects.jsonl").read_text())
    assert (listed["line"], listed["reason"]) == (2, "row_bytes") and "209715212 bytes" in listed["detail"]


def damaged(folder: Path, name: str) -> Path:
    """A file of 8,000 rows, cut in the middle."""
    texts = [f"row {i} " + "".join(draw.choices("abcdefgh", k=50)) for i in range(8000)]
    lines = "".join(text + "\n" for text in texts).encode()
    path = folder / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith("zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    elif name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text(json.dumps([{"text": text} for text in texts]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst", "x.parquet", "x.json"])
def test_files_that_are_cut_short_are_named_or_skipped(tmp_path: Path, name: str) -> None:
    path = damaged(tmp_path, name)
    (tmp_path / "good.txt").write_text("a\nb\nc\n")
    refused(within(tmp_path, f"{path}, {tmp_path}/good.txt"), 3, name, "damaged or cut short", "on_error: skip")
    ended = within(tmp_path, f"{path}, {tmp_path}/good.txt", "on_error=skip").clean()
    assert ended.code == 0 and name in ended.err, ended.err
    files = json.loads((tmp_path / "out/report.json").read_text())["files"]
    assert files[0]["broken"] and files[1] == {"file": f"{tmp_path}/good.txt", "rows": 3}
    assert (files[0]["rows"] > 1000) == (name != "x.parquet")


def test_flipped_bits_in_a_packed_file_are_seen(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b"some text\n" * 10 + bytes(range(65, 90)) * 40))
    data[-6] ^= 1                                            # the check sum
    (tmp_path / "a.txt.gz").write_bytes(data)
    refused(within(tmp_path, f"{tmp_path}/a.txt.gz"), 3, "a.txt.gz", "damaged")


def bomb(folder: Path, name: str) -> Path:
    """200 MB of nothing in a small file; the gz one is as small as gz can make it, 1,000 to one."""
    path, row = folder / name, b"a" * 1023 + b"\n"
    if name.endswith("gz"):
        with gzip.open(path, "wb", compresslevel=6) as file:
            for _mib in range(200):
                file.write(b"a" * ((1 << 20) - 1) + b"\n")
    elif name.endswith("zst"):
        with zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=19)) as file:
            for _mib in range(200):
                file.write(row * 1024)
    else:
        table = pa.table({"text": pa.array([row.decode()] * 50_000).dictionary_encode()})
        with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for _part in range(4):
                writer.write_table(table)
    assert path.stat().st_size < 210_000
    return path


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst", "x.parquet"])
def test_decompression_bombs_are_stopped(tmp_path: Path, name: str) -> None:
    path = recipe(tmp_path, bomb(tmp_path, name))
    done = subprocess.run(measured(tmp_path / "peak", "prepare", path), env=environment(), stderr=subprocess.PIPE, text=True,
                          check=False)
    assert done.returncode == 7 and name in done.stderr and "max_ratio" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and int((tmp_path / "peak").read_text()) < 400 * 1024
    limited = danlu("prepare", path, f"inputs.0={{path: {tmp_path}/{name}, max_ratio: 1e9, max_bytes: 100000}}")
    refused(limited, 7, name, "max_bytes")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.pkl", "x.npy", "x.txt", "x.jsonl", "x.parquet", "x.txt.gz"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    path, marker = tmp_path / name, tmp_path / "marker"
    if name.endswith("npy"):
        np.save(path, np.array([Bomb(marker)], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Bomb(marker)))
    ended = within(tmp_path, path)
    refused(ended, 7, name)
    assert not marker.exists()


def test_a_folder_that_cannot_be_written_is_told_before_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    os.mkfifo(tmp_path / "never.txt")                        # reading it would hang
    ended = prepare(tmp_path, f"{tmp_path}/never.txt")
    refused(ended, 2, "out", "cannot be written")
    assert ended.seconds < 20


def test_train_rows_in_the_test_set(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "b.txt").write_text("four\ntwo\n")
    inputs = f"{tmp_path}/a.txt, {{path: {tmp_path}/b.txt, split: test}}"
    strict = within(tmp_path, inputs, "split.strict=true", "split.by=none")
    refused(strict, 3, "a.txt:2", "1 texts stand in two splits")
    ended = within(tmp_path, inputs, "split.by=none").clean()
    assert ended.code == 0 and "1 texts stand in both train and test" in ended.err


def piped(folder: Path, mib: int, *words: str, tokenizer: str) -> tuple[int, int, str]:
    """Prepare rows that come through standard input; return exit code, peak KiB of the process, stderr."""
    path = recipe(folder, "{path: '-', format: jsonl}", workers=1, tokenizer=tokenizer)
    rows = ("import json\nbody = ' '.join(f'word{i % 977}' for i in range(150))\n"
            f"for i in range({mib} << 10): print(json.dumps({{'text': f'{{i}} ' + body[:1000]}}))")
    source = subprocess.Popen([sys.executable, "-c", rows], stdout=subprocess.PIPE)
    done = subprocess.run(measured(folder / "peak", "prepare", path, *words), stdin=source.stdout, env=environment(),
                          stderr=subprocess.PIPE, text=True, check=False)
    assert source.stdout is not None
    source.stdout.close()
    source.wait()
    return done.returncode, int((folder / "peak").read_text()), done.stderr


def fed(path: Path, data: str, fault: str = "") -> tuple[int, str]:
    done = subprocess.run(command("prepare", path), input=data, text=True, env=environment(fault), capture_output=True,
                          check=False)
    return done.returncode, done.stderr


def test_standard_input_is_streamed_or_copied(tmp_path: Path) -> None:
    for folder in ("learned", "loaded", "killed"):
        (tmp_path / folder).mkdir()
    code, _peak, err = piped(tmp_path / "learned", 2, tokenizer="{kind: chars}")
    assert code == 0 and "copied" in err and not (tmp_path / "learned/out/.unfinished").exists(), err
    loaded = f"{{path: {tmp_path}/learned/out/tokenizer}}"
    code, _peak, err = piped(tmp_path / "loaded", 2, tokenizer=loaded)
    assert code == 0 and "copied" not in err, err
    shards = {name: data for name, data in contents(tmp_path / "learned/out").items() if name.endswith(".safetensors")}
    assert {name: contents(tmp_path / "loaded/out")[name] for name in shards} == shards
    report = json.loads((tmp_path / "loaded/out/report.json").read_text())
    assert report["rows"]["read"] == 2048
    path = recipe(tmp_path / "killed", "{path: '-', format: jsonl}", tokenizer=loaded)
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2500])
    assert fed(path, data, "prepare.shard:kill:4")[0] == -signal.SIGKILL
    code, err = fed(path, data[1000:])
    assert code == 3 and "not the one" in err
    assert fed(path, data)[0] == 0
    assert json.loads((tmp_path / "killed/out/report.json").read_text())["rows"]["read"] == 2500


@pytest.mark.slow
def test_a_gigabyte_through_a_pipe_needs_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert piped(tmp_path / "a", 2, tokenizer="{kind: chars}")[0] == 0
    loaded = f"{{path: {tmp_path}/a/out/tokenizer}}"
    code, peak, err = piped(tmp_path / "b", 1024, "shard_tokens=16777216", tokenizer=loaded)
    assert code == 0, err
    assert peak < 600 * 1024
    assert json.loads((tmp_path / "b/out/report.json").read_text())["rows"]["read"] == 1 << 20
