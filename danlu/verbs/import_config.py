"""`danlu import-config --from TOOL file.yaml`: another tool's file, line by line, and the recipe that means the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from danlu import files
from danlu.errors import ConfigError, IncompatibleError
from danlu.log import say
from danlu.migrate.translate import Entry, Translation, accepted, told, translate, written
from danlu.words import _


def main(file: Path, *, tool: str, out: Path | None, as_json: bool) -> int:
    """Print what became of every line, and write the recipe.

    IncompatibleError if something the run needs cannot be translated; then no recipe is written.
    """
    if out is not None and out.exists():
        raise ConfigError(_("the file is there already"), where=str(out), fix=_("choose another --out, or remove it"))
    made = translate(tool, file)
    if as_json:
        print(json.dumps(record(made), ensure_ascii=False))
    else:
        show(made)
    if made.missing:
        raise IncompatibleError(
            _("{n} things that the run needs cannot be translated: {what}").format(
                n=len(made.missing), what="; ".join(told(entry) for entry in made.missing)), where=str(file))
    text = written(made, tool, file)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(out, text)
        say(_("recipe: {file}; next: danlu train {file}").format(file=out))
    elif not as_json:
        print(f"\n{text}", end="")
    problems = accepted(made.recipe)
    if problems:
        raise ConfigError(_("the recipe needs a change before it can be trained: {why}").format(why=problems),
                          where=str(out or file))
    return 0


def show(made: Translation) -> None:
    """Print a line for each key of the file, in its order, then what was added and how many there are of each."""
    words = names()
    width = max(len(word) for word in words.values())
    for entry in made.entries:
        status = words["essential" if entry.status == "unsupported" and entry.essential else entry.status]
        print(f"{place(entry):>9}  {status:<{width}}  {told(entry)}".rstrip())
    counts = Counter(entry.status for entry in made.entries)
    print("\n" + ", ".join(f"{words[status]}: {n}" for status, n in counts.items()))


def names() -> dict[str, str]:
    """Return the words for what became of a key."""
    return {"translated": _("translated"), "same": _("same"), "default": _("default"), "unsupported": _("not supported"),
            "essential": _("NOT SUPPORTED"), "added": _("added")}


def place(entry: Entry) -> str:
    """Return the lines of an entry; those that only spell out a default have none."""
    if entry.first is None:
        return "–"
    return str(entry.first) if entry.last == entry.first else f"{entry.first}–{entry.last}"


def record(made: Translation) -> dict[str, Any]:
    """Return the report as JSON-ready values."""
    return {"entries": [entry._asdict() | {"ours": dict(entry.ours)} for entry in made.entries], "recipe": made.recipe,
            "missing": [entry.key for entry in made.missing]}
