"""`danlu quickstart` on a small corpus: it learns, resumes, repeats, and what it prints works."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from danlu import cli, config, fault, quickstart, schedule
from danlu.data.prepare import Prepare
from danlu.errors import ConfigError, Stopped
from danlu.train import checkpoint
from danlu.train.recipe import Run

TEXT = "Return the value of {a} if {b} is given, else raise ValueError number {n}. The list {a} is sorted by {b}."


def texts(root: Path) -> Iterator[str]:
    for n in range(160):
        yield TEXT.format(a="abcdefgh"[n % 8] * 3, b="pqrstu"[n % 6] * 2, n=n)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, and a corpus and vocabulary that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "python_texts", texts)
    monkeypatch.setattr(quickstart, "VOCAB", 400)
    monkeypatch.setattr(quickstart, "ROWS", 2)
    monkeypatch.setattr(quickstart, "LENGTH", 64)
    monkeypatch.setattr(quickstart, "PROBES", 1)
    monkeypatch.setattr(quickstart, "SIZE", {"width": 32, "layers": 1, "heads": 2})
    return tmp_path


def test_it_learns_and_its_next_commands_work(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quickstart", "--out", "my try", "--steps", "8", "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    before, after = (result[when]["data"]["loss,none"] for when in ("before", "after"))
    assert after < before - 0.05
    assert "Plan" in told.err and "Expected" in told.err and "sample:" in told.err
    page = (small / "my try" / "run" / "report.html").read_text(encoding="utf-8")
    assert "eval_before.json" in page and "eval_results.json" in page and "<svg" in page
    assert config.load(Prepare, small / "my try" / "corpus.yaml").out == Path("my try/data")
    recipe = config.load(Run, small / "my try" / "pretrain.yaml")
    assert recipe.steps == 8 and recipe.data[0].folder == Path("my try/data")
    assert len(result["next"]) == 6
    for line in result["next"]:
        words = shlex.split(line)
        own = words[words.index("danlu") + 1 :] if "danlu" in words else words[1:]
        shorter = ["steps=9"] if own[0] == "train" else ["--max-new-tokens", "4"] if own[0] == "generate" else []
        assert cli.main([*own, *shorter]) == 0, line


def test_a_stopped_quickstart_goes_on_with_its_own_recipe(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault.arm("train.step:term:4")
    with pytest.raises(Stopped) as stop:
        quickstart.main(Path("q"), steps=6, minutes=1.0, as_json=False)
    assert stop.value.code == 143 and "quickstart --out q" in str(stop.value)
    recipe = (small / "q" / "pretrain.yaml").read_bytes()
    assert checkpoint.listing(small / "q" / "run")[-1].name == "checkpoint-4"
    with pytest.raises(ConfigError, match="steps=6"):
        quickstart.main(Path("q"), steps=7, minutes=1.0, as_json=False)
    assert quickstart.main(Path("q"), steps=None, minutes=1.0, as_json=False) == 0
    assert (small / "q" / "pretrain.yaml").read_bytes() == recipe
    assert "resuming from checkpoint-4" in capsys.readouterr().err
    assert checkpoint.listing(small / "q" / "run")[-1].name == "checkpoint-6"
    assert quickstart.main(Path("q"), steps=None, minutes=1.0, as_json=False) == 0        # done already: it says so again


def test_a_model_that_has_not_learned_is_not_called_a_success(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "open_subject", lambda run: quickstart.Subject(
        run, quickstart.Tokenizer.load(Path("q/data/tokenizer")), quickstart.fresh_model(
            config.load(Run, Path("q/pretrain.yaml")), 400, quickstart.torch.device("cpu")), None))
    assert cli.main(["quickstart", "--out", "q", "--steps", "5"]) == 6


def test_too_little_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for words in (["--steps", "4"], ["--minutes", "0"], ["--minutes", "nan"]):
        assert cli.main(["quickstart", "--out", str(tmp_path / "q"), *words]) == 2
    assert not (tmp_path / "q").exists()


def test_the_least_steps_make_a_recipe(small: Path) -> None:
    for steps in range(5, 60):
        schedule.check(quickstart.draft(Path("q"), Path("d"), steps, 1, torch.device("cpu")).schedule, steps)


def test_nothing_of_the_library_is_run_and_its_texts_are_found(tmp_path: Path) -> None:
    long = "It does what it says, and it says what it does. " * 4
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {{'a': {long + 'topic'!r}}}\n")
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").write_text(f"'''{long}test'''\n")
    (tmp_path / "good.py").write_text(
        f"'''{long}module'''\nraise SystemExit\ndef f():\n    '''{long}function'''\ndef g():\n    '''short'''\n")
    found = [text.split()[-1] for text in quickstart.python_texts(tmp_path)]
    assert sorted(found) == ["function", "module", "topic"]


def test_this_python_has_enough_to_learn_from() -> None:
    library = Path(ast.__file__).parent
    assert sum(len(text) for text in quickstart.python_texts(library / "pydoc_data")) > 300_000
    assert sum("\u4e00" <= letter <= "\u9fff" for text in quickstart.chinese_texts() for letter in text) > 3000


def test_the_command_is_one_that_this_shell_finds() -> None:
    words = shlex.split(quickstart.command())
    out = subprocess.run([*words, "version"], capture_output=True, text=True, check=True).stdout
    assert out.startswith("danlu ")


@pytest.mark.slow
def test_without_network_in_a_short_time(tmp_path: Path) -> None:
    offline = ["unshare", "-rn"]
    if subprocess.run([*offline, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare -rn is not allowed here: no network-less quickstart")
    done = subprocess.run([*offline, sys.executable, "-m", "danlu", "quickstart", "--minutes", "0.2"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quickstart" / "run" / "report.html").is_file()
