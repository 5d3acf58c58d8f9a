"""Whole rows against the csv and json modules and pyarrow; files in other encodings and bad rows against their places."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.data.blocks import Reject
from danlu.data.delimited import headed
from danlu.data.inputs import Input
from danlu.data.records import Record, read
from danlu.errors import DataError

FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


def rows(item: Input | str | Path, **options: int) -> tuple[list[Record], list[Reject]]:
    rejects: list[Reject] = []
    chosen = item if isinstance(item, Input) else str(item)
    return list(read(chosen, on_reject=lambda _name, reject: rejects.append(reject), **options)), rejects


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@given(table=st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(FIELD, min_size=n, max_size=n), max_size=5)))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_rows_are_what_was_written(tmp_path: Path, table: list[list[str]]) -> None:
    out = io.StringIO()
    names = [f"c{place}" for place in range(len(table[0]))] if table else ["c0"]
    csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([names, *table])
    found, rejects = rows(Input(path=str(put(tmp_path, "a.csv", out.getvalue())), header=True))
    kept = [row for row in table if not (len(row) == 1 and not row[0].strip() and len(names) != 1)]
    assert [[one.columns[name] for name in names] for one in found] == kept
    assert rejects == []


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = [{"text": "丹炉", "label": "1"}, {"text": "a, \"b\"", "label": "0"}]
    put(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in table) + "\n\n")
    put(tmp_path, "b.json", json.dumps(table))
    put(tmp_path, "c.json", json.dumps({"version": "1", "data": table}))
    out = io.StringIO()
    writer = csv.DictWriter(out, ["text", "label"])
    writer.writeheader()
    writer.writerows(table)
    put(tmp_path, "d.csv", b"\xef\xbb\xbf" + out.getvalue().encode())
    put(tmp_path, "e.tsv", "text\tlabel\n丹炉\t1\na, \"b\"\t0\n")
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "f.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.csv", "e.tsv", "f.parquet"):
        found, rejects = rows(tmp_path / name)
        assert [one.columns for one in found] == table, name
        assert rejects == []
    hub, rejects = rows(f"hf://{tmp_path}/a.jsonl")
    assert [one.columns for one in hub] == table and rejects == []
    assert [one.columns for one in rows(f"{tmp_path}/e.tsv#1")[0]] == table[:1]


def test_nested_columns_of_parquet(tmp_path: Path) -> None:
    table = [{"messages": [{"role": "user", "content": "x"}], "n": 1.5}, {"messages": [], "n": None}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    assert [one.columns for one in rows(tmp_path / "a.parquet")[0]] == table


@pytest.mark.parametrize(("first", "rest", "top"), [
    (["a stirring film", "1"], [["a bad film", "0"]], False), (["label", "text_a"], [["1", "x"]], True),
    (["A plane.", "A jet.", "5.0"], [["A man.", "A dog.", "1.0"]], False),
    (["good film", "positive"], [["bad", "positive"]], False),
    (["Review Text", "Stars"], [["fine", "5"]], True),
    (["", "text", "label"], [["0", "a film", "pos"], ["1", "a play", "neg"]], True), (["", "good"], [["a film", "bad"]], False),
    (["文本", "标签"], [["好", "1"]], True), (["my text", ""], [["a", "b"]], False),
    (["this is a rather long sentence that nobody would call a column", "pos"], [["b", "neg"]], False)])
def test_a_header_is_told_from_a_row(first: list[str], rest: list[list[str]], top: bool) -> None:
    assert headed([first, *rest]) is top


def test_rows_that_are_not_taken_cannot_be_at_fault(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", "text,label\r\n" + "".join(f"row {n},x\r\n" for n in range(5)) + "ragged\r\n" + "more,y\r\n")
    found, rejects = rows(Input(path=f"{path}#4"))
    assert [one.columns["text"] for one in found] == [f"row {n}" for n in range(4)] and not rejects
    found, rejects = rows(Input(path=f"{path}#6"))
    assert len(found) == 6 and [reject.line for reject in rejects] == [7]
    assert not rows(Input(path=str(path), take=6, take_seed=1))[1]
    plain = put(tmp_path, "a.txt", "one\r\ntwo\r\n")
    assert [one.columns for one in rows(Input(path=f"{plain}#2"))[0]] == [{"text": "one"}, {"text": "two"}]


def test_a_headless_tsv_keeps_its_first_row(tmp_path: Path) -> None:
    found, _rejects = rows(put(tmp_path, "a.tsv", "a fine film\t1\na poor \"film\t0\n"))
    assert [(one.line, one.columns) for one in found] == [
        (1, {"0": "a fine film", "1": "1"}), (2, {"0": "a poor \"film", "1": "0"})]
    named, _rejects = rows(Input(path=str(tmp_path / "a.tsv"), header=True))
    assert [one.columns for one in named] == [{"a fine film": "a poor \"film", "1": "0"}]


def test_words_and_tags(tmp_path: Path) -> None:
    lines = "en:R.H.\tB-ORG\nen:Lee\tI-ORG\n\n\nen:Paris\tB-LOC\nen:is\tO\nen:big\tO\nen::\tO\n"
    found, rejects = rows(put(tmp_path, "a.tsv", lines))
    assert [(one.line, one.columns) for one in found] == [
        (1, {"tokens": ["R.H.", "Lee"], "tags": ["B-ORG", "I-ORG"]}),
        (5, {"tokens": ["Paris", "is", "big", ":"], "tags": ["B-LOC", "O", "O", "O"]})]
    assert rejects == []
    other = "-DOCSTART- -X- -X- O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\nx\n\n# O O\n"
    found, rejects = rows(put(tmp_path, "b.conll", other))
    assert [(one.line, one.columns["tokens"]) for one in found] == [(3, ["EU", "rejects"]), (8, ["#"])]
    assert [(reject.line, reject.reason) for reject in rejects] == [(6, "columns")]


def test_squad_gives_a_row_a_question(tmp_path: Path) -> None:
    asked = {"id": "q1", "question": "Who?", "answers": [{"text": "Bo", "answer_start": 0}, {"text": "Bo", "answer_start": 9}]}
    none = {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True}
    data = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "Bo and a Bo", "qas": [asked, none]}]},
                                        {"paragraphs": [{"qas": 3}]}]}
    found, rejects = rows(put(tmp_path, "a.json", json.dumps(data)))
    assert [(one.line, one.columns) for one in found] == [
        (1, {"id": "q1", "context": "Bo and a Bo", "question": "Who?",
             "answers": {"text": ["Bo", "Bo"], "answer_start": [0, 9]}}),
        (2, {"id": "q2", "context": "Bo and a Bo", "question": "Why?", "answers": {"text": [], "answer_start": []}})]
    assert [(reject.line, reject.reason) for reject in rejects] == [(3, "squad")]
    assert len(rows(f"{tmp_path}/a.json#1")[0]) == 1


TABLE = "text,label\n丹炉很好,1\n不好,0\n"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_gb18030_is_refused_with_the_byte_and_the_fix(tmp_path: Path, name: str) -> None:
    text = TABLE if name != "a.jsonl" else '{"text": "丹炉"}\n'
    path = put(tmp_path, name, text.replace(",", "\t" if name == "a.tsv" else ",").encode("gb18030"))
    with pytest.raises(DataError) as caught:
        rows(path)
    place = next(at for at, byte in enumerate(path.read_bytes()) if byte > 127)
    assert f"offset {place} " in caught.value.what
    assert caught.value.fix == "encoding: gb18030"
    assert caught.value.where == f"{path}:{1 if name == 'a.jsonl' else 2}"
    found, rejects = rows(Input(path=str(path), encoding="gb18030"))
    assert found[0].columns["text"].startswith("丹炉") and rejects == []


def test_other_encodings_have_no_wrong_fix(tmp_path: Path) -> None:
    for data in (TABLE.encode() + b"\xe4\xb8,1\n", "text,label\ncafé au lait,1\n".encode("latin-1")):
        with pytest.raises(DataError) as caught:
            rows(put(tmp_path, "a.csv", data))
        assert "gb18030" not in str(caught.value.fix)
    text = json.dumps([{"text": "丹" * 400_000}, {"text": "x"}], ensure_ascii=False).encode()
    with pytest.raises(DataError, match=rf"offset {len(text) - 3} "):        # beyond the first piece, in a character cut by it
        rows(put(tmp_path, "a.json", text[:-3] + b"\xff" + text[-3:]))


def test_an_enormous_row_is_rejected_with_its_line(tmp_path: Path) -> None:
    large = "x" * 3_000_000
    for name, text, line in (("a.csv", f"text,label\nok,1\n{large},0\nfine,1\n", 3),
                             ("c.csv", f'text,label\nok,1\n"{large}",0\nfine,1\n', 3),
                             ("a.jsonl", f'{{"text": "ok"}}\n{{"text": "{large}"}}\n{{"text": "fine"}}\n', 2),
                             ("a.json", f'[{{"text": "ok"}}, {{"text": "{large}"}}, {{"text": "fine"}}]', 2)):
        found, rejects = rows(put(tmp_path, name, text), row_bytes=100_000)
        assert [one.columns["text"] for one in found] == ["ok", "fine"], name
        assert [(reject.line, reject.reason) for reject in rejects] == [(line, "row_bytes")], name
    pq.write_table(pa.table({"text": ["ok", large]}), tmp_path / "a.parquet")
    found, rejects = rows(tmp_path / "a.parquet", row_bytes=100_000)
    assert len(found) == 1 and [(reject.line, reject.reason) for reject in rejects] == [(2, "row_bytes")]


def test_nothing_vanishes(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', "", "[1]", '{"text": NaN}', '{"text": "\\ud800"}', '{"text": {"x": ["\\u0000"]}}', "{",
             '{"text": "b"}']
    found, rejects = rows(put(tmp_path, "a.jsonl", "\n".join(lines)))
    assert [one.line for one in found] == [1, 8]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (3, "not_object"), (4, "not_a_number"), (5, "surrogate"), (6, "nul"), (7, "json")]
    found, rejects = rows(put(tmp_path, "a.csv", "text,label\na,1\nb\n\nc,2,3\nd,4\n"))
    assert [one.columns["text"] for one in found] == ["a", "d"]
    assert [(reject.line, reject.reason) for reject in rejects] == [(3, "columns"), (5, "columns")]
    with pytest.raises(DataError, match="two columns"):
        rows(Input(path=str(put(tmp_path, "b.csv", "text,text\na,b\n")), header=True))
    with pytest.raises(DataError, match="cannot be used"):
        list(read(str(tmp_path / "a.csv")))


def tags_of(found: list[Record]) -> Counter[Any]:
    return Counter(tag for one in found for tag in one.columns["tags"])


@pytest.mark.realdata
def test_public_files_are_read_to_the_last_row(realdata: Path) -> None:
    """Row counts as the data sets' own pages give them."""
    counts = {"sst2/train.tsv": 6920, "sst2/test.tsv": 1821, "chnsenticorp/train.tsv": 9600, "stsb/en-train.csv": 5749,
              "stsb/zh-test.csv": 1379, "wikiann/train.tsv": 20000, "xquad/en.json": 1190, "xquad/zh.json": 1190,
              "gsm8k/train.jsonl": 7473, "gsm8k/test.jsonl": 1319}
    for name, count in counts.items():
        found, rejects = rows(realdata / name)
        assert (len(found), rejects) == (count, []), name
    tagged, _rejects = rows(realdata / "wikiann/test.tsv")
    lines = (realdata / "wikiann/test.tsv").read_text(encoding="utf-8").splitlines()
    assert tags_of(tagged) == Counter(line.rsplit("\t", 1)[1] for line in lines if line.strip())
    assert not any(word.startswith("en:") for one in tagged for word in one.columns["tokens"])
