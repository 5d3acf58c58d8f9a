"""Files to prepared data: read, clean, deduplicate, split, learn a tokenizer, tokenise, store as shards.

The result is a pure function of the inputs and the configuration, whatever the number of processes and however often it
was killed on the way.  Memory is bounded: blocks of 1 MiB in flight, one shard a split, 32 bytes a row for duplicates.

Inputs whose `split` is val or test are read first, so that a text that stands in both leaves training, not evaluation.
Standard input can be read only once: with a tokenizer that is loaded and no labels it is streamed straight through (to
resume, give the same stream again; what was done is skipped and checked); otherwise it is first copied to `out`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from danlu import files, log
from danlu.data import coverage, mapped, progress, raw, shards, split, tokenizer
from danlu.data.inputs import MIB, File, Input, resolve, split_take
from danlu.data.job import Job, Prepare
from danlu.data.ledger import Ledger, Totals
from danlu.data.progress import Progress
from danlu.data.shelf import Shelf
from danlu.data.split import NAMES
from danlu.data.tokenizer import Loaded, Tokenizer
from danlu.data.work import Answer
from danlu.errors import DataError, ResourceError
from danlu.fault import fault
from danlu.words import _

__all__ = ["Prepare", "prepare"]

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
MANY = 10_000                                       # classes; more are no classes
SAMPLE = 250                                        # training documents that the tokenizer's report looks at
BEGINNING = 100                                     # tokens of each


def prepare(cfg: Prepare, *, say: Callable[[str], None] = log.say) -> Path:
    """Return `cfg.out`, which now holds the prepared data; at once if it did so before.

    Goes on where a killed run stopped.  Raises ConfigError before any data is read; then DataError, SecurityError,
    ResourceError.
    """
    files.check_writable(cfg.out)
    try:
        with progress.alone(cfg.out):
            return _prepare(cfg, say)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ResourceError(_("no room is left: {why}").format(why=error.strerror), where=str(cfg.out),
                            fix=_("free some space and run it again: it goes on where it stopped")) from error


def _prepare(cfg: Prepare, say: Callable[[str], None]) -> Path:
    inputs = tuple(sorted(map(split_take, cfg.inputs), key=lambda item: item.split in (None, "train")))
    found = resolve(inputs)
    config = cfg.model_dump(mode="json", exclude={"out", "workers", "overwrite"})
    if not cfg.overwrite and progress.finished(cfg.out, config, found):
        say(_("{out} is complete already").format(out=cfg.out))
        return cfg.out
    if cfg.overwrite and (cfg.out / "manifest.json").exists():
        progress.clear(cfg.out)
    _check_tokenizer(cfg)
    files.check_space(cfg.out, sum(file.size or 0 for file in found) + 64 * MIB)
    state = Progress(cfg.out, config, found, overwrite=cfg.overwrite)
    job = Job(cfg, inputs, _kept(cfg, inputs, found, state, say), say)
    bounds = _survey(job, state)
    chosen = _tokenizer(job, state, bounds)
    ledger, entries = _shards(job, state, bounds, chosen)
    _finish(job, state, config=config, ledger=ledger, entries=entries, chosen=chosen, bounds=bounds)
    return cfg.out


def _check_tokenizer(cfg: Prepare) -> None:
    """Load a tokenizer that is to be loaded, so that a wrong path is told before data is read."""
    if isinstance(cfg.tokenizer, Loaded):
        tokenizer.train((), cfg.tokenizer)


def _kept(cfg: Prepare, inputs: tuple[Input, ...], found: list[File], state: Progress, say: Callable[[str], None]
          ) -> tuple[File, ...]:
    """Return the files; one that can be read only once but is needed more often is copied to disk first."""
    passes = 1 + (not isinstance(cfg.tokenizer, Loaded)) + any(item.label is not None for item in inputs)
    result = []
    for number, file in enumerate(found):
        if not file.once or passes == 1:
            result.append(file)
            continue
        path = state.hidden / f"input-{number}"
        if not path.exists():
            say(_("{path} can be read only once: it is copied to {to} first").format(path=file.path, to=path))
            with raw.opened(file) as source, path.with_suffix(".part").open("wb") as target:
                shutil.copyfileobj(source, target, MIB)
                target.flush()
                os.fsync(target.fileno())
            path.with_suffix(".part").rename(path)
        result.append(replace(file, kept=str(path), size=path.stat().st_size))
    return tuple(result)


def _survey(job: Job, state: Progress) -> dict[str, split.Bounds] | None:
    """Return the bounds of every class, sorted by name; None where no input has labels."""
    if all(item.label is None for item in job.inputs):
        return None
    if "classes" not in state.state:
        ledger, groups = job.ledger(), dict[str, list[Any]]()
        for answer, keep in job.rows(ledger, state, job.work("labels"), _("counting classes")):
            keys = split.keys(answer.digests, job.cfg.seed)[answer.owner]
            shared = job.inputs[job.files[answer.file].input].split is None
            for number in np.flatnonzero(keep) if answer.labels else ():
                groups.setdefault(answer.labels[number], []).extend([keys[number]] if shared else ())
            if len(groups) > MANY:
                raise DataError(_("the label has more than {n} different values; it is no class").format(n=MANY),
                                where=job.files[answer.file].path, fix=_("set `label` to the column of the class"))
        if not groups:
            _refuse(job, ledger)
        exact = job.cfg.split.stratify and job.cfg.split.by == "hash"
        state.save(classes={
            label: list(job.cfg.split.exact(np.array(found, np.uint64)) if exact else job.cfg.split.bounds())
            for label, found in sorted(groups.items(), key=lambda pair: _rank(pair[0]))})
    return {label: (low, high) for label, (low, high) in state.state["classes"].items()}


def _rank(label: str) -> tuple[int, float, str]:
    """Numbers in their order, then names in theirs."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _tokenizer(job: Job, state: Progress, bounds: dict[str, split.Bounds] | None) -> Tokenizer:
    """Return the tokenizer, which now lies in out/tokenizer: loaded, learned, or as an interrupted run left it."""
    folder = job.cfg.out / "tokenizer"
    if state.state.get("tokenizer") and not isinstance(job.cfg.tokenizer, Loaded):
        kept = Tokenizer.load(folder)
        if kept.sha256 == state.state["tokenizer"]:
            return kept
        raise DataError(_("the tokenizer has changed since this preparation was interrupted"), where=str(folder),
                        fix=_("set overwrite: true to do it again"))
    if isinstance(job.cfg.tokenizer, Loaded):
        chosen = tokenizer.train((), job.cfg.tokenizer)
    else:
        job.say(_("learning a tokenizer of {n} tokens").format(n=job.cfg.tokenizer.vocab))
        share = min(1.0, 1.2 * job.cfg.tokenizer.text_bytes / max(1, job.text_bytes))
        with closing(_texts(job, state, bounds, share)) as texts:
            chosen = tokenizer.train(texts, job.cfg.tokenizer)
    if state.state.get("tokenizer", chosen.sha256) != chosen.sha256:
        raise DataError(_("the tokenizer has changed since this preparation was interrupted"),
                        where=str(folder), fix=_("set overwrite: true to do it again"))
    chosen.save(folder)
    state.save(tokenizer=chosen.sha256)
    if not isinstance(job.cfg.tokenizer, Loaded) and chosen.size < job.cfg.tokenizer.vocab:
        job.say(_("the text gave {n} tokens, fewer than the {wanted} asked for").format(
            n=chosen.size, wanted=job.cfg.tokenizer.vocab))
    return Tokenizer.load(folder)


