"""The part of `danlu plan` that is asked about a machine: the search for a recipe, and the plan of a public model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from danlu import config
from danlu.errors import ConfigError
from danlu.planner import amounts, hardware, large, offer
from danlu.planner.hardware import Machine
from danlu.planner.public import public as known
from danlu.planner.search import search
from danlu.rehearse import settled
from danlu.train.intake import located
from danlu.train.recipe import Run
from danlu.verbs import needed
from danlu.words import _

T = TypeVar("T")


class Asked(NamedTuple):
    """What the command line asks of a plan; seconds, money."""

    machine: Machine
    deadline: float | None
    budget: float | None


def first(problems: list[str], make: Callable[[], T], other: T) -> T:
    """Return what `make` makes; if it cannot, `other`, and the problem goes to the others."""
    try:
        return make()
    except ConfigError as error:
        problems.append(str(error))
        return other


def tell(problems: list[str]) -> None:
    """Raise ConfigError with all problems, if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))


def asked(problems: list[str], *, hardware: str | None, deadline: str | None, budget: str | None, price: str | None) -> Asked:
    """Return what the options mean; what is wrong with them goes to `problems`."""
    cost = first(problems, lambda: None if price is None else amounts.money(price, where="--price"), None)
    machine = first(problems, lambda: machine_of(hardware or "here", cost), machine_of("here", None))
    limit = first(problems, lambda: None if deadline is None else amounts.seconds(deadline, where="--deadline"), None)
    most = first(problems, lambda: None if budget is None else amounts.money(budget, where="--budget"), None)
    if most == 0:
        problems.append(_("--budget: nothing runs for nothing"))
    return Asked(machine, limit, most)


def machine_of(text: str, price: float | None) -> Machine:
    """Return the machine of that name, this one with what `danlu calibrate` has measured."""
    return hardware.parse(text, price=price, path=hardware.measured_at(os.environ.get("XDG_CACHE_HOME")))


def public(file: Path | None, overrides: list[str], problems: list[str], *, model: str | None, tokens: str | None, asked: Asked,
           as_json: bool) -> int:
    """Print what training a public model on so many tokens takes; exit 5 if it cannot be."""
    if file is not None or overrides:
        problems.append(_("--model plans without a recipe; leave out {words}").format(
            words=" ".join([*([str(file)] if file else []), *overrides])))
    chosen = first(problems, lambda: known(model) if model is not None else None, None)
    count = first(problems, lambda: amounts.number(tokens, where="--tokens") if tokens is not None else None, None)
    problems += [_("{option} is needed, too").format(option=option)
                 for option, value in (("--model", model), ("--tokens", tokens)) if value is None]
    tell(problems)
    assert chosen is not None and count is not None, "told"
    found = large.large(chosen, asked.machine, count, deadline=asked.deadline, budget=asked.budget)
    if as_json:
        print(json.dumps(large.record(found), ensure_ascii=False))
    else:
        print(*large.lines(found), sep="\n")
    return 5 if any(large.impossible(found)) else 0


def recipe(file: Path | None, overrides: list[str], *, asked: Asked, vocab: int | None, rehearsed: int, as_json: bool) -> int:
    """Print the best ways to run a recipe on a machine; exit 5 if none fits into it."""
    given = located(config.load(Run, needed(file), overrides))
    device = "cpu" if asked.machine.device.kind == "cpu" else "cuda"
    alone = given.model_copy(update={"rows": given.step_rows, "micro_rows": None, "tokens": None, "device": device,
                                     "layout": type(given.layout)()})
    run = settled(alone, vocab)
    run = run.model_copy(update={"precision": given.precision})
    found = search(run, asked.machine, steps=given.steps, deadline=asked.deadline, budget=asked.budget, given=given)
    checked = [offer.verified(one) for one in found.best[:rehearsed] if one.fits]
    if as_json:
        print(json.dumps(offer.record(found) | {"rehearsed": [
            {"peak": each.largest.memory.peak, "estimate_above": above} for each, above in checked]}, ensure_ascii=False))
    else:
        print(*offer.lines(found, file), sep="\n")
        used = found.best[0].run.precision
        if given.precision not in ("auto", used):
            print(_("{device} has no {precision} that is worth it; {used} stands in its place").format(
                device=asked.machine.device.name, precision=given.precision, used=used))
        for number, (each, above) in enumerate(checked, 1):
            print(_("{number}. rehearsed in full: {peak}; the estimate lies {above:+.1%} off").format(
                number=number, peak=amounts.size(each.largest.memory.peak), above=above))
    return 0 if found.best[0].fits else 5
