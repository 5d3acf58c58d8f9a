"""Each task from a file of rows to figures, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import danlu as danlu_cli
from train.tasks_small import bpe, recipe
from transformers import AutoModel, AutoTokenizer

import danlu
from danlu import config
from danlu.data.shards import Shards
from danlu.errors import ConfigError
from danlu.train.intake import taken_in
from danlu.train.run import train

FIGURES = {"tag": "f1", "answer": "exact_match", "choose": "accuracy", "embed": "mrr", "scored": "spearman"}


def evaluations(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/loss" in line]


def last(out: Path) -> dict[str, Any]:
    return evaluations(out)[-1]


@pytest.mark.parametrize("kind", FIGURES)
def test_a_task_trains_and_is_judged(kind: str, tmp_path: Path) -> None:
    run = taken_in(recipe(kind, tmp_path, metric=FIGURES[kind]))
    train(run)
    found = last(run.out)
    assert 0 <= abs(found[f"eval/{FIGURES[kind]}"]) <= 1, found
    told = [json.loads(line) for line in (run.out / "predictions.jsonl").read_text().splitlines()]
    assert len(told) == Shards(run.data[0].folder, "val").documents > 5 and all(one["predicted"] is not None for one in told)
    (figures,) = json.loads((run.out / "eval_results.json").read_text())["results"].values()
    best = max(line[f"eval/{FIGURES[kind]}"] for line in evaluations(run.out))
    assert figures[f"{FIGURES[kind]},none"] == pytest.approx(best, abs=1e-6)


def test_questions_without_an_answer_are_left_so(tmp_path: Path) -> None:
    """What is judged is what is said: by the training's figures, its samples and `danlu predict` alike."""
    run = recipe("answer", tmp_path, metric="f1", every={"log": 1, "evaluate": 50}, steps=150)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row |= {"question": "why ?", "answers": {"text": [], "answer_start": []}}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(taken_in(run))
    told = [json.loads(line) for line in (run.out / "predictions.jsonl").read_text().splitlines()]
    (figures,) = json.loads((run.out / "eval_results.json").read_text())["results"].values()
    right = sum(one["predicted"] == "" for one in told if not one["label"]) / sum(not one["label"] for one in told)
    assert figures["no_answer_exact_match,none"] == pytest.approx(right) and right > 0
    assert json.loads((run.out / "run.json").read_text())["run"]["objective"]["may_be_empty"] is True


def test_a_length_that_the_start_cannot_read_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    first = taken_in(recipe("tag", tmp_path, steps=2))
    last_one = train(first)
    longer = recipe("tag", tmp_path, start=str(last_one), model=None, tokenizer=None, out=str(tmp_path / "again"), length=192)
    with pytest.raises(ConfigError, match="length=192 is more than the model's context of 128"):
        train(taken_in(longer))
    assert not list((tmp_path / "again").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIGURES)
def test_rows_without_labels_are_predicted(kind: str, tmp_path: Path) -> None:
    run = recipe(kind, tmp_path, steps=2, every={"log": 1})
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(run), encoding="utf-8")
    assert danlu_cli("train", tmp_path / "recipe.yaml").code == 0
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[:3]]
    bare = [{name: value for name, value in line.items() if name not in ("tags", "answers", "answer", "score")} for line in lines]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    ended = danlu_cli("predict", run.out, "--data", tmp_path / "new.jsonl")
    assert ended.code == 0, ended.err
    said = [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]
    assert [{name: line[name] for name in bare[0]} for line in said] == bare and all("prediction" in line for line in said)


@pytest.mark.parametrize("kind", FIGURES)
def test_a_decoder_has_every_head(kind: str, tmp_path: Path) -> None:
    run = recipe(kind, tmp_path, tokenizer=str(bpe(tmp_path / "bpe")), metric=FIGURES[kind], model={
        "kind": "decoder", "family": "llama", "width": 32, "layers": 2, "heads": 2, "context": 128})
    train(taken_in(run))
    assert f"eval/{FIGURES[kind]}" in last(run.out)


def test_in_batch_negatives_refuse_layouts_that_deal_the_batch_out(tmp_path: Path) -> None:
    for layout in ({"dp": 2}, {"micro": 2}):
        with pytest.raises(ConfigError, match="contrastive"):
            recipe("embed", tmp_path, layout=layout)
        recipe("scored", tmp_path, layout=layout)


def test_sentence_transformers_finds_what_it_needs(tmp_path: Path) -> None:
    run = recipe("scored", tmp_path, steps=2, every={"log": 1})
    folder = train(taken_in(run))
    modules = json.loads((folder / "modules.json").read_text())
    assert [one["type"].rsplit(".", 1)[1] for one in modules] == ["Transformer", "Pooling", "Normalize"]
    assert all((folder / one["path"]).is_dir() for one in modules)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [name for name, on in pooling.items() if on is True and name.startswith("pooling")] == ["pooling_mode_mean_tokens"]
    theirs, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert all("pooler" in name for name in told["missing_keys"]) and not told["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(folder)("anna in paris", return_tensors="pt")
    with torch.no_grad():
        mean = theirs.eval()(**ids).last_hidden_state.mean(1)
        ours = danlu.load(folder).eval()(ids["input_ids"])["embed"][:, 0]
    torch.testing.assert_close(ours, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), [("tag", "dp"), ("answer", "cp"), ("choose", "cp"), ("scored", "dp")])
def test_two_processes_judge_as_one_does(kind: str, layout: str, tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        run = recipe(kind, tmp_path / str(number), steps=2, layout={layout: number}, group_by_length=False)
        file = tmp_path / f"{number}.yaml"
        file.write_text(config.to_yaml(run), encoding="utf-8")
        ended = danlu_cli("train", file)
        assert ended.code == 0, ended.err
        lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
        found.append({name: value for name, value in lines[0].items() if name.startswith("eval/") and name != "eval/loss_hex"})
    assert FIGURES[kind] in {name.removeprefix("eval/") for name in found[0]}
    assert found[0] == pytest.approx(found[1], rel=1e-5)