def _texts(job: Job, state: Progress, bounds: dict[str, split.Bounds] | None, share: float
           ) -> Generator[str, None, None]:
    """Yield the texts to learn the tokenizer from: training rows only, a `share` of them chosen by fingerprint."""
    ledger, given = job.ledger(), 0
    work = job.work("texts", bounds=bounds, sample=share)
    for answer, keep in job.rows(ledger, state, work, _("reading for the tokenizer")):
        for number in np.flatnonzero(keep & (answer.part == 0)):
            if text := answer.texts[number]:
                given += 1
                yield text
    if not given:
        _refuse(job, ledger)


def _refuse(job: Job, ledger: Ledger) -> None:
    """Write the report; raise DataError when too much was rejected or nothing is left."""
    files.write_json(job.cfg.out / "report.json", ledger.report())
    ledger.check_rejects()
    ledger.check_left()


def _shards(job: Job, state: Progress, bounds: dict[str, split.Bounds] | None, chosen: Tokenizer
            ) -> tuple[Ledger, dict[str, list[shards.Entry]]]:
    """Tokenise every row, committing whenever a shard is full; return the ledger and the shards of each split."""
    commit = state.state.get("commit")
    ledger = job.ledger(Totals.of(commit["totals"]) if commit else None)
    size, labels = job.cfg.shard_tokens, bounds is not None
    shelves = {name: Shelf(job.cfg.out, name, dtype=chosen.dtype, tokens=size, labels=labels) for name in NAMES}
    state.restore(shelves, ledger.seen)
    if commit:
        job.say(_("going on after {rows} rows; {n} shards stand already").format(
            rows=ledger.totals.read, n=sum(len(shelf.entries) for shelf in shelves.values())))
    numbers = {label: number for number, label in enumerate(bounds or ())}
    work = job.work("ids", bounds=bounds, tokenizer=job.cfg.out / "tokenizer")
    for answer, keep in job.rows(ledger, state, work, _("tokenising"), commit):
        if _store(shelves, answer, keep, numbers):
            state.commit(shelves, done=[answer.file, answer.number], mark=answer.mark, totals=ledger.totals.record())
    _refuse(job, ledger)
    _check_leaks(job.cfg, ledger)
    return ledger, {name: entries for name, shelf in shelves.items() if (entries := shelf.close())}


