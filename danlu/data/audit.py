"""What a run would learn from, counted on prepared data: each source and split on its own.

Token counts are made of a sample of the rows, evenly spaced, where there are more than `most` of them or more than
TOKENS ids; `looked_at` says of how many.  Everything else is counted in full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from danlu import files
from danlu.data import overlap
from danlu.data.overlap import Array
from danlu.data.shards import Shards
from danlu.data.stream import Overlong
from danlu.data.tokenizer import Tokenizer

TOKENS = 1 << 23                                         # ids that are looked at, of one source
NEAR = 1 << 21                                           # ids of rows that are compared for being nearly the same
LONGEST = 1 << 20                                        # ids of one document that are looked at
QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
REJECTS = 100_000                                        # lines that are looked through for examples
SHOWN = 5                                                # examples of each
WIDE = 48                                                # tokens of an excerpt
Mask = NDArray[np.bool_]


class Marks(NamedTuple):
    """What the tokens of a vocabulary are.  [size] each."""

    special: Mask
    ends: Mask                                           # may end what a model says
    blank: Mask                                          # white space only
    opens: tuple[int, ...]                               # ids that open a row: bos, cls
    first: int | None                                    # the id that every document begins with, if the tokenizer adds one
    closes: bool                                         # whether the tokenizer ends every document
    unknown: int | None


def marks(tokenizer: Tokenizer) -> Marks:
    """Return what the tokens of a tokenizer are."""
    special = tokenizer.special
    ends = special.reserved & np.array([bool(piece) for piece in tokenizer.pieces])
    for one in (special.bos, special.pad, special.unk, special.cls, special.mask):
        if one is not None:
            ends[one] = False
    for one in (special.eos, special.sep):
        if one is not None:
            ends[one] = True
    blank = np.array([bool(piece) and not piece.strip() for piece in tokenizer.pieces]) & ~special.reserved
    opens = tuple(dict.fromkeys(i for i in (special.bos, special.cls) if i is not None))
    return Marks(special.reserved, ends, blank, opens, special.bos if tokenizer.add_bos else None, tokenizer.add_eos, special.unk)


class Sample(NamedTuple):
    """Rows of a split that are looked at, as far as they are learned from."""

    shards: Shards
    tokenizer: Tokenizer
    numbers: Array                                       # of the documents
    rows: overlap.Rows
    learned: Mask                                        # [ids]
    whole: Mask                                          # [rows] whether nothing of it was cut off

    def where(self, row: int) -> str:
        """Return "file:line" of a row."""
        return self.shards.where(int(self.numbers[row]))


def sample(shards: Shards, tokenizer: Tokenizer, *, room: int, overlong: Overlong, most: int) -> Sample:
    """Return at most `most` documents and about TOKENS ids, evenly spaced; such as the run drops or has no ids are none."""
    lengths = shards.lengths()
    kept = np.minimum(lengths, room) if overlong == "cut" else lengths
    there = np.flatnonzero((lengths > 0) & ((lengths <= room) | (overlong != "drop")))
    size = np.minimum(kept, LONGEST)
    number = len(there)
    for _turn in range(2):                               # the mean of a sample is not quite that of all
        mean = float(size[there].mean()) if number else 1.0
        number = max(1, min(number, most, int(TOKENS / max(mean, 1.0))))
        there = there[np.linspace(0, len(there) - 1, number).round().astype(np.int64)] if len(there) else there
    ids, learned = [], []
    tagged = "tags" in shards.answers
    for document in there.tolist():
        end = int(size[document])
        part, weights = shards.part(document, 0, end)
        ids.append(part)
        learned.append(shards.answer("tags", document, 0, end) >= 0 if tagged
                       else np.ones(end, bool) if weights is None else weights > 0)
    return Sample(shards, tokenizer, there, overlap.rows(ids), np.concatenate([np.zeros(0, bool), *learned]),
                  size[there] == lengths[there])


def _sums(of: Mask, rows: overlap.Rows) -> Array:
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(of)])
    found: Array = total[rows.offsets[1:]] - total[rows.offsets[:-1]]
    return found


def flaws(taken: Sample, by: Marks, *, says: bool) -> dict[str, Mask]:
    """Return which rows have which flaw [rows].  says: whether the model learns to say them, so that it must learn to end."""
    rows, learned = taken.rows, taken.learned
    ids = np.minimum(rows.ids, len(by.special) - 1)
    first, sizes = rows.offsets[:-1], np.diff(rows.offsets)
    amount = _sums(learned, rows)
    found = {"masked": amount == 0}
    second = np.minimum(first + 1, len(ids) - 1)
    found["double_bos"] = np.isin(ids[first], by.opens) & (ids[second] == ids[first]) & (sizes > 1)
    if by.first is not None:
        found["no_bos"] = ids[first] != by.first
    if says and by.ends.any():
        place = np.where(learned & ~by.blank[ids], np.arange(len(ids)), -1)
        last = np.maximum.reduceat(place, first) if len(first) else first
        ended = by.ends[ids[last]] & (last >= 0)
        partly = (amount > 0) & (amount < sizes - 1)     # of a conversation; a text alone may lack the place of bos
        found["unended"] = ~ended & (partly | ((amount > 0) & taken.whole & by.closes))
        found["empty_answer"] = partly & (_sums(learned & ~by.special[ids], rows) == 0)
    return found


def labels(shards: Shards) -> dict[str, Any] | None:
    """Return the balance of the classes, or the spread of the scores; None where rows have neither."""
    names = list(shards.manifest.get("labels") or [])
    column = next((name for name in ("label", "tags") if name in shards.answers), None)
    if column is None:
        return None
    if not names:
        scores = shards.column("label").astype(np.float64)
        return {"scores": {str(q): float(np.quantile(scores, q / 100)) for q in QUANTILES}, "mean": float(scores.mean()),
                "constant": bool(scores.min() == scores.max())} if len(scores) else None
    counts = shards.tally(column, len(names))
    total = int(counts.sum())
    several = column == "label" and shards.documents > 0 and shards.answer("label", 0, 0, 0).ndim == 1
    least = int(counts.argmin())
    return {"counts": dict(zip(names, counts.tolist(), strict=True)), "rarest": names[least],
            "total": shards.documents if several else total,
            "constant": int((counts > 0).sum()) == 1 and not several,
            "majority_accuracy": None if several or not total else int(counts.max()) / total}


def contradicting(taken: Sample, first: Array) -> Mask:
    """Return which rows [rows] have another class or other tags than the first row of the same ids."""
    shards = taken.shards
    names = [name for name in ("label", "tags", "answer") if name in shards.answers]
    names = [name for name in names if name != "label" or shards.manifest.get("labels")]     # scores may differ a little
    found = np.zeros(len(first), bool)
    sizes = np.diff(taken.rows.offsets)
    for row in np.flatnonzero(first != np.arange(len(first))).tolist():
        a, b, size = int(taken.numbers[row]), int(taken.numbers[first[row]]), int(sizes[row])
        found[row] = any(not np.array_equal(shards.answer(n, a, 0, size), shards.answer(n, b, 0, size)) for n in names)
    return found


def picked(taken: Sample, which: Array) -> tuple[overlap.Rows, Array]:
    """Return the rows `which` of a sample, evenly thinned to about NEAR ids, and their numbers in it."""
    sizes = np.diff(taken.rows.offsets)[which]
    number = len(which) if sizes.sum() <= NEAR else max(1, int(len(which) * NEAR / sizes.sum()))
    if number < len(which):
        which = which[np.linspace(0, len(which) - 1, number).round().astype(np.int64)]
    return overlap.rows([taken.rows.ids[taken.rows.offsets[i] : taken.rows.offsets[i + 1]] for i in which.tolist()]), which


def part(name: str, taken: Sample, *, counts: Mapping[str, int], room: int, says: bool) -> dict[str, Any]:
    """Return the figures of one split of a source, JSON-ready.  counts: what became of its documents on the way to rows."""
    shards = taken.shards
    by, lengths, said = marks(taken.tokenizer), shards.lengths(), told(shards)
    ids = taken.rows.ids
    found: dict[str, Any] = {
        "source": name, "split": shards.split, "folder": str(shards.folder), "read": said["read"], "left_out": said["left_out"],
        "documents": shards.documents, "tokens": shards.tokens, "room": room, "looked_at": taken.rows.number,
        "empty": counts["empty"], "rows": counts["pieces"], "split_up": counts["split"], "dropped": counts["dropped"],
        "cut": said["cut"] + counts["cut"], "tokens_lost": said["lost"] + counts["tokens_lost"],
        "lengths": {str(q): int(np.quantile(lengths, q / 100, method="lower")) for q in QUANTILES} if len(lengths) else {},
        "learned": float(taken.learned.mean()) if len(ids) else 0.0,
        "tokens_looked_at": len(ids), "unknown": 0 if by.unknown is None else int((ids == by.unknown).sum()),
        "labels": labels(shards), **said["flaws"], "examples": said["examples"]}
    if len(lengths):
        longest = int(lengths.argmax())
        found["longest"] = {"where": shards.where(longest), "tokens": int(lengths[longest])}
    for what, which in (flaws(taken, by, says=says) if taken.rows.number else {}).items():
        _show(found, what, taken, np.flatnonzero(which))
    _twice(found, taken)
    return found


def _show(found: dict[str, Any], what: str, taken: Sample, which: Array, *, beside: tuple[str, Mapping[int, int]] = ("", {})
          ) -> None:
    """Write down how many rows there are of a kind, and the first of them, with the row that each is compared with."""
    sign, partners = beside
    found[what] = len(which)
    if len(which):
        found["examples"][what] = [{
            "where": taken.where(row) + (f" {sign} {taken.where(partners[row])}" if row in partners else ""),
            "text": excerpt(taken, row)} for row in which[:SHOWN].tolist()]


def _twice(found: dict[str, Any], taken: Sample) -> None:
    """Write down which rows stand there already: the same, with another class, nearly the same."""
    number = taken.rows.number
    first = overlap.first_of(overlap.hashes(taken.rows))
    again = np.flatnonzero(first != np.arange(number))
    partners = dict(enumerate(first.tolist()))
    _show(found, "duplicates", taken, again, beside=("=", partners))
    _show(found, "contradictions", taken, np.flatnonzero(contradicting(taken, first)), beside=("≠", partners))
    found["distinct"] = number - len(again)
    single, which = picked(taken, np.setdiff1d(np.arange(number), again))
    a, b, found["near_compared"] = overlap.alike(single, overlap.index(single), same=True)
    twins = {int(which[i]): int(which[j]) for i, j in zip(a[::-1], b[::-1], strict=True)}
    _show(found, "near_duplicates", taken, np.array(sorted(twins), np.int64), beside=("≈", twins))


def told(shards: Shards) -> dict[str, Any]:
    """Return what the making of a folder counted: rows read, left out and why, cut; flaws of the texts."""
    found: dict[str, Any] = {"read": None, "left_out": {}, "cut": 0, "lost": 0, "flaws": {}, "examples": {}}
    account, report = shards.folder / "audit.json", shards.folder / "report.json"
    if account.is_file():
        said = files.read_json(account)
        here = said["splits"].get(shards.split, {})
        found |= {"read": said["read"], "left_out": said["rejected"], "cut": here.get("cut", 0), "lost": here.get("lost", 0)}
        for name, one in here.get("flaws", {}).items():
            found["flaws"][name] = one["rows"]
            found["examples"][name] = one["examples"]
    elif report.is_file():
        said = files.read_json(report)
        found |= {"read": said.get("rows", {}).get("read"), "left_out": dict(said.get("rejects", {}))}
    shown = Counter[str]()
    for one in islice(files.read_lines(shards.folder / "rejects.jsonl"), REJECTS) if account.is_file() else ():
        shown[one["reason"]] += 1
        if shown[one["reason"]] <= SHOWN:
            found["examples"].setdefault("left_out", []).append(
                {"where": f"{one['file']}:{one['line']}", "text": f"{one['reason']}: {one['detail']}"})
    return found


def excerpt(taken: Sample, row: int) -> str:
    """Return a stretch of a row's text around the end of what is learned; the learned part stands in ⟦ ⟧."""
    start, stop = int(taken.rows.offsets[row]), int(taken.rows.offsets[row + 1])
    ids, learned = taken.rows.ids[start:stop], taken.learned[start:stop]
    end = min(len(ids), int(np.flatnonzero(learned)[-1]) + WIDE // 4) if learned.any() else len(ids)
    begin = max(0, end - WIDE)
    ids, learned = ids[begin:end], learned[begin:end]
    cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    marked = bool(learned.any()) and not taken.learned[start:stop].all()
    said = [("⟦{}⟧" if marked and learned[a] else "{}").format(taken.tokenizer.decode(ids[a:b]))
            for a, b in pairwise(cuts) if a < b]
    return ("…" if begin else "") + "".join(said) + ("…" if end < stop - start else "")


def crossing(name: str, train: Sequence[Sample], theirs: Sample) -> dict[str, Any]:
    """Return how many evaluation documents stand in the training data too, word for word (all of it) or nearly (samples)."""
    held_out = theirs.shards
    same, of = overlap.shared([taken.shards for taken in train], held_out)
    single, which = picked(theirs, np.arange(theirs.rows.number))
    others = overlap.index(single)
    found: dict[int, str] = {}
    compared = 0
    for taken in train:
        ours, mine = picked(taken, np.arange(taken.rows.number))
        a, b, number = overlap.alike(ours, others)
        compared += number
        for row, partner in zip(mine[a].tolist(), which[b].tolist(), strict=True):
            found.setdefault(partner, taken.where(row))
    keys, known = overlap.hashes(theirs.rows), set(same)
    exact = {int(keys[i]) for i, number in enumerate(theirs.numbers.tolist()) if number in known}   # equal ones count once
    near = [i for i in sorted(found) if int(keys[i]) not in exact]
    return {"held_out": name, "documents": of, "exact": len(same), "near": len(near), "near_looked_for": single.number,
            "compared_with": compared, "examples": {
                "overlap": [{"where": held_out.where(n), "text": theirs.tokenizer.decode(held_out.document(n).ids[:WIDE])}
                            for n in same[:SHOWN]],
                "near_overlap": [{"where": f"{theirs.where(i)} ≈ {found[i]}", "text": excerpt(theirs, i)}
                                 for i in near[:SHOWN]]}}
