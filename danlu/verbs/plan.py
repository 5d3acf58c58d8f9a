"""`danlu plan`: what a run will cost, how it runs best on a machine, and what cannot be."""

from __future__ import annotations

from pathlib import Path

from danlu.errors import ConfigError
from danlu.verbs import searched
from danlu.words import _


def main(file: Path | None, overrides: list[str], *, hardware: str | None, deadline: str | None, budget: str | None,
         price: str | None, vocab: int | None, model: str | None, tokens: str | None, rehearse: int, as_json: bool) -> int:
    """Print the plan."""
    problems: list[str] = []
    asked = searched.asked(problems, hardware=hardware, deadline=deadline, budget=budget, price=price)
    if model is not None or tokens is not None:
        return searched.public(file, overrides, problems, model=model, tokens=tokens, asked=asked, as_json=as_json)
    searched.tell(problems)
    if hardware is None:
        raise ConfigError(_("no machine is given"), where="--hardware", fix=_("give --hardware 8xH100, or --hardware here"))
    return searched.recipe(file, overrides, asked=asked, vocab=vocab, rehearsed=rehearse, as_json=as_json)
