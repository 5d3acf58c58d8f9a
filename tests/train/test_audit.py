"""`danlu audit`: each planted fault is named with its row, a clean file passes, and every count is counted again here."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli import danlu

from danlu import cli
from danlu.data import audit, examples, shards
from danlu.data.kinds import BPE
from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer, train

Rows = list[dict[str, Any]]
METALS = ("lead", "gold", "silver", "copper", "tin", "mercury", "iron", "salt", "sulphur", "smoke", "ash", "coal", "fire", "lime")
TEXTS = [f"the film number {i} is {'good' if i % 2 else 'bad'} and {'long' if i % 3 else 'short'} as {word} says" for i, word in
         enumerate(METALS * 2)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(TEXTS * 3, BPE(vocab=400, bos="<s>", add_bos=True)).save(folder)
    return folder


def labelled(number: int = 28) -> Rows:
    """Rows of two classes, no two of them alike."""
    draw = np.random.default_rng(7)
    words = [word for text in TEXTS for word in text.split()]
    return [{"text": " ".join(draw.choice(words, 12)) + f" {i}", "label": "pos" if i % 2 else "neg"} for i in range(number)]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    base = {"out": str(folder / "run"), "data": str(folder / "train.jsonl"), "tokenizer": str(tokenizer), "objective": "classify",
            "model": {"kind": "encoder", "width": 16, "layers": 1, "heads": 2, "context": 64},
            "optim": {"kind": "adamw", "lr": 1e-3}, "schedule": "linear",
            "steps": 2, "rows": 4, "length": 64, "precision": "fp32", "threads": 1, "device": "cpu"}
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(base | changes), encoding="utf-8")
    return path


def speaking(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    model = {"kind": "decoder", "family": "llama", "width": 16, "layers": 1, "heads": 2, "context": 512}
    return recipe(folder, tokenizer, objective="causal_lm", model=model, held_out=0.0, **changes)


def said(tokenizer: Path) -> Rows:
    """Tokenised conversations: bos, a question that is only read, an answer with its end that is learned."""
    by = Tokenizer.load(tokenizer)
    rows = []
    for number, row in enumerate(labelled(12)):
        asked, told = by.encode(row["text"]).tolist(), by.encode(f"answer {number}").tolist()
        ids = [by.special.bos, *asked, *told, by.special.eos]
        rows.append({"input_ids": ids, "labels": [-100] * (1 + len(asked)) + [*told, by.special.eos]})
    return rows


class Told:
    """What `danlu audit --json` said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.err = code, err
        self.record: dict[str, Any] = json.loads(out) if out.strip() else {}
        self.findings = {one["name"]: one for one in self.record.get("findings", [])}

    def names(self, name: str, *rows: str) -> None:
        """The run would stop for this, and these rows are shown."""
        one = self.findings[name]
        assert self.code == 3 and one["stops"] and one["n"] == len(rows)
        shown = [example["where"] for example in one["examples"]]
        assert [place.split(" ")[0] for place in shown] == list(rows), shown


