"""What each way of making a model smaller costs and gains, measured here: size, time, quality; and which to take.

B rows of a batch, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from danlu.compress.factorize import Factorize, factorize
from danlu.compress.prune import Prune, prune
from danlu.compress.quantize import Quantize, quantize
from danlu.compress.rows import Rows
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.evaluate import rows, written
from danlu.evaluate import run as on_text
from danlu.evaluate.interval import Estimate
from danlu.evaluate.subject import Subject, open_subject
from danlu.figures import HIGHER
from danlu.models.decoder import DecoderModel
from danlu.nn.cache import Cache
from danlu.words import _

ONE_SIDED = ("precision", "recall")                      # figures that are whole where almost nothing is found, or everything
BATCH, TIMES, SECONDS = 32, 30, 2.0                      # rows at a time; how often one is timed, or for how long
Step = Quantize | Prune | Factorize


@dataclass(frozen=True)
class Way:
    """A name and what is done, one after the other; `dtype`: of the weights that are not packed."""

    name: str
    steps: tuple[Step, ...] = ()
    dtype: Literal["fp32", "bf16"] | None = None


@dataclass(frozen=True)
class Measured:
    """A way, and what was measured of it."""

    way: Way
    bytes: int
    latency: float                                       # seconds, the median at batch 1: of a row, or of one more token
    rate: float                                          # rows a second at batch 32, or tokens read
    figure: str                                          # the quality's name
    quality: Estimate

    @property
    def better(self) -> float:
        """The quality, so that more is better."""
        return self.quality.value if HIGHER[self.figure] else -self.quality.value

    @property
    def worst(self) -> float:
        """The end of its interval on the bad side, so that more is better."""
        end = self.quality.low if HIGHER[self.figure] else self.quality.high
        return self.better if end is None else end if HIGHER[self.figure] else -end

    def record(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {"way": self.way.name, "steps": [step.model_dump(mode="json") for step in self.way.steps], "bytes": self.bytes,
                "latency": self.latency, "rate": self.rate, "figure": self.figure, "quality": self.quality.value,
                "interval": [self.quality.low, self.quality.high]}


class Target(Model):
    """What the model must fit into: bytes of its weights, seconds of its latency."""

    size: float | None = None
    latency: float | None = None

    def met(self, found: Measured) -> bool:
        """Return whether a measured model fits."""
        return (self.size is None or found.bytes <= self.size) and (self.latency is None or found.latency <= self.latency)

    def cost(self, found: Measured) -> float:
        """Return how much of what is scarce it takes: time where that is the target, else room."""
        return found.bytes if self.latency is None else found.latency


_UNITS = {"size": {"GB": 1e9, "MB": 1e6, "KB": 1e3, "B": 1.0}, "latency": {"ms": 1e-3, "us": 1e-6, "s": 1.0}}


def target(texts: Sequence[str]) -> Target:
    """Return what texts such as size=50MB and latency=5ms mean.  Raises ConfigError for others."""
    found: dict[str, float] = {}
    for text in texts:
        key, _sign, value = text.partition("=")
        unit = next((u for u in _UNITS.get(key, ()) if value.lower().endswith(u.lower())), None)
        try:
            number = float(value[: -len(unit)]) * _UNITS[key][unit] if unit is not None else 0.0
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise ConfigError(_("{given!r} is no target").format(given=text), where="--target", fix="size=50MB, latency=5ms")
        found[key] = number
    return Target(**found)


def ways(model: Any, calibrated: bool) -> list[Way]:
    """Return the combinations that make sense for a model.  calibrated: there are rows that methods may look at."""
    four = Quantize(bits=4, method="gptq" if calibrated else "rtn")
    eight, dynamic = Quantize(), Quantize(method="dynamic")
    found = [Way("as it is"), Way("bf16", dtype="bf16"), Way("int8", (eight,)), Way("int8 dynamic", (dynamic,)),
             Way(f"int4 {four.method}", (four,)), Way("nf4", (Quantize(bits=4, method="nf4"),))]
    found += [Way("int4 awq", (Quantize(bits=4, method="awq"),))] if calibrated else []
    found += [Way(f"factorised {error:.0%}", (Factorize(error=error),)) for error in (0.1, 0.2)]
    if model.cfg.kind == "foreign":
        return found
    heads = model.blocks[0].attention.k.out_features // model.blocks[0].attention.head_width
    parts = [Prune(method="ffn", sparsity=share) for share in (0.25, 0.5)]
    parts += [Prune(method="heads", sparsity=share) for share in (0.25, 0.5) if 0 < round(share * heads) < heads]
    if calibrated:
        layers = model.cfg.layers
        parts += [Prune(method="layers", sparsity=share) for share in (0.25, 0.5) if 0 < round(share * layers) < layers]
    for part in parts:
        name = f"{part.method} -{part.sparsity:.0%}"
        found += [Way(name, (part,)), Way(f"{name}, int8 dynamic", (part, dynamic))]
    return found


def made(model: Any, way: Way, given: Rows) -> Any:
    """Return what `way` makes of a model, which may be changed in place.  ConfigError: it would not be smaller."""
    for step in way.steps:
        if isinstance(step, Prune):
            model = prune(model, step, given)
        elif isinstance(step, Quantize):
            quantize(model, step, given)
        else:
            factorize(model, step, given)
    return model


def measure(way: Way, folder: Path, *, size: int, row: dict[str, Tensor], data: str, how: rows.How) -> Measured:
    """Return what is measured of the model in `folder`, opened as a user opens it.  row: the one that is timed, [1, T]."""
    subject = open_subject(folder)
    subject.model.eval()
    figure, quality = judged(subject, data, how)
    latency, rate = timed(subject.model, row)
    return Measured(way, size, latency, rate, figure, quality)


def judged(subject: Subject, data: str, how: rows.How) -> tuple[str, Estimate]:
    """Return the first figure of the subject's task on `data` that errors of every kind lower, or its perplexity."""
    device = torch.device("cpu")
    if subject.cfg.tasks:
        figures = rows.judged_on(rows.task_of(subject, how, device), data, how, lambda line: None).judged.figures
        return next((name, figure) for name, figure in figures.items() if not name.startswith(ONE_SIDED))
    found = written.of_answers(subject, data, how, device) or on_text.on_text(
        subject, data, split=how.split, sample_by="line", text=how.names.get("text", "text"), encoding=how.encoding,
        length=how.length, precision=how.precision, device=device)[0][0]
    figures = found.tally.estimates()
    name = "perplexity" if "perplexity" in figures else next(iter(figures))
    return name, figures[name]


