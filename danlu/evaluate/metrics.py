"""How good predictions are: classes, several classes at once, scores; every figure with its 95 % interval.

The figures are scikit-learn's and SciPy's (extra `metrics`).  Intervals are bootstraps over rows (interval.py): 1,000 draws of
tables of counts, not of rows, where the figure is a function of such a table.  N rows, K classes, R resamples.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from danlu.errors import ConfigError, DataError, NumericError
from danlu.evaluate.interval import Estimate, Floats, around, estimate, resampled
from danlu.figures import HIGHER
from danlu.words import _

RESAMPLES = 1000
WORK = 20_000_000                                        # rows × resamples × classes an AUC may cost: about a second
BLOCK = 1024                                             # queries that are compared with all texts at once
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """What was found about predictions.  figures: by name, all of them in HIGHER; the rest is empty where it has no meaning."""

    figures: dict[str, Estimate]
    report: str = ""                                     # precision, recall, F1 and support of each class or type, as text
    labels: tuple[str, ...] = ()                         # of the rows and columns of `confusion`
    confusion: Ints | None = None                        # [K, K]: row the true class, column the predicted one
    types: dict[str, dict[str, Estimate]] = field(default_factory=dict)        # figures of each kind of span

    def record(self, task: str) -> dict[str, Any]:
        """Return the parts of an eval_results.json (danlu/report.py says what is in it) that tell this."""
        figures: dict[str, Any] = {"alias": task}
        for name, one in self.figures.items():
            figures |= {f"{name},none": _finite(one.value), f"{name}_stderr,none": _finite(one.stderr)}
        found: dict[str, Any] = {
            "results": {task: figures},
            "intervals": {task: {n: [_finite(one.low), _finite(one.high)] for n, one in self.figures.items()}},
            "higher_is_better": {task: {name: HIGHER[name] for name in self.figures}}}
        if self.confusion is not None:
            found["confusion"] = {task: {"labels": list(self.labels), "counts": self.confusion.tolist()}}
        return found | ({"report": {task: self.report}} if self.report else {})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None        # JSON has no NaN


def require() -> None:
    """Raise ConfigError unless scikit-learn is there; asked before training, not after."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(_("these metrics need scikit-learn, which is not installed"), where="metrics",
                          fix='pip install "danlu[metrics]"')


def classes(truth: NDArray[Any], logits: NDArray[Any], names: Sequence[str], *, resamples: int = RESAMPLES,
            seed: int = 0) -> Judged:
    """Return the figures of single-label classification.  truth [N] class numbers, logits [N, K], names [K].

    accuracy; precision, recall, f1 as _macro (classes that occur in truth or predictions), _micro, _weighted, and for two
    classes also plain: of the second class; mcc (Gorodkin, 2004); auc of the second of two classes, or the mean over classes
    of one against the rest; loss, the mean cross-entropy in nats.  A figure with an empty denominator is 0, auc without two
    classes NaN.  Large sets draw fewer resamples for auc (WORK).  Raises DataError without rows, NumericError for NaN logits.
    """
    require()
    from sklearn.metrics import accuracy_score, classification_report, matthews_corrcoef, precision_recall_fscore_support

    truth, logits = np.asarray(truth, np.int64), np.asarray(logits, np.float64)
    _check(truth, logits)
    size = len(names)
    if logits.shape[1] != size or not 0 <= truth.min() <= truth.max() < size:
        raise ValueError(f"{logits.shape[1]} logits a row and classes {truth.min()}..{truth.max()} for {size} names")
    predicted = logits.argmax(1)
    table = np.bincount(truth * size + predicted, minlength=size * size).reshape(size, size)
    with warnings.catch_warnings():                      # one class alone: its mcc of 0 says it
        warnings.simplefilter("ignore")
        values = {"accuracy": float(accuracy_score(truth, predicted)), "mcc": float(matthews_corrcoef(truth, predicted))}
    averages = {"macro": "macro", "micro": "micro", "weighted": "weighted"} | ({"": "binary"} if size == 2 else {})
    for suffix, average in averages.items():
        found = precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), found, strict=False):
            values[f"{name}_{suffix}" if suffix else name] = float(value)
    figures = _around(values, table, resamples, seed)
    highest = logits.max(1, keepdims=True)
    chances = np.exp(logits - highest)
    total = chances.sum(1, keepdims=True)
    loss = (np.log(total) + highest)[:, 0] - logits[np.arange(len(truth)), truth]
    ranked = logits[:, 1:] - logits[:, :1] if size == 2 else chances / total
    figures["auc"] = _auc(truth[:, None] == np.arange(size)[1 if size == 2 else 0:], ranked, resamples, seed)
    figures["loss"] = estimate(loss, np.ones(len(loss)), resamples=resamples, seed=seed)
    report = classification_report(truth, predicted, labels=range(size), target_names=list(names), zero_division=0, digits=4)
    return Judged(figures, str(report), tuple(names), table)


