"""Figures against scikit-learn and SciPy called on the rows themselves, also in resamples; intervals against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from danlu.errors import ConfigError, DataError, NumericError
from danlu.evaluate import metrics
from danlu.evaluate.interval import Estimate, Floats, resampled
from danlu.evaluate.metrics import classes, scores, several
from danlu.figures import HIGHER, direction

AVERAGES = ("macro", "micro", "weighted")


def drawn(n: int, size: int, seed: int = 0) -> tuple[Any, Any]:
    """Labels and logits that agree more often than not."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, size, n)
    return truth, draw.normal(0, 1, (n, size)) + 1.2 * (truth[:, None] == np.arange(size))


def expected(truth: Any, logits: Any) -> dict[str, float]:
    guess, size = logits.argmax(1), logits.shape[1]
    found = {"accuracy": np.mean(truth == guess), "mcc": reference.matthews_corrcoef(truth, guess),
             "loss": reference.log_loss(truth, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels=range(size))}
    scorers: dict[str, Callable[..., float]] = {
        "precision": reference.precision_score, "recall": reference.recall_score, "f1": reference.f1_score}
    for name, score in scorers.items():
        for average in AVERAGES:
            found[f"{name}_{average}"] = score(truth, guess, average=average, zero_division=0)
        if size == 2:
            found[name] = score(truth, guess, zero_division=0)
    if len(set(truth)) == size:
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        found["auc"] = reference.roc_auc_score(truth, chances[:, 1]) if size == 2 else reference.roc_auc_score(
            truth, chances, multi_class="ovr")
    return found


@pytest.mark.parametrize("size", [2, 3, 7])
def test_classes_are_scikit_learns(size: int) -> None:
    truth, logits = drawn(300, size)
    found = classes(truth, logits, [f"class {i}" for i in range(size)], resamples=20)
    assert {name: one.value for name, one in found.figures.items()} == pytest.approx(expected(truth, logits), abs=1e-9)
    assert found.confusion is not None and (found.confusion == reference.confusion_matrix(truth, logits.argmax(1))).all()
    assert found.labels[1] == "class 1" and "class 1" in found.report and "macro avg" in found.report
    assert set(found.figures) <= set(HIGHER)


@pytest.mark.filterwarnings("ignore:A single label")
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_every_resample_has_scikit_learns_figures(rows: list[tuple[int, int]]) -> None:
    """A draw of cells of the table is judged as scikit-learn judges the rows it stands for; classes may be missing."""
    times = np.random.default_rng(0).integers(0, 3, (3, len(rows))).astype(float)
    times[:, 0] += 1
    truth, guess = np.array(rows).T
    found = metrics.of_tables(times, truth, guess, 4)
    for row, often in enumerate(times.astype(int)):
        y, p = np.repeat(truth, often), np.repeat(guess, often)
        assert found["accuracy"][row] == pytest.approx(reference.accuracy_score(y, p))
        assert found["mcc"][row] == pytest.approx(reference.matthews_corrcoef(y, p), abs=1e-9)
        for average in AVERAGES:
            for name, value in zip(("precision", "recall", "f1"), reference.precision_recall_fscore_support(
                    y, p, average=average, zero_division=0), strict=False):
                assert found[f"{name}_{average}"][row] == pytest.approx(value), (name, average)


def test_resamples_of_areas_and_labels_and_correlations_are_those_of_the_rows() -> None:
    draw = np.random.default_rng(3)
    times = draw.multinomial(60, np.full(60, 1 / 60), size=8).astype(float)
    truth, values = draw.random(60) < 0.4, np.round(draw.normal(size=60), 1)
    other = np.round(values + draw.normal(size=60), 1)
    labels, guessed = draw.random((60, 3)) < 0.3, draw.random((60, 3)) < 0.3
    areas, found = metrics.of_ranks(times, truth, values), metrics.of_labels(times, labels, guessed)
    pearson, spearman = metrics._pearson(times, values, other), metrics._spearman(times, values, other)
    for row, often in enumerate(times.astype(int)):
        some = np.repeat(np.arange(60), often)
        assert areas[row] == pytest.approx(reference.roc_auc_score(truth[some], values[some]))
        assert pearson[row] == pytest.approx(stats.pearsonr(values[some], other[some])[0])
        assert spearman[row] == pytest.approx(stats.spearmanr(values[some], other[some])[0])
        for average in AVERAGES:
            assert found[f"f1_{average}"][row] == pytest.approx(
                reference.f1_score(labels[some], guessed[some], average=average, zero_division=0))
        assert found["subset_accuracy"][row] == pytest.approx(reference.accuracy_score(labels[some], guessed[some]))
        assert found["hamming_loss"][row] == pytest.approx(reference.hamming_loss(labels[some], guessed[some]))


