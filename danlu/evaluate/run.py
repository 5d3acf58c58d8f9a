"""`danlu eval run --data heldout.txt`: how well a model predicts text it has not seen, and how sure that figure is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import danlu
from danlu import config, files, parallel
from danlu.data import sources
from danlu.data.inputs import Input
from danlu.data.shards import Shards
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.evaluate.score import Document, Tally, score
from danlu.log import say
from danlu.models import weights
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.nn import paths
from danlu.objectives import CausalLM, Mixture, Objective
from danlu.train import checkpoint
from danlu.train.recipe import Run
from danlu.words import _

LENGTH = 2048                                            # longest row where neither the user nor a recipe says one


def main(run: Path, *, data: str | None, split: str, sample_by: str, text: str, length: int | None, precision: str,
         out: Path | None, samples: Path | None, as_json: bool) -> int:
    """Print loss, perplexity, bits per byte (a decoder), masked loss, accuracies (an encoder), with 95 % intervals."""
    device = parallel.start(threads=None, device="auto")
    subject = open_subject(run)
    places = [(data, split)] if data is not None else subject.held_out()
    results = []
    for place, part in places:
        documents = read_prepared(Path(place), part, subject.tokenizer) if is_prepared(place) else read_text(
            place, subject.tokenizer, sample_by=sample_by, text=text)
        results.append(evaluate(subject, documents, task=Path(place).stem or place, length=length, precision=precision,
                                device=device))
    record = merged([result.record() for result in results])
    if samples is not None:
        files.rewrite_lines(samples, ({"task": r.task, **line} for r in results for line in r.tally.samples()))
    if out is not None:
        files.write_json(out, record)
    if as_json:
        print(json.dumps(record, ensure_ascii=False, indent=1))
    else:
        for result, (place, _part) in zip(results, places, strict=True):
            show(result, place)
    return 0


@dataclass
class Subject:
    """What is judged: a model with its tokenizer, and the recipe it was trained by, if it has one."""

    folder: Path
    tokenizer: Tokenizer
    model: nn.Module
    run: Run | None

    @property
    def cfg(self) -> Decoder | Encoder:
        """The shape of the model."""
        cfg: Any = self.model.cfg
        assert isinstance(cfg, Decoder | Encoder)
        return cfg

    def held_out(self) -> list[tuple[str, str]]:
        """Return the (folder, split) that the recipe holds out.  Raises ConfigError if there is none."""
        if self.run is None:
            raise ConfigError(_("there is nothing to evaluate on"), where=str(self.folder),
                              fix="danlu eval RUN --data heldout.txt")
        named: list[tuple[str, str]] = [(str(s.folder), s.split) for s in self.run.eval]
        return named or [(str(s.folder), "val") for s in self.run.data]

    @property
    def length(self) -> int:
        """Tokens in a row: the recipe's, or the model's context within reason."""
        return self.run.length if self.run is not None else min(LENGTH, self.cfg.context)

    @property
    def objective(self) -> Objective:
        """What is measured: a decoder's plain cross-entropy, an encoder's objective as it was trained on."""
        if isinstance(self.cfg, Decoder):
            return CausalLM.model_validate({})
        if self.run is not None:
            return self.run.objective
        known = {"mlm": "masked_lm", "nsp": "next_sentence", "sop": "sentence_order"}
        parts = [{"objective": {"kind": known[name]}} for name in self.cfg.outputs or ()]
        if not parts:
            raise IncompatibleError(_("the model has no head that could be evaluated"), where=str(self.folder))
        return Mixture.model_validate({"parts": tuple(parts)})


def open_subject(path: Path) -> Subject:
    """Return the model of a run (its best checkpoint), of a checkpoint or of a Hugging Face folder."""
    folder = checkpoint.chosen(path)
    manifest = next((f / "manifest.json" for f in (folder, folder.parent) if (f / "manifest.json").is_file()), None)
    recipe = config.validate(Run, files.read_json(manifest)["run"]) if manifest is not None else None
    return Subject(folder, Tokenizer.load(folder), weights.load(folder), recipe)


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


def read_text(place: str, tokenizer: Tokenizer, *, sample_by: str, text: str) -> Iterator[Document]:
    """Yield the documents of text files, tokenised as they are read.  Raises DataError for an unusable row."""
    item = Input.model_validate({"path": place, "sample_by": sample_by, "text": text})
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
        found = self.tally.estimates()
        figures: dict[str, Any] = {"alias": self.task}
        for name, one in found.items():
            figures |= {f"{name},none": finite(one.value), f"{name}_stderr,none": finite(one.stderr)}
        documents = len(self.tally.bytes)
        return {
            "results": {self.task: figures},
            "intervals": {self.task: {name: [finite(one.low), finite(one.high)] for name, one in found.items()}},
            "facts": {self.task: self.facts()},
            "n-samples": {self.task: {"original": documents, "effective": documents}},
            "n-shot": {self.task: 0}, "versions": {self.task: 1},
            "higher_is_better": {self.task: {name: name.endswith("accuracy") for name in found}},
            "config": {"model": "danlu", "model_args": str(self.subject.folder), "length": self.length,
                       "precision": self.precision, "bootstrap_iters": 2000, "danlu": danlu.__version__},
            "model_name": str(self.subject.folder), "tokenizer_sha256": self.subject.tokenizer.sha256,
            "total_evaluation_time_seconds": round(self.seconds, 3),
        }


def finite(value: float | None) -> float | None:
    """Return `value`, None where it is not a number: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


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
    use.use(paths.choose(device, parallel.DTYPES[precision], shape, causal=cfg.kind == "decoder"))
    tally = score(model, subject.tokenizer, documents, subject.objective, length=length, device=device,
                  precision=precision)
    if not any(sum(counts) for counts in tally.counts.values()):
        raise DataError(_("there is no token to predict"), where=task, fix=_("give texts of two tokens and more"))
    if tally.unknown:
        say(_("warning: {n} of {tokens} tokens are unknown to the tokenizer; what they stood for is not measured")
            .format(n=tally.unknown, tokens=tally.tokens))
    return Result(task, subject, tally, length, precision, time.perf_counter() - began)


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record of several; what is told by task is joined."""
    whole = dict(records[0])
    for record in records[1:]:
        for name, value in record.items():
            if isinstance(value, dict) and name != "config":
                whole[name] = {**whole[name], **value}
    return whole


def show(result: Result, place: str) -> None:
    """Print the figures as a table, and what they rest on."""
    facts, console = result.facts(), Console()
    names = {"loss": _("loss (nats a token)"), "perplexity": _("perplexity"), "bits_per_byte": _("bits per byte"),
             "mlm_loss": _("masked loss"), "mlm_perplexity": _("masked perplexity"),
             "mlm_accuracy": _("masked accuracy"),
             "nsp_loss": _("next-sentence loss"), "nsp_accuracy": _("next-sentence accuracy"),
             "sop_loss": _("sentence-order loss"), "sop_accuracy": _("sentence-order accuracy")}
    table = Table(title=f"{result.subject.folder} · {place}", title_justify="left")
    table.add_column(_("figure"))
    table.add_column(_("value"), justify="right")
    table.add_column(_("95 % interval"), justify="right")
    for name, one in result.tally.estimates().items():
        spread = f"{one.low:.4f} – {one.high:.4f}" if one.low is not None and one.high is not None else "–"
        table.add_row(names[name], f"{one.value:.4f}", spread)
    console.print(table)
    few = facts["interval_over"] != "documents"
    over = _("pieces of documents, for documents are few") if few else _("documents")
    lines = [
        _("{documents} documents, {tokens} tokens, rows of {length} tokens, {precision}").format(
            documents=facts["documents"], tokens=facts["tokens"], length=result.length, precision=result.precision),
        _("intervals: bootstrap over {over}").format(over=over)]
    if facts["first_tokens"]:
        lines.append(_("{n} first tokens have nothing before them: neither they nor their bytes are counted").format(
            n=facts["first_tokens"]))
    for line in lines:
        console.print(line, highlight=False, markup=False)
