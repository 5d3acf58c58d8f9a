"""Rows of tables and of question sets as contents: classes, scores, tags, answers, choices, likeness, plain text.

Each function gets the columns and returns the reader of a row, or None where the columns are not of its kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from danlu.data.columns import PAIRS, Columns, listed, number, short, text, value
from danlu.data.example import Asked, Chosen, Content, Labelled, Segments, Similar, Tagged, Tokens, Unusable
from danlu.data.parse import label_name

Row = Mapping[str, Any]
Reader = Callable[[Row], Content]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOSTLY = 0.9                                             # of the values of a column of 0 and 1: others in it are at fault
ENDINGS = ("ending", "option", "choice", "sol", "opa")


def texts(columns: Columns, *, but: str | None = None) -> tuple[str, ...]:
    """Return the columns of one text or of two that belong together; () for none.  `but` is taken already."""
    if "text" in columns.given:
        return tuple(columns.given[role] for role in ("text", "pair") if role in columns.given)
    lower = {name.lower(): name for name in columns.names if name != but}
    for pair in PAIRS:
        if all(name in lower for name in pair):
            return lower[pair[0]], lower[pair[1]]
    one = columns.find("text")
    return () if one is None or one == but else (one,)


def label(columns: Columns) -> Reader | None:
    """One class a row."""
    return _labelled(columns, "label", _class)


def score(columns: Columns) -> Reader | None:
    """One number a row."""
    return _labelled(columns, "score", lambda found: number(found, "score"))


def _labelled(columns: Columns, role: str, read: Callable[[Any], str | float]) -> Reader | None:
    target = _bare_target(columns, role) if columns.bare else columns.find(role)
    parts = tuple(name for name in columns.names if name != target) if columns.bare else texts(columns, but=target)
    if not 1 <= len(parts) <= 2 or (target is None and not columns.unlabelled):
        return None
    return partial(_label_row, parts=parts, target=target, read=read, unlabelled=columns.unlabelled)


def _label_row(row: Row, *, parts: Sequence[str], target: str | None, read: Callable[[Any], str | float],
               unlabelled: bool) -> Content:
    said = tuple(text(row, part) for part in parts)
    if target is None or (unlabelled and row.get(target) in (None, "")):
        return Labelled(said, None)
    return Labelled(said, read(value(row, target)))


def _bare_target(columns: Columns, role: str) -> str | None:
    """Return the column of the class or score of a table without a header: the last or first, and the only one of numbers.

    A class may also be the column whose values are shorter than all others.
    """
    if len(columns.names) not in (2, 3) or not columns.first:
        return None
    ends = (columns.names[-1], columns.names[0])
    numbers = [name for name in columns.names if all(_is_number(one) for one in columns.values(name))]
    if len(numbers) == 1 and numbers[0] in ends:
        return numbers[0]
    sizes = {name: short(columns.values(name)) for name in columns.names}
    found = min(ends, key=lambda name: sizes[name])
    return found if role == "label" and all(sizes[found] < sizes[name] for name in columns.names if name != found) else None


def _is_number(found: Any) -> bool:
    try:
        number(found, "score")
    except Unusable:
        return False
    return True


def _class(found: Any) -> str:
    if isinstance(found, str | int) or (isinstance(found, float) and abs(found) < float("inf")):
        name = label_name(found).strip()
        if name:
            return name
    raise Unusable("label", f"{found!r} is not the name of a class")


def labels(columns: Columns) -> Reader | None:
    """Several classes a row: a list, a text with `|`, `;` or `,` between, or a column of 0 and 1 for each class."""
    target = columns.find("label")
    parts = texts(columns, but=target)
    if not parts:
        return None
    if target is not None:
        return lambda row: Labelled(tuple(text(row, part) for part in parts), _several(row.get(target)))
    flags = [name for name in columns.names if name not in parts and (said := columns.values(name))
             and sum(map(flag, said)) > len(said) * MOSTLY]
    if len(flags) < 2:
        return (lambda row: Labelled(tuple(text(row, part) for part in parts), None)) if columns.unlabelled else None
    return lambda row: Labelled(tuple(text(row, part) for part in parts),
                                tuple(name for name in flags if _flag(row, name)))


def _several(found: Any) -> tuple[str, ...]:
    if found is None:
        raise Unusable("missing", "the row has no classes; write [] if none applies")
    if isinstance(found, str) and found.lstrip()[:1] != "[":
        return tuple(_class(part) for part in re.split(r"[|;,，；、]", found) if part.strip())
    return tuple(dict.fromkeys(_class(one) for one in (listed(found, "label") if isinstance(found, str | list | tuple)
                                                       else [found])))


def flag(found: Any) -> bool:
    """Return whether a value says yes or no."""
    return str(found).lower() in ("0", "1", "0.0", "1.0", "true", "false")


def _flag(row: Row, name: str) -> bool:
    found = value(row, name)
    if not flag(found):
        raise Unusable("label", f"column {name!r} holds {found!r}, neither 0 nor 1")
    return str(found).lower() in ("1", "1.0", "true")


def tags(columns: Columns) -> Reader | None:
    """Words and a tag for each, as lists or with blanks between."""
    words, marks = columns.find("tokens"), columns.find("tags")
    if words is None or (marks is None and not columns.unlabelled):
        return None
    return partial(_tag_row, words=words, marks=marks, unlabelled=columns.unlabelled)


def _tag_row(row: Row, *, words: str, marks: str | None, unlabelled: bool) -> Content:
    found = _words(value(row, words))
    if not found or not all(isinstance(word, str) for word in found):
        raise Unusable("tokens", f"column {words!r} holds no list of words")
    if marks is None or (unlabelled and row.get(marks) is None):
        return Tagged(tuple(found), None)
    its = _words(value(row, marks))
    if len(its) != len(found):
        raise Unusable("tags", f"{len(its)} tags for {len(found)} tokens")
    return Tagged(tuple(found), tuple(_class(one) for one in its))


def _words(found: Any) -> list[Any]:
    return found.split() if isinstance(found, str) and found.lstrip()[:2] not in ("['", '["') else listed(found, "tokens")


def answer(columns: Columns) -> Reader | None:
    """A question whose answer stands in the context, as SQuAD has it."""
    context, question = columns.find("context"), columns.find("question")
    answers, start, key = columns.find("answers"), columns.find("start"), columns.find("key")
    if context is None or question is None or (answers is None and not columns.unlabelled):
        return None

    def read(row: Row) -> Content:
        said = text(row, context)
        name = "" if key is None or row.get(key) is None else str(row[key])
        if answers is None or (columns.unlabelled and row.get(answers) is None):
            return Asked(text(row, question), said, (), name)
        its = value(row, answers)
        if start is not None and isinstance(its, str):
            none = not its and row.get(start) in (None, "", "-1", -1)             # a table's way to say: there is no answer
            its = {"text": [], "answer_start": []} if none else {"text": [its], "answer_start": [value(row, start)]}
        return Asked(text(row, question), said, _answers(its, said), name)

    return read


def _answers(found: Any, context: str) -> tuple[tuple[str, int], ...]:
    """Return the (text, first character) of the answers; Unusable if one does not stand where it is said to."""
    if isinstance(found, str) and found.lstrip()[:1] == "{":
        with suppress(ValueError, RecursionError):
            found = json.loads(found)                    # as a cell of a table holds it
    if isinstance(found, str):
        place = context.find(found)
        if not found or place < 0 or context.find(found, place + 1) >= 0:
            raise Unusable("answer_start", f"{found[:40]!r} does not stand in the context exactly once; answer_start is missing")
        return ((found, place),)
    if isinstance(found, Mapping):
        said, starts = found.get("text"), found.get("answer_start")
        if isinstance(said, str):
            said, starts = [said], [starts]
        pairs = [*zip(listed(said, "answer"), listed(starts, "answer"), strict=False)]
        if len(said or ()) != len(starts or ()):
            raise Unusable("answer_start", f"{len(said or ())} answers, but {len(starts or ())} places")
    else:
        pairs = [(one.get("text"), one.get("answer_start")) for one in listed(found, "answer") if isinstance(one, Mapping)]
    placed = list[tuple[str, int]]()
    for said, start in pairs:
        if not isinstance(said, str) or not said:
            raise Unusable("answer", f"{said!r} is not an answer")
        if (at := whole(start)) is None or at < 0 or not context.startswith(said, at):
            raise Unusable("answer_start", f"the answer {said[:40]!r} does not stand at character {start} of the context")
        placed.append((said, at))
    return tuple(placed)


def whole(found: Any) -> int | None:
    """Return a whole number, also one that is written as a text or as 57.0; None for anything else."""
    try:
        value = number(found, "number")
    except Unusable:
        return None
    return int(value) if value.is_integer() else None


def choice(columns: Columns) -> Reader | None:
    """A text and its possible endings, of which one is right.

    How the right one is told (by a letter, a number from 0 or 1, its text, or the label that stands beside each choice)
    is settled once by the first rows.
    """
    stem, several = columns.find("stem"), columns.find("choices")
    lower = {name.lower(): name for name in columns.names}
    each = next((found for mark in ENDINGS if len(found := [
        name for low, name in sorted(lower.items()) if re.fullmatch(rf"{mark}_?[0-9a-e]", low)]) > 1), [])
    each = each or [name for letter in "abcdef" if (name := lower.get(letter))]
    right = columns.find("choice")
    if stem is None or (several is None and len(each) < 2) or (right is None and not columns.unlabelled):
        return None
    context = columns.find("context")

    def given(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        found = {"text": [row.get(name) for name in each]} if several is None else value(row, several)
        told = found.get("label") if isinstance(found, Mapping) else None
        marks = [str(one) for one in told] if isinstance(told, list | tuple) else []
        said = listed(found.get("text") if isinstance(found, Mapping) else found, "choice")
        if len(said) < 2 or not all(isinstance(one, str) and one.strip() for one in said):
            raise Unusable("choice", "there are not two texts or more to choose from")
        return tuple(said), tuple(marks)

    which = _numbering([(given(row), row[right]) for row in columns.first if right is not None
                        and row.get(right) is not None and _fits(given, row)])

    def read(row: Row) -> Content:
        said, marks = given(row)
        about = text(row, stem) if context is None or context == stem else f"{text(row, context)}\n{text(row, stem)}"
        if right is None or (columns.unlabelled and row.get(right) in (None, "")):
            return Chosen(about, said, None)
        place = which(value(row, right), said, marks)
        if place is None or not 0 <= place < len(said):
            raise Unusable("choice", f"the answer {row[right]!r} is none of the {len(said)} choices")
        return Chosen(about, said, place)

    return read


def _fits(read: Callable[[Row], Any], row: Row) -> bool:
    try:
        read(row)
    except Unusable:
        return False
    return True


Which = Callable[[Any, Sequence[str], Sequence[str]], int | None]


def _by_mark(found: Any, said: Sequence[str], marks: Sequence[str]) -> int | None:
    return marks.index(str(found)) if str(found) in marks else None


def _by_letter(found: Any, said: Sequence[str], marks: Sequence[str]) -> int | None:
    mark = str(found).strip().strip("().").upper()
    return LETTERS.index(mark) if len(mark) == 1 and mark in LETTERS[:len(said)] else None


def _by_number(found: Any, said: Sequence[str], marks: Sequence[str], *, first: int = 0) -> int | None:
    mark = str(found).strip().removesuffix(".0")
    place = int(mark) - first if mark.isascii() and mark.isdigit() else -1
    return place if 0 <= place < len(said) else None


def _by_text(found: Any, said: Sequence[str], marks: Sequence[str]) -> int | None:
    return said.index(found) if isinstance(found, str) and said.count(found) == 1 else None


def _numbering(sample: Sequence[tuple[tuple[tuple[str, ...], tuple[str, ...]], Any]]) -> Which:
    """Return the way of telling the right choice that fits most of the rows; ties go to the first of the list."""
    ways: tuple[Which, ...] = (_by_mark, _by_letter, _by_number, partial(_by_number, first=1), _by_text)
    return max(ways, key=lambda way: sum(way(found, *given) is not None for given, found in sample))


def similar(columns: Columns) -> Reader | None:
    """Texts that are alike: anchor, positive and negatives; or two texts and how alike they are."""
    anchor, positive, negative = (columns.find(role) for role in ("anchor", "positive", "negative"))
    if anchor is not None and positive is not None:
        extra = [name for name in columns.names if re.fullmatch(r"negative_?\d+", name.lower())]

        def read(row: Row) -> Content:
            worse = [text(row, name) for name in extra if row.get(name) is not None]
            if negative is not None and row.get(negative) is not None:
                found = row[negative]
                worse += [text(row, negative)] if isinstance(found, str) else [
                    text({negative: one}, negative) for one in listed(found, "negative")]
            return Similar((text(row, anchor), text(row, positive), *worse))

        return read
    inner = score(columns)

    def scored(row: Row) -> Content:
        found = inner(row) if inner else None
        assert isinstance(found, Labelled)
        if len(found.parts) != 2:
            raise Unusable("missing", "two texts are wanted to compare")
        return Similar(found.parts, float(found.label) if isinstance(found.label, float) else None)

    bare = columns.bare and len(columns.names) == 3
    return scored if inner is not None and (bare or len(texts(columns, but=columns.find("score"))) == 2) else None


def plain(columns: Columns) -> Reader | None:
    """Text to be learned from as it is, or ids."""
    if columns.find("ids") is not None:
        return tokens(columns)
    column = columns.names[0] if len(columns.names) == 1 else columns.find("text")
    return None if column is None else lambda row: Segments(((text(row, column), 1.0),))


def tokens(columns: Columns) -> Reader | None:
    """Rows that are tokenised already.  A label of -100 is not learned from; a token under a 0 in the mask is padding."""
    ids, targets, mask = (columns.find(role) for role in ("ids", "targets", "mask"))
    if ids is None:
        return None

    def read(row: Row) -> Content:
        found = _whole(value(row, ids), "input_ids")
        said = found if targets is None else _whole(value(row, targets), "labels")
        kept = [1] * len(found) if mask is None else _whole(value(row, mask), "attention_mask")
        if not found or not len(found) == len(said) == len(kept):
            raise Unusable("tokens", f"{len(found)} input_ids, {len(said)} labels, {len(kept)} in the attention_mask")
        if any(want not in (-100, own) for own, want in zip(found, said, strict=True)):
            raise Unusable("tokens", "a label is neither -100 nor the id at its place; labels are not shifted")
        both = [(own, float(want != -100)) for own, want, one in zip(found, said, kept, strict=True) if one]
        return Tokens(tuple(own for own, _weight in both), tuple(weight for _own, weight in both))

    return read


def _whole(found: Any, name: str) -> list[int]:
    values = listed(found, "tokens")
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
        raise Unusable("tokens", f"{name} holds something else than whole numbers")
    return values
