"""The page at /: plain files of the package, in the language that the browser asks for.  Nothing is loaded from elsewhere."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

FILES = Path(__file__).parent / "page_files"
SCRIPTS = ("page.js", "ask.js", "words.js", "tabs.js", "runs.js", "curve.js", "compare.js", "tables.js", "chat.js", "classify.js")
TYPES = {**dict.fromkeys(SCRIPTS, "text/javascript; charset=utf-8"), "page.css": "text/css; charset=utf-8",
         "words.json": "application/json"}


def language(accepted: str) -> str:
    """Return zh or en: the one of them that an Accept-Language header likes best."""
    best, found = 0.0, "en"
    for part in accepted.split(",")[:20]:
        name, _semicolon, rest = part.strip().partition(";")
        weight = rest.strip().removeprefix("q=")
        try:
            liked = float(weight) if weight else 1.0
        except ValueError:
            continue
        if name[:2].lower() in ("zh", "en") and liked > best:
            best, found = liked, name[:2].lower()
    return found


@cache
def index(chosen: str) -> bytes:
    """Return the page in a language."""
    return _filled("index.html", chosen)


@cache
def door(chosen: str, wrong: bool) -> bytes:
    """Return what asks for the token.  wrong: one was given, and it opens nothing."""
    text = _filled("door.html", chosen).decode()
    return text.replace("<!--why-->", words(chosen)["used" if wrong else "opened"]).encode()


def _filled(name: str, chosen: str) -> bytes:
    text = (FILES / name).read_text(encoding="utf-8")
    for key, said in words(chosen).items():
        text = text.replace("{" + key + "}", said)
    return text.encode()


@cache
def words(chosen: str) -> dict[str, str]:
    """Return what the page says in a language, by name."""
    told: dict[str, dict[str, str]] = json.loads((FILES / "words.json").read_text(encoding="utf-8"))
    return told[chosen]


@cache
def file(name: str) -> bytes:
    """Return one of the page's files, of those in TYPES."""
    return (FILES / name).read_bytes()
