"""The audit of a run: what it would really learn from, before its first step; the same for `danlu audit` and every training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from danlu import files
from danlu.data import audit, findings
from danlu.data.findings import Finding
from danlu.data.shards import Shards
from danlu.data.stream import SLOTS, Mixed, Stream
from danlu.data.tokenizer import Tokenizer
from danlu.errors import DataError
from danlu.log import say
from danlu.objectives.tasks import single
from danlu.train.feed import stream
from danlu.train.recipe import Audit, Run
from danlu.words import _

SCHEMA = 1
BATCHES = 20_000                                         # rows whose batches are laid out to count their padding


def audited(run: Run, rows: Stream | Mixed, train: Sequence[Shards], held_out: Sequence[Shards], tokenizer: Tokenizer, *,
            total: int) -> dict[str, Any]:
    """Return the audit of a run of `total` steps, JSON-ready, and write it to `out/audit.json`.

    rows: of the training, from the parts `train`.  What was counted before, of the same data and settings, is used again;
    what is allowed is judged anew.
    """
    streams = rows.streams if isinstance(rows, Mixed) else (rows,)
    key = files.digest([SCHEMA, rows.fingerprint, [s.fingerprint for s in held_out], run.audit.rows, run.step_rows, run.layout.dp,
                        run.length, run.tight, total, [s.path for s in run.data], [s.path for s in run.eval],
                        *([[s.path for s in part] for part in list(run.named.values())[2:]] if run.continual else [])])
    before = run.out / "audit.json"
    found = files.read_json(before) if before.is_file() else {}
    if found.get("key") != key:
        ours = [looked_at(run, shards, its, tokenizer) for shards, its in zip(train, streams, strict=True)]
        theirs = [looked_at(run, shards, None, tokenizer) for shards in held_out]
        found = {"schema": SCHEMA, "key": key, "parts": [figures for figures, _taken in (*ours, *theirs)],
                 "overlap": [audit.crossing(f"{figures['source']} · {figures['split']}", [taken for _figures, taken in ours], its)
                             for figures, its in theirs],
                 "batches": padding(run, rows), "mixture": mixture(run, rows, streams, total)}
    judged = findings.judge(found["parts"], found["overlap"], found["batches"], allowed=allowed(run), stop=run.audit.stop)
    found |= {"allowed": allowed(run), "findings": [one._asdict() for one in judged],
              "passed": not any(one.stops for one in judged)}
    files.write_json(before, found)
    return found


def looked_at(run: Run, shards: Shards, its: Stream | None, tokenizer: Tokenizer) -> tuple[dict[str, Any], audit.Sample]:
    """Return the figures of one split of a source, and the rows they were made of.  its: rows, as the run makes them."""
    source = next((s for sources in run.named.values() for s in sources if s.folder == shards.folder), None)
    task = source.task if source is not None else None
    its = its or stream(shards, run.objective, task=task, length=run.length, overlong=run.overlong, pack=run.pack, seed=None)
    taken = audit.sample(shards, tokenizer, room=its.room, overlong=run.overlong, most=run.audit.rows)
    name, says = source.path if source is not None else str(shards.folder), "lm" in single(run.objective, task).heads
    return audit.part(name, taken, counts=its.counts, room=its.room, says=says), taken


def padding(run: Run, rows: Stream | Mixed) -> dict[str, int]:
    """Return the places that batches of one epoch have for ids, and how many are filled; of the first BATCHES rows."""
    size = max(1, run.step_rows // run.layout.dp)
    number = min(rows.rows(0), BATCHES)
    number = number // size * size or number
    some = rows.streams[0] if isinstance(rows, Mixed) else rows
    lengths = np.array([sum(piece[2] + some.reserve for piece in plan.pieces)
                        for plan, _after in islice(rows.plans(rows.begin()), number)], np.int64)    # type: ignore[arg-type]
    if run.tight:
        places = sum(int(lengths[at : at + size].max()) * len(lengths[at : at + size]) for at in range(0, number, size))
    else:
        places = number * some.length
    return {"rows": number, "rows_of_a_batch": size, "places": places, "filled": int(lengths.sum())}


def mixture(run: Run, rows: Stream | Mixed, streams: Sequence[Stream], total: int) -> list[dict[str, Any]]:
    """Return for each source its share of the rows, and how often the run goes through it."""
    slots = np.bincount(rows.pattern, minlength=len(streams)) if isinstance(rows, Mixed) else np.array([SLOTS])
    return [{"source": source.path, "weight": source.weight, "share": int(n) / SLOTS, "rows": its.rows(0),
             "epochs": total * run.step_rows * int(n) / SLOTS / max(1, its.rows(0))}
            for source, its, n in zip(run.learned, streams, slots.tolist(), strict=True)]


def allowed(run: Run) -> dict[str, float]:
    """Return what share of the rows each finding may have."""
    of: Audit = run.audit
    return {"left_out": run.guard.rejects, "overlap": run.guard.overlap, "near_overlap": of.near_overlap, "masked": of.masked,
            "unended": of.unended, "double_bos": of.double_bos, "empty_answer": of.empty_answer, "duplicates": of.duplicates,
            "contradictions": of.contradictions, "cut": of.cut, "padding": of.padding, "unknown": of.unknown,
            "rarest": of.rarest, "garbled": of.garbled, "markup": of.markup}


def tell(found: Mapping[str, Any], to: Path) -> None:
    """Say in a line what was found; raise DataError if something of it stops the run."""
    listed = [Finding(**one) for one in found["findings"]]
    told = "; ".join(f"{one.source}: {one.what}" if one.source else one.what for one in listed if not one.stops)
    if told:
        say(_("audit: {told} ({file})").format(told=told, file=to))
    bad = [one for one in listed if one.stops]
    if not bad:
        return
    raise DataError("; ".join(_shown(one) for one in bad), where=bad[0].source,
                    fix="; ".join(dict.fromkeys(one.fix for one in bad)))


def _shown(one: Finding) -> str:
    rows = ", ".join(example["where"] for example in one.examples)
    return f"{one.what}: {rows}" if rows else one.what


def digest(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the receipt says of an audit; the whole stands in audit.json."""
    return {"findings": {f"{one['name']} {one['source']}".strip(): f"{one['n']}/{one['of']}" for one in found["findings"]},
            "overlap": {one["held_out"]: one["exact"] / max(1, one["documents"]) for one in found["overlap"]},
            "near_overlap": {one["held_out"]: one["near"] / max(1, one["near_looked_for"]) for one in found["overlap"]},
            "padding": 1 - found["batches"]["filled"] / max(1, found["batches"]["places"])}
