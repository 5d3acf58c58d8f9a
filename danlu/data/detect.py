"""Which form a data set has, told from its columns and first rows; never from a registry, but one is read if there is one."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from danlu.data import dialogues, forms
from danlu.data.columns import PAIRS, ROLES, Columns, check, naming, short
from danlu.data.example import Content, Unusable
from danlu.data.forms import flag
from danlu.errors import DataError, SecurityError
from danlu.words import _

Reader = Callable[[Mapping[str, Any]], Content]
READERS: dict[str, Callable[[Columns], Reader | None]] = {
    "label": forms.label, "labels": forms.labels, "score": forms.score, "tags": forms.tags, "answer": forms.answer,
    "choice": forms.choice, "similar": forms.similar, "chat": dialogues.chat, "text": forms.plain,
}
NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {   # the roles of each form, as an error shows them
    "label": (("text", "label"), ("text", "pair", "label")),
    "labels": (("text", "label"),),
    "score": (("text", "score"), ("text", "pair", "score")),
    "tags": (("tokens", "tags"),),
    "answer": (("context", "question", "answers"),),
    "choice": (("stem", "choices", "choice"),),
    "similar": (("anchor", "positive"), ("text", "pair", "score")),
    "chat": (("messages",), ("instruction", "output"), ("query", "response"), ("prompt", "completion"), ("segments",),
             ("ids",), ("text",)),
    "text": (("text",), ("ids",)),
}

KNOWN = {name.lower() for names in ROLES.values() for name in names} | {name for pair in PAIRS for name in pair}
NUMBERED = re.compile(r"[a-z]+_?[0-9a-f]{1,3}")          # negative_1, option_a …
SPELT = {"labels": "label", "answer": "answers", "text_a": "text", "text_b": "pair", "sentence1": "text", "sentence2": "pair"}
SAID: dict[str, dict[str, str]] = {                 # roles as users may call them, by what is wanted
    "score": {"label": "score"}, "tags": {"label": "tags", "text": "tokens"}, "answer": {"text": "context", "label": "answers"},
    "choice": {"label": "choice", "answers": "choice", "question": "stem", "text": "stem"},
    "chat": {"question": "query", "answers": "response"},
}


def reader(columns: Sequence[str], first: Sequence[Mapping[str, Any]], want: str, names: Mapping[str, str], *,
           unlabelled: bool = False) -> Understood:
    """Return what makes contents of rows; it raises `Unusable` for a row that cannot be learned from.

    columns: of the file; first: its first rows, the more (some hundred) the surer; want: a key of READERS; names: column
    of each role that the user names; unlabelled: rows to be predicted, which need no label and no answer.  Raises
    DataError when the columns do not fit or are probably swapped.
    """
    plain = {SPELT.get(role, role): column for role, column in names.items()}
    roles = {SAID.get(want, {}).get(role, role): column for role, column in plain.items()}
    return Understood(Columns(tuple(columns), tuple(first), roles, unlabelled), want)


class Understood:
    """Makes contents of rows.  A column that no row had before is taken in when it comes, and what is not read is known."""

    def __init__(self, columns: Columns, want: str) -> None:
        self.want, self.columns = want, columns
        self.known = {*columns.names, *(name for row in columns.first for name in row)}
        self.used = set[str]()
        check(columns)
        self._read = self._made(columns.first)

    def __call__(self, row: Mapping[str, Any]) -> Content:
        if not row.keys() <= self.known:
            self._meet(row)
        return self._read(row)

    @property
    def unread(self) -> list[str]:
        """Return the columns that nothing is taken from."""
        return [name for name in self.columns.names if name not in self.used]

    def _meet(self, row: Mapping[str, Any]) -> None:
        """Take in a row with columns that no row had before.  Raises DataError if they make of the rows what cannot be."""
        new = [name for name in row if name not in self.known]
        self.known |= set(new)
        if self.want == "labels" and self.columns.find("label") is None and any(flag(row[name]) for name in new):
            self.known -= set(new)                       # the next such row is at fault as well
            raise Unusable("label", f"no row before has the column {', '.join(new)}, which may be a class")
        if not any(name.lower() in KNOWN or NUMBERED.fullmatch(name.lower()) for name in new):
            return
        self.columns = replace(self.columns, names=(*self.columns.names, *new), first=(*self.columns.first, row))
        self._read = self._made([row])

    def _made(self, rows: Sequence[Mapping[str, Any]]) -> Reader:
        """Return the reader of rows with these columns; `rows` are looked at to see what it takes."""
        columns = self.columns
        if self.want == "chat":
            _check_answers(columns)
        found = READERS[self.want](columns)
        if found is None:
            raise _unfit(columns, self.want)
        if self.want == "label" and not columns.unlabelled:
            _check_swapped(columns)
        for row in rows:
            with suppress(Unusable):
                found(_Watched(row, self.used))
        return found


class _Watched(dict[str, Any]):
    """A row that remembers which of its columns were asked for."""

    def __init__(self, row: Mapping[str, Any], used: set[str]) -> None:
        super().__init__(row)
        self.used = used

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)


def _check_answers(columns: Columns) -> None:
    """Raise DataError for rows whose answers are not all to be learned, or answer what a chat does not show."""
    lower = {name.lower(): name for name in columns.names}
    if {"completion", "response", "output", "messages"} & columns.given.keys():
        return                                           # the user has said what is learned from
    if {"chosen", "rejected"} <= lower.keys():
        raise DataError(_("these rows hold preferences (chosen and rejected answers), from which nothing is learned yet"),
                        fix=naming({"query": "prompt", "response": "chosen"}))
    answers = [columns.find(role) for role in ("messages", "completion", "output", "response")]
    said = columns.values(lower["label"]) if "label" in lower and lower["label"] not in columns.given.values() else []
    if any(answers) and said and all(str(one).lower() in ("true", "false") for one in said):
        raise DataError(_("column {name!r} says which answers are good and which are bad, from which nothing is learned yet")
                        .format(name=lower["label"]), fix=_("keep the rows whose answers are good, without that column"))
    letters = [lower[name] for name in "abcd" if name in lower]
    several = letters if len(letters) > 2 else [lower[name] for name in ROLES["choices"] if name in lower]
    if several and any(answers[1:]) and answers[0] is None:
        raise DataError(_("the columns {names} hold choices, which a chat would not show").format(names=", ".join(several)),
                        fix=_("set objective: choose, or write the choices into the question"))


def _unfit(columns: Columns, want: str) -> DataError:
    """Return the error for columns of which nothing can be made, with the form that is nearest."""
    others = [other for other, form in READERS.items() if other != want and form(columns) is not None]
    form = max(NEEDS[want], key=lambda roles: (sum(_has(columns, role) for role in roles) / len(roles), -len(roles)))
    used = {found for role in form if (found := columns.find(role))}
    guessed = dict[str, str]()
    for role in form:
        if not _has(columns, role):
            free = [name for name in columns.names if name not in used]
            found = _nearest(role, free)
            used |= {found} if found else set()
            guessed[role] = found or "…"
    fix = naming(guessed)
    if others:
        fix += _("; as they are, they fit: {others}").format(others=", ".join(others))
    forms_shown = " | ".join("+".join(roles) for roles in NEEDS[want])
    return DataError(_("the columns {names} do not fit; to learn {want}, one of these forms is wanted: {forms}").format(
        names=", ".join(columns.names), want=want, forms=forms_shown), fix=fix)


def _has(columns: Columns, role: str) -> bool:
    if role == "pair":
        lower = {name.lower() for name in columns.names}
        return role in columns.given or any(second in lower and first in lower for first, second in PAIRS)
    return columns.find(role) is not None


def _nearest(role: str, free: Sequence[str]) -> str | None:
    """Return the free column whose name is most like one that the role has in data sets, else the only one left."""
    known = ROLES[role] or tuple(second for _first, second in PAIRS)
    scored = [(difflib.SequenceMatcher(None, name.lower(), other).ratio(), name) for name in free for other in known]
    best = max(scored, default=(0.0, ""))
    return best[1] if best[0] >= 0.6 else free[0] if len(free) == 1 else None


def _check_swapped(columns: Columns) -> None:
    """Raise DataError when the label column holds long texts, all different, and the text column a few short values."""
    label, parts = columns.find("label"), forms.texts(columns, but=columns.find("label"))
    if label is None or len(parts) != 1 or columns.bare:
        return
    said, texts = [str(one) for one in columns.values(label)], [str(one) for one in columns.values(parts[0])]
    if len(said) < 8 or len(texts) < 8:
        return
    if len(set(said)) == len(said) and short(said) > 20 and len(set(texts)) <= len(texts) // 2 and short(texts) <= 20:
        raise DataError(
            _("the columns look swapped: {label!r} holds long texts, all different, and {text!r} only {values}").format(
                label=label, text=parts[0], values=", ".join(sorted(set(texts))[:5])),
            fix=naming({"text": label, "label": parts[0]}))


class Registered(NamedTuple):
    """An entry of LLaMA-Factory's dataset_info.json in our words."""

    path: str                                       # a file or folder, or hf://name
    names: dict[str, str]                           # column of each role
    subset: str | None = None
    split: str | None = None
    take: int | None = None


