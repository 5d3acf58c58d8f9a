"""How well stretches of words are found and named (people, places …): seqeval's figures (extra `metrics`) with intervals.

Sentences are drawn for the intervals, for spans of one sentence depend on each other.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

from danlu.errors import ConfigError, DataError
from danlu.evaluate.interval import Estimate, Floats, around, estimate, estimates, resampled
from danlu.evaluate.metrics import RESAMPLES, Judged
from danlu.words import _

SAME = {"M": "I", "L": "E", "U": "S"}                    # BMES and BILOU are IOBES by other letters
Span = tuple[str, int, int]                              # type, first word, last word


def require() -> None:
    """Raise ConfigError unless seqeval is there; asked before training, not after."""
    if importlib.util.find_spec("seqeval") is None:
        raise ConfigError(_("span metrics need seqeval, which is not installed"), where="metrics",
                          fix='pip install "danlu[metrics]"')


def spans(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], *, strict: bool = False,
          resamples: int = RESAMPLES, seed: int = 0) -> Judged:
    """Return precision, recall, f1 over spans (micro), f1_macro over types, accuracy over words; `types` has those of each.

    A span is right if its type and both ends are.  Tags: O, or B- I- E- S- (M- is read as I-, L- as E-, U- as S-) and a type.
    As CoNLL's script, and so nearly everybody's figures: an I- that nothing began begins a span, and one of another type
    begins another.  strict: only well-formed spans of the scheme count, IOBES where the truth has E- or S-, else IOB2;
    predicted I- without B- are then no span.  Raises DataError for other tags, ValueError for sentences of unequal length.
    """
    require()
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} true sentences, {len(predicted)} predicted")
    if not any(len(row) for row in truth):
        raise DataError(_("there is no row to evaluate"))
    pairs = [(_plain(t, n), _plain(p, n)) for n, (t, p) in enumerate(zip(truth, predicted, strict=True), 1)]
    for number, (real, guess) in enumerate(pairs, 1):
        if len(real) != len(guess):
            raise ValueError(f"sentence {number}: {len(real)} words, {len(guess)} predicted tags")
    scheme = ("IOBES" if any(t[0] in "ES" for real, _p in pairs for t in real) else "IOB2") if strict else None
    found = [(set(_found(real, scheme)), set(_found(guess, scheme))) for real, guess in pairs]
    kinds = sorted({span[0] for both in found for side in both for span in side})
    counts = np.zeros((3, len(pairs), len(kinds)))       # true, predicted, right; of each sentence and type
    for row, (real_spans, guessed) in enumerate(found):
        for part, some in enumerate((real_spans, guessed, real_spans & guessed)):
            for kind, n in Counter(span[0] for span in some).items():
                counts[part, row, kinds.index(kind)] = n
    right = np.array([sum(a == b for a, b in zip(real, guess, strict=True)) for real, guess in pairs], np.float64)
    words = np.array([len(real) for real, _p in pairs], np.float64)
    figures, *each = _figures(np.concatenate([counts.sum(2, keepdims=True), counts], 2), resamples, seed)
    types = dict(zip(kinds, each, strict=True))
    macro = _macro(counts.sum(1, keepdims=True))[0]
    spread = resampled(lambda times: _macro(times @ counts), len(pairs), resamples=resamples, seed=seed) \
        if resamples and len(pairs) > 1 else np.zeros(0)
    figures["f1_macro"] = around(float(macro), spread)
    figures["accuracy"] = estimate(right, words, resamples=resamples, seed=seed)
    support = [*counts[0].sum(0), counts[0].sum()]
    report = _table([*types.items(), ("micro avg", figures)], support) if types else ""
    return Judged(figures, report, types=types)


def _figures(counts: Floats, resamples: int, seed: int) -> list[dict[str, Estimate]]:
    """Return precision, recall and f1 of each of M columns; 0 where there is nothing to divide by.

    counts [3, N, M]: true, predicted, right spans of each sentence.
    """
    true, claimed, right = counts
    found = estimates(np.concatenate([right, right, 2 * right], 1), np.concatenate([claimed, true, true + claimed], 1),
                      resamples=resamples, seed=seed)
    found = [one if np.isfinite(one.value) else Estimate(0.0) for one in found]
    size = true.shape[1]
    return [{"precision": found[m], "recall": found[size + m], "f1": found[2 * size + m]} for m in range(size)]


def _macro(counts: Floats) -> Floats:
    """Return [r] the mean F1 over the types that occur; counts [3, r, M]: sums over the sentences of each resample."""
    true, claimed, right = counts
    there = true + claimed > 0
    f1 = np.divide(2 * right, true + claimed, out=np.zeros(true.shape), where=there)
    return f1.sum(-1) / np.maximum(there.sum(-1), 1)


def _plain(tags: Sequence[str], sentence: int) -> list[str]:
    out = []
    for tag in tags:
        letter = SAME.get(tag[:1], tag[:1])
        if tag != "O" and not (letter in "BIES" and letter and (len(tag) == 1 or tag[1] == "-")):
            raise DataError(
                _("{tag!r} is no tag of a span").format(tag=tag), where=_("sentence {n}").format(n=sentence),
                fix=_("use O, B-TYPE and I-TYPE; or B-, I-, E-, S-; where words only have classes, ask for accuracy"))
        out.append(letter + tag[1:])
    return out


def _found(tags: list[str], scheme: str | None) -> list[Span]:
    """Return the spans of one sentence; `scheme` None: as CoNLL's script finds them."""
    from seqeval.metrics.sequence_labeling import get_entities
    from seqeval.scheme import IOB2, IOBES, Entities

    if scheme is None:
        return [tuple(span) for span in get_entities(tags)]
    if scheme == "IOB2":                                 # a predicted E- or S- is not of the scheme: no span
        tags = [tag if tag[0] in "BIO" else "O" for tag in tags]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Entities([tags], scheme=IOB2 if scheme == "IOB2" else IOBES).entities[0]
    return [(one.tag, one.start, one.end - 1) for one in found]


def _table(rows: Sequence[tuple[str, dict[str, Estimate]]], support: Sequence[float]) -> str:
    """Return the figures of each type as seqeval's report lays them out; it would look for every span again."""
    wide = max(len(name) for name, _figures in rows)
    lines = [f"{'':>{wide}}  precision  recall  f1-score  support"]
    lines += [f"{name:>{wide}}  {one['precision'].value:9.4f}  {one['recall'].value:6.4f}  {one['f1'].value:8.4f}  {int(n):7d}"
              for (name, one), n in zip(rows, support, strict=True)]
    return "\n".join(lines) + "\n"
