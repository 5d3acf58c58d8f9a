"""Advice for a case: the rules that apply, filled in with the case's own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from danlu.planner import amounts
from danlu.planner.case import Case, held
from danlu.planner.rules import Source, rules
from danlu.words import _

TOPICS = ("model", "method", "optimizer", "schedule", "batch", "epochs", "data", "compression")
BEST = 20.0                                              # tokens a parameter (Hoffmann et al., 2022)
LOSS = 3.0                                               # nats a token, where the critical batch is told for


class Advice(NamedTuple):
    """One piece, as it is told."""

    topic: str
    say: str
    why: str
    source: Source
    lines: tuple[str, ...]


def values(case: Case) -> dict[str, str]:
    """Return what the texts of rules may name."""
    tokens = case.tokens or 0.0
    ratio = tokens / case.size if case.size else 0.0
    told = _("{tokens} tokens ÷ 20 = {size}").format(tokens=amounts.told(tokens), size=amounts.told(tokens / BEST))
    return {
        "model": case.model.name if case.model else "", "size": amounts.told(case.size), "count": f"{case.machine.count}",
        "device": case.machine.device.name, "state": amounts.size(case.state), "full": amounts.size(held(case.size, "full")),
        "method": {"lora": "LoRA", "qlora": "QLoRA"}.get(case.method, case.method), "tokens": amounts.told(tokens),
        "ratio": f"{ratio:.3g}", "twenty": amounts.told(BEST * case.size), "share": told if tokens else _("you give no tokens"),
        "base": "nf4" if case.method == "qlora" else "null",
        "qlora": "2e-4" if case.size < 2e10 else "1e-4", "batch": amounts.told(2e8 / LOSS ** (1 / 0.21)),
    }


def advise(case: Case) -> list[Advice]:
    """Return what applies, one piece a topic, in the order of TOPICS."""
    known, made = values(case), dict[str, Advice]()
    for rule in rules():
        asked = case.method != "none" or rule.topic in ("model", "method", "data")
        if asked and rule.topic not in made and rule.when(case):
            made[rule.topic] = Advice(rule.topic, rule.say.format(**known), rule.why.format(**known), rule.source,
                                      tuple(line.format(**known) for line in rule.lines))
    return [made[topic] for topic in TOPICS if topic in made]


def epochs(case: Case) -> float:
    """Return the passes over the data that the advice begins with."""
    given = [line for one in advise(case) for line in one.lines if line.startswith("epochs=")]
    return float(given[0].partition("=")[2]) if given else 1.0


def lines(case: Case) -> Iterator[str]:
    """Yield what is printed."""
    machine = case.machine
    yield _("{task} on {count} × {device} ({memory} each)").format(
        task=case.task, count=machine.count, device=machine.device.name, memory=amounts.size(machine.device.memory))
    found = advise(case)
    for one in found:
        yield f"{one.topic}: {one.say}"
        yield f"    {one.why} — {one.source.authors}, {one.source.year}, {one.source.where}"
    passes, seconds = epochs(case), case.seconds(epochs(case))
    if seconds is not None and case.method != "none":
        cost = machine.device.price
        yield _("time: about {time} for {passes:g} passes over {tokens} tokens ({length} a row assumed){money}").format(
            time=amounts.duration(seconds), passes=passes, tokens=amounts.told(case.seen or 0), length=case.length,
            money="" if cost is None else _(", money {cost:,.2f}").format(cost=cost * machine.count * seconds / 3600))
    given = [line for one in found for line in one.lines]
    if given:
        yield _("keys for the recipe:")
        yield "  " + " ".join(given)


def record(case: Case) -> dict[str, Any]:
    """Return everything as JSON-ready values."""
    return {
        "task": case.task, "device": case.machine.device.name, "count": case.machine.count,
        "model": case.model.name if case.model else None, "parameters": case.size, "method": case.method,
        "state_bytes": case.state, "seconds": case.seconds(epochs(case)) if case.method != "none" else None,
        "advice": [{"topic": one.topic, "say": one.say, "why": one.why, "source": dict(one.source._asdict()),
                    "lines": list(one.lines)} for one in advise(case)],
    }