UNLEARNED = ("chosen", "rejected", "kto_tag", "images", "videos", "audios")        # columns of LLaMA-Factory
LF = {                                              # their names of columns: our roles
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
               "tools": "tools"},
    "sharegpt": {"messages": "messages", "system": "system", "tools": "tools"},
}


def registered(folder: Path, name: str) -> Registered | None:
    """Return what a dataset_info.json in `folder` says of `name`; None where there is no such file or no such key."""
    file = folder / "dataset_info.json"
    if not file.is_file():
        return None
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"))
        entry = table.get(name)
    except (ValueError, AttributeError) as error:
        raise DataError(_("this is not a registry of data sets: {why}").format(why=error), where=str(file)) from None
    if not isinstance(entry, dict):
        return None
    if "script_url" in entry:
        raise SecurityError(_("{name!r} is a program, which is never run").format(name=name), where=str(file),
                            fix=_("save its rows as jsonl or parquet"))
    if entry.get("ranking"):
        raise DataError(_("{name!r} holds preferences (chosen and rejected answers)").format(name=name), where=str(file),
                        fix=_("name a data set with one answer a row"))
    known = LF.get(entry.get("formatting", "alpaca"), LF["sharegpt"])
    columns = {**({"messages": "conversations"} if known is LF["sharegpt"] else {}), **(entry.get("columns") or {})}
    names = {known[key]: column for key, column in columns.items() if key in known}
    names |= entry.get("tags") or {}
    if odd := sorted(key for key in columns if key in UNLEARNED):
        raise DataError(_("{name!r} has what nothing is learned from: {keys}").format(name=name, keys=", ".join(odd)),
                        where=str(file), fix=_("name a data set of texts with one answer a row"))
    if known is LF["alpaca"] and columns.keys() == {"prompt"} and columns["prompt"] in ROLES["text"]:
        names = {"text": columns["prompt"]}              # how a corpus for pretraining is written there
    path = f"hf://{entry['hf_hub_url']}" if "hf_hub_url" in entry else str(folder / entry.get("file_name", name))
    return Registered(path, names, entry.get("subset"), entry.get("split"), entry.get("num_samples"))
