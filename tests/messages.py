"""The Chinese catalogue: `python tests/messages.py update` brings it level with the code; missing ones are printed."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).parent.parent / "danlu"
PO = ROOT / "locale" / "zh_CN" / "LC_MESSAGES" / "danlu.po"
# argparse speaks through the same catalogue
ARGPARSE = ("usage: ", "positional arguments", "options", "show this help message and exit",
            "show program's version number and exit", "%(prog)s: error: %(message)s\n",
            "the following arguments are required: %s", "unrecognized arguments: %s",
            "argument %(argument_name)s: %(message)s",
            "invalid choice: %(value)r (choose from %(choices)s)", "expected one argument", "expected at least one argument",
            "invalid %(type)s value: %(value)r")


def extracted() -> Catalog:
    """Return every message in the code."""
    catalog = Catalog(locale="zh_CN", domain="danlu", project="danlu", fuzzy=False)
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):      # finds calls inside f-strings too
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_" and isinstance(node.args[0], ast.Constant):
                catalog.add(node.args[0].value) if node.args[0].value else None
    for message in ARGPARSE:
        catalog.add(message, flags=["python-format"] if "%" in message else [])
    return catalog


def translated() -> Catalog:
    """Return the Chinese catalogue as it stands."""
    if not PO.exists():
        return Catalog(locale="zh_CN", domain="danlu")
    with PO.open("rb") as file:
        return read_po(file, locale="zh_CN", domain="danlu")


def compiled(catalog: Catalog) -> bytes:
    """Return the bytes of the .mo file."""
    out = io.BytesIO()
    write_mo(out, catalog)
    return out.getvalue()


def update() -> int:
    """Write the .po with every message of the code, keep translations, compile; return how many lack one."""
    before, now = translated(), extracted()
    for message in now:
        old = before.get(message.id) if message.id else None
        if old is not None and old.string:
            message.string = old.string
        message.locations = []
    PO.parent.mkdir(parents=True, exist_ok=True)
    now.creation_date = now.revision_date = before.creation_date
    with PO.open("wb") as file:
        write_po(file, now, width=120, omit_header=False, sort_output=True)
    catalog = translated()
    PO.with_suffix(".mo").write_bytes(compiled(catalog))
    missing = [m.id for m in catalog if m.id and not m.string]
    for message in missing:
        print(repr(message))
    return len(missing)


if __name__ == "__main__":
    sys.exit(1 if sys.argv[1:] == ["update"] and update() else 0)
