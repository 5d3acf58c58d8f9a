"""How near written texts come to right ones: BLEU and chrF (sacrebleu), ROUGE (rouge-score), both in the extra `metrics`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from danlu.errors import ConfigError, DataError
from danlu.evaluate.interval import Estimate, Floats, around, estimates, resampled
from danlu.evaluate.metrics import RESAMPLES, Judged
from danlu.words import _

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KANA = re.compile("[\u3040-\u30ff]")
CHINESE = 0.3                                            # share of Han among letters from which on a text is Chinese
ROUGE = ("rouge1", "rouge2", "rougeL")


def require() -> None:
    """Raise ConfigError unless the libraries are there; asked before training, not after."""
    missing = [name for name, module in (("sacrebleu", "sacrebleu"), ("rouge-score", "rouge_score"))
               if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(_("text metrics need {names}, which is not installed").format(names=", ".join(missing)),
                          where="metrics", fix='pip install "danlu[metrics]"')


def language(texts: Iterable[str]) -> bool:
    """Return whether the texts are Chinese: at least 0.3 of the letters are Han characters, and few are kana (Japanese)."""
    letters = han = kana = 0
    for text in texts:
        letters += sum(c.isalpha() for c in text)
        han += len(HAN.findall(text))
        kana += len(KANA.findall(text))
    return han >= max(1, CHINESE * letters) and 5 * kana < han


def texts(predicted: Sequence[str], references: Sequence[Sequence[str]], *, chinese: bool | None = None,
          resamples: int = RESAMPLES, seed: int = 0) -> Judged:
    """Return bleu and chrf (0 to 100), rouge1, rouge2, rougeL and exact_match (0 to 1); references: at least one of each row.

    bleu: sacrebleu of the whole set, tokenizer 13a, for Chinese `zh`: by character.  chrf: sacrebleu's, 6 characters, beta 2,
    blanks left out.  rouge: the mean over rows of rouge-score's F, the best reference of each row; words are runs of letters and
    digits in lower case, not stemmed (for ASCII as in Google's script), for Chinese each Han character is a word.
    exact_match: equal to a reference but for blanks at the ends.  chinese None: decided by the references.
    Intervals: sentences are drawn (Koehn, 2004).
    """
    require()
    from sacrebleu.metrics import BLEU, CHRF

    if len(predicted) != len(references) or not all(references):
        raise ValueError(f"{len(predicted)} texts, {len(references)} rows of references; each row needs one and more")
    if not len(predicted):
        raise DataError(_("there is no row to evaluate"))
    if chinese is None:
        chinese = language(one for row in references for one in row)
    most = max(map(len, references))                     # sacrebleu wants columns; a row may have fewer references
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    figures = {
        "bleu": _corpus(BLEU(tokenize="zh" if chinese else "13a"), predicted, columns, resamples, seed),
        "chrf": _corpus(CHRF(), predicted, columns, resamples, seed)}
    same = [said.strip() in [one.strip() for one in row] for said, row in zip(predicted, references, strict=True)]
    found = np.column_stack([rouge(predicted, references, chinese=chinese), same])                 # [N, 4]
    means = estimates(found, np.ones(found.shape), resamples=resamples, seed=seed)
    figures |= dict(zip((*ROUGE, "exact_match"), means, strict=True))
    return Judged(figures)


def _corpus(metric: Any, predicted: Sequence[str], columns: list[list[str | None]], resamples: int, seed: int) -> Estimate:
    """Return a figure of sacrebleu and its spread: the counts of sentences are added up anew in each resample."""
    value = float(metric.corpus_score(list(predicted), columns).score)
    if not resamples or len(predicted) < 2:
        return Estimate(value)
    # a private function, but the only way to the counts of chrF; the extra holds sacrebleu below 3
    counts = np.array(metric._extract_corpus_statistics(list(predicted), columns), np.float64)     # [N, counts]

    def of(times: Floats) -> Floats:
        return np.array([metric._compute_score_from_stats([int(x) for x in row]).score for row in times @ counts])

    return around(value, resampled(of, len(predicted), resamples=resamples, seed=seed))


class Words:
    """Splits text for rouge-score, which asks for an object with `tokenize`."""

    def __init__(self, *, chinese: bool) -> None:
        self.chinese = chinese

    def tokenize(self, text: str) -> list[str]:
        """Return runs of letters and digits in lower case; in Chinese each Han character by itself."""
        text = text.lower()
        return re.findall(r"[^\W_]+", HAN.sub(r" \g<0> ", text) if self.chinese else text)


def rouge(predicted: Sequence[str], references: Sequence[Sequence[str]], *, chinese: bool) -> Floats:
    """Return [N, 3] the F of ROUGE-1, ROUGE-2 and ROUGE-L of each row: that of its best reference."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), tokenizer=Words(chinese=chinese))
    found = [scorer.score_multi(list(row), said) for said, row in zip(predicted, references, strict=True)]
    return np.array([[one[name].fmeasure for name in ROUGE] for one in found], np.float64)