def test_the_interval_of_accuracy_is_the_binomial_one() -> None:
    truth, logits = drawn(800, 3)
    one = classes(truth, logits, "abc", resamples=2000).figures["accuracy"]
    half = 1.96 * math.sqrt(one.value * (1 - one.value) / 800)
    assert one.stderr == pytest.approx(half / 1.96, rel=0.05)
    assert (one.low, one.high) == pytest.approx((one.value - half, one.value + half), abs=0.15 * half)


def test_intervals_of_tables_are_those_of_rows() -> None:
    """Drawing cells is drawing rows: the same spread as the plain bootstrap that calls scikit-learn."""
    truth, logits = drawn(200, 3)
    guess, draw = logits.argmax(1), np.random.default_rng(5)
    plain = [reference.f1_score(truth[some], guess[some], average="macro")
             for some in (draw.integers(0, 200, 200) for _ in range(600))]
    one = classes(truth, logits, "abc", resamples=3000).figures["f1_macro"]
    assert one.stderr == pytest.approx(np.std(plain), rel=0.1)
    assert (one.low, one.high) == pytest.approx(np.percentile(plain, (2.5, 97.5)), abs=0.01)


def test_the_interval_of_accuracy_covers_the_truth_19_times_in_20() -> None:
    hits = 0
    for seed, right in enumerate(np.random.default_rng(2).binomial(300, 0.8, 300)):          # the true accuracy is 0.8
        table = np.array([[0, 0], [300 - right, right]])
        one = metrics._around({"accuracy": right / 300}, table, 300, seed)["accuracy"]
        assert one.low is not None and one.high is not None
        hits += one.low <= 0.8 <= one.high
    assert 0.91 <= hits / 300 <= 0.98