def _around(values: Mapping[str, float], table: Ints, resamples: int, seed: int) -> dict[str, Estimate]:
    """Return the figures with the spread they have in draws from a confusion matrix [K, K]."""
    if not resamples or table.sum() < 2:
        return {name: Estimate(value) for name, value in values.items()}
    true, predicted = table.nonzero()
    spread = resampled(lambda times: np.stack(list(of_tables(times, true, predicted, len(table)).values()), 1),
                       table[true, predicted], resamples=resamples, seed=seed)
    names = list(of_tables(np.ones((1, len(true))), true, predicted, len(table)))
    return {name: around(value, spread[:, names.index(name)]) for name, value in values.items()}


def of_tables(times: Floats, true: Ints, predicted: Ints, size: int) -> dict[str, Floats]:
    """Return the figures, [r] each, of r confusion matrices of size K = `size`.

    times [r, C]: the counts of C cells; true, predicted [C]: the row and the column of each cell.
    """
    hit = _by_class(times * (true == predicted), true, size)                      # [r, K]
    actual, claimed, n = _by_class(times, true, size), _by_class(times, predicted, size), times.sum(1)
    parts = {"precision": _ratio(hit, claimed), "recall": _ratio(hit, actual), "f1": _ratio(2 * hit, actual + claimed)}
    accuracy = hit.sum(1) / n
    there = (actual + claimed > 0).sum(1)
    found = {"accuracy": accuracy}
    for name, part in parts.items():
        found |= {f"{name}_macro": part.sum(1) / there, f"{name}_micro": accuracy,
                  f"{name}_weighted": (part * actual).sum(1) / n}
        if size == 2:
            found[name] = part[:, 1]
    over = n * n
    covariance = hit.sum(1) * n - (actual * claimed).sum(1)
    within = np.sqrt((over - (actual**2).sum(1)) * (over - (claimed**2).sum(1)))
    return found | {"mcc": _ratio(covariance, within)}


def _by_class(times: Floats, owner: Ints, size: int) -> Floats:
    """Return [r, K] the sums of columns [r, C] that belong to the same class."""
    order = np.argsort(owner, kind="stable")
    present, first = np.unique(owner[order], return_index=True)
    out = np.zeros((len(times), size))
    out[:, present] = np.add.reduceat(times[:, order], first, axis=1)
    return out


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros(np.broadcast_shapes(above.shape, below.shape)), where=below > 0)


