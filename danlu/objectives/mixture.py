"""Several objectives in one run, as a weighted sum: BERT is masked_lm + next_sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from danlu.config import Model
from danlu.data.tokenizer import Special
from danlu.nn.tasks import Head
from danlu.objectives.frame import to_batch, wrap
from danlu.objectives.lm import CausalLM, MaskedLM
from danlu.objectives.pairs import NextSentence, SentenceOrder, answers, frame
from danlu.objectives.protocol import Batch, Out, Rng, Row
from danlu.words import _

Single = CausalLM | MaskedLM | NextSentence | SentenceOrder


class Part(Model):
    """One objective of a mixture."""

    objective: Single = Field(discriminator="kind", description="What is learned.")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Weight of its loss in the sum.")


def spell_out(value: Any) -> Any:
    """Return `[masked_lm, next_sentence]` as the mixture it stands for; anything else as it is."""
    return {"kind": "mixture", "parts": value} if isinstance(value, list | tuple) else value


def _part(value: Any) -> Any:
    if isinstance(value, str):
        return {"objective": {"kind": value}}
    return {"objective": value} if isinstance(value, dict) and "kind" in value else value


class Mixture(Model):
    """The weighted sum of objectives that one model learns at once.

    A pair objective lays the row out, the masked one then hides tokens of it.  Two pair objectives take turns by the
    row's key, so that each row bears one question.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[Annotated[Part, BeforeValidator(_part)], ...] = Field(
        min_length=1, description="The objectives and their weights.")

    @field_validator("parts")
    @classmethod
    def _together(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        kinds = [p.objective.kind for p in parts]
        twice = next((k for k in kinds if kinds.count(k) > 1), None)
        if twice:
            raise ValueError(_("{kind} stands twice in the mixture; name it once, with a weight").format(kind=twice))
        others = [k for k in kinds if k != "causal_lm"]
        if "causal_lm" in kinds and others:
            what = _("causal_lm reads left to right, {other} both ways: one model cannot learn both; keep one")
            raise ValueError(what.format(other=others[0]))
        return parts

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(t for p in self.parts for t in p.objective.terms)

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(p.weight * s for p in self.parts for s in p.objective.scales)

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(h for p in self.parts for h in p.objective.heads)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(i for p in self.parts for i in p.objective.inputs))

    @property
    def partner(self) -> bool:
        return any(p.objective.partner for p in self.parts)

    @property
    def packs(self) -> bool:
        return all(p.objective.packs for p in self.parts)

    @property
    def wants(self) -> str:
        return self.parts[0].objective.wants

    def tasks(self) -> tuple[Head, ...]:
        return ()

    def meet(self, labels: Sequence[str], counts: Sequence[int]) -> Self:
        return self

    def room(self, length: int) -> tuple[int, int, int]:
        sizes, overlaps, reserves = zip(*(p.objective.room(length) for p in self.parts), strict=True)
        return max(sizes), max(overlaps), max(reserves)

    def collate(self, rows: Sequence[Row], vocab: Special, rng: Rng, length: int) -> Batch:
        """Return the columns of every part, those of a masked one over the pairs, [B, T] and [B]."""
        parts = [p.objective for p in self.parts]
        if isinstance(parts[0], CausalLM):
            return parts[0].collate(rows, vocab, rng, length)
        asking = [p for p in parts if isinstance(p, NextSentence | SentenceOrder)]
        masked = next((p for p in parts if isinstance(p, MaskedLM)), None)
        if asking:
            turn = np.array([_turn(r, rng, len(asking)) for r in rows])
            pairs = [asking[t].pair(r, vocab, rng) for t, r in zip(turn, rows, strict=True)]
            columns = frame(pairs, vocab, length)
            for i, part in enumerate(asking):
                columns |= answers(part.terms[0], pairs, turn == i)
        else:
            columns = wrap(rows, vocab, length)
        if masked:
            columns = masked.hide(columns, [r["key"] for r in rows], vocab, rng)
        else:
            del columns["weights"]
        return to_batch(columns)

    def enrich(self, batch: Batch, frozen: Mapping[str, Any]) -> Batch:
        for part in self.parts:
            batch = part.objective.enrich(batch, frozen)
        return batch

    def count(self, batch: Batch) -> Tensor:
        return torch.cat([p.objective.count(batch) for p in self.parts])

    def loss(self, out: Out, batch: Batch) -> Tensor:
        return torch.cat([p.objective.loss(out, batch) for p in self.parts])


def _turn(row: Row, rng: Rng, choices: int) -> int:
    """Return which of the pair objectives the row is for."""
    return int(rng(row["key"], "turn").integers(choices)) if choices > 1 else 0
