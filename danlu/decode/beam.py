"""Beam search: the likeliest whole answer among those that a few beginnings lead to.

W beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from danlu.decode.rows import check
from danlu.decode.sampling import Sampling
from danlu.errors import ConfigError, IncompatibleError
from danlu.generate import Writer
from danlu.models.decoder import DecoderModel
from danlu.nn.cache import Cache
from danlu.words import _


class Beam(NamedTuple):
    """An answer: its ids, without the one that ended it, and its score."""

    ids: tuple[int, ...]
    score: float                                        # log-probability / (tokens, the ending one included) ** penalty


@torch.inference_mode()
def search(model: Writer, ids: Sequence[int], *, beams: int, max_new_tokens: int, length_penalty: float = 1.0,
           ends: Sequence[int] = ()) -> list[Beam]:
    """Return the best `beams` answers to a prompt, best first; as `transformers` finds them with early_stopping=False.

    The search stops when no beginning can do better at its present length than the worst of the answers that ended.
    Raises ConfigError for impossible values, IncompatibleError for a model without a cache of ours.
    """
    if beams < 1 or max_new_tokens < 1:
        raise ConfigError(_("num_beams and max_new_tokens must be at least 1"))
    if not isinstance(model, DecoderModel):
        raise IncompatibleError(_("beam search needs a decoder of Danlu's own families"))
    check(model, ids, Sampling(max_new_tokens=max_new_tokens))
    device, stops = next(model.parameters()).device, torch.tensor(sorted(ends), dtype=torch.long)
    cache = Cache(model.cfg.layers, model.cfg.context)
    logp = model(torch.tensor([list(ids)], device=device), cache=cache, last=True)["logits"][:, -1].float().log_softmax(-1)
    scores, texts, done = torch.zeros(1), torch.zeros(1, 0, dtype=torch.long), list[Beam]()
    for length in range(1, max_new_tokens + 1):
        best, parents, tokens = _candidates(scores[:, None] + logp.cpu(), (1 + len(ends)) * beams)
        texts = torch.cat((texts[parents], tokens[:, None]), 1)
        ended = torch.isin(tokens, stops) if length < max_new_tokens else torch.ones_like(tokens, dtype=torch.bool)
        for place in ended[:beams].nonzero()[:, 0].tolist():
            whole = tuple(texts[place].tolist())
            done.append(Beam(whole[:-1] if whole[-1] in set(ends) else whole, float(best[place]) / length ** length_penalty))
        done = sorted(done, key=lambda beam: -beam.score)[:beams]
        go_on = (~ended).nonzero()[:beams, 0]
        if not len(go_on) or (len(done) == beams and float(best[go_on[0]]) / length ** length_penalty <= done[-1].score):
            break
        scores, texts = best[go_on], texts[go_on]
        cache.pick(parents[go_on].to(device))
        logp = model(texts[:, -1:].to(device), cache=cache, last=True)["logits"][:, -1].float().log_softmax(-1)
    return done


def _candidates(scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best scores out of [W, V], the beam of each, and its next id; best first."""
    best = scores.flatten().topk(min(most, scores.numel()))
    return best.values, best.indices // scores.shape[1], best.indices % scores.shape[1]
