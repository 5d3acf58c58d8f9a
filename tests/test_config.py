"""Configuration: strict YAML, every problem at once with its line, other tools' names, short forms."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from danlu import config, yamls
from danlu.config import Model
from danlu.errors import ConfigError, SecurityError
from danlu.train.recipe import Run


class Adam(Model):
    kind: Literal["adam"] = "adam"
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.99)


class SGD(Model):
    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)


class Part(Model):
    path: Path
    weight: float = 1.0


class Recipe(Model):
    out: Path
    optim: Annotated[Adam | SGD, Field(discriminator="kind")] = Adam()
    steps: int = Field(10, gt=0)
    shuffle: bool = True
    data: tuple[Part, ...] = ()


Recipe.ALIASES = {"learning_rate": "optim.lr", "max_steps": "steps",
                  "optim": lambda v: {"optim": {"adamw_torch": "adam"}.get(v, v) if isinstance(v, str) else v}}


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "tiny.yaml"
    file.write_text(text, encoding="utf-8")
    return config.load(Recipe, file, overrides)


def test_short_forms_aliases_and_three_spellings(tmp_path: Path) -> None:
    run = load(tmp_path, "out: x\noptim: adamw_torch\nmax_steps: 7\n", "--learning-rate=2e-4", "optim.betas=[0.8, 0.9]")
    assert run == Recipe(out=Path("x"), optim=Adam(lr=2e-4, betas=(0.8, 0.9)), steps=7)
    assert load(tmp_path, "out: x\ndata: [{path: a}]\n", "data.0.weight=2", "optim=sgd", "optim.lr=1").data[0].weight == 2


def test_a_typo_names_file_line_and_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "out: x\nsteps: 3\nlerning_rate: 1e-4\n")
    assert "tiny.yaml:3" in str(caught.value) and "unknown key 'lerning_rate'" in str(caught.value)
    assert "did you mean 'learning_rate'?" in str(caught.value) and caught.value.code == 2


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'optim.lr'"):
        load(tmp_path, "out: x\nlr: 1e-4\n")


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    text = "out: x\nsteps: -1\noptim: {lr: .nan, betaz: 1}\nshuffle: no\ndata: [{weight: 1}]\n"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for wanted in ("steps: must be > 0, not -1", "optim.lr", "optim.betaz", "shuffle: must be true or false", "data.0.path"):
        assert any(wanted in line for line in lines), wanted


@pytest.mark.parametrize("value", ["true", '"5"', "1.5", "null"])
def test_no_value_is_bent_into_a_whole_number(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="steps"):
        load(tmp_path, f"out: x\nsteps: {value}\n")


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E5", 1e5), ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("1:30", "1:30"),
    ("010", 10), ("0x10", 16), ("~", None), ("1_000", 1000), ("2024-01-01", "2024-01-01"), (".5", 0.5), ("'1'", "1"),
])
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = yamls.parse(f"a: {text}")[0]["a"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", [
    "a: !!python/object/apply:os.system ['touch marker']", "a: !!binary aGk=", "a: !custom 1",
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{y}: &{y} [{','.join(['*' + x] * 9)}]\n" for x, y in pairwise("abcdefghij")),
    "a: &a [*a]", "x: " + "y" * (1 << 20),
])
def test_tags_and_bombs_are_refused(text: str) -> None:
    with pytest.raises(SecurityError):
        yamls.parse(text)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: [1", "a: {b: 1, b: 2}", "a:\n\t- 1", "? [1]\n: 2"])
def test_malformed_yaml_names_the_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r":\d"):
        yamls.parse(text, name="f.yaml")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
                    max_leaves=8))
def test_what_a_yaml_library_writes_is_read_back(value: object) -> None:
    text = yaml.safe_dump({"v": value})                  # escapes what its own parser would fold
    try:
        read = yamls.parse(text)[0]["v"]
    except SecurityError as error:                       # PyYAML writes odd characters with tags; those stay refused
        assert "tag" in str(error)
        return
    assert read == value or "<<" in text


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    run = Recipe(out=tmp_path, optim=SGD(lr=0.5), data=(Part(path=Path("a"), weight=2),))
    assert load(tmp_path, config.to_yaml(run)) == run


def test_an_optimizer_and_its_rate_may_both_have_other_names(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("output_dir: x\ndata: d\nmodel: {kind: decoder}\nobjective: causal_lm\nweight_decay: 0.2\n"
                    "optim: adamw_torch\nlearning_rate: 2e-3\nwarmup_ratio: 0.1\nlr_scheduler_type: cosine\nmax_steps: 5\n"
                    "length: 8\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 3\n", encoding="utf-8")
    run = config.load(Run, file)
    assert (run.optim.kind, run.optim.lr, run.optim.weight_decay) == ("adamw", 2e-3, 0.2)
    assert (run.schedule.kind, run.schedule.warmup, run.step_rows) == ("cosine", 0.1, 6)


@pytest.mark.parametrize(("change", "said"), [
    ("recompute=foo", ["recompute: \"foo\" is not one of 'none' or 'full'", "recompute: must be a whole number, not \"foo\""]),
    ("objective.class_weights.bad=-1", ["objective.class_weights.bad: must be ≥ 0.0, not -1"]),
    ("data.0.columns=3", ["data.0.columns: must hold keys and values, not 3"]),
    ("data.0.columns.text=[1]", ["data.0.columns.text: must be text", "data.0.columns.text: must be a whole number"])])
def test_a_key_is_named_as_the_user_wrote_it_and_the_part_at_fault_alone(change: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Run, Path(__file__).parents[1] / "recipes" / "sentiment.yaml", ["start=x", change])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(said) and all(each in line for each, line in zip(said, lines, strict=True))
