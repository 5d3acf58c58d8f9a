"""Shards against the safetensors library, and against every kind of damage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from danlu import fault, files
from danlu.data import mapped, progress, shards
from danlu.errors import DataError, SecurityError

ROW = {"bytes": 7, "file": 0, "line": 3}


def prepared(folder: Path, lengths: list[int], *, tokens: int = 100, weights: str | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, n) for n in lengths]
    with shards.Writer(folder / "train", dtype="uint16", weights=weights, tokens=tokens) as writer:
        for i, ids in enumerate(documents):
            share = (ids % 2) if weights else None
            writer.add(ids, weights=share, bytes=int(ids.size), file=i % 2, line=i + 1)
    shards.write_manifest(folder, {
        "tokenizer": "0" * 64, "dtype": "uint16", "files": ["a.txt", "b.txt"], "inputs": [], "counts": {}, "config": {},
        "splits": {"train": writer.entries}})
    return documents


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=30), weights=st.sampled_from([None, "uint8", "float16"]))
def test_documents_come_back(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], weights: str | None) -> None:
    folder = tmp_path_factory.mktemp("data")
    documents = prepared(folder, lengths, weights=weights)
    found = shards.Shards(folder, verify=True)
    assert found.documents == len(documents) and found.tokens == sum(lengths)
    assert found.lengths().tolist() == lengths
    assert found.top == max((int(d.max()) for d in documents if d.size), default=-1)
    for i, ids in enumerate(documents):
        document = found.document(i)
        assert document.ids.tolist() == ids.tolist()
        assert document.columns == {"bytes": ids.size, "file": i % 2, "line": i + 1}
        assert (document.weights is None) if weights is None else document.weights.tolist() == (ids % 2).tolist()
        assert found.where(i) == f"{'ab'[i % 2]}.txt:{i + 1}"


def test_the_library_reads_what_the_writer_writes(tmp_path: Path) -> None:
    documents = prepared(tmp_path, [40, 0, 70, 200, 3], weights="float16")
    names = sorted((tmp_path / "train").iterdir())
    assert [n.name for n in names] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    loaded = [load_file(n) for n in names]
    assert np.concatenate([one["ids"] for one in loaded]).tolist() == np.concatenate(documents).tolist()
    assert [one["offsets"].tolist() for one in loaded] == [[0, 40, 40, 110], [0, 200], [0, 3]]


def test_the_reader_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5, dtype=np.int64), "b": np.ones((2, 3), np.float16), "c": np.zeros(0, np.uint8)}
    save_file(arrays, tmp_path / "x.safetensors")
    found = mapped.read(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").stat().st_size)
    assert {n: (a.dtype, a.tolist()) for n, a in found.items()} == {n: (a.dtype, a.tolist()) for n, a in arrays.items()}
    assert not any(a.flags.writeable for a in found.values())


def test_mode_follows_the_umask_and_no_temporary_is_left(tmp_path: Path) -> None:
    prepared(tmp_path, [5])
    mask = os.umask(0)
    os.umask(mask)
    assert [p.name for p in (tmp_path / "train").iterdir()] == ["00000.safetensors"]
    assert (tmp_path / "train" / "00000.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_empty, damage_gone])
def test_damage_is_named(tmp_path: Path, damage: object) -> None:
    prepared(tmp_path, [40, 90, 70])
    damage(tmp_path / "train" / "00001.safetensors")    # type: ignore[operator]
    with pytest.raises(DataError, match=r"train/00001\.safetensors"):
        shards.Shards(tmp_path, verify=True)


def raw(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "U8", shape: object = (4,), span: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize("content", [
    raw({"a": entry(span=(0, 400))}, b"1234"),                              # beyond the end
    raw({"a": entry(shape=(400,), span=(0, 400))}, b"1234"),
    raw({"a": entry(shape=(5,))}, b"1234"),                                 # size and shape differ
    raw({"a": entry(shape=(-4,))}, b"1234"),
    raw({"a": entry(shape=(2**40, 2**40, 0), span=(0, 4))}, b"1234"),
    raw({"a": entry(shape=(True,), span=(0, 1))}, b"1"),
    raw({"a": entry(dtype="Q7")}, b"1234"),
    raw({"a": entry(span=(1, 5))}, b"12345"),                               # a gap
    raw({"a": entry(), "b": entry()}, b"1234"),                             # an overlap
    raw({"a": entry()}, b"12345"),                                          # bytes that nobody owns
    raw({"a": {"dtype": "U8"}}, b"1234"),
    raw({"a": 3}, b""),
    raw([], b""),
    raw(b'{"a": {}, "a": {}}', b""),
    raw(b"{", b""),
    raw(b"\xff\xff", b""),
    (1 << 40).to_bytes(8, "little") + b"{}",
    b"12345678",
    b"123",
])
def test_lying_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.safetensors"):
        mapped.read(path, len(content))


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flip_is_found_by_its_hash_and_none_crashes_without(
        tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("data")
    prepared(folder, [40, 30])
    path = folder / "train" / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DataError, match="00000"):
        shards.Shards(folder, verify=True)
    try:
        found = shards.Shards(folder)
    except DataError:
        return
    assert sum(found.document(i).ids.size for i in range(2)) == 70


def test_wrong_offsets_are_refused(tmp_path: Path) -> None:
    prepared(tmp_path, [40, 30])
    path = tmp_path / "train" / "00000.safetensors"
    arrays = load_file(path)
    arrays["offsets"] = np.array([0, 80, 70])
    mapped.write(path, arrays)
    with pytest.raises(DataError, match="00000"):
        shards.Shards(tmp_path)


@pytest.mark.parametrize(("change", "error"), [
    (lambda m: m.update(tokenizer="1" * 64), DataError),
    (lambda m: m["splits"]["train"][0].update(tokens=1), DataError),
    (lambda m: m.pop("fingerprint"), DataError),
    (lambda m: m.update(schema=99), DataError),
    (lambda m: m.update(splits=[]), DataError),
])
def test_a_changed_manifest_is_refused(tmp_path: Path, change: object, error: type[Exception]) -> None:
    prepared(tmp_path, [40])
    manifest = files.read_json(tmp_path / "manifest.json")
    change(manifest)    # type: ignore[operator]
    files.write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(error):
        shards.Shards(tmp_path)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    prepared(tmp_path, [40])
    manifest = files.read_json(tmp_path / "manifest.json")
    manifest["splits"]["train"][0]["file"] = "../../etc/passwd"
    manifest["fingerprint"] = shards.fingerprint(manifest)
    files.write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(SecurityError):
        shards.Shards(tmp_path)


def test_missing_unfinished_and_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data"):
        shards.Shards(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(DataError, match="not finished"):
        shards.Shards(tmp_path)
    prepared(tmp_path, [4])
    with pytest.raises(DataError, match="train"):
        shards.Shards(tmp_path, "test")


def test_fingerprint_follows_every_byte(tmp_path: Path) -> None:
    prepared(tmp_path / "a", [40, 90])
    prepared(tmp_path / "b", [40, 90])
    prepared(tmp_path / "c", [40, 91])
    one, same, other = (shards.Shards(tmp_path / n).fingerprint for n in "abc")
    assert one == same != other


@pytest.mark.parametrize(("ids", "values"), [
    (np.array([70000]), ROW), (np.array([-1]), ROW), (np.array([1]), {"bytes": 1}),
    (np.array([1]), {**ROW, "label": 1}),
])
def test_the_writer_refuses_what_does_not_fit(tmp_path: Path, ids: np.ndarray, values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"fit|needs"):
        shards.Writer(tmp_path / "train", dtype="uint16").add(ids, **values)
    writer = shards.Writer(tmp_path / "train", dtype="uint16")
    writer.add(np.array([1]), bytes=2**40, file=0, line=0)
    with pytest.raises(ValueError, match="bytes"):
        writer.close()


@pytest.mark.parametrize("point", ["shards.before_fsync", "shards.before_rename"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, point: str) -> None:
    writer = shards.Writer(tmp_path / "train", dtype="uint16")
    writer.add(np.arange(5), **ROW)
    fault.arm(f"{point}:raise")
    with pytest.raises(fault.PlantedFault):
        writer.close()
    assert list((tmp_path / "train").iterdir()) == [] and writer.entries == []
    assert writer.close()[0].documents == 1         # nothing was lost: the next attempt writes it


def test_what_a_killed_process_had_half_written_goes(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("00000.safetensors", "00001.safetensors", ".00003.safetensors.d33f4c2a", ".mine", "notes.txt"):
        (folder / name).write_bytes(b"x")
    progress.prune(tmp_path, "train", keep=1)
    assert sorted(path.name for path in folder.iterdir()) == [".mine", "00000.safetensors", "notes.txt"]
    (tmp_path / ".manifest.json.0123abcd").write_bytes(b"x")
    progress.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
