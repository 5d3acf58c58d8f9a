"""`danlu plan`: what a run will cost, how it runs best on a machine, and what cannot be."""

from __future__ import annotations

from pathlib import Path

from danlu.verbs import searched
from danlu.verbs.rehearse import amount


def main(file: Path | None, overrides: list[str], *, hardware: str | None, deadline: str | None, budget: str | None,
         price: str | None, memory: str | None, vocab: int | None, probe: bool, model: str | None, tokens: str | None,
         rehearse: int, as_json: bool) -> int:
    """Print the plan: of a recipe as it stands, here; of the best ways to run it, with --hardware; or of a public model."""
    problems: list[str] = []
    asked = searched.asked(problems, hardware=hardware, deadline=deadline, budget=budget, price=price)
    room = None if memory is None else searched.first(problems, lambda: int(amount(memory)), 0)
    if room is not None:
        device = asked.machine.device.model_copy(update={"memory": room})
        asked = asked._replace(machine=asked.machine.model_copy(update={"device": device}))
    if model is not None or tokens is not None:
        return searched.public(file, overrides, problems, model=model, tokens=tokens, asked=asked, as_json=as_json)
    searched.tell(problems)
    if hardware is not None or deadline is not None or budget is not None:
        return searched.recipe(file, overrides, asked=asked, vocab=vocab, rehearsed=rehearse, as_json=as_json)
    from danlu.verbs import planned  # it draws tables

    return planned.recipe(file, overrides, room=room, price=asked.machine.device.price, vocab=vocab, probe=probe, as_json=as_json)