@pytest.fixture
def audited(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(path: Path, *words: str) -> Told:
        code = cli.main(["audit", str(path), *words, "--json"])
        return Told(code, *capfd.readouterr())
    return run


def test_a_clean_file_passes_and_the_counts_are_those_of_the_file(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    rows = labelled()
    write(tmp_path / "train.jsonl", rows[:20])
    write(tmp_path / "dev.jsonl", rows[20:])
    told = audited(recipe(tmp_path, tokenizer, eval=str(tmp_path / "dev.jsonl"), steps=10))
    assert told.code == 0 and not [one for one in told.findings.values() if one["stops"]], told.findings
    by, (ours, theirs) = Tokenizer.load(tokenizer), told.record["parts"]
    assert [(p["split"], p["read"], p["documents"], p["looked_at"]) for p in (ours, theirs)] == [
        ("train", 20, 20, 20), ("val", 8, 8, 8)]
    sizes = [len(by.together([by.encode(row["text"])])[0]) for row in rows[:20]]
    assert ours["tokens"] == sum(sizes) and ours["lengths"]["0"] == min(sizes) and ours["lengths"]["100"] == max(sizes)
    assert ours["lengths"]["50"] == sorted(sizes)[19 // 2]
    assert ours["labels"]["counts"] == Counter(row["label"] for row in rows[:20]) and ours["labels"]["majority_accuracy"] == 0.5
    assert told.record["mixture"][0]["epochs"] == pytest.approx(10 * 4 / 20)
    batches = told.record["batches"]
    assert (batches["rows"], batches["filled"]) == (20, sum(sizes)) and sum(sizes) <= batches["places"] < 20 * max(sizes)
    assert json.loads((tmp_path / "run/audit.json").read_text())["key"] == told.record["key"]


def test_conversations_without_fault_pass(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    rows = said(tokenizer)
    write(tmp_path / "train.jsonl", rows)
    told = audited(speaking(tmp_path, tokenizer))
    assert told.code == 0, told.findings
    learned = sum(label != -100 for row in rows for label in row["labels"])
    assert told.record["parts"][0]["learned"] == pytest.approx(learned / sum(len(row["input_ids"]) for row in rows))


def test_chats_rendered_here_learn_their_ends(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "yes"},
                          {"role": "user", "content": "why"}, {"role": "assistant", "content": f"for {i} reasons"}]}
            for i, row in enumerate(labelled(8))]
    path = write(tmp_path / "train.jsonl", rows)
    told = audited(speaking(tmp_path, tokenizer, length=512))
    assert told.code == 0 and 0 < told.record["parts"][0]["learned"] < 0.5, told.findings
    rows[4]["messages"][3]["content"] = ""
    write(path, rows)
    audited(tmp_path / "r.yaml").names("left_out", f"{path}:5")


@pytest.mark.parametrize("fault", ["masked", "unended", "double_bos", "empty_answer"])
def test_faults_of_conversations_are_named_with_their_row(tmp_path: Path, tokenizer: Path, audited: Any, fault: str) -> None:
    rows, by = said(tokenizer), Tokenizer.load(tokenizer)
    row = rows[6]
    match fault:
        case "masked":
            row["labels"] = [-100] * len(row["labels"])
        case "unended":
            row["input_ids"], row["labels"] = row["input_ids"][:-1], row["labels"][:-1]
        case "double_bos":
            row["input_ids"].insert(0, by.special.bos)
            row["labels"].insert(0, -100)
        case "empty_answer":
            row["labels"] = [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]
    path = write(tmp_path / "train.jsonl", rows)
    told = audited(speaking(tmp_path, tokenizer))
    told.names("left_out" if fault == "masked" else fault, f"{path}:7")
    assert "⟦" in json.dumps(told.record["findings"][0], ensure_ascii=False) or fault == "masked"
    ended = danlu("train", speaking(tmp_path, tokenizer)).clean()
    assert ended.code == 3 and f"{path}:7" in ended.err and not list(tmp_path.glob("run/checkpoint-*"))


def test_an_empty_answer_in_words_is_named(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    rows = [{"prompt": row["text"], "completion": "yes" if i != 3 else ""} for i, row in enumerate(labelled(10))]
    path = write(tmp_path / "train.jsonl", rows)
    told = audited(speaking(tmp_path, tokenizer))
    told.names("left_out", f"{path}:4")


def test_a_leak_is_named_exactly_and_nearly(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    rows = labelled()
    close = {**rows[5], "text": rows[5]["text"] + " ash"}
    write(tmp_path / "train.jsonl", rows[:20])
    path = write(tmp_path / "dev.jsonl", [*rows[20:], rows[3], close])
    where = recipe(tmp_path, tokenizer, eval=str(path))
    told = audited(where, "audit.stop=[near_overlap]")
    told.names("overlap", f"{path}:9")
    told.names("near_overlap", f"{path}:10")
    assert f"{tmp_path}/train.jsonl:6" in told.findings["near_overlap"]["examples"][0]["where"]
    assert audited(where, "guard.overlap=0.2").code == 0


def test_a_label_that_training_never_saw_is_named(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    rows = labelled()
    write(tmp_path / "train.jsonl", rows[:20])
    path = write(tmp_path / "dev.jsonl", [*rows[20:24], {"text": "of another kind", "label": "odd"}])
    told = audited(recipe(tmp_path, tokenizer, eval=str(path)))
    told.names("left_out", f"{path}:5")
    assert "unseen_label" in told.findings["left_out"]["examples"][0]["text"]
    assert danlu("train", recipe(tmp_path, tokenizer, eval=str(path))).clean().code == 3      # the folder is there


def test_a_row_that_is_too_big_is_named(tmp_path: Path, tokenizer: Path, audited: Any,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "ROW_BYTES", 4096)
    rows = labelled()
    rows[2]["text"] = "x" * 5000
    path = write(tmp_path / "train.jsonl", rows)
    told = audited(recipe(tmp_path, tokenizer))
    told.names("left_out", f"{path}:3")
    assert "row_bytes" in told.findings["left_out"]["examples"][0]["text"]


@pytest.mark.slow
def test_a_row_of_200_mb_is_named(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    path = write(tmp_path / "train.jsonl", labelled())
    with path.open("ab") as file:
        file.write(b'{"text": "')
        for _mib in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'", "label": "pos"}\n')
    audited(recipe(tmp_path, tokenizer)).names("left_out", f"{path}:29")


def test_another_encoding_and_swapped_columns_are_refused_by_name(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes("text,label\n好,正\n坏,负\n".encode("gb18030"))
    told = audited(recipe(tmp_path, tokenizer, data=str(path)))
    assert told.code == 3 and "train.csv:2" in told.err and "offset 11" in told.err and "gb18030" in told.err
    swapped = [{"text": row["label"], "label": row["text"]} for row in labelled()]
    write(tmp_path / "train.jsonl", swapped)
    told = audited(recipe(tmp_path, tokenizer))
    assert told.code == 3 and "swapped" in told.err and "train.jsonl" in told.err


def test_what_is_only_told(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    rows = labelled(24)
    rows += [rows[1], {**rows[2], "label": "pos"}, {"text": "broken \ufffd text", "label": "neg"},
             {"text": "<p>hello&nbsp;you</p>", "label": "Neg "}]
    path = write(tmp_path / "train.jsonl", rows)
    told = audited(recipe(tmp_path, tokenizer, held_out=0.0), "audit.duplicates=0", "audit.markup=0", "audit.rarest=0.1")
    assert told.code == 0
    shown = {name: [e["where"].removeprefix(f"{tmp_path}/") for e in one["examples"]] for name, one in told.findings.items()}
    assert shown["duplicates"] == [f"train.jsonl:25 = {path}:2", f"train.jsonl:26 = {path}:3"]
    assert shown["contradictions"] == [f"train.jsonl:26 ≠ {path}:3"]
    assert shown["garbled"] == ["train.jsonl:27"] and shown["markup"] == ["train.jsonl:28"]
    assert "'Neg'" in told.findings["alike_labels"]["what"] and told.findings["rarest"]["n"] == 1
    again = audited(recipe(tmp_path, tokenizer, held_out=0.0), "audit.stop=[contradictions]")
    again.names("contradictions", f"{path}:26")


def test_the_run_uses_the_audit_again_and_keeps_it_in_the_receipt(tmp_path: Path, tokenizer: Path, audited: Any) -> None:
    write(tmp_path / "train.jsonl", labelled(40))
    path = recipe(tmp_path, tokenizer)
    key = audited(path).record["key"]
    before = (tmp_path / "run/audit.json").stat().st_size
    ended = danlu("train", path).clean()
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run/audit.json").read_text())["key"] == key
    assert (tmp_path / "run/audit.json").stat().st_size == before
    receipt = json.loads((tmp_path / "run/run.json").read_text())["audit"]
    assert {"findings", "overlap", "near_overlap", "padding", "rows"} <= receipt.keys()


def test_a_prepared_corpus_is_audited_too(tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = speaking(tmp_path, corpus / "tokenizer", data=str(corpus), overlong="split", length=32)
    assert cli.main(["audit", str(path)]) == 0
    out = capfd.readouterr().out
    assert str(corpus) in out and "padding" in out and "rows read" in out


def test_a_sample_is_taken_of_many_rows_and_says_so(tmp_path: Path, tokenizer: Path) -> None:
    by = Tokenizer.load(tokenizer)
    with shards.Writer(tmp_path / "train", dtype="uint16") as writer:
        for number in range(500):
            writer.add(np.full(1 + number % 7, 5), bytes=1, file=0, line=number + 1)
    shards.write_manifest(tmp_path, {"tokenizer": by.sha256, "dtype": "uint16", "splits": {"train": writer.entries},
                                     "files": ["a"], "inputs": [], "counts": {}, "config": {}})
    taken = audit.sample(Shards(tmp_path), by, room=5, overlong="drop", most=100)
    assert taken.rows.number == 100 and all(number % 7 < 5 for number in taken.numbers)
    assert taken.numbers[0] == 0 and taken.numbers[-1] >= 490
    cut = audit.sample(Shards(tmp_path), by, room=5, overlong="cut", most=1000)
    assert cut.rows.number == 500 and np.diff(cut.rows.offsets).max() == 5
    assert (~cut.whole).sum() == sum(n % 7 > 4 for n in range(500))
