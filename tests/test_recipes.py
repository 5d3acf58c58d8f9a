"""Every recipe in recipes/ says something that can be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from danlu import config
from danlu.data.prepare import Prepare
from danlu.train.recipe import Run

FOLDER = Path(__file__).parent.parent / "recipes"
ALL = sorted(FOLDER.glob("*.yaml"))
PREPARED = {"corpus.yaml", "corpus-bert.yaml", "shakespeare.yaml"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_it_loads_and_loads_again_from_what_it_dumps(path: Path, tmp_path: Path) -> None:
    kind: type[config.Model] = Prepare if path.name in PREPARED else Run
    value = config.load(kind, path)
    (tmp_path / "again.yaml").write_text(config.to_yaml(value), encoding="utf-8")
    assert config.load(kind, tmp_path / "again.yaml") == value


def test_training_recipes_read_what_preparing_ones_write() -> None:
    written = {config.load(Prepare, FOLDER / name).out for name in PREPARED}
    named = {Path(source.path) for path in ALL if path.name not in PREPARED for source in config.load(Run, path).data}
    assert {path for path in named if not path.suffix} == written       # the others are files of rows


def test_each_says_its_command_and_a_line_of_chinese() -> None:
    for path in ALL:
        head = path.read_text(encoding="utf-8").splitlines()[:2]
        assert f"recipes/{path.name}" in head[0], path
        assert any("\u4e00" <= letter <= "\u9fff" for letter in head[1]), path
