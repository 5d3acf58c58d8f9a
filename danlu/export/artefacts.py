"""What Danlu opens itself: runs, checkpoints, Hugging Face folders, adapters, quantised folders; and the rows to ask them.

T tokens of a row, K classes, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from danlu import files
from danlu.adapt import folder as adapters
from danlu.data import chat
from danlu.data.example import Turn
from danlu.data.shards import Shards, read_manifest
from danlu.errors import ConfigError, DataError
from danlu.evaluate.subject import Subject, open_subject
from danlu.evaluate.written import template_of
from danlu.export.beside import Beside
from danlu.export.protocol import Artefact, Says
from danlu.generate import writes
from danlu.models import weights
from danlu.words import _

PLAIN = ("logits", "nsp", "sop", "hidden")     # what is asked of a model without a task, the first that is there
TOKENS, ROWS = 64, 8                                     # of a row, at most; rows, unless the user says


class Danlu:
    """A model in Danlu, with the tokenizer and template that it was trained with."""

    def __init__(self, subject: Subject, *, head: str | None = None) -> None:
        self.subject = subject
        self.model: Any = subject.model.eval()
        self.kind = kind_of(subject)
        self.name = f"{_named(subject.folder)} (Danlu)"
        tasks = subject.cfg.tasks
        self.head = subject.head(head) if tasks and (head is not None or len(subject.heads) == 1) else tasks[0] if tasks else None
        self.writes = writes(self.model)
        self.text = Beside(adapters.tokenizer_in(subject.folder), writes=self.writes,
                           template=template_of(subject) if self.writes else None)

    def heads(self) -> tuple[str, ...]:
        """Return the names of the heads, if there are several."""
        tasks = self.subject.cfg.tasks
        return tuple(task.name for task in tasks) if len(tasks) > 1 else ()

    def ask(self, head: str) -> None:
        """Let `logits` say what this head says."""
        self.head = self.subject.head(head)

    @property
    def limit(self) -> int:
        """The longest row that the model takes."""
        return int(self.subject.cfg.context - self.model.ahead.room())

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return what is said of one row: [T, V], [K], [T, K], [T, 2] of an answer, [D] of a text's vector, of length 1."""
        out = self.model(torch.tensor([list(ids)]))
        if self.head is None:
            said = out[next(name for name in PLAIN if name in out)][0]
        elif self.head.kind == "embed":
            said = torch.nn.functional.normalize(out[self.head.name][0, 0], dim=-1)
        else:
            said = out[self.head.name][0]
        return np.atleast_1d(np.asarray(said.double()))

    def says(self) -> Says:
        """Return what the numbers of `logits` are."""
        if self.head is None:
            cfg = self.subject.cfg
            return "classes" if (cfg.lm if cfg.kind == "decoder" else cfg.outputs) else "vector"
        return {"answer": "places", "embed": "vector"}.get(self.head.kind, "classes")      # type: ignore[return-value]

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of `text`; what looks like a special token stays text."""
        return self.text.encode(text)

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of `ids`."""
        return self.text.decode(ids)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return a conversation as it was trained on; None where no template was."""
        return self.text.render(messages) if templated(self.subject) else None

    def ends(self) -> frozenset[int] | None:
        """Return the ids that end an answer, or a text."""
        return self.text.ends()

    def labels(self) -> tuple[str, ...] | None:
        """Return the names of the head's classes."""
        return self.head.labels or None if self.head is not None else None


def templated(subject: Subject) -> bool:
    """Return whether the model has a chat template of its own, and not only what is taken where there is none."""
    given = subject.run is not None and subject.run.chat.template is not None
    return given or template_of(subject).source is not None


def kind_of(subject: Subject) -> str:
    """Return what a folder that Danlu opens is: quantized, danlu (a run's in full precision), adapter, or hf."""
    file = subject.folder / "config.json"
    if file.is_file() and "quantization_config" in files.read_json(file):      # a run's that was quantized keeps its run.json
        return "quantized"
    if subject.run is not None:
        return "danlu"
    return "adapter" if adapters.is_adapter(subject.folder) else "hf"


def dtype_of(folder: Path) -> str:
    """Return the arithmetic that a folder's weights were rounded to: fp32, bf16 or fp16."""
    file = folder / "config.json"
    told = files.read_json(file) if file.is_file() else {}
    name = str(told.get("dtype") or told.get("torch_dtype") or "float32")
    return {"bfloat16": "bf16", "float16": "fp16"}.get(name, "fp32")


def bits_of(folder: Path) -> int:
    """Return the least bits of a quantised folder's weights; 8 where it does not say."""
    file = folder / "config.json"
    config = files.read_json(file) if file.is_file() else {}
    if (ours := weights.forms_in(config)) is not None:
        each = [group["form"].get("rounded") or group["form"] for group in ours]
        return 4 if any(form.get("kind") in ("int4", "nf4") or form.get("bits", 8) <= 4 for form in each) else 8
    told = config.get("quantization_config") or {}
    found = [told[key] for key in ("bits", "w_bit", "num_bits") if isinstance(told.get(key), int)]
    return found[0] if found else 4 if told.get("load_in_4bit") else 8


