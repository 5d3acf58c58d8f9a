"""`danlu eval` and `danlu predict` of models of tasks, against transformers' logits and scikit-learn's figures."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import command, environment

from danlu import cli
from danlu.errors import DataError
from danlu.evaluate import calibrate, rows
from danlu.evaluate.lines import read, source
from danlu.evaluate.subject import open_subject
from danlu.train import checkpoint

from . import small

transformers = pytest.importorskip("transformers")
sklearn = pytest.importorskip("sklearn.metrics")
CPU = torch.device("cpu")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluated(run: Path, tmp_path: Path, *words: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out, samples = tmp_path / "result.json", tmp_path / "samples.jsonl"
    assert cli.main(["eval", str(run), "--out", str(out), "--samples", str(samples), *map(str, words)]) == 0
    return json.loads(out.read_text()), lines(samples)


def logits(folder: Path, texts: list[Any], length: int = 64) -> np.ndarray:
    """Transformers' own, one row at a time; texts or pairs."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        parts = (text,) if isinstance(text, str) else tuple(text)
        types = {"return_token_type_ids": True} if len(parts) > 1 else {}
        with torch.no_grad():
            given = tokenizer(*parts, truncation=True, max_length=length, return_tensors="pt", **types)
            found.append(model(**given).logits[0].numpy())
    return np.stack(found).astype(np.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three classes whose columns have names that only its recipe tells."""
    folder = tmp_path_factory.mktemp("classes")
    data = small.table(folder / "train.csv", ["review", "stars"], small.texts(240, 1, 3))
    return small.trained(folder, small.encoder(folder), [{"path": str(data), "columns": {"text": "review", "label": "stars"}}])


def test_figures_are_those_of_scikit_learn_on_the_logits_of_transformers(run: Path, tmp_path: Path) -> None:
    held = small.texts(60, 2, 3)
    data = small.table(tmp_path / "test.csv", ["review", "stars"], held)
    record, told = evaluated(run, tmp_path, "--data", data)
    best = open_subject(run).folder
    names = ["bad", "good", "mixed"]
    scores = logits(best, [text for text, _label in held], 32)
    chances = torch.softmax(torch.tensor(scores), -1).numpy()
    truth, said = [names.index(label) for _text, label in held], scores.argmax(1)
    figures = {name.removesuffix(",none"): value for name, value in record["results"]["test"].items()}
    assert figures["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, said))
    assert figures["f1_macro"] == pytest.approx(sklearn.f1_score(truth, said, average="macro", zero_division=0))
    assert figures["mcc"] == pytest.approx(sklearn.matthews_corrcoef(truth, said))
    assert figures["loss"] == pytest.approx(sklearn.log_loss(truth, chances), abs=1e-5)
    assert record["confusion"]["test"] == {"labels": names, "counts": sklearn.confusion_matrix(truth, said).tolist()}
    low, high = record["intervals"]["test"]["accuracy"]
    assert low < figures["accuracy"] < high
    assert record["n-samples"]["test"] == {"original": 60, "effective": 60}
    assert record["facts"]["test"].get("cut", 0) == sum(
        len(one) > 32 for one in transformers.AutoTokenizer.from_pretrained(best)([t for t, _l in held])["input_ids"])
    assert [(one["text"], one["label"], one["line"]) for one in told] == [(*row, n + 2) for n, row in enumerate(held)]
    assert [one["predicted"] for one in told] == [names[i] for i in said]
    np.testing.assert_allclose([one["probability"] for one in told], chances.max(1), atol=1e-5)
    np.testing.assert_allclose([one["loss"] for one in told], -np.log(chances[range(60), truth]), atol=1e-4)
    assert json.loads((run / "eval_results.json").read_text())["results"] == record["results"]


def test_training_leaves_what_the_report_shows(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    held, told = evaluated(run, tmp_path)                # what the run holds out: by default
    last = lines(run / "metrics.jsonl")[-1]
    task, = held["results"]
    assert task == "train" and len(told) == sum(map(sum, held["confusion"][task]["counts"])) == 24
    assert held["results"][task]["accuracy,none"] == pytest.approx(last["eval/accuracy"])
    assert held["results"][task]["loss,none"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert {one["label"] for one in told} == {"bad", "good", "mixed"}
    (run / "predictions.jsonl").write_text((tmp_path / "samples.jsonl").read_text())
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<svg" in page and "mixed" in page and "Worst errors" in page


def test_a_run_leaves_its_figures_at_its_end(tmp_path: Path) -> None:
    data = small.table(tmp_path / "train.csv", ["text", "label"], small.texts(60, 1))
    out = small.trained(tmp_path, small.encoder(tmp_path), str(data), steps=2)
    record, told = json.loads((out / "eval_results.json").read_text()), lines(out / "predictions.jsonl")
    assert list(record["results"]) == ["train"] and len(told) == 6
    assert set(told[0]) == {"file", "line", "text", "label", "predicted", "probability", "loss"}


@pytest.mark.parametrize(("rows_given", "message"), [
    ([("fine day", "good"), ("cold day", "ugly")], "test.csv:3.*'ugly'"),
    ([("fine day", "good"), ("", "bad")], "test.csv:3.*empty"),
    ([("fine day", "good"), ("cold", "")], "test.csv:3"),
])
def test_a_row_that_cannot_be_judged_is_named(run: Path, tmp_path: Path, rows_given: list[Any], message: str) -> None:
    data = small.table(tmp_path / "test.csv", ["review", "stars"], rows_given)
    task = rows.task_of(open_subject(run), rows.How(), CPU)
    with pytest.raises(DataError) as caught:
        rows.judged_on(task, str(data), rows.How(), lambda line: None)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_other_columns_encodings_and_policies(run: Path, tmp_path: Path) -> None:
    data = small.table(tmp_path / "gb.csv", ["文", "类"], small.texts(30, 5, 3), encoding="gb18030")
    words = ["--data", data, "--columns", "text=文", "label=类"]
    assert cli.main(["eval", str(run), *map(str, words)]) == 3
    record, told = evaluated(run, tmp_path, *words, "--encoding", "gb18030")
    assert len(told) == 30 and "电影" in "".join(one["text"] for one in told)
    assert cli.main(["eval", str(run), *map(str, words), "--encoding", "gb18030", "--length", "8", "--overlong", "error"]) == 3
    record, told = evaluated(run, tmp_path, *words, "--encoding", "gb18030", "--length", "12", "--overlong", "drop")
    assert 0 < record["facts"]["gb"]["dropped"] == 30 - len(told)


def test_logits_do_not_depend_on_the_company(run: Path, tmp_path: Path) -> None:
    given = [text for text, _label in small.texts(50, 7, 3)]
    data = small.table(tmp_path / "new.csv", ["review"], [(text,) for text in given])
    found = {}
    for most in (1, 7, None):
        task = rows.task_of(open_subject(run), rows.How(rows=most), CPU)
        reading = task.reading(rows.How(), unlabelled=True)
        found[most] = [outs[0] for _line, outs in rows.answered(task, read(source(str(data), task.like), reading))]
    for most in (7, None):
        np.testing.assert_allclose(np.stack(found[most]), np.stack(found[1]), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.stack(found[1]), logits(task.subject.folder, given, 32), atol=1e-5, rtol=0)


def test_predictions_keep_the_order_the_columns_and_the_rows_at_fault(run: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "new.jsonl", tmp_path / "told.jsonl"
    given = [{"review": text, "id": n, "prediction": "theirs"} for n, (text, _label) in enumerate(small.texts(40, 9, 3))]
    shown = [json.dumps(one, ensure_ascii=False) for one in given]
    shown[3] = "{broken"
    shown[20] = json.dumps({"id": 20})
    path.write_text("\n".join(shown) + "\n{also broken\n", encoding="utf-8")
    assert cli.main(["predict", str(run), "--data", str(path), "--out", str(out), "--top-k", "3"]) == 0
    told = lines(out)
    assert len(told) == 41
    for n, one in enumerate(told):
        if n in (3, 40):
            assert list(one) == ["error"] and f"new.jsonl:{n + 1}: json" in one["error"]
        elif n == 20:
            assert one["id"] == 20 and "missing" in one["error"]
        else:
            assert {key: one[key] for key in given[n]} == given[n]
            assert one["danlu_prediction"] == one["top"][0][0] and one["probability"] == one["top"][0][1]
            assert sum(chance for _name, chance in one["top"]) == pytest.approx(1)
    best = logits(open_subject(run).folder, [given[n]["review"] for n in (0, 39)], 32).argmax(1)
    assert [told[0]["danlu_prediction"], told[39]["danlu_prediction"]] == [["bad", "good", "mixed"][i] for i in best]


def test_predictions_as_a_table_and_from_a_pipe(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small.table(tmp_path / "new.csv", ["id", "review"], [(1, "fine, \"warm\" day"), (2, " "), (3, "很差")])
    assert cli.main(["predict", str(run), "--data", str(data), "--out", str(tmp_path / "told.csv")]) == 0
    with (tmp_path / "told.csv").open(encoding="utf-8", newline="") as file:
        told = list(csv.DictReader(file))
    assert [one["id"] for one in told] == ["1", "2", "3"] and told[0]["review"] == "fine, \"warm\" day"
    assert "empty" in told[1]["error"] and not told[1]["prediction"] and told[2]["prediction"] and not told[2]["error"]
    capsys.readouterr()
    pipe = "".join(json.dumps({"review": one["review"]}) + "\n" for one in told)
    done = subprocess.run(command("predict", run, "--data", "-"), input=pipe, capture_output=True, text=True, check=True,
                          env=environment())
    piped = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one.get("prediction", "") for one in piped] == [one["prediction"] for one in told]
    assert cli.main(["predict", str(run), "--text", "fine, \"warm\" day", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["prediction"] == told[0]["prediction"]
    assert one["probability"] == pytest.approx(float(told[0]["probability"]), abs=1e-6)


def test_predicting_needs_no_label_and_looks_at_none(run: Path, tmp_path: Path) -> None:
    data = small.table(tmp_path / "new.csv", ["review", "stars"], [("fine day", "never seen"), ("cold day", "")])
    assert cli.main(["predict", str(run), "--data", str(data), "--out", str(tmp_path / "told.jsonl")]) == 0
    assert [(one["stars"], "prediction" in one) for one in lines(tmp_path / "told.jsonl")] == [("never seen", True), ("", True)]


def test_rows_are_held_a_window_at_a_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LINES", 8)
    task = rows.task_of(open_subject(run), rows.How(), CPU)
    drawn = 0

    def endless() -> Any:
        nonlocal drawn
        draw = random.Random(0)
        one = next(iter(read(source(str(path), None), task.reading(rows.How(), unlabelled=True))))
        while True:
            drawn += 1
            yield one._replace(line=draw.randint(1, 9))

    path = run / "one.jsonl"
    path.write_text('{"text": "fine day"}\n')
    given = rows.answered(task, endless())
    for _n in range(20):
        next(given)
    assert drawn == 24


@pytest.mark.parametrize("problem", ["multi", "score", "pair", "decoder"])
def test_kinds_of_tasks_against_transformers(problem: str, tmp_path: Path) -> None:
    """From a run, and from the same checkpoint as a plain Hugging Face folder."""
    draw, names = random.Random(3), ["good", "bad", "old"]
    start = small.decoder(tmp_path, [t for t, _l in small.texts(60, 0)]) if problem == "decoder" else small.encoder(tmp_path)
    given: list[dict[str, Any]] = []
    for text, label in small.texts(120, 4):
        kind: dict[str, Any] = {"labels": [n for n in names if n in (label, "old" if "old" in text else "")]}
        kind = {"score": {"score": 0.5 + (label == "good") * 3.0}, "decoder": {"label": label}, "pair": {"label": label}}.get(
            problem, kind)
        given.append({"text_a": text, "text_b": " ".join(draw.choices(small.OTHER, k=draw.randint(1, 9)))} | kind
                     if problem == "pair" else {"text": text} | kind)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in given), encoding="utf-8")
    objective: Any = {"multi": {"kind": "classify", "several": True}, "score": {"kind": "regress"}}.get(
        problem, {"kind": "classify"})
    out = small.trained(tmp_path, start, str(path), objective=objective, steps=10, length=64)
    folder = open_subject(out).folder
    record, told = evaluated(out, tmp_path, "--data", path)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (bare / name).write_bytes((folder / name).read_bytes())
    again, same = evaluated(bare, tmp_path, "--data", path, "--overlong", "cut", "--length", "64")
    assert again["results"] == record["results"] and same == told
    texts = [(one["text_a"], one["text_b"]) if problem == "pair" else one["text"] for one in given]
    if problem == "decoder":
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        subject = open_subject(folder)
        found = []
        for text in texts:
            ids = subject.tokenizer.together([subject.tokenizer.encode(text)])[0][:64]
            with torch.no_grad():
                found.append(theirs(torch.tensor(ids)[None]).logits[0].numpy())
        scores = np.stack(found).astype(np.float64)
    else:
        scores = logits(folder, texts, 64)
    figures = record["results"]["rows"]
    if problem == "score":
        want = np.array([one["score"] for one in given])
        assert figures["pearson,none"] == pytest.approx(np.corrcoef(scores[:, 0], want)[0, 1], abs=1e-4)
        np.testing.assert_allclose([one["predicted"] for one in told], scores[:, 0], atol=1e-5)
        assert figures["mse,none"] == pytest.approx(np.mean([one["loss"] for one in told]))
    elif problem == "multi":
        labels = open_subject(out).run.objective.labels  # type: ignore[union-attr]
        truth = np.array([[name in one["labels"] for name in labels] for one in given])
        said = 1 / (1 + np.exp(-scores)) >= 0.5
        assert figures["f1_micro,none"] == pytest.approx(sklearn.f1_score(truth, said, average="micro", zero_division=0))
        assert [set(one["predicted"]) for one in told] == [{n for n, yes in zip(labels, row, strict=True) if yes} for row in said]
    else:
        said = scores.argmax(1)
        assert [one["predicted"] for one in told] == [("bad", "good")[i] for i in said]
        truth = [("bad", "good").index(one["label"]) for one in given]
        assert figures["accuracy,none"] == pytest.approx(sklearn.accuracy_score(truth, said))
        assert figures["loss,none"] == pytest.approx(
            sklearn.log_loss(truth, torch.softmax(torch.tensor(scores), -1).numpy()), abs=1e-5)


def test_a_prepared_folder_with_other_numbers_of_the_same_classes(run: Path, tmp_path: Path) -> None:
    """Classes are met by their names, whatever their order in the folder."""
    data = small.table(tmp_path / "more.csv", ["text", "label"], small.texts(60, 11, 3))
    other = small.trained(tmp_path, open_subject(run).folder, str(data), steps=1,
                          objective={"kind": "classify", "labels": ["mixed", "good", "bad"]})
    folder, = (other / "data").glob("more-*")
    record, told = evaluated(run, tmp_path, "--data", folder, "--split", "train")
    direct = {one["line"]: (one["label"], one["predicted"]) for one in evaluated(run, tmp_path, "--data", data)[1]}
    assert len(told) == 54 and all(direct[one["line"]] == (one["label"], one["predicted"]) for one in told)
    assert record["confusion"][folder.name]["labels"] == ["bad", "good", "mixed"]


def test_a_run_that_was_moved_finds_its_rows(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(run, moved)
    file = checkpoint.chosen(moved) / "manifest.json"
    told = json.loads(file.read_text())
    for source_of in told["run"]["data"]:                # as if it had been trained with `--out runs/x`, from another folder
        source_of["prepared"] = str(Path("runs/x/data") / Path(source_of["prepared"]).name)
    file.write_text(json.dumps(told))
    subject = open_subject(moved)
    assert [subject.place(one) for one in subject.run.data] == [moved / "data" / Path(told["run"]["data"][0]["prepared"]).name]
    both = calibrate.both(subject, None, count=10, how=rows.How())
    assert len(both.given) + len(both.aside) == 10 and str(moved) in both.said


def test_a_model_without_a_task_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small.decoder(tmp_path, [t for t, _l in small.texts(60, 0)])
    assert cli.main(["predict", str(folder), "--text", "fine"]) == 4
    assert "no head of a task" in capsys.readouterr().err
