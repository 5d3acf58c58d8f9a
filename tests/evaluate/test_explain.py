"""What made a model say what it says: shares that add up, on the words that matter, and attention that is transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from danlu import cli
from danlu.errors import ConfigError
from danlu.evaluate import rows
from danlu.evaluate.explain import explain
from danlu.evaluate.subject import open_subject

from . import small

pytest.importorskip("captum")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    data = small.table(folder / "train.csv", ["text", "label"], small.texts(240, 1))
    return small.trained(folder, small.encoder(folder), [{"path": str(data)}], steps=150)


def task(run: Path) -> rows.Task:
    return rows.task_of(open_subject(run), rows.How(), torch.device("cpu"))


def test_shares_add_up_and_stand_where_the_words_are_that_matter(run: Path) -> None:
    made = task(run)
    tokenizer = made.subject.tokenizer
    pieces = [tokenizer.decode([int(i)]) for i in tokenizer.encode("awful")]
    found = explain(made, ("the film was awful and a story of music",))
    assert found.told["predicted"] == found.target == "bad"
    assert abs(found.gap) < 0.02 * sum(map(abs, found.scores))
    there = [i for i, token in enumerate(found.tokens) if token in pieces]
    share = sum(found.scores[i] for i in there)
    assert there and share > sum(abs(one) for i, one in enumerate(found.scores) if i not in there)
    against = explain(made, ("the film was awful and a story of music",), target="good")
    assert sum(against.scores[i] for i in there) < 0
    assert found == explain(made, ("the film was awful and a story of music",))._replace(attention=found.attention)
    with pytest.raises(ConfigError, match="bad, good"):
        explain(made, ("the film",), target="splendid")


def test_attention_is_that_of_transformers(run: Path) -> None:
    made = task(run)
    found = explain(made, ("the film was dull",))
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(made.subject.folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.subject.folder)
    with torch.no_grad():
        seen = model(**tokenizer("the film was dull", return_tensors="pt"), output_attentions=True).attentions
    wanted = torch.stack([layer[0].mean(0) for layer in seen])
    torch.testing.assert_close(torch.from_numpy(found.attention), wanted, rtol=1e-4, atol=1e-5)


def test_a_page_holds_all_of_it_and_nothing_from_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "why.html"
    assert cli.main(["explain", str(run), "--text", "the <b>film</b> was sad", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["tokens"]) == len(told["scores"]) and told["target"] in ("good", "bad")
    page = out.read_text(encoding="utf-8")
    assert "<b>film" not in page and "http" not in page and page.count("<details>") == 2
    assert cli.main(["explain", str(run), "--text", "the film was sad"]) == 0
    assert told["target"] in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["regress", "tag", "answer"])
def test_other_tasks_are_explained(kind: str, tmp_path: Path) -> None:
    rows_of = {"regress": [{"text": t, "score": float(label == "good")} for t, label in small.texts(48, 1)],
               "tag": [{"tokens": t.split(), "tags": ["B-X" if w in small.GOOD else "O" for w in t.split()]}
                       for t, _label in small.texts(48, 1)],
               "answer": [{"question": "the day", "context": t, "answers": {"text": [t.split()[0]], "answer_start": [0]}}
                          for t, _label in small.texts(48, 1)]}
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of[kind]), encoding="utf-8")
    folder = small.trained(tmp_path, small.encoder(tmp_path), [{"path": str(data)}], objective=kind, steps=20, length=48,
                           overlong="split" if kind == "tag" else "cut")
    made = task(folder)
    texts = ("the day", "a lovely film of music") if kind == "answer" else ("a lovely film of music",)
    found = explain(made, texts, **({"word": 1} if kind == "tag" else {}))
    assert len(found.tokens) == len(found.scores) == found.attention.shape[-1]
    assert abs(found.gap) <= 0.02 * sum(map(abs, found.scores)) + 1e-4
    if kind == "tag":
        assert found.target.startswith("lovely: ")