def opened(path: Path, *, head: str | None = None) -> Danlu:
    """Return what Danlu makes of a run, a checkpoint, or a folder of a model or an adapter."""
    return Danlu(open_subject(path), head=head)


def _named(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") or folder.name == "ema" else folder.name


def held_out_rows(subject: Subject, *, rows: int = ROWS, tokens: int = TOKENS) -> list[list[int]]:
    """Return the beginnings of documents that the run held out, else of its training data; [] if none is there any more."""
    if subject.run is None:
        return []
    found = list[list[int]]()
    for source in (*subject.run.eval, *subject.run.data):
        place = subject.place(source)
        if not (place / "manifest.json").is_file():
            continue
        split = "val" if read_manifest(place)["splits"].get("val") else source.split
        if not Shards.has(place, split):
            continue
        shards = Shards(place, split)
        for number in range(min(shards.documents, rows)):
            ids = shards.document(number).ids.astype(np.int64)
            found.append(framed(subject, ids, tokens))
        if len(found) >= rows:
            break
    return [row for row in found if row][:rows]


def framed(subject: Subject, ids: np.ndarray, tokens: int = TOKENS) -> list[int]:
    """Return ids as the model is given them, at most `tokens`: between its special tokens if it has a task or is an encoder."""
    room = min(tokens, int(subject.cfg.context - subject.model.ahead.room()))    # type: ignore[union-attr, operator]
    tokenizer, special = subject.tokenizer, subject.tokenizer.special
    if writes(subject.model) or (len(ids) and ids[0] in (special.cls, special.bos)):
        return [int(i) for i in ids[:room]]
    row, _types = tokenizer.together((ids[: max(1, room - tokenizer.room_beside(1))],))
    return [int(i) for i in row[:room]]


def rows_of_texts(subject: Subject, texts: Sequence[str], *, tokens: int = TOKENS) -> list[list[int]]:
    """Return each text as a row that the model reads; those that its vocabulary cannot say are left out."""
    found = list[list[int]]()
    for text in texts:
        try:
            ids = subject.tokenizer.encode(text)
        except DataError:
            continue
        if len(ids):
            found.append(framed(subject, ids, tokens))
    return found


def read_rows(path: Path, first: Artefact, *, rows: int | None = None, tokens: int = TOKENS
              ) -> tuple[list[list[int]], list[str], list[list[dict[str, str]]]]:
    """Return rows of ids, texts and conversations of a JSON lines file of {"ids"}, {"text"} or {"messages"}.  DataError.

    Ids are made as the first of two artefacts makes them, cut to `tokens`.
    """
    ids, texts, dialogues = list[list[int]](), list[str](), list[list[dict[str, str]]]()
    if not path.is_file():
        raise ConfigError(_("there is no such file"), where=str(path))
    for number, line in enumerate(_lines(path)):
        if rows is not None and len(ids) >= rows:
            break
        if isinstance(line.get("ids"), list):
            ids.append(_whole(line["ids"], first, f"{path}:{number + 1}"))
        elif isinstance(line.get("messages"), list):
            dialogues.append([{"role": str(m["role"]), "content": str(m["content"])} for m in line["messages"]])
            ids += _prompted(first, dialogues[-1], tokens)
        elif isinstance(line.get("text"), str):
            texts.append(line["text"])
            ids += rows_of_texts(first.subject, [line["text"]], tokens=tokens) if isinstance(first, Danlu) else [
                found[:tokens] for found in [first.encode(line["text"])] if found]
        else:
            raise DataError(_("a row must have ids, text or messages"), where=f"{path}:{number + 1}")
    if not ids:
        raise DataError(_("there is no row to compare on"), where=str(path))
    return ids, texts, dialogues


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that somebody wrote, the last line without its end included.  Raises DataError."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(_("this is not JSON: {why}").format(why=error), where=f"{path}:{number}") from None
        if not isinstance(found, dict):
            raise DataError(_("a row must have ids, text or messages"), where=f"{path}:{number}")
        yield found


def _whole(ids: list[Any], first: Artefact, where: str) -> list[int]:
    """Return ids that the first artefact can read.  Raises DataError."""
    top = first.subject.tokenizer.special.size if isinstance(first, Danlu) else None
    if not ids or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 or (top is not None and i >= top) for i in ids):
        raise DataError(_("the ids are not those of a row: whole numbers below {n}").format(n=top), where=where)
    if isinstance(first, Danlu) and len(ids) > first.limit:
        raise DataError(_("{n} ids, and the model reads {limit}").format(n=len(ids), limit=first.limit), where=where)
    return ids


def _prompted(first: Artefact, said: Sequence[Mapping[str, str]], tokens: int) -> list[list[int]]:
    """Return a conversation as a row of ids; none of an artefact without a template."""
    if isinstance(first, Danlu) and first.text.template is not None:
        turns = [Turn(one["role"], one["content"]) for one in said]
        return [chat.encode(chat.render(first.text.template, turns), first.subject.tokenizer)[0].tolist()[:tokens]]
    text = first.render(said)
    found = None if text is None else first.encode(text)
    return [found[:tokens]] if found else []
