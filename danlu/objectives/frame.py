"""Rows of unequal length become columns [B, T]: numpy only, no loop over rows.

B rows, T tokens of a padded row, N ids of all rows together, P pieces (a piece = one document of a row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from danlu.data.tokenizer import Special
from danlu.errors import IncompatibleError
from danlu.objectives.protocol import Batch, Row
from danlu.words import _

Columns = dict[str, np.ndarray]     # as a Batch, still in numpy


@dataclass(frozen=True)
class Flat:
    """All rows end to end.  Arrays are [N] unless said otherwise."""

    ids: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    sizes: np.ndarray       # [B] ids in each row
    row: np.ndarray         # which row
    place: np.ndarray       # where in its row
    first: np.ndarray       # bool: the piece begins here


def flatten(rows: Sequence[Row]) -> Flat:
    """Return the rows end to end."""
    sizes = np.array([len(r["ids"]) for r in rows])
    ids = np.concatenate([r["ids"] for r in rows])
    segments = np.concatenate([r["segments"] for r in rows])
    row = np.repeat(np.arange(len(rows)), sizes)
    place = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    first = place == 0
    first[1:] |= segments[1:] != segments[:-1]
    return Flat(ids, np.concatenate([r["weights"] for r in rows]), segments, sizes, row, place, first)


def since(first: np.ndarray) -> np.ndarray:
    """Return, for each place, how far the last True of `first` lies back."""
    here = np.arange(len(first))
    return here - np.maximum.accumulate(np.where(first, here, 0))


def spread(values: np.ndarray, at: np.ndarray, shape: tuple[int, int], fill: float, dtype: type) -> np.ndarray:
    """Return [B, T] of `fill`, with `values` at the flat positions `at`."""
    out: np.ndarray = np.full(shape[0] * shape[1], fill, dtype)
    out[at] = values
    return out.reshape(shape)


def pad_id(vocab: Special) -> int:
    """Return the id that stands where nothing stands."""
    return 0 if vocab.pad is None else vocab.pad


def needed(vocab: Special, *names: str) -> tuple[int, ...]:
    """Return the ids of the special tokens called cls, sep, mask.  Raises IncompatibleError where one is missing."""
    ids = [getattr(vocab, name) for name in names]
    missing = [f"[{n.upper()}]" for n, i in zip(names, ids, strict=True) if i is None]
    if missing:
        raise IncompatibleError(
            _("the tokenizer has no {names} token, which this objective needs").format(names=", ".join(missing)),
            fix=_("use a tokenizer made for encoders, or set objective.kind: causal_lm"),
        )
    return tuple(ids)


def wrap(rows: Sequence[Row], vocab: Special, length: int) -> Columns:
    """Return each piece as [CLS] piece [SEP]; a mark that is there already is not written twice.

    Columns: ids, weights, segments, positions, all [B, T].  Marks have weight 0.
    """
    cls, sep = needed(vocab, "cls", "sep")
    flat = flatten(rows)
    start = np.flatnonzero(flat.first)                                  # [P]
    end = np.append(start[1:], len(flat.ids)) - 1                       # [P]
    left = (flat.ids[start] != cls).astype(np.int64)                    # [P] marks to add
    right = (flat.ids[end] != sep).astype(np.int64)
    added = left + np.append(0, right[:-1])                             # added before each piece, over all rows …
    before = np.cumsum(added)
    opens = flat.place[start] == 0
    carried = np.maximum.accumulate(np.where(opens, before - left, 0))  # … of which in earlier rows
    shift = np.zeros(len(flat.ids), np.int64)
    shift[start] = np.diff(before - carried, prepend=0)
    place = flat.place + np.cumsum(shift)
    assert not len(place) or place.max() + right[-1] <= length, "a row does not fit: ask room() for its size"

    shape = (len(rows), length)
    at = flat.row * length + place
    lefts, rights = at[start[left == 1]] - 1, at[end[right == 1]] + 1
    every = np.concatenate([at, lefts, rights])
    marks = np.zeros(len(lefts) + len(rights), np.float32)
    ids = np.concatenate([flat.ids, np.full(len(lefts), cls), np.full(len(rights), sep)])
    segments = np.concatenate([flat.segments, flat.segments[start[left == 1]], flat.segments[end[right == 1]]])
    columns = {
        "ids": spread(ids, every, shape, pad_id(vocab), np.int64),
        "weights": spread(np.concatenate([flat.weights, marks]), every, shape, 0, np.float32),
        "segments": spread(segments, every, shape, 0, np.int32),
    }
    return columns | {"positions": restart(columns["segments"])}


def rectangle(rows: Sequence[Row], vocab: Special, length: int) -> Columns:
    """Return whole rows as they are, padded at their ends: ids, segments, positions [B, T], ends [B] (the last token).

    types [B, T] too where rows have two stretches: 0 in the first, 1 in the second.
    """
    flat = flatten(rows)
    assert flat.sizes.max() <= length, "a row does not fit: ask room() for its size"
    at, shape = flat.row * length + flat.place, (len(rows), length)
    segments = spread(np.ones(len(at), np.int32), at, shape, 0, np.int32)
    columns = {"ids": spread(flat.ids, at, shape, pad_id(vocab), np.int64), "segments": segments,
               "positions": restart(segments), "ends": flat.sizes - 1}
    parts = [row["parts"] for row in rows if "parts" in row]
    if parts and any(part[1:].any() for part in parts):
        border = np.repeat([part[0] for part in parts], flat.sizes)
        columns["types"] = spread((flat.place >= border).astype(np.int64), at, shape, 0, np.int64)
    return columns


def stretched(rows: Sequence[Row], vocab: Special, length: int, sizes: np.ndarray) -> Columns:
    """Return rows of several texts that do not see each other; sizes [B, P]: how many ids each has, 0 for no text.

    ids, segments (text p is p + 1), positions [B, T]; of each text the first and the last token: starts, ends [B, P], 0 for
    no text, and there [B, P]: 1 where there is one.
    """
    flat = flatten(rows)
    assert (sizes.sum(1) == flat.sizes).all() and flat.sizes.max() <= length, "parts and ids of a row belong together"
    at, shape = flat.row * length + flat.place, (len(rows), length)
    segments = spread(np.repeat(np.tile(np.arange(1, sizes.shape[1] + 1), len(rows)), sizes.ravel()), at, shape, 0, np.int32)
    stops = sizes.cumsum(1)
    there = sizes > 0
    return {"ids": spread(flat.ids, at, shape, pad_id(vocab), np.int64), "segments": segments, "positions": restart(segments),
            "starts": np.where(there, stops - sizes, 0).astype(np.int64), "ends": np.where(there, stops - 1, 0).astype(np.int64),
            "there": there.astype(np.uint8)}


def padded(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return a column of lists of unequal length as [B, P], with zeros at their ends and none that no row needs."""
    out = np.zeros((len(rows), max(len(row[name]) for row in rows)), np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row[name])] = row[name]
    return out[:, : int(np.flatnonzero(out.any(0))[-1]) + 1]


