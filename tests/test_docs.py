"""The documents say what the program does: the same in both languages, every key, commands that parse, links that lead."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from danlu import cli, config
from danlu.data.prepare import Prepare
from danlu.errors import DanluError
from danlu.train.recipe import Run
from danlu.verbs import table
from danlu.verbs.rehearse import spread

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = sorted(p.name for p in (ROOT / "docs/en").glob("*.md"))
ALL = [*READMES, ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def headings(path: Path) -> list[int]:
    return [len(found[1]) for found in re.finditer(r"^(#+) ", prose(path), re.M)]


def blocks(path: Path) -> list[tuple[str, str]]:
    """Return the code blocks, comments left out: they are translated."""
    found = FENCE.findall(path.read_text(encoding="utf-8"))
    return [(kind, re.sub(r"\s+#.*", "", code)) for kind, code in found]


def tree(code: str) -> list[str]:
    """Return the names that a listing of a folder tells, without what is said about them."""
    return [line.split()[0] for line in code.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def keys() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keys", ROOT / "docs/keys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_languages_have_the_same_pages() -> None:
    assert sorted(p.name for p in (ROOT / "docs/zh").glob("*.md")) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_both_languages_have_the_same_headings_and_code(name: str) -> None:
    english, chinese = ROOT / "docs/en" / name, ROOT / "docs/zh" / name
    assert headings(english) == headings(chinese)
    for (kind, ours), (other, theirs) in zip(blocks(english), blocks(chinese), strict=True):
        assert kind == other
        if "manifest.json" in ours:
            assert tree(ours) == tree(theirs)
        else:
            assert ours == theirs


def test_both_readmes_have_the_same_headings_and_commands() -> None:
    assert headings(READMES[0]) == headings(READMES[1])
    english, chinese = ([code for _kind, code in blocks(path)] for path in READMES)
    assert [code for code in english if code not in chinese] == []
    told = [sorted(re.findall(r"^\| `(danlu [^`]+)`", path.read_text(encoding="utf-8"), re.M)) for path in READMES]
    assert told[0] == told[1]


def test_the_tables_of_keys_are_what_the_schema_says(keys: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["check"]) == 0, capsys.readouterr().out + "\nrun: python docs/keys.py"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("cls", [Run, Prepare])
def test_every_key_stands_in_the_page_of_the_configuration(language: str, cls: type[config.Model]) -> None:
    page, schema = (ROOT / "docs" / language / "config.md").read_text(encoding="utf-8"), config.schema(cls)
    told = set(re.findall(r"`([a-z0-9_]+)`", page))
    wanted = {key for one in (schema, *schema["$defs"].values()) for key in one.get("properties", ())}
    assert wanted - told == set()
    assert set(cls.ALIASES) - told == set()


def test_every_verb_stands_in_the_readmes() -> None:
    for path in READMES:
        told = set(re.findall(r"`danlu ([\w-]+)", path.read_text(encoding="utf-8")))
        assert set(table.verbs()) - told == set(), path.name


def commands() -> Iterator[tuple[str, str]]:
    """Yield (file, command) of everything in the documents that begins with `danlu`."""
    for path in ALL:
        text = path.read_text(encoding="utf-8")
        lines = [line for kind, code in FENCE.findall(text) if kind in ("", "sh") for line in code.splitlines()]
        lines += re.findall(r"`(danlu [a-z][^`]*)`", prose(path))
        for line in (re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line.strip()) for line in lines):
            if line.startswith("danlu "):
                yield str(path.relative_to(ROOT)), re.sub(r"\s+[#<].*", "", line)


def shown(name: str) -> str:
    """Return the YAML that a page shows first."""
    return next(code for kind, code in FENCE.findall((ROOT / "docs/en" / name).read_text(encoding="utf-8")) if kind == "yaml")


@pytest.mark.parametrize(("file", "line"), sorted(set(commands())))
def test_every_command_parses(file: str, line: str, tmp_path: Path) -> None:
    words, _language = cli.language(shlex.split(line)[1:])
    words = [word for word in words if word not in ("--json", "--debug")]
    verbs = table.verbs()
    assert words[0] in verbs, f"{file}: {line}"
    if len(words) == 1:                                  # `danlu eval` names the verb, not a call
        return
    try:
        if verbs[words[0]].recipe:
            check_recipe(verbs[words[0]], words, tmp_path)
            return
        parser = argparse.ArgumentParser(exit_on_error=False)
        verbs[words[0]].arguments(parser)
        parser.parse_args(words[1:])
    except (DanluError, argparse.ArgumentError, SystemExit) as error:
        if "optim.lrr" not in line:                      # the page of errors shows one
            pytest.fail(f"{file}: {line}: {error}")


def check_recipe(verb: table.Verb, words: list[str], folder: Path) -> None:
    """Load the recipe that a command names, or the one that the pages show, with the command's overrides."""
    options, rest = cli.recipe_options(verb, words)
    recipe, overrides = cli.recipe_words(rest)
    if options.get("action") == "schema":
        return
    if words[0] == "verify" and options["what"] != "layout":     # `danlu verify runs/x`
        return
    if options.get("model") is not None:                 # `danlu plan --model gpt3-175b`
        return
    assert recipe is not None
    prepares = words[0] == "prepare" or options.get("about") == "prepare"
    cls, page = (Prepare, "data.md") if prepares else (Run, "training.md")
    if not (ROOT / recipe).is_file():
        assert recipe.parent == Path("."), f"{recipe} is not in the repository"
        (folder / recipe).write_text(shown(page), encoding="utf-8")
    path = ROOT / recipe if (ROOT / recipe).is_file() else folder / recipe
    world = options["world"] if words[0] == "rehearse" else None
    config.load(cls, path, [o for o in (*overrides, *spread(path, overrides, world)) if o not in ("a.b=c", "plan=auto")])