def _auc(truth: NDArray[np.bool_], scores: Floats, resamples: int, seed: int) -> Estimate:
    """Return the mean over columns of the area under the curve; truth [N, C], scores [N, C].

    Columns whose rows are all alike have no curve and are left out; NaN if no column is left.
    """
    from sklearn.metrics import roc_auc_score

    use = [c for c in range(truth.shape[1]) if 0 < truth[:, c].sum() < len(truth)]
    if not use:
        return Estimate(float("nan"))
    value = float(np.mean([roc_auc_score(truth[:, c], scores[:, c]) for c in use]))
    rows = min(resamples, max(100, WORK // (len(truth) * len(use))))
    if not resamples:
        return Estimate(value)

    def areas(times: Floats) -> Floats:
        found = np.stack([of_ranks(times, truth[:, c], scores[:, c]) for c in use], 1)
        there = np.isfinite(found)
        return np.divide(np.where(there, found, 0).sum(1), there.sum(1), out=np.full(len(times), np.nan),
                         where=there.any(1))

    return around(value, resampled(areas, len(truth), resamples=rows, seed=seed))


def of_ranks(times: Floats, truth: NDArray[np.bool_], scores: Floats) -> Floats:
    """Return [r] the areas under the curve where row n was drawn times[:, n] times; NaN where all are alike.

    The area is the share of (true, false) pairs that are in order; ties count half (Mann and Whitney, 1947).
    """
    order = np.argsort(scores, kind="stable")
    first = np.unique(scores[order], return_index=True)[1]                        # equal scores are one group
    good = np.add.reduceat(times[:, order] * truth[order], first, axis=1)
    bad = np.add.reduceat(times[:, order] * ~truth[order], first, axis=1)
    won = (good * (np.cumsum(bad, 1) - bad / 2)).sum(1)
    pairs = good.sum(1) * bad.sum(1)
    return np.divide(won, pairs, out=np.full(len(times), np.nan), where=pairs > 0)


def several(truth: NDArray[Any], logits: NDArray[Any], names: Sequence[str], *, threshold: float = 0.5,
            resamples: int = RESAMPLES, seed: int = 0) -> Judged:
    """Return the figures of multi-label classification.  truth [N, K] of 0 and 1, logits [N, K], names [K].

    A label is predicted where sigmoid(logit) >= threshold, 0 < threshold < 1.  precision, recall, f1 as _micro,
    _macro (all K labels), _weighted; subset_accuracy: rows with every label right; hamming_loss: the share of
    wrong labels; auc: the mean over the labels that are neither always nor never there; loss: the mean
    binary cross-entropy in nats.
    """
    require()
    from sklearn.metrics import accuracy_score, classification_report, hamming_loss, precision_recall_fscore_support

    truth, logits = np.asarray(truth).astype(bool), np.asarray(logits, np.float64)
    _check(truth, logits)
    if truth.shape != logits.shape or truth.shape[1] != len(names):
        raise ValueError(f"truth {truth.shape} and logits {logits.shape} for {len(names)} names")
    predicted = logits >= math.log(threshold) - math.log1p(-threshold)
    only: Any = {"labels": [True]} if len(names) == 1 else {}        # one column would be read as two classes
    values: dict[str, float] = {}
    for average in ("macro", "micro", "weighted"):
        found = precision_recall_fscore_support(truth, predicted, average=average, zero_division=0, **only)
        values |= {f"{n}_{average}": float(v) for n, v in zip(("precision", "recall", "f1"), found, strict=False)}
    values |= {"subset_accuracy": float(accuracy_score(truth, predicted)), "hamming_loss": float(hamming_loss(truth, predicted))}
    figures = {name: Estimate(value) for name, value in values.items()}
    if resamples and len(truth) > 1:
        spread = resampled(lambda times: np.stack(list(of_labels(times, truth, predicted).values()), 1), len(truth),
                           resamples=resamples, seed=seed)
        order = list(of_labels(np.ones((1, len(truth))), truth, predicted))
        figures = {name: around(value, spread[:, order.index(name)]) for name, value in values.items()}
    losses = (np.logaddexp(0, logits) - truth * logits).mean(1)
    figures["auc"] = _auc(truth, logits, resamples, seed)
    figures["loss"] = estimate(losses, np.ones(len(losses)), resamples=resamples, seed=seed)
    report = classification_report(truth, predicted, target_names=list(names), zero_division=0, digits=4, **only)
    return Judged(figures, str(report))


def of_labels(times: Floats, truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> dict[str, Floats]:
    """Return the figures of multi-label rows, [r] each, where row n was drawn times[:, n] times; truth, predicted [N, K]."""
    hit, actual, claimed = (times @ part.astype(np.float64) for part in (truth & predicted, truth, predicted))     # [r, K]
    n, found = times.sum(1), dict[str, Floats]()
    for name, above, below in (("precision", hit, claimed), ("recall", hit, actual), ("f1", 2 * hit, actual + claimed)):
        part = _ratio(above, below)
        found |= {f"{name}_macro": part.mean(1), f"{name}_micro": _ratio(above.sum(1), below.sum(1)),
                  f"{name}_weighted": _ratio((part * actual).sum(1), actual.sum(1))}
    wrong = (truth != predicted).sum(1)
    return found | {"subset_accuracy": times @ (wrong == 0) / n, "hamming_loss": times @ wrong / (n * truth.shape[1])}


def scores(truth: NDArray[Any], predicted: NDArray[Any], *, resamples: int = RESAMPLES, seed: int = 0) -> Judged:
    """Return pearson, spearman, mse and mae of predicted scores; truth, predicted [N].

    A correlation with a constant is NaN.  Ranks are taken anew in each resample; ties share the mean of their ranks.
    """
    require()
    from scipy import stats

    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    _check(truth, predicted)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(f"truth {truth.shape} and predicted {predicted.shape}")
    n, ones, found = len(truth), np.ones(len(truth)), dict[str, Estimate]()
    for name, exact, of in (("pearson", stats.pearsonr, _pearson), ("spearman", stats.spearmanr, _spearman)):
        with warnings.catch_warnings():                  # of a constant: the NaN says it
            warnings.simplefilter("ignore")
            value = float(exact(truth, predicted)[0]) if n > 1 else float("nan")
        drawn = partial(of, x=truth, y=predicted)
        found[name] = around(value, resampled(drawn, n, resamples=resamples, seed=seed)) if resamples else Estimate(value)
    error = predicted - truth
    found["mse"] = estimate(error**2, ones, resamples=resamples, seed=seed)
    found["mae"] = estimate(np.abs(error), ones, resamples=resamples, seed=seed)
    return Judged(found)


def _pearson(times: Floats, x: Floats, y: Floats) -> Floats:
    """Return [r] weighted correlations; times [r, N], x, y [N] or [r, N]."""
    n = times.sum(1, keepdims=True)
    x, y = np.broadcast_to(x, times.shape), np.broadcast_to(y, times.shape)
    x, y = x - (times * x).sum(1, keepdims=True) / n, y - (times * y).sum(1, keepdims=True) / n
    below = np.sqrt((times * x * x).sum(1) * (times * y * y).sum(1))
    return np.divide((times * x * y).sum(1), below, out=np.full(len(times), np.nan), where=below > 1e-12)


def _spearman(times: Floats, x: Floats, y: Floats) -> Floats:
    return _pearson(times, _ranks(times, x), _ranks(times, y))


def _ranks(times: Floats, x: Floats) -> Floats:
    """Return [r, N] the rank of each row among those drawn; equal values share the mean of their ranks."""
    _values, group = np.unique(x, return_inverse=True)
    held = _by_class(times, group, int(group.max()) + 1)
    return (np.cumsum(held, 1) - held / 2 + 0.5)[:, group]


def retrieval(queries: NDArray[Any], texts: NDArray[Any], *, resamples: int = RESAMPLES, seed: int = 0) -> Judged:
    """Return accuracy_at_1 and mrr of finding each query's own text among all of them by cosine; queries, texts [N, D].

    mrr: the mean of 1 / rank (Voorhees, 1999).  A text that scores the same as the own one does not stand before it, for it
    may be the same text.
    """
    queries, texts = (np.asarray(part, np.float64) for part in (queries, texts))
    _check(queries, texts)
    queries, texts = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in (queries, texts))
    ranks = np.empty(len(queries))
    for start in range(0, len(queries), BLOCK):
        part = queries[start : start + BLOCK]
        scores = part @ texts.T
        own = scores[np.arange(len(part)), start + np.arange(len(part))]
        ranks[start : start + len(part)] = 1 + (scores > own[:, None] + 1e-9).sum(1)
    ones = np.ones(len(ranks))
    return Judged({"accuracy_at_1": estimate((ranks == 1).astype(np.float64), ones, resamples=resamples, seed=seed),
                   "mrr": estimate(1 / ranks, ones, resamples=resamples, seed=seed)})


def _check(truth: NDArray[Any], outputs: Floats) -> None:
    if len(truth) != len(outputs):
        raise ValueError(f"{len(truth)} true values, {len(outputs)} predicted")
    if not len(truth):
        raise DataError(_("there is no row to evaluate"))
    wrong = int((~np.isfinite(outputs.reshape(len(outputs), -1))).any(1).sum())
    if wrong:
        raise NumericError(_("the model's outputs for {n} of {rows} rows are not finite").format(n=wrong, rows=len(outputs)))