def test_many_labels_are_scikit_learns() -> None:
    draw = np.random.default_rng(1)
    truth = (draw.random((250, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(int)          # the last never occurs
    logits = draw.normal(size=(250, 4)) + 2 * truth - 1
    found = several(truth, logits, "abcd", threshold=0.4, resamples=50)
    guess = 1 / (1 + np.exp(-logits)) >= 0.4
    want = {"subset_accuracy": (truth == guess).all(1).mean(), "hamming_loss": reference.hamming_loss(truth, guess),
            "auc": reference.roc_auc_score(truth[:, :3], logits[:, :3], average="macro"),
            "loss": -np.mean(np.where(truth, np.log(1 / (1 + np.exp(-logits))), np.log(1 - 1 / (1 + np.exp(-logits)))))}
    for average in AVERAGES:
        values = reference.precision_recall_fscore_support(truth, guess, average=average, zero_division=0)
        want |= {f"{name}_{average}": v for name, v in zip(("precision", "recall", "f1"), values, strict=False)}
    assert {name: one.value for name, one in found.figures.items()} == pytest.approx(want, abs=1e-9)
    assert all(one.low is not None and one.high is not None and one.low <= one.value <= one.high
               for one in found.figures.values())
    assert set(found.figures) <= set(HIGHER) and "samples avg" in found.report


def test_scores_are_scipys() -> None:
    draw = np.random.default_rng(4)
    truth = np.round(draw.random(400) * 5, 1)
    guess = truth + draw.normal(size=400)
    found = scores(truth, guess, resamples=2000).figures
    assert {name: one.value for name, one in found.items()} == pytest.approx({
        "pearson": stats.pearsonr(truth, guess)[0], "spearman": stats.spearmanr(truth, guess)[0],
        "mse": np.mean((truth - guess) ** 2), "mae": np.mean(np.abs(truth - guess))})
    fisher = stats.pearsonr(truth, guess).confidence_interval()
    assert (found["pearson"].low, found["pearson"].high) == pytest.approx((fisher.low, fisher.high), abs=0.01)
    assert math.isnan(scores(truth, np.ones(400), resamples=10).figures["pearson"].value)
    assert scores(truth[:1], guess[:1]).figures["mse"].low is None


@pytest.mark.parametrize("truth, guess", [([0, 0, 0], [0, 0, 0]), ([1, 1], [0, 0]), ([1], [1]), ([0], [1])])
def test_degenerate_rows_have_figures(truth: list[int], guess: list[int]) -> None:
    logits = np.eye(2)[guess]
    with np.errstate(all="raise"):
        found = classes(np.array(truth), logits, ["no", "yes"]).figures
    assert found["accuracy"].value == np.mean(np.array(truth) == guess)
    assert math.isnan(found["auc"].value) and found["mcc"].value == 0


def test_hopeless_outputs_are_refused() -> None:
    with pytest.raises(DataError, match="no row"):
        classes(np.zeros(0, int), np.zeros((0, 2)), "ab")
    with pytest.raises(NumericError, match="2 of 3"):
        classes(np.zeros(3, int), np.array([[0, 1], [np.nan, 0], [np.inf, 0]]), "ab")
    with pytest.raises(ValueError):
        classes(np.array([2]), np.zeros((1, 2)), "ab")


def test_large_logits_do_not_overflow() -> None:
    one = classes(np.array([0, 1]), np.array([[1e4, 0.0], [1e4, 0.0]]), "ab").figures["loss"]
    assert one.value == pytest.approx(5000)
    labels = several(np.array([[1], [0]]), np.array([[1e4], [1e4]]), "a").figures["loss"]
    assert labels.value == pytest.approx(5000)


def test_one_label_alone_is_a_label() -> None:
    truth, logits = drawn(80, 2)
    truth, logits = truth[:, None], (logits[:, 1] - logits[:, 0])[:, None]
    found = several(truth, logits, ["spam"], resamples=100)
    assert found.figures["f1_macro"].value == found.figures["f1_micro"].value == pytest.approx(
        reference.f1_score(truth[:, 0], logits[:, 0] >= 0))
    assert found.figures["f1_macro"].low is not None and found.figures["f1_macro"].low < found.figures["f1_macro"].value
    assert "spam" in found.report


def test_any_statistic_can_be_resampled() -> None:
    x = np.random.default_rng(0).normal(size=100)

    def median(times: Floats) -> Floats:
        return np.array([np.median(np.repeat(x, row.astype(int))) for row in times])

    assert np.std(resampled(median, 100, resamples=600, seed=0)) == pytest.approx(1.2533 * x.std() / 10, rel=0.35)
    assert (resampled(median, 100, resamples=5, seed=1) == resampled(median, 100, resamples=5, seed=1)).all()
    assert resampled(lambda times: times, np.array([7, 3]), resamples=50, seed=0).sum(1).tolist() == [10.0] * 50


def test_which_way_is_better() -> None:
    assert direction("accuracy") and direction("eval/f1_macro") and direction("eval_accuracy") and direction("sst2/mcc")
    assert not direction("loss") and not direction("eval/loss") and not direction("mse")
    with pytest.raises(ConfigError) as error:
        direction("acuracy")
    assert error.value.fix is not None and "'accuracy'" in error.value.fix
    with pytest.raises(ConfigError):
        direction("zzzzzzzz")


def test_the_record_is_json_with_intervals() -> None:
    found = classes(np.array([0, 0, 0]), np.array([[1.0, 0], [1, 0], [0, 1]]), ["good", "bad"])
    told = found.record("reviews")
    assert told["results"]["reviews"]["auc,none"] is None and told["results"]["reviews"]["accuracy,none"] == pytest.approx(2 / 3)
    assert told["confusion"]["reviews"] == {"labels": ["good", "bad"], "counts": [[2, 1], [0, 0]]}
    assert told["higher_is_better"]["reviews"]["loss"] is False and "good" in told["report"]["reviews"]


def test_no_interval_is_asked_for() -> None:
    found = classes(*drawn(50, 3), "abc", resamples=0).figures
    assert all(one == Estimate(one.value) for one in found.values())
    assert all(one.low is None for one in several(np.eye(3), np.eye(3), "abc", resamples=0).figures.values())
    assert all(one.low is None for one in scores(np.arange(9), np.arange(9) ** 2, resamples=0).figures.values())


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        scores(np.arange(3), np.arange(3))
    assert error.value.fix == 'pip install "danlu[metrics]"'
