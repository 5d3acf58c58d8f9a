"""What is searched: `optim.lr=log(1e-5,1e-3)`, `adapt.rank=[4,8,16]`, `objective.smoothing=0..0.2`, `rows=8..64:8`."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from danlu import chance, config, yamls
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.train.recipe import Run
from danlu.words import _

NUMBER = r"\s*([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)\s*"
LOG = re.compile(rf"log\({NUMBER},{NUMBER}\)")
BETWEEN = re.compile(rf"{NUMBER}\.\.{NUMBER}(?::{NUMBER})?")


class Range(Model):
    """Numbers from low to high, both among them; whole ones if both are written so."""

    kind: Literal["range"] = "range"
    low: float
    high: float
    log: bool = False                                    # drawn evenly over the logarithm
    step: float | None = None
    whole: bool = False

    def ends(self) -> list[Any]:
        """Return the values that a check needs to see."""
        return [int(x) if self.whole else x for x in (self.low, self.high)]

    def points(self) -> list[Any] | None:
        """Return all values, None if they cannot be counted."""
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            return None
        values = [self.low + number * step for number in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]
        return [int(value) if self.whole else round(value, 12) for value in values]


class Choice(Model):
    """One of several values."""

    kind: Literal["choice"] = "choice"
    values: tuple[bool | int | float | str | None, ...]

    def ends(self) -> list[Any]:
        """Return the values that a check needs to see: all."""
        return list(self.values)

    def points(self) -> list[Any] | None:
        """Return all values."""
        return list(self.values)


Axis = Range | Choice


def parsed(key: str, text: Any, *, where: str) -> Axis:
    """Return the axis that `text`, or a list out of a YAML file, describes.  Raises ConfigError that shows the forms."""
    if isinstance(text, str) and text.strip().startswith("["):
        text = yamls.scalar(text.strip())
    if isinstance(text, list):
        return choice(key, text, where)
    words = str(text).strip()
    if found := LOG.fullmatch(words):
        return between(key, [found[1], found[2]], None, where, log=True)
    if found := BETWEEN.fullmatch(words):
        return between(key, [found[1], found[2]], found[3], where, log=False)
    raise ConfigError(_("{key}: {text!r} is nothing that can be searched").format(key=key, text=words), where=where,
                      fix=_("write log(1e-5,1e-3), 0..0.2, 8..64:8 (from, to, step) or [4,8,16]"))


def choice(key: str, values: list[Any], where: str) -> Choice:
    """Return the axis of some values."""
    if not values or any(isinstance(value, list | dict) for value in values):
        raise ConfigError(_("{key}: the list must hold single values").format(key=key), where=where,
                          fix=_("write for example [4,8,16]"))
    if len({json.dumps(value) for value in values}) < len(values):
        raise ConfigError(_("{key}: a value stands twice in {values}").format(key=key, values=values), where=where)
    return Choice(values=tuple(values))


def between(key: str, ends: Sequence[str], step: str | None, where: str, *, log: bool) -> Range:
    """Return the axis between two numbers."""
    low, high = (float(end) for end in ends)
    width = None if step is None else float(step)
    whole = all(re.fullmatch(r"[-+]?\d+", end) for end in (*ends, step or "1"))
    if not low < high:
        raise ConfigError(_("{key}: {low} must be less than {high}").format(key=key, low=ends[0], high=ends[1]), where=where)
    if log and low <= 0:
        raise ConfigError(_("{key}: a logarithm needs numbers above 0, and {low} is not").format(key=key, low=ends[0]),
                          where=where)
    if width is not None and not 0 < width <= high - low:
        raise ConfigError(_("{key}: the step {step} does not fit between {low} and {high}").format(
            key=key, step=step, low=ends[0], high=ends[1]), where=where)
    return Range(low=low, high=high, log=log, step=width, whole=whole)


def read(words: Sequence[str], file: Path | None) -> dict[str, Axis]:
    """Return what is searched, by the section `search` of a YAML file and by `key=…` words; words win."""
    space: dict[str, Axis] = {}
    if file is not None:
        content, lines = yamls.read(file)
        search = content.get("search") if isinstance(content, dict) else None
        if not isinstance(search, dict):
            raise ConfigError(_("the file must hold a section `search` with keys and what to search"), where=str(file))
        for key, value in search.items():
            space[str(key)] = parsed(str(key), value, where=f"{file}:{lines[('search', key)]}")
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(_("{text!r} is not of the form key=what").format(text=word), where="--search")
        space[key.strip().replace("-", "_")] = parsed(key.strip(), text, where="--search")
    if not space:
        raise ConfigError(_("nothing is searched"), where=_("command line"), fix="--search 'optim.lr=log(1e-5,1e-3)'")
    return space


def words(values: Mapping[str, Any]) -> list[str]:
    """Return values as overrides of a recipe."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def check(space: Mapping[str, Axis], file: Path, overrides: Sequence[str]) -> Run:
    """Return the recipe at the first value of every axis; ConfigError if it, or any end of an axis, is no recipe."""
    first = {key: axis.ends()[0] for key, axis in space.items()}
    run = config.load(Run, file, [*overrides, *words(first)])
    for key, axis in space.items():
        for value in axis.ends()[1:]:
            try:
                config.load(Run, file, [*overrides, *words(first | {key: value})])
            except ConfigError as error:
                raise ConfigError(_("{key}={value} cannot be: {why}").format(key=key, value=value, why=error),
                                  where="--search") from None
    return run


def points(space: Mapping[str, Axis], seed: int) -> list[dict[str, Any]]:
    """Return every point of the grid, in an order drawn from the seed."""
    axes = grid(space)
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    random.Random(chance.torch_seed(seed, "grid")).shuffle(found)
    return found


def grid(space: Mapping[str, Axis]) -> dict[str, list[Any]]:
    """Return every value of every axis.  Raises ConfigError for one that cannot be counted."""
    points = {key: axis.points() for key, axis in space.items()}
    endless = [key for key, values in points.items() if values is None]
    if endless:
        raise ConfigError(_("a grid needs values that can be counted, and {keys} has not").format(keys=", ".join(endless)),
                          where="--sampler", fix=_("give a list [a,b,c] or a step from..to:step, or --sampler tpe"))
    return {key: values for key, values in points.items() if values is not None}
