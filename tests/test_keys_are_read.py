"""Every key that a recipe may hold is read somewhere: a key without effect would be a lie."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

import danlu
from danlu import config
from danlu.data.kinds import BPE, Chars, Unigram, WordPiece, roles
from danlu.data.prepare import Prepare
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.train.recipe import Run

ROOT = Path(danlu.__file__).parent


def classes(cls: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if cls not in seen:
        seen.add(cls)
        yield cls
        for field in cls.model_fields.values():
            for inner in config.members(field.annotation):
                yield from classes(inner, seen)


def read() -> set[str]:
    """Names that are read as attributes (or by getattr with a name) anywhere in the package."""
    names: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


# read by name from the values given, not as attributes; what they do is tested below
BY_NAME = {"preset", "mask", "kind"}


def test_every_declared_key_is_read() -> None:
    names, unread = read(), []
    seen: set[type[BaseModel]] = set()
    for root in (Run, Prepare):
        unread += [f"{cls.__name__}.{name}" for cls in classes(root, seen) for name in cls.model_fields
                   if name not in names and name not in BY_NAME]
    assert unread == []
    assert len(seen) > 30, "the walk reaches the members of the unions"


def test_keys_read_by_name_have_an_effect() -> None:
    assert Decoder(preset="mini").width == 384 and Encoder(preset="bert-mini").width == 256
    for cls in (BPE, WordPiece, Unigram, Chars):
        assert roles(cls(mask="[HIDE]"))["mask"] == "[HIDE]"
