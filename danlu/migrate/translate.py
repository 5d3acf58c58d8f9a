"""Another tool's YAML file to a recipe, with a report on every line of it."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from danlu import config, yamls
from danlu.errors import ConfigError
from danlu.migrate import axolotl, llamafactory, trl
from danlu.migrate.rules import Given, Rule, Said
from danlu.train.recipe import Run
from danlu.words import _

TOOLS = {"llamafactory": llamafactory, "axolotl": axolotl, "trl": trl}
SETS = ("datasets", "test_datasets", "pretraining_dataset")
SECRET = ("token", "api_key", "secret", "webhook_url", "password")
ORDER = ("out", "start", "data", "held_out", "eval", "objective", "adapt", "optim", "schedule", "clip", "precision", "recompute",
         "steps", "epochs", "micro_rows", "layout", "length", "pack", "overlong", "seed", "every", "metric", "stop")
MOMENTS = ("adam", "adamw", "lion", "lamb")              # optimizers that have betas


class Entry(NamedTuple):
    """What became of one key of the file, or of one that it leaves to a default (then without lines)."""

    first: int | None                                    # its first and last line
    last: int | None
    key: str
    value: Any
    status: Literal["translated", "same", "default", "unsupported", "added"]
    ours: Mapping[str, Any]
    note: str
    essential: bool


class Translation(NamedTuple):
    """A report in the order of the file, and the recipe."""

    entries: list[Entry]
    recipe: dict[str, Any]

    @property
    def missing(self) -> list[Entry]:
        """What the run needs and could not be translated."""
        return [entry for entry in self.entries if entry.status == "unsupported" and entry.essential]


def translate(tool: str, path: Path) -> Translation:
    """Return what the file at `path`, written for `tool`, means here.  Raises ConfigError if it is no strict YAML."""
    values, lines = yamls.read(path)
    if not isinstance(values, dict):
        raise ConfigError(_("the file must hold keys and values"), where=str(path))
    given, module = Given(values, path.parent), TOOLS[tool]
    table, text = module.table(), path.read_text(encoding="utf-8-sig").splitlines()
    entries = []
    for name, value in values.items():
        outcome = apply(table.get(name), name, value, given, f"{path}:{lines[(name,)]}") or unknown(name, list(table))
        entries.append(Entry(lines[(name,)], None, name, shown(name, value), *outcome))
        if tool == "axolotl" and name in SETS and isinstance(value, list):
            entries += details(name, value, lines)
    flat: dict[str, Any] = {}
    for entry in entries:
        merge(flat, entry.ours)
    entries = [*stretches(entries, text), *added(module.defaults(given), table, given, flat)]
    return Translation([*entries, *wanting(flat, entries, path)], nested(flat))


def apply(rule: Rule | None, name: str, value: Any, given: Given, where: str) -> Said | None:
    """Return what the rule says, None without one.  Raises ConfigError if the value is of a kind that it cannot be."""
    try:
        return rule(name, value, given) if rule is not None else None
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(_("the value of {key} is not one this key can have: {value}").format(key=name,
                                                                                               value=shown(name, value)),
                          where=where) from error


def unknown(name: str, known: list[str]) -> Said:
    """Return what is said of a key that is in no table."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return Said("unsupported", note=_("no key of this tool; did you mean {name}?").format(name=near[0]) if near
                else _("no key of this tool that is known here"))


def shown(name: str, value: Any) -> Any:
    """Return the value, hidden if it is a secret."""
    return "…" if value and name.endswith(SECRET) and isinstance(value, str) and name not in ("eos_token", "pad_token") else value


def details(name: str, value: list[Any], lines: yamls.Lines) -> Iterator[Entry]:
    """Yield an entry for each key of each data set in Axolotl's lists."""
    for number, each in enumerate(value):
        for key, inner in each.items() if isinstance(each, dict) else ():
            yield Entry(lines[(name, number, key)], None, f"{name}.{number}.{key}", inner, *axolotl.detail(key, inner, each))


def stretches(entries: list[Entry], text: list[str]) -> list[Entry]:
    """Return the entries with their last lines: up to the next entry, without the blank lines and comments before it."""
    starts = sorted({entry.first or 0 for entry in entries} | {len(text) + 1})
    ends = {}
    for start, following in itertools.pairwise(starts):
        last = following - 1
        while last > start and (not text[last - 1].strip() or text[last - 1].lstrip().startswith("#")):
            last -= 1
        ends[start] = last
    return [entry._replace(last=ends[entry.first or 0]) for entry in entries]


