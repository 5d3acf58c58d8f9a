"""Readers against the json and csv modules, gzip, zstandard, pyarrow and datasets; bad rows against their reasons."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from danlu.data import blocks, formats, raw
from danlu.data.blocks import Reject
from danlu.data.inputs import Input, resolve
from danlu.data.sources import read
from danlu.errors import ConfigError, DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
LINES = st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b), max_size=12)
NAMED = st.fixed_dictionaries({"text": TEXTS}, optional={"more": st.integers() | st.lists(TEXTS, max_size=2)})


def rows(item: Input | str, **options: int) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Return what `read` gives: (line, text) of the records, (line, reason) of the rejects."""
    rejects: list[Reject] = []
    found = [(one.line, one.text) for one in
             read(item, on_reject=lambda _name, reject: rejects.append(reject), **options)]
    return found, [(reject.line, reject.reason) for reject in rejects]


def put(folder: Path, name: str, data: bytes | str) -> str:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Make the readers take `size` bytes at a time, so that every cut falls somewhere awkward."""
    monkeypatch.setattr(raw, "MIB", size)
    monkeypatch.setattr(blocks, "MIB", size)


@given(data=LINES, end=st.booleans(), size=st.sampled_from([2, 3, 7, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_lines_equal_a_plain_split(folder: Path, data: list[bytes], end: bool, size: int) -> None:
    whole = b"\n".join(data) + (b"\n" if end and data else b"")
    path = put(folder, "lines.txt", whole)
    wanted, bad = [], []
    parts = whole.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for line, part in enumerate(parts, 1):
        try:
            text = part.decode().removesuffix("\r")
        except UnicodeDecodeError:
            bad.append((line, "encoding"))
            continue
        if "\0" in text:
            bad.append((line, "nul"))
        elif text.strip():
            wanted.append((line, text))
    if whole[:2] in (b"\xff\xfe", b"\xfe\xff") or re.match(rb"\x80[\x02-\x05].", whole, re.DOTALL):
        return
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, size)
        assert rows(path) == (wanted, bad)


@given(st.lists(NAMED, max_size=8), st.sampled_from([3, 1 << 20]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_jsonl_and_json_equal_the_json_module(folder: Path, values: list[dict[str, object]], size: int, plain: bool
                                              ) -> None:
    lines = [json.dumps(value, ensure_ascii=plain) for value in values]
    wanted = [(line, value["text"]) for line, value in enumerate(values, 1)]
    array = "[" + " ,\n".join(lines) + "]"
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, size)
        assert rows(put(folder, "a.jsonl", "\n".join(lines))) == (wanted, [])
        assert rows(put(folder, "a.json", array)) == (wanted, [])
        before = '"data_": "[", "x": {"data": [1]}, "version": "\\"data"'
        nested = f'{{{before}, "data": {array}, "after": [{{"text": "no"}}]}}'
        assert rows(put(folder, "b.json", nested)) == (wanted, [])


@given(st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=8), st.sampled_from([3, 1 << 20]),
       st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@settings(max_examples=150, deadline=None)
def test_csv_equals_the_csv_module(folder: Path, table: list[list[str]], size: int, quoting: int) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=quoting)                # type: ignore[arg-type]
    writer.writerow(["label", "text"])
    writer.writerows(table)
    wanted = [row[1] for row in csv.reader(io.StringIO(out.getvalue(), newline=""))][1:]
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, size)
        found, bad = rows(put(folder, "t.csv", out.getvalue()))
    assert [text for _line, text in found] == wanted == [row[1] for row in table]
    assert bad == []


def test_a_line_ends_at_line_feeds_only(tmp_path: Path) -> None:
    text = "a\u2028b\x0bc\x0cd\x85e\rf\r\ng"
    assert rows(put(tmp_path, "x.txt", text))[0] == [(1, "a\u2028b\x0bc\x0cd\x85e\rf"), (2, "g")]


def test_paragraphs_and_documents(tmp_path: Path) -> None:
    path = put(tmp_path, "p.txt", "\na1\r\na2\n\n \t\nb\n\n\nc1\nc2")
    assert rows(Input(path=path, sample_by="paragraph"))[0] == [(2, "a1\na2"), (6, "b"), (9, "c1\nc2")]
    assert rows(Input(path=path, sample_by="document"))[0] == [(1, "\na1\r\na2\n\n \t\nb\n\n\nc1\nc2")]


def test_tsv_does_not_quote_and_so_loses_no_rows(tmp_path: Path) -> None:
    path = put(tmp_path, "t.tsv", 'label\ttext\n1\t"open quote\n0\tsecond "word"\n')
    assert rows(path) == ([(2, '"open quote'), (3, 'second "word"')], [])
    bare = put(tmp_path, "bare.tsv", "x\t1\ny\t0\n")
    found = list(read(Input(path=bare, header=False, text=0, label=1)))
    assert [(one.text, one.label) for one in found] == [("x", "1"), ("y", "0")]


def test_a_stray_quotation_mark_in_csv_is_told(tmp_path: Path) -> None:
    path = put(tmp_path, "s.csv", 'text,n\nfine,1\n"stray,2\nlost,3\nagain "x",4\nfine,5\n')
    found, bad = rows(path)
    assert (2, "fine") in found and (6, "fine") in found
    assert [reason for _line, reason in bad] == ["csv"] and bad[0][0] == 3


def test_ragged_rows_and_unknown_columns(tmp_path: Path) -> None:
    path = put(tmp_path, "r.csv", "text,n\na,1\nb\nc,2,3\n\nd,4\n")
    assert rows(path) == ([(2, "a"), (6, "d")], [(3, "columns"), (4, "columns")])
    with pytest.raises(DataError, match=r"r\.csv:1.*'texts'.*text, n.*'text'"):
        rows(Input(path=path, text="texts"))


@pytest.mark.parametrize("line, reason", [
    ("{", "json"), ('{"text": "a",}', "json"),
    ('["text"]', "not_object"), ("3", "not_object"), ('"text"', "not_object"),
    ('{"text": NaN}', "not_a_number"),
    ('{"text": "a", "label": NaN}', "not_a_number"),
    ('{"text": "a", "n": -Infinity}', "not_a_number"), ('{"text": 3}', "not_text"), ('{"text": null}', "not_text"),
    ('{"txt": "a"}', "no_column"), (r'{"text": "\ud800"}', "surrogate"), (r'{"text": "a\u0000b"}', "nul"),
    ('{"text": "a"} {"text": "b"}', "json"), ('{"text": ' + "1" * 5000 + "}", "json"), ("[" * 100_000, "json"),
    ("{'text': 'a'}", "json"), ('{"text": "a\tb"}', "json"),
])
def test_json_rows_at_fault(tmp_path: Path, line: str, reason: str) -> None:
    path = put(tmp_path, "f.jsonl", f'{{"text": "one"}}\n\n{line}\n{{"text": "two"}}\n')
    assert rows(path) == ([(1, "one"), (4, "two")], [(3, reason)])


@pytest.mark.parametrize("label, name", [('"a"', "a"), ("1", "1"), ("1.0", "1"), ("true", "true"), ("0.5", "0.5")])
def test_labels_are_names(tmp_path: Path, label: str, name: str) -> None:
    path = put(tmp_path, "l.jsonl", f'{{"text": "x", "label": {label}}}\n')
    assert next(read(Input(path=path, label="label"))).label == name


@pytest.mark.parametrize("label", ["null", "[]", '""', "1e999", '"\\ud800"'])
def test_labels_at_fault(tmp_path: Path, label: str) -> None:
    path = put(tmp_path, "l.jsonl", f'{{"text": "x", "label": {label}}}\n')
    assert rows(Input(path=path, label="label")) == ([], [(1, "label")])


def test_bytes_that_are_not_utf8_are_told_by_offset(tmp_path: Path) -> None:
    head = "好的\n".encode()
    path = put(tmp_path, "e.txt", head + "caf\xe9\n".encode("latin-1") + "中文\n".encode("gb18030") + b"fine\n")
    told: list[str] = []
    tell = lambda _name, reject: told.append(f"{reject.line} {reject.detail}")  # noqa: E731
    found = [one.text for one in read(path, on_reject=tell)]
    assert found == ["好的", "fine"]
    assert told[0] == f"2 byte 0xe9 at offset {len(head) + 3} is not utf-8"
    assert told[1].startswith(f"3 byte 0xd6 at offset {len(head) + 5}")
    with pytest.raises(DataError, match=r"e\.txt:2"):
        list(read(path))


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "latin-1", "cp1252", "utf-8-sig"])
def test_an_encoding_that_is_given(tmp_path: Path, encoding: str) -> None:
    text = "café" if encoding in ("latin-1", "cp1252") else "中文字"
    path = put(tmp_path, "g.txt", f"{text}\n{text}2\n".encode(encoding))
    assert rows(Input(path=path, encoding=encoding))[0] == [(1, text), (2, f"{text}2")]
    table = put(tmp_path, "g.csv", f"text,n\n{text},1\n".encode(encoding))
    assert rows(Input(path=table, encoding=encoding))[0] == [(2, text)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-7", "hz", "iso2022_jp", "nonsense", "base64"])
def test_encodings_that_hide_line_ends_are_refused(encoding: str) -> None:
    with pytest.raises(ValidationError, match="encoding="):
        Input(path="x", encoding=encoding)


def test_byte_order_marks(tmp_path: Path) -> None:
    assert rows(put(tmp_path, "a.txt", b"\xef\xbb\xbfone\ntwo"))[0] == [(1, "one"), (2, "two")]
    assert rows(put(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "one"}'))[0] == [(1, "one")]
    assert rows(put(tmp_path, "a.json", b'\xef\xbb\xbf[{"text": "one"}]'))[0] == [(1, "one")]
    assert rows(put(tmp_path, "a.csv", b"\xef\xbb\xbftext\none\n"))[0] == [(2, "one")]
    with pytest.raises(DataError, match="UTF-16"):
        rows(put(tmp_path, "b.txt", "one".encode("utf-16")))


@pytest.mark.parametrize("name, packed", [
    ("x.txt.gz", lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:])),
    ("x.txt.zst", lambda data: zstandard.compress(data[:7]) + zstandard.compress(data[7:])),
])
def test_packed_files_of_several_members(tmp_path: Path, name: str, packed: object) -> None:
    data = "".join(f"line {i}\n" for i in range(1000)).encode()
    found, bad = rows(put(tmp_path, name, packed(data)))     # type: ignore[operator]
    assert [text for _line, text in found] == data.decode().split("\n")[:-1] and bad == []


def test_what_a_file_is_must_fit_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is gzip"):
        rows(put(tmp_path, "x.txt", gzip.compress(b"text")))
    with pytest.raises(DataError, match="not gzip"):
        rows(put(tmp_path, "y.txt.gz", b"text"))
    with pytest.raises(DataError, match="not parquet"):
        rows(put(tmp_path, "y.parquet", b"text"))
    with pytest.raises(DataError, match=r"follows the first.*format: jsonl"):
        rows(put(tmp_path, "y.json", '{"text": "a"}\n{"text": "b"}\n'))
    with pytest.raises(DataError, match='without an array under "data"'):
        rows(put(tmp_path, "z.json", '{"text": "a"}'))
    with pytest.raises(DataError, match="array of objects"):
        rows(put(tmp_path, "w.json", "text"))


def test_parquet_equals_what_pyarrow_wrote(tmp_path: Path) -> None:
    texts = [f"文 {i}" for i in range(5000)]
    labels = [i % 3 for i in range(5000)]
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"label": labels, "other": texts[::-1], "text": pa.array(texts).dictionary_encode()}), path,
                   row_group_size=700)
    found = list(read(Input(path=path, label="label")))
    wanted = [(i + 1, texts[i], str(labels[i])) for i in range(5000)]
    assert [(one.line, one.text, one.label) for one in found] == wanted
    with pytest.raises(DataError, match="label, other, text"):
        rows(Input(path=path, text="txt"))
    with pytest.raises(DataError, match="int64, not text"):
        rows(Input(path=path, text="label"))


def test_parquet_nulls_and_bytes_that_are_not_utf8_are_rejected(tmp_path: Path) -> None:
    path = str(tmp_path / "x.parquet")
    column = pa.array([b"good", None, b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    assert rows(path) == ([(1, "good")], [(2, "not_text"), (3, "encoding")])


def test_hub_sets_are_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = "".join(json.dumps({"text": f"row {i}", "label": i % 2}) + "\n" for i in range(20))
    (tmp_path / "set").mkdir()
    put(tmp_path / "set", "train.jsonl", data)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    wanted = [(i + 1, f"row {i}") for i in range(20)]
    assert rows(f"hf://{tmp_path}/set") == (wanted, [])
    assert rows(Input(path=f"hf://{tmp_path}/set/train.jsonl", take=3))[0] == wanted[:3]
    with pytest.raises(DataError, match="text, label"):
        rows(Input(path=f"hf://{tmp_path}/set", text="txt"))
    with pytest.raises(DataError, match="no such file"):
        rows(f"hf://{tmp_path}/none")
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="scripts"):
        rows(f"hf://{tmp_path}/set")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module, name, wanted", [
    ("zstandard", "x.txt.zst", "zstd"), ("pyarrow", "x.parquet", "parquet"), ("datasets", "hf://x", "hub")])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, wanted: str
                                  ) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = name if name.startswith("hf:") else put(tmp_path, name, zstandard.compress(b"x"))
    with pytest.raises(ConfigError, match=rf'pip install "danlu\[{wanted}\]"'):
        rows(path)


def test_a_long_line_is_never_held(tmp_path: Path) -> None:
    path = put(tmp_path, "l.txt", b"a\n" + b"x" * 5000 + b"\nb\n" + b"y" * 2001 + b"\n" + b"z" * 2000)
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, 64)
        assert rows(path, row_bytes=2000) == (
            [(1, "a"), (3, "b"), (5, "z" * 2000)], [(2, "row_bytes"), (4, "row_bytes")])
        item = Input(path=path)
        cut = list(formats.stream(resolve([item]), [item], row_bytes=2000))
    assert max(block.size for block in cut) <= 2000 + 64 + 2000
    big = json.dumps([{"text": "a"}, {"text": "x" * 5000}, {"text": "b"}])
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, 64)
        assert rows(put(tmp_path, "l.json", big), row_bytes=2000) == ([(1, "a"), (3, "b")], [(2, "row_bytes")])
        table = put(tmp_path, "l.csv", f'text\na\n"{"x" * 5000}"\nb\n')
        assert rows(table, row_bytes=2000) == ([(2, "a"), (4, "b")], [(3, "row_bytes")])


def test_folders_patterns_and_names_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl.gz", "sub/c.csv", "readme.me", ".hidden.txt"):
        put(tmp_path / "in", name, "")
    os.symlink(tmp_path / "in", tmp_path / "in" / "loop")
    names = [Path(file.path).name for file in resolve([Input(path=str(tmp_path / "in"))])]
    assert names == ["a.jsonl.gz", "b.txt", "c.csv"]
    assert [f.format for f in resolve([Input(path=str(tmp_path / "in/*.me"), format="txt")])] == ["txt"]
    assert [Path(f.path).name for f in resolve([Input(path=str(tmp_path / "in"), format="csv")])] == ["c.csv"]
    os.symlink(tmp_path / "gone", tmp_path / "dangling.txt")
    for path, wanted in (("in/*.xml", "no file matches"), ("none.txt", "no such file"),
                         ("dangling.txt", "cannot be opened"), ("in/readme.me", "does not show the format")):
        with pytest.raises(DataError, match=wanted) as caught:
            resolve([Input(path=str(tmp_path / path))])
        assert path in str(caught.value)
    with pytest.raises(DataError, match="set `format"):
        resolve([Input(path="-")])
    with pytest.raises(DataError, match="one input only"):
        resolve([Input(path="-", format="txt"), Input(path="-", format="jsonl")])


def test_take_gives_the_first_rows_or_a_seeded_choice(tmp_path: Path) -> None:
    path = put(tmp_path, "n.txt", "".join(f"{i}\n\n" for i in range(100)))
    table = put(tmp_path, "n.csv", "text\n" + "".join(f"{i}\n" for i in range(100)))
    assert [text for _line, text in rows(f"{path}#3")[0]] == ["0", "1", "2"]
    assert rows(f"{path}#3")[0][2] == (5, "2")
    assert [text for _line, text in rows(f"{table}#3")[0]] == ["0", "1", "2"]
    chosen = [[int(text) for _line, text in rows(Input(path=path, take=10, take_seed=seed))[0]] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] == sorted(set(chosen[0])) and len(chosen[0]) == 10
    assert chosen[0] != chosen[2] and max(chosen[0] + chosen[2]) > 50
    with pytest.raises(ConfigError, match="how many"):
        rows(Input(path=path, take_seed=1))
    named = put(tmp_path, "odd.txt#2", "a\nb\nc\n")
    assert len(rows(Input(path=named, format="txt"))[0]) == 3