def recipes() -> Iterator[tuple[str, str]]:
    for path in ALL:
        for number, (kind, code) in enumerate(FENCE.findall(path.read_text(encoding="utf-8"))):
            if kind == "yaml" and code.startswith("out:"):
                yield f"{path.relative_to(ROOT)} {number}", code


@pytest.mark.parametrize(("place", "code"), list(recipes()))
def test_every_recipe_in_the_documents_is_valid(place: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(code, encoding="utf-8")
    kind: type[config.Model] = Prepare if "inputs:" in code else Run
    try:
        config.load(kind, tmp_path / "shown.yaml")
    except DanluError as error:
        pytest.fail(f"{place}: {error}")


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)\s]*)?\)", prose(path)):
        if target and "://" not in target:
            assert (path.parent / target).resolve().exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_anchors_lead_to_headings(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", prose(path)):
        if "://" in target:
            continue
        page = (path.parent / target).resolve() if target else path
        titles = [found[1].strip("` ").lower() for found in re.finditer(r"^#+ (.*)$", prose(page), re.M)]
        slugs = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]
        assert anchor in slugs, f"{path.name}: {target}#{anchor}"


def test_the_page_of_errors_shows_an_error_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "gpt.yaml"
    recipe.write_text(shown("training.md"), encoding="utf-8")
    assert cli.main(["train", str(recipe), "optim.lrr=1e-3", "--json"]) == 2
    told = re.search(r'^\{"error".*\}$', (ROOT / "docs/en/errors.md").read_text(encoding="utf-8"), re.M)
    assert told is not None
    assert json.loads(capsys.readouterr().err) == json.loads(told[0])


def test_every_meaning_is_of_today(keys: ModuleType) -> None:
    """No Chinese stands for a description that is gone."""
    used: set[str] = set()

    class Watched(dict[str, str]):
        def __getitem__(self, key: str) -> str:
            used.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: str | None = None) -> str:         # type: ignore[override]
            used.add(key)
            return str(super().get(key, default))

    kept = yaml.safe_load((ROOT / "docs/zh/meanings.yaml").read_text(encoding="utf-8"))
    tables = keys.Tables("zh")
    tables.meanings = Watched(kept)
    for name in keys.PAGES:
        keys.page((ROOT / "docs/zh" / name).read_text(encoding="utf-8"), tables)
    assert set(kept) - used == set()
