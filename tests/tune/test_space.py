"""What can be searched, how it is written, and what is said of every way to get it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from danlu.errors import ConfigError
from danlu.tune import space
from danlu.tune.space import Choice, Range


@pytest.mark.parametrize(("text", "axis"), [
    ("optim.lr=log(1e-5,1e-3)", Range(low=1e-5, high=1e-3, log=True)),
    ("optim.lr=log( 1e-5 , .01 )", Range(low=1e-5, high=0.01, log=True)),
    ("rows=log(1,64)", Range(low=1, high=64, log=True, whole=True)),
    ("objective.smoothing=0..0.2", Range(low=0, high=0.2)),
    ("objective.smoothing=0..0.2:0.05", Range(low=0, high=0.2, step=0.05)),
    ("rows=8..64:8", Range(low=8, high=64, step=8, whole=True)),
    ("seed=-3..3", Range(low=-3, high=3, whole=True)),
    ("adapt.rank=[4,8,16]", Choice(values=(4, 8, 16))),
    ("pack=[true, false]", Choice(values=(True, False))),
    ("optim.kind=[adamw, lion]", Choice(values=("adamw", "lion"))),
    ("clip=[null, 1.0]", Choice(values=(None, 1.0))),
])
def test_forms(text: str, axis: space.Axis) -> None:
    assert space.read([text], None) == {text.partition("=")[0]: axis}


@pytest.mark.parametrize(("text", "why"), [
    ("optim.lr", "not of the form key=what"), ("=1..2", "not of the form key=what"),
    ("optim.lr=1e-4", "nothing that can be searched.*log\\(1e-5,1e-3\\)"), ("optim.lr=log(1e-3)", "nothing that can be searched"),
    ("optim.lr=0..x", "nothing that can be searched"), ("optim.lr=", "nothing that can be searched"),
    ("optim.lr=log(0,1)", "above 0, and 0 is not"), ("optim.lr=log(1e-3,1e-5)", "1e-3 must be less than 1e-5"),
    ("rows=8..8", "8 must be less than 8"), ("rows=8..16:0", "the step 0 does not fit"),
    ("rows=8..16:9", "the step 9 does not fit"),
    ("rows=[]", "must hold single values"), ("optim.betas=[[0.9,0.95],[0.9,0.99]]", "must hold single values"),
    ("rows=[8,8]", "stands twice"), ("rows=[8,", "nothing that can be searched|must hold"),
])
def test_errors_say_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        space.read([text], None)


def test_a_file_holds_the_same_and_words_win(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("search:\n  optim.lr: log(1e-5,1e-3)\n  rows: [8, 16]\n  pack: [true, false]\n")
    found = space.read(["rows=[4,8]"], tmp_path / "s.yaml")
    assert found == {"optim.lr": Range(low=1e-5, high=1e-3, log=True), "rows": Choice(values=(4, 8)),
                     "pack": Choice(values=(True, False))}
    (tmp_path / "s.yaml").write_text("search:\n  rows: [8, 16]\n  optim.lr: often\n")
    with pytest.raises(ConfigError, match=r"s\.yaml:3: optim\.lr: 'often'"):
        space.read([], tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match="nothing is searched"):
        space.read([], None)


def test_points_of_a_grid_are_counted() -> None:
    axes = space.read(["rows=8..32:8", "optim.lr=[1e-3,1e-2]", "objective.smoothing=0..0.2:0.1"], None)
    assert space.grid(axes) == {"rows": [8, 16, 24, 32], "optim.lr": [1e-3, 1e-2], "objective.smoothing": [0.0, 0.1, 0.2]}
    with pytest.raises(ConfigError, match=r"optim\.lr has not"):
        space.grid(space.read(["optim.lr=log(1e-5,1e-3)"], None))


def test_every_end_must_make_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "out: run\ndata: data\nmodel: {kind: decoder, preset: mini}\nobjective: causal_lm\noptim: adamw\nschedule: cosine\n"
        "steps: 5\nrows: 8\nlength: 32\n")
    space.check(space.read(["rows=[4,8]"], None), tmp_path / "r.yaml", [])
    with pytest.raises(ConfigError, match=r"layout\.micro=3 cannot be: .*does not divide"):
        space.check(space.read(["layout.micro=[1,3]"], None), tmp_path / "r.yaml", [])
    with pytest.raises(ConfigError, match="did you mean"):
        space.check(space.read(["optim.lrr=[1,3]"], None), tmp_path / "r.yaml", [])
