"""How well a model predicts text it has not seen, and how sure that figure is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from danlu import parallel
from danlu.data import sources
from danlu.data.inputs import Input
from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.evaluate.record import figures_of, show, whole
from danlu.evaluate.score import Document, Tally, score
from danlu.evaluate.subject import Subject
from danlu.log import say
from danlu.nn import paths
from danlu.words import _


def on_text(subject: Subject, data: str | None, *, split: str | None, sample_by: str, text: str, encoding: str | None,
            length: int | None, precision: str, device: torch.device) -> list[tuple[Result, str]]:
    """Return what the subject scores on text files or a prepared folder, or what its recipe holds out, and each place."""
    places = [(data, split or "val")] if data is not None else subject.held_out()
    results = []
    names = told_apart([(Path(place).name if is_prepared(place) else Path(place).stem) or place for place, _part in places],
                       [part for _place, part in places])
    for (place, part), name in zip(places, names, strict=True):
        documents = read_prepared(Path(place), part, subject.tokenizer) if is_prepared(place) else read_text(
            place, subject.tokenizer, sample_by=sample_by, text=text, encoding=encoding or "utf-8", hub_split=split or "train")
        results.append((evaluate(subject, documents, task=name, length=length, precision=precision,
                                 device=device), place))
    return results


def told_apart(names: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Return the names, those that come more than once with their part, and with a number where that is the same, too."""
    first = [f"{name}-{part}" if names.count(name) > 1 else name for name, part in zip(names, parts, strict=True)]
    return [f"{name}-{first[:place].count(name) + 1}" if first[:place].count(name) else name for place, name in enumerate(first)]


def is_prepared(place: str) -> bool:
    """Return whether `danlu prepare` wrote this folder."""
    return (Path(place) / "manifest.json").is_file()


def read_prepared(folder: Path, split: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the documents of a prepared folder.  Raises IncompatibleError if another tokenizer made it."""
    shards = Shards(folder, split, verify=True)
    found = shards.manifest["tokenizer"]
    if found != tokenizer.sha256:
        raise IncompatibleError(
            _("the data was prepared with another tokenizer: {data}, the model's is {model}").format(
                data=found[:12], model=tokenizer.sha256[:12]),
            where=str(folder), fix=_("give the text itself: it is tokenised for this model"))
    for number in range(shards.documents):
        one = shards.document(number)
        yield Document(one.ids.astype(np.int64), int(one.columns["bytes"]), one.weights, shards.where(number))


def read_text(place: str, tokenizer: Tokenizer, *, sample_by: str, text: str, encoding: str = "utf-8",
              hub_split: str = "train") -> Iterator[Document]:
    """Yield the documents of text files, tokenised as they are read.  Raises DataError for an unusable row."""
    item = Input.model_validate({"path": place, "sample_by": sample_by, "text": text, "encoding": encoding,
                                  "hub_split": hub_split})
    source = sources.read(item)
    while records := list(islice(source, 256)):
        for record, ids in zip(records, tokenizer.encode_batch([r.text for r in records]), strict=True):
            yield Document(tokenizer.frame(ids), record.bytes, None, f"{record.file}:{record.line}")


@dataclass
class Result:
    """What was found about one data set."""

    task: str
    subject: Subject
    tally: Tally
    length: int
    precision: str
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return what the figures rest on."""
        tally = self.tally
        return {"documents": len(tally.bytes), "pieces": len(tally.document), "tokens": tally.tokens,
                "first_tokens": tally.first, "bytes": sum(tally.bytes), "unknown_tokens": tally.unknown,
                "interval_over": tally.unit}

    def record(self) -> dict[str, Any]:
        """Return the result as lm-eval writes it, with the intervals beside."""
        found, documents = self.tally.estimates(), len(self.tally.bytes)
        parts = figures_of(self.task, found) | {
            "higher_is_better": {self.task: {name: name.endswith("accuracy") for name in found}}}
        return whole(self.task, parts, self.subject, self.facts(), read=documents, judged=documents, length=self.length,
                     precision=self.precision, seconds=self.seconds)


def evaluate(subject: Subject, documents: Iterator[Document], *, task: str, length: int | None = None,
             precision: str = "fp32", device: torch.device | None = None) -> Result:
    """Return what the subject scores on `documents`.  Raises DataError where there is nothing to predict."""
    began, device = time.perf_counter(), device or torch.device("cpu")
    model, cfg = subject.model, subject.cfg
    length = length or subject.length
    if length > cfg.context:
        raise ConfigError(_("length={length} is more than the model's context of {context}").format(
            length=length, context=cfg.context), where="--length")
    shape = (2, cfg.heads, length, cfg.width // cfg.heads)
    use: Any = model.to(device)
    use.use(paths.choose(device, parallel.DTYPES[precision], shape, causal=cfg.causal))
    tally = score(model, subject.tokenizer, documents, subject.objective, length=length, device=device,
                  precision=precision)
    if not any(sum(counts) for counts in tally.counts.values()):
        raise DataError(_("there is no token to predict"), where=task, fix=_("give texts of two tokens and more"))
    if tally.unknown:
        say(_("warning: {n} of {tokens} tokens are unknown to the tokenizer; what they stood for is not measured")
            .format(n=tally.unknown, tokens=tally.tokens))
    return Result(task, subject, tally, length, precision, time.perf_counter() - began)


def tell(result: Result, place: str) -> None:
    """Print the figures as a table, and what they rest on."""
    facts = result.facts()
    names = {"loss": _("loss (nats a token)"), "perplexity": _("perplexity"), "bits_per_byte": _("bits per byte"),
             "mlm_loss": _("masked loss"), "mlm_perplexity": _("masked perplexity"),
             "mlm_accuracy": _("masked accuracy"),
             "nsp_loss": _("next-sentence loss"), "nsp_accuracy": _("next-sentence accuracy"),
             "sop_loss": _("sentence-order loss"), "sop_accuracy": _("sentence-order accuracy")}
    few = facts["interval_over"] != "documents"
    over = _("pieces of documents, for documents are few") if few else _("documents")
    lines = [
        _("{documents} documents, {tokens} tokens, rows of {length} tokens, {precision}").format(
            documents=facts["documents"], tokens=facts["tokens"], length=result.length, precision=result.precision),
        _("intervals: bootstrap over {over}").format(over=over)]
    if facts["first_tokens"]:
        lines.append(_("{n} first tokens have nothing before them: neither they nor their bytes are counted").format(
            n=facts["first_tokens"]))
    show(f"{result.subject.folder} · {place}", result.tally.estimates(), lines, names=names)
