"""From a run to a smaller model in a folder of its own: changed, compared with what it was, written with a receipt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from danlu import config, files
from danlu.adapt import folder as adapters
from danlu.compress import folder
from danlu.compress.compare import Distance, distance, numbers
from danlu.compress.rows import Rows
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.evaluate import calibrate, rows
from danlu.evaluate.subject import Subject, open_subject
from danlu.models import weights
from danlu.train import receipt
from danlu.words import _

Change = Callable[[Any, Rows], Any]                      # a model and rows to calibrate by (perhaps none) to the smaller model


@dataclass(frozen=True)
class Smaller:
    """A smaller model in its folder, beside what it was made from."""

    folder: Path
    source: Path
    sizes: tuple[int, int]                               # bytes of the weights, before and after
    numbers: tuple[tuple[int, int], tuple[int, int]]     # weights and those that are not zero, before and after
    distance: Distance
    rows: str                                            # where those it was compared on are from
    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        parts = {when: {"bytes": self.sizes[i], "parameters": self.numbers[i][0], "nonzero": self.numbers[i][1]}
                 for i, when in enumerate(("before", "after"))}
        return {"folder": str(self.folder), "source": str(self.source), **parts, "distance": self.distance.record(),
                "rows": self.rows, "seconds": round(self.seconds, 3), **self.notes}


def opened(run: Path) -> Subject:
    """Return what is made smaller, ready to compute; an adapter is merged into its base.  ConfigError: its weights are packed."""
    subject = open_subject(run)
    if (subject.folder / weights.PACKED).is_file() and any(
            form["form"]["kind"] not in ("cut", "bits", "low") or form["form"].get("rounded") for form in
            weights.forms_in(weights.read_json(subject.folder / "config.json")) or []):
        raise ConfigError(_("the weights are packed already"), where=str(run),
                          fix=_("start from the model that they were packed from"))
    subject.model = fresh(subject) if adapters.is_adapter(subject.folder) else subject.model.eval()
    return subject


def fresh(subject: Subject, *, learned: bool = False) -> Any:
    """Return the subject's model, read anew.  learned: of one that learned to be rounded, the weights that learned."""
    if learned and adapters.rounding(subject.folder) is not None:
        return weights.load(subject.folder).eval()
    merged = adapters.is_adapter(subject.folder)
    return adapters.load(subject.folder, merged=merged).eval()


def make(run: Path, out: Path, *, verb: str, how: Model, change: Change, data: str | None, count: int, reading: rows.How,
         dtype: str | None = None, sparse: bool = False) -> Smaller:
    """Write to `out` what `change` makes of the model of `run`, and return how far it is from it.

    data: rows to calibrate by and, every fifth of them, to compare on; None: those of the run, if they are still there.
    """
    if out.exists():
        raise ConfigError(_("the folder exists already"), where=str(out), fix=_("choose another name, or remove it"))
    began, subject = time.perf_counter(), opened(run)
    both = calibrate.both(subject, data, count=count, how=reading)
    made = change(fresh(subject, learned=verb == "quantize"), both.given)
    return write(subject, made, out, verb=verb, options=how.model_dump(mode="json"), both=both, dtype=dtype, sparse=sparse,
                 began=began)


def write(subject: Subject, made: Any, out: Path, *, verb: str, options: Any, both: calibrate.Both, dtype: str | None = None,
          sparse: bool = False, began: float | None = None) -> Smaller:
    """Write to `out` what was made of the subject's model, which is still whole; return how far both are apart."""
    began = time.perf_counter() if began is None else began
    found, before = distance(subject.model, made, both.aside), numbers(subject.model)
    told = {"schema": 1, "kind": verb, "options": options, "source": folder.source(subject.folder),
            "tokenizer": subject.tokenizer.sha256, "rows": both.said, "distance": found.record(), "machine": receipt.machine(),
            "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    size = folder.write(out, made, receipt=told, run=None if subject.run is None else config.dump(subject.run),
                        tokenizer=home(subject), dtype=dtype or folder.dtype_of(subject.folder), sparse=sparse)
    result = Smaller(out, subject.folder, (folder.size(subject.folder), size), (before, numbers(made)), found, both.said,
                     time.perf_counter() - began)
    whole = files.read_json(out / "run.json")
    files.write_json(out / "run.json", whole | {key: result.record()[key] for key in ("before", "after")})
    return result


def home(subject: Subject) -> Path | None:
    """Return where the files of the subject's tokenizer are, if it has any."""
    place = adapters.tokenizer_in(subject.folder)
    return place if (place / "tokenizer.json").is_file() else None


def show(found: Smaller) -> None:
    """Print what it was and what it is, and how far both are apart."""
    console, table = Console(), Table(title=f"{found.source} → {found.folder}", title_justify="left")
    for name in ("", _("before"), _("after"), _("share")):
        table.add_column(name, justify="right" if name else "left")
    pairs: list[tuple[str, tuple[float, float], str]] = [(_("megabytes"), (found.sizes[0] / 1e6, found.sizes[1] / 1e6), ",.2f"),
             (_("weights"), (found.numbers[0][0], found.numbers[1][0]), ",d"),
             (_("… that are not zero"), (found.numbers[0][1], found.numbers[1][1]), ",d")]
    for name, (before, after), shape in pairs:
        table.add_row(name, format(before, shape), format(after, shape), f"{after / before:.1%}")
    console.print(table)
    console.print(told(found.distance, found.rows), highlight=False, markup=False)


def told(found: Distance, place: str) -> str:
    """Return how far two models are apart, as people read it."""
    parts = [_("{place}: at most {difference:.3g} apart (largest number said: {largest:.3g})").format(
        place=place, difference=found.difference, largest=found.largest)]
    if found.divergence is not None and found.agreement is not None:
        parts.append(_("KL {kl:.3g} nats, the same likeliest in {agreement:.2%} of {n}").format(
            kl=found.divergence, agreement=found.agreement, n=found.compared))
    return "; ".join(parts)
