"""`danlu advise`: which model, method, optimizer, schedule and compression suit a task, its data and a machine."""

from __future__ import annotations

import json
import re
from functools import partial

from danlu.errors import ConfigError
from danlu.planner import advise, amounts
from danlu.planner.case import case, task
from danlu.verbs.searched import asked, first, tell
from danlu.words import _


def main(*, task: str, rows: str | None, tokens: str | None, language: str | None, hardware: str, model_size: str | None,
         quality: str, latency: str | None, price: str | None, as_json: bool) -> int:
    """Print the advice, each piece with its reason and source."""
    problems: list[str] = []
    machine = asked(problems, hardware=hardware, deadline=None, budget=None, price=price).machine
    name = first(problems, lambda: named(task), "classification")
    counts = {}
    for option, text in (("--rows", rows), ("--tokens", tokens), ("--model-size", model_size)):
        counts[option] = None if text is None else first(problems, partial(amounts.number, text, where=option), 0.0)
    wait = first(problems, lambda: None if latency is None else milliseconds(latency), None)
    tell(problems)
    found = case(name=name, rows=counts["--rows"], tokens=counts["--tokens"], language=(language or "en").lower()[:2],
                 machine=machine, size=counts["--model-size"], quality=quality, latency=wait)
    if as_json:
        print(json.dumps(advise.record(found), ensure_ascii=False))
    else:
        print(*advise.lines(found), sep="\n")
    return 0


def named(text: str) -> str:
    """Return the task of that name."""
    return task(text)


def milliseconds(text: str) -> float:
    """Return the seconds that '20ms' or '0.5s' means.  Raises ConfigError for anything else."""
    found = re.fullmatch(r"([0-9.]+)\s*(ms|s)", text.strip().lower())
    if found is None or found[1].count(".") > 1 or not float(found[1] or 0) > 0:
        raise ConfigError(_("{text!r} is no time of an answer").format(text=text), where="--latency",
                          fix=_("write it as 20ms or 0.5s"))
    return float(found[1]) / (1000 if found[2] == "ms" else 1)
