"""A folder of runs as the page shows it: who is there, what came out, the curves as they grow, what the audit and the plan say.

A run is found by its place in the listing, never by a path that a client made: no name leads out of the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu import files
from danlu.errors import DataError, SecurityError
from danlu.words import _

Told = dict[str, Any]
RECEIPT, CURVES = "run.json", "metrics.jsonl"
NO_NUMBERS = ("nan", "inf", "-inf")                      # as curves hold them
TABLES = {"audit": "audit.json", "plan": "plan.json"}
MOST = 500                                               # runs that are listed
PIECE = 1 << 20                                          # bytes of curves in an answer
LARGEST = 8 << 20                                        # bytes of a receipt or a table
FACTS = ("kind", "began", "ended", "parameters", "tokenizer", "data", "choice", "machine")


def found(root: Path) -> dict[str, Path]:
    """Return the runs of a folder by name: itself, if it is one, and those in it.  Links that lead out of it do not count."""
    names = {root.resolve().name: root} if _is_run(root) else {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if len(names) < MOST and not path.name.startswith(".") and _inside(root, path.name) and _is_run(path):
            names[path.name] = path
    return names


def _is_run(path: Path) -> bool:
    return (path / RECEIPT).is_file() or (path / CURVES).is_file()


def _inside(root: Path, name: str) -> bool:
    try:
        files.inside(root, name)
    except SecurityError:
        return False
    return True


def read(run: Path, name: str) -> Told | None:
    """Return a JSON object of a run's folder, None if there is none.  Raises DataError for one that cannot be read."""
    path = run / name
    if not path.is_file() or not _inside(run, name):
        return None
    if path.stat().st_size > LARGEST:
        raise DataError(_("{name} is larger than this page shows").format(name=name))
    try:
        told = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)     # JSON has no NaN, and browsers refuse it
    except (OSError, ValueError, RecursionError):        # being written, perhaps
        raise DataError(_("{name} cannot be read").format(name=name)) from None
    return told if isinstance(told, dict) else {"": told}


def listed(root: Path) -> list[Told]:
    """Return the runs: name, kind, when they began and ended, their results."""
    rows = []
    for name, path in found(root).items():
        try:
            receipt = read(path, RECEIPT) or {}
        except DataError:
            receipt = {}
        rows.append({"name": name, "kind": receipt.get("kind"), "began": receipt.get("began"), "ended": receipt.get("ended"),
                     "results": receipt.get("metrics") or {}})
    return sorted(rows, key=lambda row: str(row["began"]), reverse=True)


def told(run: Path) -> Told:
    """Return a run's recipe, results and facts."""
    receipt = read(run, RECEIPT) or {}
    return {"recipe": receipt.get("run") or {}, "results": receipt.get("metrics") or {},
            "facts": {key: receipt[key] for key in FACTS if key in receipt},
            "tables": [name for name, file in TABLES.items() if (run / file).is_file()]}


def grown(run: Path, start: int, number: int) -> Told:
    """Return the whole lines of a run's curves from byte `start` on, at most PIECE of them.

    number: of the file that `start` was read from; if it is another by now, or shorter, as after a run went on from an older
    checkpoint, reading begins `again`.
    """
    path = run / CURVES
    if not path.is_file() or not _inside(run, CURVES):
        return {"lines": [], "next": 0, "file": 0, "again": start > 0, "more": False}
    with path.open("rb") as file:
        state = path.stat()
        again = start > 0 and (state.st_ino != number or state.st_size < start)
        begin = 0 if again else start
        file.seek(begin)
        piece = file.read(PIECE)
    whole = piece[: piece.rfind(b"\n") + 1]
    lines = []
    for line in whole.splitlines():
        try:
            row = json.loads(line, parse_constant=lambda name: None)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            lines.append({key: value for key, value in row.items() if isinstance(value, int | float) or value in NO_NUMBERS})
    return {"lines": lines, "next": begin + len(whole), "file": state.st_ino, "again": again,
            "more": len(piece) == PIECE and bool(whole)}
