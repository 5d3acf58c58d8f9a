"""What became of every row: kept, rejected, dropped, a duplicate, in two splits; counted in the order of the inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from danlu.data.dedup import Digests, Seen
from danlu.data.split import NAMES
from danlu.data.work import Answer
from danlu.errors import DataError
from danlu.words import _

NONE: tuple[Digests, NDArray[np.uint8]] = (np.zeros((0, 2), np.uint64), np.zeros(0, np.uint8))
SHOWN = 5                                           # places that a message or report names
EARLY = 10_000                                      # rows after which a mostly bad input is given up before its end


@dataclass
class Totals:
    """Counts over all blocks so far."""

    read: int = 0
    blank: int = 0
    size: int = 0                                   # bytes of text read
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    leaks: Counter[str] = field(default_factory=Counter)        # "train+val": texts found in both
    leaked: list[str] = field(default_factory=list)             # where the first few stand
    bad: list[str] = field(default_factory=list)                # the first few rejects, as "file:line reason"
    rows: Counter[str] = field(default_factory=Counter)         # read, by number of the file
    marks: dict[str, str] = field(default_factory=dict)         # by number of the file, when it was read to its end
    broken: dict[str, str] = field(default_factory=dict)        # why a file ended early, by its number
    documents: Counter[str] = field(default_factory=Counter)    # by split
    tokens: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def record(self) -> dict[str, Any]:
        """Return the counts as JSON-ready values; `asdict` would count the items of a Counter."""
        return {one.name: dict(value) if isinstance(value := getattr(self, one.name), Counter) else value
                for one in fields(self)}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Totals:
        """Return the counts that `record` gave."""
        totals = cls()
        for name, value in data.items():
            setattr(totals, name, Counter(value) if isinstance(getattr(totals, name), Counter) else value)
        return totals


class Ledger:
    """Takes answers in order, decides which documents stay, and keeps the totals."""

    def __init__(self, names: list[str], *, rejects: float, dedup: bool, watch: bool, totals: Totals | None = None
                 ) -> None:
        self.names, self.rejects, self.dedup = names, rejects, dedup
        self.totals = totals or Totals()
        self.seen = Seen() if dedup or watch else None          # watch: texts may stand in two splits
        self.fresh = NONE                                       # fingerprints that the last answer brought first

    def take(self, answer: Answer) -> NDArray[np.bool_]:
        """Count an answer; return which of its rows [n] stay.  Raises DataError when most rows are bad."""
        totals, file = self.totals, str(answer.file)
        totals.read += answer.read
        totals.blank += answer.blank
        totals.size += answer.size
        totals.rejected.update(reject.reason for reject in answer.rejects)
        totals.dropped.update(answer.dropped)
        totals.rows[file] += answer.read
        for reject in answer.rejects[: SHOWN - len(totals.bad)]:
            totals.bad.append(f"{self.names[answer.file]}:{reject.line} {reject.reason} ({reject.detail})")
        if answer.last:
            totals.marks[file] = answer.mark
            if answer.broken:
                totals.broken[file] = answer.broken
        if totals.read >= EARLY and totals.rejected.total() > totals.read // 2:
            self.check_rejects()
        keep = self._fresh(answer)
        for part in np.unique(answer.part[keep]):
            rows = keep & (answer.part == part)
            totals.documents[NAMES[part]] += int(rows.sum())
            totals.tokens[NAMES[part]] += int(answer.counts[rows].sum()) if len(answer.counts) else 0
            totals.bytes[NAMES[part]] += int(answer.bytes[rows].sum(dtype=np.int64))
        return keep

    def _fresh(self, answer: Answer) -> NDArray[np.bool_]:
        self.fresh = NONE
        if self.seen is None or not len(answer.digests):
            return np.ones(len(answer.owner), bool)
        home = np.zeros(len(answer.digests), np.uint8)          # split of each document: that of its first row
        home[answer.owner[::-1]] = answer.part[::-1]
        known = self.seen.add(answer.digests, home)
        again = known >= 0
        self.fresh = answer.digests[~again], home[~again]
        for number in np.flatnonzero(again & (known != home)):
            pair = "+".join(NAMES[part] for part in sorted((int(known[number]), int(home[number]))))
            self.totals.leaks[pair] += 1
            if len(self.totals.leaked) < SHOWN:
                lines = answer.lines[answer.owner == number]
                self.totals.leaked += [f"{self.names[answer.file]}:{line} {pair}" for line in lines[:1]]
        if not self.dedup:
            return np.ones(len(answer.owner), bool)
        self.totals.duplicates += int(again.sum())
        return ~again[answer.owner]

    def check_rejects(self) -> None:
        """Raise DataError when a larger share of the rows was rejected than is allowed."""
        totals = self.totals
        bad = totals.rejected.total()
        if bad <= self.rejects * totals.read:
            return
        fix = _("mend the rows (rejects.jsonl lists them all), or raise `rejects`")
        if totals.rejected["encoding"] * 2 > bad:
            fix = _("say what the encoding is, for example `encoding: gb18030`")
        elif totals.rejected["no_column"] * 2 > bad:
            fix = _("name the column of the text with `text`")
        raise DataError(
            _("{bad} of {rows} rows were rejected, more than the share of {share:g} that `rejects` allows: {first}")
            .format(bad=bad, rows=totals.read, share=self.rejects, first="; ".join(totals.bad)),
            where=totals.bad[0].partition(" ")[0], fix=fix)

    def check_left(self) -> None:
        """Raise DataError when no row is left, or none to train on, naming the filter that took the most."""
        totals = self.totals
        if totals.documents["train"]:
            return
        if not totals.read:
            raise DataError(_("0 rows left: the inputs hold no row ({files} files)").format(files=len(self.names)),
                            where=self.names[0] if self.names else None, fix=_("check the inputs"))
        if totals.documents.total():
            raise DataError(_("0 rows left to train on after the split"), where=self.names[0],
                            fix=_("lower split.val and split.test, or add rows"))
        name, count = (totals.dropped + totals.rejected).most_common(1)[0]
        raise DataError(_("0 rows left after filter {name} ({count} of {rows} rows)").format(
            name=name, count=count, rows=totals.read), where=self.names[0], fix=_("loosen the filter under `clean`"))

    def report(self) -> dict[str, Any]:
        """Return the totals as report.json holds them."""
        totals = self.totals.record()
        by_file = [{"file": name, "rows": totals["rows"].get(str(number), 0)} | (
            {"broken": totals["broken"][str(number)]} if str(number) in totals["broken"] else {})
            for number, name in enumerate(self.names)]
        splits = {name: {key: totals[key].get(name, 0) for key in ("documents", "tokens", "bytes")} for name in NAMES}
        return {
            "rows": {"read": totals["read"], "blank": totals["blank"], "rejected": self.totals.rejected.total(),
                     "filtered": self.totals.dropped.total(), "duplicates": totals["duplicates"],
                     "kept": self.totals.documents.total()},
            "bytes_read": totals["size"], "rejects": dict(sorted(totals["rejected"].items())),
            "filters": dict(sorted(totals["dropped"].items())), "leaks": dict(sorted(totals["leaks"].items())),
            "leaked": totals["leaked"], "splits": {n: s for n, s in splits.items() if s["documents"]}, "files": by_file,
        }
