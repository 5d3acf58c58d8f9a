"""Advice: every rule has its source, what it says fits the machine, and its lines are keys of a recipe."""

from __future__ import annotations

import json
import re

import pytest

from danlu import config
from danlu.cli import main
from danlu.planner.advise import TOPICS, advise
from danlu.planner.case import TASKS, Case, case, fits, held
from danlu.planner.hardware import parse
from danlu.planner.rules import rules
from danlu.train.recipe import Run

MACHINES = ("laptop", "RTX4090", "8xA100", "16xH100")


def asked(task: str, machine: str, **more: object) -> Case:
    given: dict[str, object] = {"rows": None, "tokens": None, "language": "en", "size": None, "quality": "good", "latency": None}
    given |= {"tokens": 1e9} if TASKS[task][0] == "text" else {"rows": 5000.0}
    return case(name=task, machine=parse(machine), **given | more)     # type: ignore[arg-type]


def test_every_rule_has_a_source() -> None:
    for rule in rules():
        assert rule.source.authors and 2017 <= rule.source.year <= 2026, rule.say
        assert re.fullmatch(r"arXiv \d{4}\.\d{4,5}", rule.source.where), rule.say
        # a number such as 2305.14314 is of May 2023: no paper appears years before its number, nor long before its year
        assert -1 <= rule.source.year - (2000 + int(rule.source.where[6:8])) <= 2, rule
        assert rule.topic in TOPICS and rule.why


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_advised_on_every_machine(task: str, machine: str) -> None:
    found = asked(task, machine)
    told = advise(found)
    assert {"model", "method", "optimizer", "schedule", "batch", "epochs", "compression"} <= {one.topic for one in told}
    assert not any("{" in one.say + one.why + "".join(one.lines) for one in told)
    if found.method not in ("scratch", "none"):
        assert fits(found.size, found.method, found.machine)


@pytest.mark.parametrize("task", ["classification", "chat", "pretraining", "domain"])
@pytest.mark.parametrize("rows", [30.0, 500.0, 5000.0, 1e6])
def test_lines_are_keys_of_a_recipe(task: str, rows: float) -> None:
    learns, objective, _kind = TASKS[task]
    machine = "64xH100" if task == "pretraining" else "RTX4090"
    found = asked(task, machine, **({"tokens": rows * 1e5} if learns == "text" else {"rows": rows}))
    lines = [line for one in advise(found) for line in one.lines]
    needed = ["out=x", 'data=[{path: x}]', f"objective={objective}", "start=x", "length=128"]
    needed += [] if any(line.startswith("rows=") for line in lines) else ["rows=8"]
    needed += [] if any(line.startswith("epochs=") for line in lines) else ["epochs=1"]
    needed += [] if any(line.startswith("optim=") for line in lines) else ["optim=adamw"]
    needed += [] if any(line.startswith("schedule=") for line in lines) else ["schedule=linear"]
    assert config.load(Run, None, [*needed, *lines]).length == 128


def test_the_method_follows_rows_memory_and_quality() -> None:
    assert asked("classification", "laptop", language="zh").method == "full"
    assert asked("classification", "laptop", rows=20.0).method == "none"
    assert asked("chat", "RTX4090").method == "qlora"
    assert asked("chat", "8xA100").method == "lora"
    assert asked("chat", "16xH100", quality="best", rows=2e5, size=7e9).method == "full"
    assert asked("chat", "16xH100", quality="best").size > asked("chat", "16xH100").size
    assert asked("chat", "RTX4090", size=175e9).method == "none"
    assert held(1.0, "full") == 16 and held(7e9, "qlora") < 7e9


def test_few_rows_are_not_the_reason_where_memory_is() -> None:
    told = [next(one.say for one in advise(asked("chat", "RTX4090", rows=rows, size=175e9)) if one.topic == "method")
            for rows in (20.0, 5000.0)]
    assert told[0] == told[1] and "do not fit" in told[0]


def test_two_hundred_tokens_are_not_twenty() -> None:
    # 50M parameters and 10B tokens have been called twenty tokens a parameter
    told = next(one for one in advise(asked("pretraining", "8xH100", size=50e6, tokens=10e9)) if one.topic == "data")
    assert "= 200 a parameter" in told.say and "would be 1B tokens" in told.say


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", "--task", "classification", "--rows", "5000", "--language", "zh", "--hardware", "laptop"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "bert-base-chinese" and told["method"] == "full"
    assert all(one["source"]["authors"] for one in told["advice"])
    assert main(words) == 0
    assert "arXiv" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "says"), [
    (["--task", "clasification", "--hardware", "laptp", "--rows", "0", "--latency", "3"],
     ["did you mean 'classification'", "did you mean 'laptop'", "'0'", "'3'"]),
    (["--task", "pretraining", "--tokens", "10T", "--hardware", "laptop"], ["500B", "8.00 TB", "--model-size"]),
    (["--task", "domain", "--rows", "10"], ["give --tokens"]), (["--task", "pretraining"], ["--model-size"]),
    (["--task", "chat", "--rows=-5", "--price", "x"], ["'-5'", "'x'"])])
def test_what_cannot_be_advised(words: list[str], says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *words]) == 2
    told = capsys.readouterr().err
    assert all(each in told for each in says), told