@torch.inference_mode()
def timed(model: Any, row: dict[str, Tensor]) -> tuple[float, float]:
    """Return the median seconds of one row, or of a decoder's next token after it, and rows (tokens) a second of many."""
    writes = isinstance(model, DecoderModel) and model.cfg.lm
    if writes and row["ids"].shape[1] + 2 <= model.cfg.context:
        def once() -> None:
            model(row["ids"][:, -1:], cache=cache, last=True)
            for past in cache.layers:
                past.length = row["ids"].shape[1]        # the next one is written in the same place
        cache = Cache(model.cfg.layers, model.cfg.context)
        model(row["ids"], cache=cache, last=True)
    else:
        def once() -> None:
            model(**row)
    many = {name: column.expand(BATCH, *column.shape[1:]).contiguous() for name, column in row.items()}
    latency = statistics.median(_times(once))
    whole = statistics.median(_times(lambda: model(**many)))
    return latency, BATCH * (row["ids"].shape[1] if writes else 1) / whole


def _times(work: Any) -> list[float]:
    work()
    began, found = time.perf_counter(), list[float]()
    while len(found) < 5 or (len(found) < TIMES and time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def front(found: Sequence[Measured]) -> set[str]:
    """Return the names of the ways that none is better than in size, latency and quality alike."""
    def beaten(one: Measured, by: Measured) -> bool:
        pairs = ((by.bytes, one.bytes), (by.latency, one.latency), (-by.better, -one.better))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
    return {one.way.name for one in found if not any(beaten(one, other) for other in found)}


def chosen(found: Iterable[Measured], wanted: Target) -> Measured | None:
    """Return, of those that meet the target, the cheapest whose quality lies in the best one's interval; None: none does."""
    fit = [one for one in found if wanted.met(one)]
    if not fit:
        return None
    best = max(fit, key=lambda one: one.better)
    return min((one for one in fit if one.better >= best.worst), key=wanted.cost)


def typical(given: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the row of the median length."""
    return sorted(given, key=lambda row: row["ids"].shape[1])[len(given) // 2]


def tried(model: Any, calibrated: bool, only: Sequence[str]) -> Iterator[Way]:
    """Yield the ways of a model, those that `only` names if it names any.  Raises ConfigError for a name that is none."""
    known = {way.name: way for way in ways(model, calibrated)}
    if strange := sorted(set(only) - known.keys()):
        raise ConfigError(_("there is no way called {name!r}; there are {names}").format(name=strange[0], names=", ".join(known)),
                          where="--only")
    yield from (way for name, way in known.items() if not only or name in only)
