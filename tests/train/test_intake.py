"""Rows as they are to a run: held-out shares, classes, policies, and a recipe that repeats the run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from evaluate import small

from danlu import cli, config, files
from danlu.data.shards import Shards
from danlu.errors import ConfigError, DataError
from danlu.parallel import World
from danlu.train import intake, setup
from danlu.train.intake import taken_in
from danlu.train.recipe import Run


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.encoder(tmp_path_factory.mktemp("start"))


def recipe(start: Path, folder: Path, rows: list[Any], **change: Any) -> Run:
    small.table(folder / "rows.csv", ["text", "label"], rows)
    given: dict[str, Any] = {
        "out": str(folder / "run"), "start": str(start), "data": [{"path": str(folder / "rows.csv")}], "rows": 4, "steps": 3,
        "objective": {"kind": "classify"}, "optim": {"kind": "adamw", "lr": 1e-3}, "schedule": {"kind": "constant"}, "length": 32}
    return config.validate(Run, given | change)


def test_each_class_gives_its_share_and_stays(start: Path, tmp_path: Path) -> None:
    rows = small.texts(90, 1, 3)
    run = taken_in(recipe(start, tmp_path, rows, held_out=0.2, overlong="cut"))
    folder = run.data[0].folder
    for split, share in (("val", 0.2), ("train", 0.8)):
        labels = Shards(folder, split).column("label")
        assert Counter(labels.tolist()) == {number: round(30 * share) for number in range(3)}
    assert Shards(folder, "val").manifest["labels"] == ["bad", "good", "mixed"]
    again = recipe(start, tmp_path, rows[::-1], held_out=0.2, overlong="cut")
    first = _held_texts(folder)
    assert _held_texts(taken_in(again).data[0].folder) == first          # by content, wherever a row stands


def _held_texts(folder: Path) -> set[bytes]:
    val = Shards(folder, "val")
    return {val.document(number).ids.tobytes() for number in range(len(val))}


def test_what_cannot_be_used_stops_the_run_with_its_rows(start: Path, tmp_path: Path) -> None:
    rows = [*small.texts(20, 1), ("", "good"), ("no label", "")]
    with pytest.raises(DataError) as caught:
        taken_in(recipe(start, tmp_path, rows, overlong="cut"))
    assert "2 of 22 rows cannot be used" in str(caught.value) and "rows.csv:22" in str(caught.value)
    allowed = taken_in(recipe(start, tmp_path, rows, overlong="cut", guard={"rejects": 0.1}))
    told = files.read_json(allowed.data[0].folder / "audit.json")
    assert told["read"] == 22 and sum(told["rejected"].values()) == 2
    assert sum(split["rows"] for split in told["splits"].values()) == 20
    listed = [json.loads(line) for line in (allowed.data[0].folder / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in listed] == [22, 23]


@pytest.mark.parametrize(("policy", "kept"), [("error", None), ("drop", 20), ("cut", 21)])
def test_long_rows_need_a_policy(start: Path, tmp_path: Path, policy: str, kept: int | None) -> None:
    rows = [(text[:60], label) for text, label in small.texts(20, 1)] + [("film " * 99, "good")]
    run = recipe(start, tmp_path, rows, overlong=policy, held_out=0.0, length=64)
    if kept is None:
        with pytest.raises(DataError, match="overlong"):
            taken_in(run)
        return
    assert len(Shards(taken_in(run).data[0].folder, "train")) == kept


def test_a_label_unseen_in_training_is_told_with_its_row(start: Path, tmp_path: Path) -> None:
    small.table(tmp_path / "eval.csv", ["text", "label"], [("a fine film", "good"), ("a film", "superb")])
    run = recipe(start, tmp_path, small.texts(20, 1), overlong="cut", eval=[{"path": str(tmp_path / "eval.csv")}])
    with pytest.raises(DataError, match=r"eval\.csv:3: unseen_label: the label 'superb'"):
        taken_in(run)


def test_one_class_is_none(start: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be told apart"):
        taken_in(recipe(start, tmp_path, [(text, "good") for text, _label in small.texts(9, 1)], overlong="cut"))


def test_rows_need_a_tokenizer(tmp_path: Path) -> None:
    small.table(tmp_path / "rows.csv", ["text", "label"], small.texts(9, 1))
    run = config.validate(Run, {
        "out": str(tmp_path / "run"), "model": {"kind": "encoder", "width": 8, "heads": 2, "layers": 1}, "rows": 4, "steps": 3,
        "data": [{"path": str(tmp_path / "rows.csv")}], "objective": {"kind": "classify"}, "optim": {"kind": "adamw"},
        "schedule": {"kind": "constant"}, "length": 32})
    with pytest.raises(ConfigError, match="need a tokenizer"):
        taken_in(run)


def test_the_recipe_of_a_run_repeats_it(start: Path, tmp_path: Path) -> None:
    run = recipe(start, tmp_path, small.texts(40, 1), overlong="cut")
    (tmp_path / "first.yaml").write_text(config.to_yaml(run), encoding="utf-8")
    assert cli.main(["train", str(tmp_path / "first.yaml")]) == 0
    assert cli.main(["train", str(run.out / "recipe.yaml"), f"out={tmp_path / 'again'}"]) == 0
    losses = [[json.loads(line)["train/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()
               if "train/loss" in line] for out in (run.out, tmp_path / "again")]
    assert losses[0] == losses[1] and losses[0]


def test_columns_that_nothing_is_taken_from_are_told(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe(start, tmp_path, [], overlong="cut")
    small.table(tmp_path / "rows.csv", ["text", "label", "source"], [(*row, "web") for row in small.texts(20, 1)])
    folder = taken_in(run).data[0].folder
    assert files.read_json(folder / "audit.json")["unread"] == ["source"]
    told = capsys.readouterr()
    assert "columns that nothing is taken from: source" in told.out + told.err


def test_a_registry_says_how_much_of_what(start: Path, tmp_path: Path) -> None:
    small.table(tmp_path / "rows.csv", ["body", "label"], small.texts(40, 1))
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "reviews": {"file_name": "rows.csv", "num_samples": 24, "tags": {"text": "body"}},
        "hub": {"hf_hub_url": "some/where", "subset": "zh", "split": "train_sft"}}))
    given: dict[str, Any] = {
        "out": str(tmp_path / "run"), "start": str(start), "objective": {"kind": "classify"}, "rows": 4, "steps": 3,
        "optim": {"kind": "adamw", "lr": 1e-3}, "schedule": {"kind": "constant"}, "length": 32, "overlong": "cut"}
    for name, rows in (("reviews", 24), ("reviews#20", 20)):
        run = taken_in(config.validate(Run, {**given, "data": [{"path": str(tmp_path / name)}]}))
        assert files.read_json(run.data[0].folder / "audit.json")["read"] == rows
    hub = config.validate(Run, {**given, "data": [{"path": str(tmp_path / "hub")}]}).data[0]
    item, _names = intake._named(hub, "label")
    assert (item.path, item.subset, item.hub_split) == ("hf://some/where", "zh", "train_sft")
    with pytest.raises(ConfigError, match="no split 'test'"):
        taken_in(config.validate(Run, {**given, "data": [{"path": str(tmp_path / "rows.csv"), "split": "test"}]}))


@pytest.mark.parametrize(("weights", "said"), [({"Good": 5.0}, "did you mean good"), ({"good": -1.0}, "must be ≥ 0")])
def test_weights_are_those_of_classes(start: Path, tmp_path: Path, weights: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run = taken_in(recipe(start, tmp_path, small.texts(20, 1), overlong="cut",
                              objective={"kind": "classify", "class_weights": weights}))
        setup.settle(run, setup.open_data(run), World(), None)
    assert said in str(caught.value)