def labels_of(rows: Sequence[Row], kind: type) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels [B] and their weights [B]: 0 where a row has none, since it is to be predicted."""
    known = np.array(["label" in row for row in rows])
    return np.array([row.get("label", 0) for row in rows], kind), known.astype(np.float32)


def origin(rows: Sequence[Row]) -> Columns:
    """Return where the rows come from, for judging them: row_weights [B] (0 for a row that only fills the batch), and
    example [B], window [B, 3] where they have it."""
    found = {name: np.stack([row[name] for row in rows]).astype(np.int64)
             for name in ("example", "window") if all(name in row for row in rows)}
    return found | {"row_weights": np.ones(len(rows), np.float32)}


def restart(segments: np.ndarray) -> np.ndarray:
    """Return positions [B, T] that start from 0 in each segment; 0 on padding."""
    first = np.ones(segments.shape, bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return np.where(segments > 0, since(first.ravel()).reshape(segments.shape), 0)


def to_batch(columns: Mapping[str, np.ndarray]) -> Batch:
    """Return the columns as tensors, without `positions` and `segments` where every row is one full document."""
    segments = columns["segments"]
    whole = segments.size > 0 and bool((segments == segments[:, :1]).all()) and bool((segments[:, 0] > 0).all())
    drop = ("positions", "segments") if whole else ()
    return {name: torch.from_numpy(column) for name, column in columns.items() if name not in drop}