def _store(shelves: dict[str, Shelf], answer: Answer, keep: Any, numbers: dict[str, int]) -> bool:
    """Put the rows that stay on the shelves of their splits; return whether a shard was written."""
    full = False
    labels = np.array([numbers[label] for label in answer.labels] or [-1] * len(answer.part), np.int32)
    for part in np.unique(answer.part[keep]):
        rows = keep & (answer.part == part)
        ids = answer.ids if rows.all() else answer.ids[np.repeat(rows, answer.counts)]
        columns = {"bytes": answer.bytes[rows], "file": np.full(int(rows.sum()), answer.file, np.int32),
                   "line": answer.lines[rows]} | ({"label": labels[rows]} if numbers else {})
        full |= shelves[NAMES[part]].add(ids, answer.counts[rows], **columns)
    return full


def _check_leaks(cfg: Prepare, ledger: Ledger) -> None:
    totals = ledger.totals
    if cfg.split.strict and totals.leaks:
        raise DataError(_("{n} texts stand in two splits: {first}").format(
            n=totals.leaks.total(), first="; ".join(totals.leaked)), where=totals.leaked[0].partition(" ")[0],
            fix=_("take them out of one, or set split.strict: false"))


def _sample(out: Path, entries: list[shards.Entry], chosen: Tokenizer) -> Iterator[str]:
    """Yield the beginnings of documents spread evenly over the shards of a split."""
    share = max(1, sum(entry.documents for entry in entries) // SAMPLE)
    for entry in entries:
        arrays = mapped.read(out / entry.file, entry.bytes)
        for number in range(0, entry.documents, share):
            start, stop = arrays["offsets"][number:number + 2]
            yield chosen.decode(arrays["ids"][start:min(stop, start + BEGINNING)], special=False)


def _finish(job: Job, state: Progress, *, config: dict[str, Any], ledger: Ledger, chosen: Tokenizer,
            entries: dict[str, list[shards.Entry]], bounds: dict[str, split.Bounds] | None) -> None:
    """Write the manifest, which makes the folder complete, and tidy up."""
    report, totals = ledger.report(), ledger.totals
    inputs = []
    for number, file in enumerate(job.files):
        taken, _colon, sha256 = totals.marks.get(str(number), "").partition(":")
        inputs.append({"path": file.path, "bytes": int(taken) if taken else file.size, "sha256": sha256 or None,
                       "rows": totals.rows[str(number)]})
    for name in NAMES:
        progress.prune(job.cfg.out, name, keep=len(entries.get(name, ())))
    told = coverage.report(chosen, {"train": _sample(job.cfg.out, entries["train"], chosen)})
    files.write_json(job.cfg.out / "report.json", report | {"tokenizer": told})
    fault("prepare.before_manifest")
    content = {"tokenizer": chosen.sha256, "dtype": chosen.dtype, "splits": entries, "inputs": inputs, "config": config,
               "files": [file.path for file in job.files], "counts": report["rows"]}
    if bounds is not None:
        content["labels"] = list(bounds)
    shards.write_manifest(job.cfg.out, content)
    state.done()
    rows = report["rows"]
    job.say(_("{kept} documents of {read} rows ({rejected} rejected, {filtered} filtered, {duplicates} duplicates)")
            .format(**rows))
    for name, counts in report["splits"].items():
        job.say(_("{name}: {documents} documents, {tokens} tokens, {ratio:.2f} bytes a token").format(
            name=name, ratio=counts["bytes"] / max(1, counts["tokens"]), **counts))
    for name in ("val", "test"):
        if getattr(job.cfg.split, name) and name not in entries:
            job.say(_("no row came into {name}: raise split.{name}, or give an input of its own").format(name=name))
    for pair, count in sorted(totals.leaks.items()):
        job.say(_("{count} texts stand in both {pair}: {first}").format(
            count=count, pair=pair.replace("+", _(" and ")), first="; ".join(totals.leaked)))
    for place, why in sorted(totals.broken.items()):
        job.say(_("damaged, kept up to there: {file}: {why}").format(file=job.files[int(place)].path, why=why))
