"""What a worker process does with a block: parse, clean, fingerprint, choose the split, tokenise.

A *document* is a text that was kept; a *row* is what goes into one split: the document, or a part of it (by tail).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from danlu.data import dedup, parse, split
from danlu.data.blocks import Block, Reject
from danlu.data.clean import Clean
from danlu.data.dedup import Digests
from danlu.data.inputs import File, Input
from danlu.data.split import Bounds, Split
from danlu.data.tokenizer import Tokenizer

Want = Literal["labels", "texts", "ids"]


@dataclass
class Answer:
    """A block's rows, column by column; N documents, n rows."""

    file: int
    number: int
    mark: str
    last: bool
    broken: str
    size: int                                       # bytes of text read
    read: int = 0                                   # rows read: kept, dropped or rejected
    blank: int = 0
    rejects: list[Reject] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    digests: Digests = field(default_factory=lambda: np.zeros((0, 2), np.uint64))       # [N, 2]
    owner: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))     # [n] index of the document
    part: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))      # [n] 0 train, 1 val, 2 test
    lines: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))     # [n]
    bytes: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))     # [n] UTF-8 size
    labels: list[str] = field(default_factory=list)                                     # [n] or empty
    texts: list[str] = field(default_factory=list)                                      # [n], if wanted
    ids: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.uint16))           # all rows', one after the other
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))    # [n] ids in each row


@dataclass(frozen=True)
class Work:
    """Turns a block into an Answer; the same one in any process."""

    files: tuple[File, ...]
    inputs: tuple[Input, ...]
    clean: Clean
    split: Split
    seed: int
    row_bytes: int
    loose: bool                                     # fingerprints ignore case, width and spaces
    want: Want
    bounds: Mapping[str, Bounds] | None = None                  # of each class, where rows have labels
    tokenizer: Path | None = None
    sample: float = 1.0                             # share of the texts that are wanted

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        assert self.tokenizer is not None
        return Tokenizer.load(self.tokenizer)

    def __call__(self, block: Block) -> Answer:
        """Return what the block holds."""
        file = self.files[block.file]
        item = self.inputs[file.input]
        found = parse.parse(block, file.format, item, row_bytes=self.row_bytes)
        answer = Answer(block.file, block.number, block.mark, block.last, block.broken, block.size,
                        read=len(found.texts) + len(found.rejects), blank=found.blank, rejects=found.rejects)
        texts, lines, labels = self._clean(found, answer.dropped)
        if texts:
            answer.digests = dedup.digests(texts, loose=self.loose)
            self._rows(answer, item, texts, lines, labels)
            if self.want == "ids":
                self._encode(answer)
        return answer

    def _clean(self, found: parse.Parsed, dropped: Counter[str]) -> tuple[list[str], list[int], list[str]]:
        texts, lines, labels = list[str](), list[int](), list[str]()
        for place, text in enumerate(found.texts):
            cleaned, reason = self.clean.apply(text)
            if reason is not None:
                dropped[reason] += 1
                continue
            texts.append(cleaned)
            lines.append(found.lines[place])
            if found.labels:
                labels.append(found.labels[place])
        return texts, lines, labels

    def _rows(self, answer: Answer, item: Input, texts: list[str], lines: list[int], labels: list[str]) -> None:
        """Write the columns of the rows, and their texts."""
        keys = split.keys(answer.digests, self.seed)
        owner = np.arange(len(texts))
        if item.split is not None:
            part = np.full(len(texts), split.NAMES.index(item.split), np.uint8)
        elif self.split.by == "hash":
            part = self._place(keys, labels)
        elif self.split.by == "none":
            part = np.zeros(len(texts), np.uint8)
        else:
            cut = [(number, place, piece) for number, text in enumerate(texts)
                   for place, piece in enumerate(self.split.cut(text)) if piece]
            owner = np.array([number for number, _place, _piece in cut], np.int64)
            part = np.array([place for _number, place, _piece in cut], np.uint8)
            texts = [piece for _number, _place, piece in cut]
        answer.owner, answer.part = owner, part
        answer.lines = np.array(lines, np.int64)[owner]
        answer.labels = [labels[number] for number in owner] if labels else []
        answer.texts = texts
        answer.bytes = np.fromiter((len(t) if t.isascii() else len(t.encode()) for t in texts), np.int32, len(texts))
        if self.want == "labels":
            answer.texts = []
        elif self.want == "texts" and self.sample < 1:
            chosen = split.keys(answer.digests, self.seed + 1) < np.uint64(self.sample * 2.0**64)
            answer.texts = [text if chosen[number] else "" for text, number in zip(texts, owner, strict=True)]

    def _place(self, keys: NDArray[np.uint64], labels: list[str]) -> NDArray[np.uint8]:
        if self.bounds is None or not labels:
            return self.split.place(keys, self.split.bounds())
        part, names = np.zeros(len(keys), np.uint8), np.array(labels, object)
        for label in dict.fromkeys(labels):
            rows = np.flatnonzero(names == label)
            part[rows] = self.split.place(keys[rows], self.bounds[label])
        return part

    def _encode(self, answer: Answer) -> None:
        """Replace the texts by their ids, framed; a row without any id is dropped."""
        tokenizer = self._tokenizer
        found = tokenizer.encode_batch(answer.texts)
        before, after = [np.zeros(0, np.int64)] * 2
        framed = tokenizer.frame(before)
        if tokenizer.add_bos:
            before = framed[:1]
        if tokenizer.add_eos:
            after = framed[-1:]
        answer.counts = np.fromiter(map(len, found), np.int64, len(found)) + len(framed)
        parts = [piece for ids in found for piece in (before, ids, after)] if len(framed) else found
        answer.ids = np.concatenate(parts).astype(tokenizer.dtype)
        answer.texts = []
        kept = answer.counts > 0
        if not kept.all():
            answer.dropped["no_tokens"] += int((~kept).sum())
            answer.owner, answer.part, answer.lines = answer.owner[kept], answer.part[kept], answer.lines[kept]
            answer.bytes, answer.counts = answer.bytes[kept], answer.counts[kept]
            answer.labels = [label for label, keep in zip(answer.labels, kept, strict=False) if keep]
