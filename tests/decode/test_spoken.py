"""Stop strings and characters over token borders, against the plain text cut where the first one begins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tiny import tokenizer

from danlu.decode.spoken import Speech

LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
NARROW = st.text(st.sampled_from("ab炼🔥 "), max_size=24)      # so that stop strings are found, and nearly found


def spoken(whole: str, stop: list[str]) -> tuple[list[str], bool]:
    own, pieces = tokenizer(), []
    speech = Speech(own.decode, stop)
    for token in own.encode(whole).tolist():
        pieces.append(speech.add(token))
        if speech.stopped:
            break
    return [*pieces, speech.end()], speech.stopped


@given(NARROW | st.text(LETTERS, max_size=20), st.lists(st.text(st.sampled_from("ab炼🔥 "), min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(whole: str, stop: list[str]) -> None:
    found = [whole.find(s) for s in stop if s in whole]
    pieces, stopped = spoken(whole, stop)
    text = "".join(pieces)
    assert stopped == bool(found)
    assert all("\ufffd" not in piece for piece in pieces)       # never half a character
    assert not any(s in text for s in stop)
    if not found:
        assert text == whole
    else:
        # a stop string that is complete first ends the text; one that begins earlier but ends later is not waited for
        ends = min(whole.find(s) + len(s) for s in stop if s in whole)
        upto = whole[:ends]
        assert text == upto[: min(upto.find(s) for s in stop if s in upto)]


@given(st.text(LETTERS, max_size=20))
def test_without_stop_strings_every_character_comes_at_once(whole: str) -> None:
    pieces, _stopped = spoken(whole, [])
    assert [piece for piece in pieces if piece] == list(whole)


def test_a_character_that_never_comes_whole_is_told_at_the_end() -> None:
    own = tokenizer()
    speech = Speech(own.decode)
    assert [speech.add(token) for token in own.encode("a炼").tolist()[:3]] == ["a", "", ""]
    assert speech.end() == "\ufffd"
