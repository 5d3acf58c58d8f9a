"""The tokenizer's files beside an artefact: how it reads text, writes a conversation, and where it stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from danlu import files
from danlu.data import chat
from danlu.data.example import Turn, Unusable
from danlu.data.tokenizer import Tokenizer
from danlu.errors import DataError
from danlu.export.graph import heads_of
from danlu.generate import endings


class Beside:
    """What the files of one folder say of text; nothing, where there is no tokenizer."""

    def __init__(self, folder: Path, *, writes: bool, template: chat.Template | None = None) -> None:
        self.folder, self.writes, self.given = folder, writes, template

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the folder."""
        return Tokenizer.load(self.folder) if (self.folder / "tokenizer.json").is_file() else None

    @cached_property
    def template(self) -> chat.Template | None:
        """The chat template, None where there is none, or nobody who would answer."""
        if self.tokenizer is None or not self.writes:
            return None
        return self.given or chat.Template.load(self.tokenizer, self.folder)

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of `text` without special ones."""
        return None if self.tokenizer is None else [int(i) for i in self.tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of `ids`, special tokens spelt out."""
        return None if self.tokenizer is None else self.tokenizer.decode(ids)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return a conversation with the header of the next answer, as text; None of a model that does not write."""
        if self.template is None:
            return None
        turns = [Turn(one["role"], one["content"]) for one in messages]
        try:
            return "".join(piece.text for piece in chat.render(self.template, turns, generate=True))
        except Unusable as error:
            raise DataError(error.detail, where=str(self.folder)) from None

    def ends(self) -> frozenset[int] | None:
        """Return the ids that end an answer."""
        if self.tokenizer is None or self.template is None:
            return None
        return frozenset(stops(self.template, self.tokenizer))

    def told_ends(self) -> frozenset[int] | None:
        """Return the ids that end an answer by generation_config.json, which is where other runtimes look."""
        file = self.folder / "generation_config.json"
        told = files.read_json(file).get("eos_token_id") if self.writes and file.is_file() else None
        return self.ends() if told is None else frozenset([told] if isinstance(told, int) else told)

    def labels(self) -> tuple[str, ...] | None:
        """Return the names of the classes by config.json; None of a model without."""
        file = self.folder / "config.json"
        told = files.read_json(file) if file.is_file() else {}
        named, architecture = told.get("id2label"), str(next(iter(told.get("architectures") or ()), ""))
        if not architecture.endswith(("ForSequenceClassification", "ForTokenClassification")):
            return None
        return tuple(str(named[str(i)]) for i in range(len(named))) if named else None


class Spoken:
    """What an artefact in another runtime says of text: it has the files that stand beside it, and nothing of its own."""

    text: Beside
    outputs: list[str]
    head: str = ""                                       # of several, which is asked

    def heads(self) -> tuple[str, ...]:
        """Return the names of the heads, if there are several."""
        return heads_of(self.outputs)

    def ask(self, head: str) -> None:
        """Let `logits` say what this head says."""
        self.head = head

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of `text` by the tokenizer in the folder."""
        return self.text.encode(text)

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of `ids`."""
        return self.text.decode(ids)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return a conversation as the folder's template writes it; None if it has none."""
        there = self.text.template is not None and self.text.template.source is not None
        return self.text.render(messages) if there else None

    def ends(self) -> frozenset[int] | None:
        """Return the ids that end an answer, by generation_config.json."""
        return self.text.told_ends()

    def labels(self) -> tuple[str, ...] | None:
        """Return the names of the classes."""
        return self.text.labels()


def stops(template: chat.Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer; of a template that says none, eos alone, if there is one."""
    try:
        return endings(template, tokenizer)
    except DataError:
        return () if tokenizer.special.eos is None else (tokenizer.special.eos,)
