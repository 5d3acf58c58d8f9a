"""What a key of another tool's file means here: a rule takes its value and the whole file, and says it.

A table is {their key: rule}.  `essential` marks what cannot be left out: without it the run would not start, or would
learn something else than the file asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from danlu.train.recipe import Run
from danlu.words import _

Status = Literal["translated", "same", "default", "unsupported"]
OFF: tuple[Any, ...] = (None, False, "", "none", "no", [], {})


class Said(NamedTuple):
    """What becomes of one key: our {dotted key: value} for it, a sentence, and whether the run needs what is missing."""

    status: Status
    ours: Mapping[str, Any] = {}
    note: str = ""
    essential: bool = False


class Given(NamedTuple):
    """The file that is read: its values, and the folder that its relative paths may begin at."""

    values: Mapping[str, Any]
    folder: Path

    def get(self, name: str, otherwise: Any = None) -> Any:
        """Return the value of a key; `otherwise` if it is absent or empty."""
        value = self.values.get(name)
        return otherwise if value is None else value


Rule = Callable[[str, Any, Given], Said]
Table = Mapping[str, Rule]


def said(name: str, value: Any, ours: Mapping[str, Any], note: str = "") -> Said:
    """Return `same` if a recipe of ours may hold this very line and it means `ours`, else `translated`."""
    alias = Run.ALIASES.get(name, name)
    read = {alias: value} if isinstance(alias, str) else alias(value)
    spelt = {f"{key}.kind" if key in ("optim", "schedule") and isinstance(item, str) else key: item for key, item in read.items()}
    return Said("same" if spelt == dict(ours) else "translated", ours, note)


def to(key: str, *, unset: tuple[Any, ...] = (None,), note: str = "") -> Rule:
    """Return a rule: our `key` has the same value; one of `unset` is as if it were not there."""
    def rule(name: str, value: Any, given: Given) -> Said:
        return Said("default", note=_("not set")) if value in unset else said(name, value, {key: value}, note)
    return rule


def picked(key: str, choices: Mapping[Any, Any], *, why: str, essential: bool = False) -> Rule:
    """Return a rule: our `key` has the value that `choices` names for theirs; others are not supported, `why` says."""
    def rule(name: str, value: Any, given: Given) -> Said:
        if value is None:
            return Said("default", note=_("not set"))
        if value not in choices:
            return Said("unsupported", note=why, essential=essential)
        return said(name, value, {key: choices[value]})
    return rule


def plain(*values: Any, why: str, essential: bool = False, note: str = "") -> Rule:
    """Return a rule: these values (and nothing at all) are what happens here anyway; others are not supported."""
    def rule(name: str, value: Any, given: Given) -> Said:
        if value is None or any(value == each and type(value) is type(each) for each in values):
            return Said("default", note=note)
        return Said("unsupported", note=why, essential=essential)
    return rule


def off(why: str, *, essential: bool = False) -> Rule:
    """Return a rule: switched off it is as here, switched on it is not supported, `why` says."""
    def rule(name: str, value: Any, given: Given) -> Said:
        if value in OFF or value == 0:
            return Said("default", note=_("off, as here"))
        return Said("unsupported", note=why, essential=essential)
    return rule


def needless(note: str) -> Rule:
    """Return a rule: whatever the value, nothing is to be set here, `note` says why."""
    return lambda name, value, given: Said("default", note=note)


def quantized(kind: str) -> Rule:
    """Return a rule: switched on, the matrices beside which an adapter learns are kept in few bits."""
    def rule(name: str, value: Any, given: Given) -> Said:
        return Said("translated", {"adapt.base": kind}) if value else Said("default", note=_("off, as here"))
    return rule


def within(chosen: str, values: tuple[Any, ...], rule: Rule, *, usual: Any = None) -> Rule:
    """Return `rule` where their key `chosen` has one of `values`; elsewhere their tool ignores the key, and so do we.

    usual: what `chosen` is where the file does not say.
    """
    def inner(name: str, value: Any, given: Given) -> Said:
        if given.get(chosen, usual) in values:
            return rule(name, value, given)
        return Said("default", note=_("of no effect without {key}={value}").format(key=chosen, value=values[0]))
    return inner


def learned(what: str) -> Rule:
    """Return a rule: switched on, `what` of a conversation carries loss; off it is the assistant's turns, as here."""
    def rule(name: str, value: Any, given: Given) -> Said:
        return said(name, value, {"chat.learn": what}) if value else Said("default", note=_("the assistant's turns are learned"))
    return rule


def names(key: str) -> Rule:
    """Return a rule: our `key` is the list of names that theirs is, one or several."""
    def rule(name: str, value: Any, given: Given) -> Said:
        found = listed(value) if value else []
        return said(name, value, {key: found}) if found else Said("default", note=_("not set"))
    return rule


def one(key: str, why: str) -> Rule:
    """Return a rule: our `key` is the one name that theirs is; several are not supported, `why` says."""
    def rule(name: str, value: Any, given: Given) -> Said:
        found = listed(value) if value else []
        if len(found) > 1:
            return Said("unsupported", note=why, essential=True)
        return said(name, value, {key: found[0]}) if found else Said("default", note=_("not set"))
    return rule


def listed(value: Any) -> list[str]:
    """Return the names in a list, or in text with commas."""
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [word.strip() if isinstance(word, str) else word for word in words if word not in (None, "")]
