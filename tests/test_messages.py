"""English and Chinese say the same: every message is in the catalogue, with the same holes."""

from __future__ import annotations

import ast
import string
import subprocess
import sys
from pathlib import Path

import messages


def holes(text: str) -> set[str]:
    return {field.split(".")[0].split("[")[0] for _t, field, _s, _c in string.Formatter().parse(text) if field is not None}


def test_every_message_has_a_translation() -> None:
    code = {m.id for m in messages.extracted() if m.id}
    chinese = {m.id: m.string for m in messages.translated() if m.id}
    assert code - chinese.keys() == set(), "run `make messages`"
    assert chinese.keys() - code == set(), "run `make messages`"
    assert [i for i, s in chinese.items() if not s] == []
    assert [m.id for m in messages.translated() if m.id and m.fuzzy] == []


def test_translations_keep_the_holes() -> None:
    wrong = [m.id for m in messages.translated() if m.id and "%(" not in m.id and holes(m.id) != holes(str(m.string))]
    assert wrong == []


def test_the_compiled_catalogue_is_this_one() -> None:
    assert messages.PO.with_suffix(".mo").read_bytes() == messages.compiled(messages.translated())


def test_no_message_is_formatted_before_it_is_translated() -> None:
    wrong = []
    for path in messages.ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_":
                wrong += [f"{path.name}:{node.lineno}"] if not isinstance(node.args[0], ast.Constant) else []
    assert wrong == []


def test_help_speaks_chinese() -> None:
    def run(*words: str) -> str:
        return subprocess.run([sys.executable, "-m", "danlu", *words], capture_output=True, text=True, check=True).stdout

    assert "用法" in run("--lang", "zh", "--help") and "用法" not in run("--lang", "en", "--help")
    assert Path(messages.PO).exists()
