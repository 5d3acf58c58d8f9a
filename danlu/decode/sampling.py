"""How the next token is chosen: the options of a request, and what a token's probability was.

V vocabulary, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from danlu.config import Model
from danlu.generate import draw, penalise

MOST_LOGPROBS = 100         # likeliest tokens that may be asked for at each place


class Sampling(Model):
    """What one request asks for.  The order of the steps is that of `generate`: penalties, temperature, top_k, top_p."""

    max_new_tokens: int = Field(ge=0, description="Most tokens to write; 0: none, for the probabilities of the prompt.")
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="0 takes the likeliest token.")
    top_k: int | None = Field(None, ge=1, description="Choose among the k likeliest.")
    top_p: float | None = Field(None, gt=0, le=1, description="Choose among the likeliest that make up p.")
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False,
                                      description="Above 1, tokens of prompt and answer become less likely.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Taken from the score of every token of the answer.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="… as many times as it is there.")
    seed: int | None = Field(None, description="The same seed gives the same text; empty: another each time.")
    stop: tuple[str, ...] = Field((), description="Texts that end the answer; they are no part of it.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS,
                                 description="Tell each token's log-probability and those of so many likeliest ones.")
    form: dict[str, Any] | None = Field(None, alias="schema", description="JSON schema that the answer obeys.")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return (self.temperature == 0 and self.repetition_penalty == 1.0 and not self.presence_penalty
                and not self.frequency_penalty and self.form is None)


class Logprob(NamedTuple):
    """How likely a token was, before penalties and temperature."""

    id: int
    logprob: float | None                               # None: the first token of a text, which nothing foretells
    top: tuple[tuple[int, float], ...]                  # the likeliest ids at its place, likeliest first


def penalised(logits: Tensor, prompt: Sequence[int], new: Sequence[int], how: Sampling) -> Tensor:
    """Return logits [V] with the penalties of `how` for what was read and written."""
    if how.repetition_penalty != 1.0:
        logits = penalise(logits, [*prompt, *new], how.repetition_penalty)
    if new and (how.presence_penalty or how.frequency_penalty):
        counts = Counter(new)
        index = torch.tensor(list(counts), device=logits.device)
        much = torch.tensor([how.presence_penalty + how.frequency_penalty * n for n in counts.values()], device=logits.device)
        logits = logits.index_add(0, index, -much.to(logits.dtype))
    return logits


def chosen(logits: Tensor, prompt: Sequence[int], new: Sequence[int], how: Sampling, seed: int) -> int:
    """Return the id of the next token after prompt and new ids from its logits [V] in float32."""
    return draw(penalised(logits, prompt, new, how), temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, seed=seed,
                number=len(new))


def told(logits: Tensor, ids: Sequence[int], most: int) -> list[Logprob]:
    """Return how likely `ids` [T] were by logits [T, V], and the `most` likeliest ids of each place."""
    logp = torch.log_softmax(logits.float(), -1)
    own = logp.gather(1, torch.tensor(ids, device=logp.device)[:, None])[:, 0].tolist()
    best = logp.topk(min(most, logp.shape[1]))
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Logprob(one, score, tuple(zip(i, p, strict=True))) for one, score, (i, p) in zip(ids, own, tops, strict=True)]
