"""The recipes of the articles' examples, as printed but for steps, on a tiny encoder and made-up reviews."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluate import small

from danlu import cli, files

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.encoder(tmp_path_factory.mktemp("start"), context=256)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("article-*.yaml")))
def test_it_runs(name: str, start: Path, tmp_path: Path) -> None:
    rows = small.table(tmp_path / "reviews.csv", ["text", "label"], small.texts(60, 2))
    changes = [f"start={start}", f"data={rows}", f"out={tmp_path / 'run'}", "eval=[]", "every.evaluate=2"]
    changes += ["epochs=null", "steps=4"] if "sgd" not in name and "minibatch" not in name else ["steps=4"]
    changes += ["schedule.warmup=2"] if "imdb" in name or "sst2" in name else []
    assert cli.main(["train", str(RECIPES / f"{name}.yaml"), *changes]) == 0
    told = files.read_json(tmp_path / "run" / "eval_results.json")
    (figures,) = told["results"].values()
    assert 0 <= figures["accuracy,none"] <= 1 and (tmp_path / "run" / "predictions.jsonl").is_file()


def test_early_stopping_stops(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = small.table(tmp_path / "reviews.csv", ["text", "label"], small.texts(60, 2))
    assert cli.main(["train", str(RECIPES / "article-early-stop.yaml"), f"start={start}", f"data={rows}", "optim.lr=1e-9",
                     f"out={tmp_path / 'run'}", "every.evaluate=1", "guard.reload=false", "epochs=null", "steps=40"]) == 0
    assert "stopped early" in capsys.readouterr().err
