"""A classifier made smaller, way by way: megabytes, p50 at batch 1, texts a second at batch 32, accuracy with its interval.

    python -m bench.compress --run runs/sst2 --data dev.tsv               # the ways of `danlu compress`, and onnxruntime's int8
    python -m bench.compress --run runs/sst2 --data dev.tsv --threads 2 --only fp32 "int8 dynamic"
    python -m bench.compress --run runs/sst2 --data dev.tsv --also "distilled to 2 layers=runs/small" "int4 qat=runs/sst2-int4" \
        "sparse trained=runs/sparse"                                  # … and what was trained to be smaller, as it lies there

All are timed in turns, several rounds in one process, on the row of the median length; bf16 is computed under autocast.
onnxruntime's is the same model by torch.onnx.export and quantize_dynamic, where onnx, onnxscript and onnxruntime are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu import parallel
from danlu.compress import folder
from danlu.compress.factorize import Factorize
from danlu.compress.prune import Prune
from danlu.compress.quantize import Quantize
from danlu.evaluate import calibrate, rows, smaller, tradeoff
from danlu.evaluate.interval import Estimate, estimate
from danlu.evaluate.lines import read, source
from danlu.evaluate.subject import Subject, open_subject
from danlu.evaluate.tradeoff import Way

BATCH, ROUNDS, SECONDS = 32, 5, 0.5
WAYS = [Way("fp32"), Way("bf16", dtype="bf16"), Way("int8", (Quantize(),)), Way("int8 dynamic", (Quantize(method="dynamic"),)),
        Way("int4 gptq", (Quantize(bits=4, method="gptq"),)), Way("pruned 50 % (wanda)", (Prune(method="wanda"),)),
        Way("pruned 50 % (ffn)", (Prune(method="ffn"),)), Way("factorised", (Factorize(error=0.2),))]
Call = Callable[[dict[str, Tensor]], Any]


@dataclass
class Entry:
    """One way: what it weighs, how it is called, how right it is."""

    name: str
    bytes: int
    call: Call
    accuracy: Estimate


def ours(subject: Subject, way: Way, both: calibrate.Both, scratch: Path, *, data: str, how: rows.How) -> Entry:
    """Return one of our ways, written and opened again."""
    at = scratch / str(len(list(scratch.iterdir())))
    made = tradeoff.made(smaller.fresh(subject), way, both.given)
    smaller.write(subject, made, at, verb="bench", options=way.name, both=both, dtype=way.dtype, sparse="wanda" in way.name)
    return lying(way.name, at, data=data, how=how, low=way.dtype == "bf16")


def lying(name: str, at: Path, *, data: str, how: rows.How, low: bool = False) -> Entry:
    """Return what lies in a folder: of a run its best checkpoint."""
    opened = open_subject(at)
    model = opened.model.eval()
    _figure, quality = tradeoff.judged(opened, data, replace(how, precision="bf16" if low else "fp32"))

    def call(row: dict[str, Tensor]) -> Any:
        with parallel.autocast("bf16", torch.device("cpu")) if low else nullcontext():
            return model(**row)

    return Entry(name, folder.size(opened.folder), call, quality)


def theirs(subject: Subject, scratch: Path, *, data: str, how: rows.How, threads: int) -> Entry | None:
    """Return onnxruntime's dynamic int8 of the same model; None where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime", "transformers")):
        return None
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(subject.folder, attn_implementation="eager").eval()
    ids = torch.arange(2, 34).view(2, 16)
    wide = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(_Logits(model), (ids, torch.ones_like(ids)), str(scratch / "model.onnx"),
                      input_names=["input_ids", "attention_mask"],
                      output_names=["logits"], dynamic_shapes=(wide, wide), dynamo=True, external_data=False)
    plain = onnxruntime.InferenceSession(str(scratch / "model.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        said = subject.model(ids)[subject.cfg.tasks[0].name]
    found = plain.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())})[0]
    torch.testing.assert_close(torch.from_numpy(found), said, atol=1e-3, rtol=1e-3)      # or it is another model, and no peer
    quantize_dynamic(scratch / "model.onnx", scratch / "model.int8.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(scratch / "model.int8.onnx"), options, providers=["CPUExecutionProvider"])

    def call(row: dict[str, Tensor]) -> Any:
        given = row["ids"].numpy()
        return session.run(None, {"input_ids": given, "attention_mask": np.ones_like(given)})[0]

    return Entry("onnxruntime int8", (scratch / "model.int8.onnx").stat().st_size, call, _right(subject, call, data, how))


class _Logits(torch.nn.Module):
    """A model of transformers that says its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits


def _right(subject: Subject, call: Call, data: str, how: rows.How) -> Estimate:
    """Return the accuracy of `call`, a row at a time."""
    task = rows.task_of(subject, how, torch.device("cpu"))
    labels, hits = list(getattr(task.objective, "labels", ())), []
    for line in read(source(data, task.like), task.reading(how)):
        batch = rows.collated(task.objective, [*line.rows], subject.tokenizer.special, task.length)
        hits.append(float(labels[int(np.argmax(call({"ids": batch["ids"]})))] == line.label))
    return estimate(np.array(hits), np.ones(len(hits)))


@torch.inference_mode()
def raced(entries: list[Entry], row: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return (median seconds of a row, rows a second of 32) of each, timed in turns."""
    many = {name: column.expand(BATCH, *column.shape[1:]).contiguous() for name, column in row.items()}
    singles: dict[str, list[float]] = {one.name: [] for one in entries}
    batches: dict[str, list[float]] = {one.name: [] for one in entries}
    for _round in range(ROUNDS):
        for one in entries:
            for given, found in ((row, singles[one.name]), (many, batches[one.name])):
                one.call(given)
                until = time.perf_counter() + SECONDS
                while time.perf_counter() < until:
                    start = time.perf_counter()
                    one.call(given)
                    found.append(time.perf_counter() - start)
    return {one.name: (statistics.median(singles[one.name]), BATCH / statistics.median(batches[one.name])) for one in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibrate", help="rows (default: those of the run)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=FOLDER", help="smaller models that were trained")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    told = parser.parse_args()
    parallel.start(threads=told.threads, device="cpu")
    how, subject = rows.How(overlong="cut"), smaller.opened(told.run)
    both = calibrate.both(subject, told.calibrate, count=160, how=how)
    with tempfile.TemporaryDirectory() as scratch:
        entries = []
        for way in WAYS:
            if not told.only or way.name in told.only:
                entries.append(ours(subject, way, both, Path(scratch), data=told.data, how=how))
        if not told.only or "onnxruntime int8" in told.only:
            other = theirs(subject, Path(scratch), data=told.data, how=how, threads=torch.get_num_threads())
            entries += [other] if other is not None else []
        for name, _equals, at in (given.rpartition("=") for given in told.also):
            entries.append(lying(name, Path(at), data=told.data, how=how))
        row = tradeoff.typical(both.aside)
        found = raced(entries, row)
    table = [{"way": one.name, "megabytes": one.bytes / 1e6, "p50_ms": 1e3 * found[one.name][0],
              "texts_per_second": found[one.name][1], "accuracy": one.accuracy.value,
              "interval": [one.accuracy.low, one.accuracy.high]} for one in entries]
    print(f"{torch.get_num_threads()} threads, rows of {row['ids'].shape[1]} tokens, calibrated on {both.said}\n")
    print("| way | MB | p50, ms | texts/s at 32 | accuracy | 95 % |\n|---|---|---|---|---|---|")
    for line in table:
        low, high = line["interval"]
        print(f"| {line['way']} | {line['megabytes']:.1f} | {line['p50_ms']:.2f} | {line['texts_per_second']:.0f} "
              f"| {line['accuracy']:.4f} | {low:.4f} – {high:.4f} |")
    if told.out is not None:
        told.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
