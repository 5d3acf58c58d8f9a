"""Texts against sacrebleu and rouge-score called directly, and against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from danlu.errors import ConfigError, DataError
from danlu.evaluate import text as module
from danlu.evaluate.text import language, texts

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", ",", "red", "big", "ran", "fast", ".", "it", "was", "not"]
HAN = "我们在北京上海学习工作很高兴"


def drawn(vocabulary: list[str], glue: str, n: int = 60) -> tuple[list[str], list[list[str]]]:
    """Texts with one or two references that share most of their words."""
    draw = np.random.default_rng(0)
    said, right = [], []
    for number in range(n):
        words = [str(w) for w in draw.choice(vocabulary, draw.integers(4, 15))]
        changed = [str(draw.choice(vocabulary)) if draw.random() < 0.25 else w for w in words]
        said.append(glue.join(words))
        right.append([glue.join(changed), glue.join(words[:-1])][:1 + number % 2])
    return said, right


def test_english_is_the_libraries() -> None:
    said, right = drawn(WORDS, " ")
    found = texts(said, right, resamples=200).figures
    columns = [[row[i] if i < len(row) else "" for row in right] for i in range(2)]
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(said, [[r or None for r in c] for c in columns]).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(said, [[r or None for r in c] for c in columns]).score)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        want = np.mean([scorer.score_multi(row, one)[name].fmeasure for one, row in zip(said, right, strict=True)])
        assert found[name].value == pytest.approx(want), name
    assert all(one.low is not None and one.high is not None and one.low <= one.value <= one.high for one in found.values())


def test_chinese_is_by_character() -> None:
    said, right = drawn(list(HAN), "")
    found = texts(said, right, resamples=50).figures
    columns = [[row[i] if i < len(row) else None for row in right] for i in range(2)]
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(said, columns, tokenize="zh").score)
    spaced = drawn(list(HAN), " ")                                               # characters as words: the same ROUGE
    assert found["rougeL"].value == pytest.approx(texts(*spaced, chinese=False, resamples=0).figures["rougeL"].value)
    one = texts(["北京好"], [["北京大"]]).figures
    assert one["rouge1"].value == pytest.approx(2 / 3) and one["rouge2"].value == pytest.approx(1 / 2)


def test_the_spread_of_bleu_is_that_of_drawn_sentences() -> None:
    said, right = drawn(WORDS, " ")
    draw, plain = np.random.default_rng(1), []
    for _ in range(150):
        some = draw.integers(0, len(said), len(said))
        plain.append(sacrebleu.corpus_bleu([said[i] for i in some], [[right[i][0] for i in some]]).score)
    one = texts(said, [row[:1] for row in right], resamples=600).figures["bleu"]
    assert one.stderr == pytest.approx(np.std(plain), rel=0.25)


def test_exact_match_and_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts(["a b ", "c"], [["x", "a b"], ["d"]]).figures["exact_match"].value == 0.5
    assert texts(["", "c"], [["x"], ["d"]], resamples=20).figures["bleu"].value == 0
    with pytest.raises(ValueError):
        texts(["a"], [[]])
    with pytest.raises(DataError):
        texts([], [])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as missing:
        texts(["a"], [["a"]])
    assert missing.value.fix == 'pip install "danlu[metrics]"'


def test_words_of_other_alphabets_count() -> None:
    one = texts(["кошка спит"], [["кошка ест"]]).figures["rouge1"]
    assert one.value == pytest.approx(0.5)


@pytest.mark.parametrize("text, chinese", [
    ("今天天气很好", True), ("Hello world", False), ("", False), ("123 !?", False),
    ("我用 PyTorch 训练模型", True), ("the character 人 means person", False),
    ("これは猫です", False)])
def test_which_texts_are_chinese(text: str, chinese: bool) -> None:
    assert language([text]) is chinese
