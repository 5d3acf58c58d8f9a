"""The rows of one split on their way into shards.  A shard's end depends on its rows alone, not on how they arrived."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from danlu.data import shards
from danlu.data.shards import COLUMNS, DOCUMENTS, Entry
from danlu.fault import fault

Array = NDArray[Any]


class Shelf:
    """Gathers rows and writes `folder/split/00000.safetensors …`; holds less than one shard and one block."""

    def __init__(self, folder: Path, split: str, *, dtype: str, tokens: int, labels: bool) -> None:
        self.folder, self.split, self.dtype, self.limit = folder, split, np.dtype(dtype), tokens
        self.kinds: Mapping[str, str] = {**COLUMNS, **({"label": "int32"} if labels else {})}
        self.entries: list[Entry] = []
        self._set({"ids": np.zeros(0, dtype), "counts": np.zeros(0, np.int64),
                   **{name: np.zeros(0, kind) for name, kind in self.kinds.items()}})

    def _set(self, arrays: Mapping[str, Array]) -> None:
        self._held: dict[str, list[Array]] = {name: [array] for name, array in arrays.items()}
        self._tokens, self._rows = len(arrays["ids"]), len(arrays["counts"])

    def add(self, ids: Array, counts: Array, **columns: Array) -> bool:
        """Append rows: ids of all [tokens], ids in each [rows], columns [rows].  Return whether a shard was written."""
        for name, array in ("ids", ids), ("counts", counts), *columns.items():
            self._held[name].append(array)
        self._tokens += len(ids)
        self._rows += len(counts)
        if self._tokens < self.limit and self._rows < DOCUMENTS:
            return False
        held = self.held()
        while len(held["counts"]) and (len(held["ids"]) >= self.limit or len(held["counts"]) >= DOCUMENTS):
            rows = int(np.searchsorted(np.cumsum(held["counts"]), self.limit)) + 1
            rows = min(rows, DOCUMENTS, len(held["counts"]))
            ends = dict.fromkeys(held, rows) | {"ids": int(held["counts"][:rows].sum())}
            self._write({name: array[: ends[name]] for name, array in held.items()})
            held = {name: array[ends[name]:].copy() for name, array in held.items()}
        self._set(held)
        return True

    def held(self) -> dict[str, Array]:
        """Return the rows that are in no shard yet, as one array a column."""
        return {name: np.concatenate(arrays) for name, arrays in self._held.items()}

    def restore(self, entries: list[Entry], held: Mapping[str, Array]) -> None:
        """Go on from where another shelf stood."""
        self.entries = entries
        self._set({name: np.array(array) for name, array in held.items()})

    def close(self) -> list[Entry]:
        """Write the rest; return every shard."""
        held = self.held()
        if len(held["counts"]):
            self._write(held)
        self._held.clear()
        return self.entries

    def _write(self, held: Mapping[str, Array]) -> None:
        offsets = np.zeros(len(held["counts"]) + 1, np.int64)
        np.cumsum(held["counts"], out=offsets[1:])
        arrays = {"ids": held["ids"].astype(self.dtype, copy=False), "offsets": offsets,
                  **{name: held[name].astype(kind, copy=False) for name, kind in self.kinds.items()}}
        folder = self.folder / self.split
        folder.mkdir(exist_ok=True)
        self.entries.append(shards.write(folder, len(self.entries), arrays))
        fault("prepare.shard")
