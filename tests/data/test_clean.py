"""Cleaning against unicodedata, and repetition against shares that can be counted by hand."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from danlu.data.clean import Clean, normal, repeated

HAN = "".join(chr(0x4E00 + i) for i in range(50))
WORDS = " ".join(f"word{i}" for i in range(50))


@given(st.text(max_size=60))
def test_normal_text_has_one_form_and_no_controls(text: str) -> None:
    clean = normal(text)
    assert not [c for c in clean if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not set(clean) & set("\ufeff\u2028\u2029")
    assert normal(clean) == clean                            # nothing is left to do
    if not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text):
        assert clean == unicodedata.normalize("NFC", text.replace("\ufeff", ""))


@pytest.mark.parametrize("text, wanted", [
    ("a\r\nb\rc\nd", "a\nb\nc\nd"), ("a\x85b\u2028c\u2029d\x0be\x0cf", "a\nb\nc\nd\ne\nf"),
    ("a\x00\x07\x1b[1m\x7f\x9fb", "a[1mb"),
    ("\ufeffa\tb", "a\tb"), ("e\u0301", "\u00e9"), ("Ａ１", "Ａ１"), ("한", "한"),
])
def test_normal_text_by_example(text: str, wanted: str) -> None:
    assert normal(text) == wanted


def test_forms() -> None:
    assert normal("Ａ１", "nfkc") == "A1"
    assert normal("e\u0301\r\n", "none") == "e\u0301\n"


@pytest.mark.parametrize("cfg, text, reason", [
    (Clean(), "", "too_short"), (Clean(), " \n", "too_short"), (Clean(), "a", None),
    (Clean(min_chars=3), " ab  ", "too_short"),
    (Clean(min_chars=0), "", None), (Clean(max_chars=2), "abc", "too_long"), (Clean(max_chars=3), "abc", None),
    (Clean(max_repeat=0.5), HAN * 3, "repeats"), (Clean(max_repeat=0.5), HAN * 2, None), (Clean(), "ha" * 500, None),
])
def test_filters_say_why(cfg: Clean, text: str, reason: str | None) -> None:
    assert cfg.apply(text)[1] == reason


@pytest.mark.parametrize("text", [HAN, WORDS + " "])
@pytest.mark.parametrize("times", [1, 2, 4, 10])
def test_a_text_said_k_times_repeats_all_but_the_first(text: str, times: int) -> None:
    assert repeated(text * times) == pytest.approx(1 - 1 / times)


def test_lines_that_stood_before_count() -> None:
    assert repeated("one\ntwo\none\nfour\n") == pytest.approx(3 / 13)
    assert repeated("") == repeated("\n\n") == 0


def test_what_shares_words_but_no_run_of_ten_repeats_nothing() -> None:
    words = [f"w{i % 7}x{i // 7}" if i % 2 else "the" for i in range(200)]
    assert repeated(" ".join(words)) == 0


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_chars"):
        Clean(min_chars=5, max_chars=4)
