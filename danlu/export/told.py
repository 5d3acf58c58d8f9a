"""A report as people read it: a table, and what most likely went wrong."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from danlu.words import _


@dataclass
class Profile:
    """Where logits part."""

    one_token_agrees: bool | None = None         # on a row of a single token; None: not looked at
    first_position: int | None = None            # of the first row, where it is a row of positions
    permuted: bool = False                       # the same numbers in another order


def causes(red: Collection[str], profile: Profile) -> tuple[str, ...]:
    """Return what the red checks most likely come from, the cause before what follows from it."""
    found = list[str]()
    if "shape" in red:
        found.append(_("another vocabulary, or another head: the sizes of what is said differ"))
    if "ids" in red or "round trip" in red:
        found.append(_("the tokenizer: another vocabulary, another normaliser, or white space treated otherwise"))
    if "prompts" in red:
        found.append(_("the chat template: it is not the one the model was trained with"))
    if "stops" in red:
        found.append(_("the stopping ids: eos of tokenizer_config.json or generation_config.json"))
    if "labels" in red:
        found.append(_("the names of the classes: id2label of config.json"))
    if {"logits", "KL", "top-1", "cosine", "greedy"} & set(red):
        found.append(_weights(profile))
    return tuple(found)


def _weights(profile: Profile) -> str:
    if profile.permuted:
        return _("the order of classes or of the vocabulary: the same numbers stand in other places")
    if profile.one_token_agrees:
        at = "" if profile.first_position is None else _(" (from position {at} on)").format(at=profile.first_position)
        return _("how tokens see each other{at}: rotary positions, q and k, or the mask; a row of one token agrees").format(at=at)
    if profile.one_token_agrees is False:
        return _("the weights: a matrix in the wrong place or transposed, a tensor missing, another base; even a row of one "
                 "token differs")
    return _("rounding: the weights agree, and what follows from them does not")