def added(defaults: Mapping[str, Any], table: Mapping[str, Rule], given: Given, flat: dict[str, Any]) -> list[Entry]:
    """Return an entry for each default of theirs that the recipe must spell out, and put it there."""
    found = []
    for name, value in defaults.items():
        if given.get(name) is not None:
            continue
        said = apply(table[name], name, value, given, "") or Said("default")
        kind = flat.get("optim.kind")
        ours = {key: item for key, item in said.ours.items() if key not in flat
                and (kind in (None, *MOMENTS) or not key.startswith("optim.betas"))}
        merge(flat, ours)
        if ours or said.status == "unsupported":
            found.append(Entry(None, None, name, value, "added" if ours else "unsupported", ours, said.note, said.essential))
    return found


def wanting(flat: dict[str, Any], entries: list[Entry], path: Path) -> Iterator[Entry]:
    """Yield an entry for each key of ours that every recipe needs and the file says nothing of."""
    for key, value in (("objective.kind", "causal_lm"), ("out", f"runs/{path.stem}")):
        if key not in flat and not any(entry.key == "stage" and entry.essential for entry in entries):
            flat[key] = value
            yield Entry(None, None, "", None, "added", {key: value}, "", False)
    for key, what in (("start", _("a model to start from")), ("data", _("data")), ("optim.lr", _("a learning rate")),
                      ("length", _("the length of a row"))):
        told = {"data": {"dataset", "dataset_name", *SETS}, "length": {"max_length"}}.get(key, set())
        if key not in flat and not any(entry.key in told and entry.essential for entry in entries):
            yield Entry(None, None, "", None, "unsupported", {}, _("{key}: the file names no {what}").format(key=key, what=what),
                        True)


def merge(flat: dict[str, Any], ours: Mapping[str, Any]) -> None:
    """Add `ours` to the dotted keys; sources of several keys stand one after another."""
    for key, value in ours.items():
        if key in flat and isinstance(value, list) and isinstance(flat[key], list) and key in ("data", "eval"):
            flat[key] = [*flat[key], *value]
        else:
            flat[key] = value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted keys as a recipe holds them, in the order that recipes have."""
    made: dict[str, Any] = {}
    betas = [flat.get(f"optim.betas.{i}", usual) for i, usual in enumerate((0.9, 0.999))]
    spelt = {key: value for key, value in flat.items() if not key.startswith("optim.betas")}
    if any(key.startswith("optim.betas") for key in flat):
        spelt["optim.betas"] = betas
    for key, value in spelt.items():
        head, dot, rest = key.partition(".")
        if dot:
            made.setdefault(head, {})[rest] = value
        else:
            made[head] = value
    for name, value in made.items():
        if isinstance(value, dict) and "kind" in value:
            made[name] = {"kind": value["kind"], **value}
    order = {name: number for number, name in enumerate(ORDER)}
    return dict(sorted(made.items(), key=lambda item: order.get(item[0], len(order))))


def written(translation: Translation, tool: str, path: Path) -> str:
    """Return the recipe as a file: what it was made from, the keys, and what could not be translated."""
    head = _("made by `danlu import-config --from {tool} {file}`").format(tool=tool, file=path)
    body = yaml.safe_dump(translation.recipe, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    left = [entry for entry in translation.entries if entry.status == "unsupported"]
    tail = "".join(f"# {_('not translated')}: {told(entry)}\n" for entry in left)
    return f"# {head}\n{body}{tail}"


def told(entry: Entry) -> str:
    """Return an entry in one line, without its place."""
    theirs = f"{entry.key}: {brief(entry.value)}" if entry.key else ""
    ours = ", ".join(f"{key}: {brief(value)}" for key, value in entry.ours.items())
    arrow = f"{theirs} → {ours}" if theirs and ours else theirs or ours
    return (f"{arrow} ({entry.note})" if arrow else entry.note) if entry.note else arrow


def brief(value: Any) -> str:
    """Return a value as YAML on one line, shortened."""
    if value is None:
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
    return text if len(text) <= 100 else text[:99] + "…"


def accepted(recipe: dict[str, Any]) -> str:
    """Return '' if `danlu config check` accepts the recipe, else its problems."""
    try:
        config.validate(Run, recipe)
    except ConfigError as error:
        return str(error)
    return ""
