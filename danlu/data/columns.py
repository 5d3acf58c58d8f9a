"""The columns of a data set, found by what they are for; and their values, taken strictly."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from danlu.data.example import Unusable
from danlu.errors import DataError
from danlu.words import _

ROLES: dict[str, tuple[str, ...]] = {               # role: names under which data sets have it, the usual one first
    "text": ("text", "text_a", "sentence", "sentence1", "content", "review", "comment", "tweet", "utterance", "premise",
             "question1", "query", "文本", "内容", "评论", "句子"),
    "pair": (),                                     # only beside its own first text: see PAIRS
    "label": ("label", "labels", "class", "category", "target", "sentiment", "intent", "gold_label", "label_text",
              "标签", "类别", "情感", "answer"),
    "score": ("score", "similarity_score", "similarity", "rating", "stars", "label", "labels", "target", "分数", "评分"),
    "tokens": ("tokens", "words", "字"),
    "tags": ("tags", "ner_tags", "ner", "bio", "pos_tags", "labels"),
    "context": ("context", "passage", "paragraph", "document", "article"),
    "question": ("question", "query", "问题"),
    "answers": ("answers", "answer"),
    "start": ("answer_start", "start", "start_position"),
    "key": ("id", "key", "qid", "guid"),
    "stem": ("question", "ctx", "stem", "goal", "premise", "sentence", "query", "input", "sent1"),
    "choices": ("choices", "options", "endings", "candidates"),
    "choice": ("answer", "answerkey", "label", "answer_idx", "gold", "correct"),
    "anchor": ("anchor", "query", "question"),
    "positive": ("positive", "pos", "passage", "answer"),
    "negative": ("negative", "neg", "negatives", "hard_negative"),
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue"),
    "segments": ("segments",),
    "ids": ("input_ids",),
    "targets": ("labels",),
    "mask": ("attention_mask",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "instruction": ("instruction", "指令"),
    "input": ("input", "context", "输入"),
    "output": ("output", "response", "输出"),
    "query": ("query", "question", "problem", "user", "input", "prompt", "问题"),
    "response": ("response", "answer", "output", "assistant", "solution", "target", "reply", "答案", "回答"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}
PAIRS = (("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
         ("text1", "text2"), ("text", "text_pair"), ("question", "sentence"), ("question", "passage"), ("s1", "s2"),
         ("query", "title"), ("query", "passage"))
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag", "observation_tag", "function_tag")


@dataclass(frozen=True)
class Columns:
    """The columns of a data set, its first rows, and which column the user said is what."""

    names: tuple[str, ...]
    first: tuple[Mapping[str, Any], ...]
    given: Mapping[str, str]                        # role: column
    unlabelled: bool = False                        # rows to predict: they need no label

    @property
    def bare(self) -> bool:
        """Say whether the columns have numbers for names, as without a header, and the user named none."""
        return not self.given and self.names == tuple(str(index) for index in range(len(self.names)))

    def find(self, role: str) -> str | None:
        """Return the column that has a role: the one the user named, else the first known name that is not given away."""
        if role in self.given:
            return self.given[role]
        lower = {name.lower(): name for name in reversed(self.names) if name not in self.given.values()}
        return next((lower[name] for name in ROLES[role] if name in lower), None)

    def values(self, column: str) -> list[Any]:
        """Return what the first rows hold in a column, None left out."""
        return [row[column] for row in self.first if row.get(column) is not None]


def check(columns: Columns) -> None:
    """Raise DataError when the user names a role or a column that does not exist."""
    for role, column in columns.given.items():
        if role not in ROLES and role not in TAGS:
            near = difflib.get_close_matches(role, ROLES, 1)
            raise DataError(_("there is no role {role!r} for a column; there are {known}").format(
                role=role, known=", ".join(ROLES)), fix=_("did you mean {near}?").format(near=near[0]) if near else None)
        if column not in columns.names and role not in TAGS:
            near = difflib.get_close_matches(column, columns.names, 1)
            raise DataError(_("there is no column {wanted!r}; the columns are {names}").format(
                wanted=column, names=", ".join(columns.names)),
                fix=naming({role: near[0] if near else "…"}))


def naming(meant: Mapping[str, str]) -> str:
    """Return how to say which column is what."""
    return _("name the columns, in a recipe `columns: {{{recipe}}}`, on the command line as --columns {words}").format(
        recipe=", ".join(f"{role}: {name}" for role, name in meant.items()),
        words=" ".join(f"{role}={name}" for role, name in meant.items()))


def value(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column; Unusable where the row has none."""
    if row.get(column) is None:
        raise Unusable("missing", f"there is nothing in column {column!r}")
    return row[column]


def text(row: Mapping[str, Any], column: str) -> str:
    """Return a text that says something; Unusable for anything else."""
    found = value(row, column)
    if isinstance(found, list | tuple) and len(found) > 1:
        raise Unusable("not_text", f"column {column!r} holds {len(found)} values where one text is wanted")
    if not isinstance(found, str):
        raise Unusable("not_text", f"column {column!r} holds {type(found).__name__}, not text")
    if not found.strip():
        raise Unusable("empty", f"column {column!r} is empty")
    return found


def written(row: Mapping[str, Any], column: str) -> str:
    """Return a text that may be empty; "" where the row has none."""
    found = row.get(column)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise Unusable("not_text", f"column {column!r} holds {type(found).__name__}, not text")
    return found


def number(found: Any, what: str) -> float:
    """Return a finite number; Unusable for anything else."""
    try:
        result = float(found) if isinstance(found, str | int | float) and not isinstance(found, bool) else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise Unusable(what, f"{found!r} is not a number")
    return result


def listed(found: Any, what: str) -> list[Any]:
    """Return a list, also one that is written as JSON; Unusable for anything else."""
    if isinstance(found, str) and found.lstrip()[:1] == "[":
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            raise Unusable(what, f"{found[:40]!r} is not a list") from None
    if not isinstance(found, list | tuple):
        raise Unusable(what, f"{type(found).__name__} where a list is wanted")
    return list(found)


def short(values: Sequence[Any]) -> float:
    """Return the mean number of characters of values."""
    return sum(len(str(one)) for one in values) / max(1, len(values))
