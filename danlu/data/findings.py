"""What of the figures of an audit a user should know: each finding with its share, what is allowed, and rows that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from danlu.data import suspect
from danlu.words import _

Figures = Mapping[str, Any]
ALWAYS = ("left_out", "overlap")                         # have thresholds of their own, above which every run stops


class Finding(NamedTuple):
    """One thing that is found."""

    name: str
    stops: bool                                          # the run; else it is only told
    source: str
    n: int                                               # rows, or tokens, of the `of` there are
    of: int
    what: str
    fix: str
    examples: list[dict[str, str]]


def told() -> dict[str, tuple[str, str]]:
    """Return for each finding what it says ({n} rows of {of}, …) and how to mend it."""
    return {
        "left_out": (_("{n} of {of} rows cannot be used and are left out"),
                     _("mend the rows, or allow a share of them with guard.rejects")),
        "overlap": (_("{n} of {of} evaluation documents stand in the training data"),
                    _("take them out of one of the two (prepare: dedup: exact), or allow it with guard.overlap")),
        "near_overlap": (_("{n} of {of} evaluation rows stand nearly so in the training data"),
                         _("take them out of the training data, or raise audit.near_overlap")),
        "masked": (_("{n} of {of} rows have no token that carries loss"), _("look at the rows' labels, roles and weights")),
        "unended": (_("{n} of {of} answers end without a learned end-of-text: the model would not learn to stop"),
                    _("end them with the tokenizer's eos or the template's end of turn; raise length, if they were cut")),
        "double_bos": (_("{n} of {of} rows begin with bos twice"),
                       _("let either the texts or the tokenizer bring bos, not both")),
        "no_bos": (_("{n} of {of} rows lack the bos that this tokenizer puts in front"), _("prepare the data again")),
        "empty_answer": (_("{n} of {of} answers are empty"), _("give them a text, or leave the rows out")),
        "duplicates": (_("{n} of {of} rows stand there already"), _("leave them out, or raise audit.duplicates")),
        "near_duplicates": (_("{n} of {of} rows stand nearly so there already"), _("leave them out, or raise audit.duplicates")),
        "contradictions": (_("{n} of {of} rows have another class than the same row before"), _("decide which one is right")),
        "cut": (_("{n} of {of} rows are longer than a row of the run and cut, split or dropped"), _("raise length")),
        "unknown": (_("{n} of {of} tokens are unknown to the tokenizer"), _("use a tokenizer that was made for such text")),
        "garbled": (_("the texts of {n} of {of} rows have characters that were lost in another encoding"),
                    _("set `encoding`, or mend the file")),
        "markup": (_("the texts of {n} of {of} rows hold HTML"), _("clean them, if no markup is to be learned")),
        "rarest": (_("the class {name!r} has {n} of {of} rows"), _("add rows of it, or set class weights")),
        "constant": (_("every row has the same class or score"), _("check the label column")),
        "same_text": (_("every row has the same text"), _("check the text column")),
        "alike_labels": (_("classes differ only in case or white space: {name}"), _("write them one way")),
        "long": (_("the longest row has {n} tokens, and the one in the middle {of}"), _("look at it")),
        "padding": (_("{n} of {of} places of the batches are padding"),
                    _("set pack=true or group_by_length=true, or lower length")),
    }


def judge(parts: Sequence[Figures], crossings: Sequence[Figures], batches: Figures, *, allowed: Mapping[str, float],
          stop: Iterable[str]) -> list[Finding]:
    """Return everything above what is allowed (shares, by name), what stops a run first."""
    words, stopping = told(), {*stop, *ALWAYS}
    found = list[Finding]()

    def add(name: str, source: str, n: int, of: int, *, limit: str | None = None, examples: Any = (), word: str = "") -> None:
        share = allowed.get(name if limit is None else limit, 0.0)
        if (n < share * of) if name == "rarest" else (n > share * of):
            what, fix = words[name]
            found.append(Finding(name, name in stopping, source, n, of, what.format(n=n, of=of, name=word), fix, list(examples)))

    folders = set[str]()
    for part in parts:
        _of_part(part, add, whole=part["folder"] not in folders)
        folders.add(part["folder"])
    for one in crossings:
        add("overlap", one["held_out"], one["exact"], one["documents"], examples=one["examples"]["overlap"])
        add("near_overlap", one["held_out"], one["near"], one["near_looked_for"], examples=one["examples"]["near_overlap"])
    if batches:
        add("padding", "", batches["places"] - batches["filled"], batches["places"])
    return sorted(found, key=lambda one: not one.stops)


def _of_part(part: Figures, add: Callable[..., None], *, whole: bool) -> None:
    source, rows, examples = f"{part['source']} · {part['split']}", part["looked_at"], part["examples"]
    if whole:                                            # rows that are left out belong to no split
        bad = sum(n for reason, n in part["left_out"].items() if reason != "dropped")
        add("left_out", part["source"], bad, part["read"] or bad, examples=[
            one for one in examples.get("left_out", []) if not one["text"].startswith("dropped:")])
    for name in ("masked", "unended", "double_bos", "no_bos", "empty_answer", "duplicates", "contradictions"):
        add(name, source, part.get(name, 0), rows, examples=examples.get(name, []))
    add("near_duplicates", source, part["near_duplicates"], part["near_compared"], limit="duplicates",
        examples=examples.get("near_duplicates", []))
    add("cut", source, part["cut"] + part["split_up"] + part["dropped"], part["documents"])
    add("unknown", source, part["unknown"], part["tokens_looked_at"])
    for name in ("garbled", "markup"):
        add(name, source, part.get(name, 0), part["documents"], examples=examples.get(name, []))
    if rows > 1 and part["distinct"] == 1:
        add("same_text", source, rows, rows, limit="")
    _of_labels(part, source, add)
    middle = part["lengths"].get("50", 0)
    if part["documents"] >= 20 and "longest" in part and part["longest"]["tokens"] > 100 * max(middle, 1):
        add("long", source, part["longest"]["tokens"], middle, limit="",
            examples=[{"where": part["longest"]["where"], "text": ""}])


def _of_labels(part: Figures, source: str, add: Callable[..., None]) -> None:
    balance = part["labels"]
    if not balance:
        return
    if balance["constant"]:
        add("constant", source, part["documents"], part["documents"], limit="")
    if part["split"] != "train" or "counts" not in balance:
        return
    for group in suspect.alike(list(balance["counts"])):
        add("alike_labels", source, len(group), len(balance["counts"]), limit="", word=", ".join(map(repr, group)))
    add("rarest", source, balance["counts"][balance["rarest"]], balance["total"], word=balance["rarest"])
