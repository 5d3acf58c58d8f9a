"""Speculative decoding: a small model proposes some tokens, the large one judges them all in one pass (Leviathan et al., 2023).

What comes out has the large model's distribution, whatever the draft proposes.  V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu import chance
from danlu.decode.rows import check
from danlu.decode.sampling import Sampling, penalised
from danlu.errors import ConfigError, IncompatibleError
from danlu.generate import Writer, keep_best, keep_probable
from danlu.models.decoder import DecoderModel
from danlu.nn.cache import Cache
from danlu.words import _


@dataclass
class Luck:
    """How many proposals there were, and how many of them were taken."""

    proposed: int = 0
    taken: int = 0
    passes: int = 0                                     # of the large model


def write(model: Writer, draft: Writer, ids: Sequence[int], how: Sampling, *, ends: Sequence[int] = (), ahead: int = 4,
          luck: Luck | None = None) -> Iterator[int]:
    """Yield the ids that continue a prompt, like `generate`, `ahead` proposals of `draft` at a time.

    Temperature 0 gives the very tokens of `generate`; else tokens of the same distribution, which are a function of (weights of
    both, ids, seed, number).  Ends before an id of `ends`.  Raises ConfigError and IncompatibleError at once.
    """
    if not isinstance(model, DecoderModel) or not isinstance(draft, DecoderModel):
        raise IncompatibleError(_("a draft model works with decoders of Danlu's own families"))
    if model.cfg.vocab != draft.cfg.vocab:
        raise IncompatibleError(_("the draft model has {n} ids and the model {m}; both must have the same tokenizer").format(
            n=draft.cfg.vocab, m=model.cfg.vocab))
    if how.form is not None or how.stop or how.logprobs is not None or ahead < 1:
        raise ConfigError(_("a draft model cannot be used together with a schema, stop strings or logprobs"))
    check(model, ids, how)
    return _write(model, draft, ids=list(ids), how=how, ends=frozenset(ends), ahead=ahead, luck=luck or Luck())


def _write(model: DecoderModel, draft: DecoderModel, *, ids: list[int], how: Sampling, ends: frozenset[int], ahead: int,
           luck: Luck) -> Iterator[int]:
    assert not model.training and not draft.training, "dropout would blur the text: call model.eval() first"
    large, small = Cache(model.cfg.layers, model.cfg.context), Cache(draft.cfg.layers, draft.cfg.context)
    seed, new = how.seed or 0, list[int]()
    while len(new) < how.max_new_tokens:
        with torch.inference_mode():
            room = min(ahead, how.max_new_tokens - len(new) - 1, draft.cfg.context - draft.ahead.room() - len(ids) - len(new))
            proposals = _propose(draft, small, ids, new, how=how, seed=seed, most=max(0, room))
            fresh = _judge(model, large, ids, new, how=how, seed=seed, proposals=proposals)
            known = len(ids) + len(new) + len(fresh) - 1                    # the last id was read by neither
            large.cut(known + model.ahead.tokens)
            small.cut(known + draft.ahead.tokens)
        luck.proposed, luck.taken, luck.passes = luck.proposed + len(proposals), luck.taken + len(fresh) - 1, luck.passes + 1
        for token in fresh:
            if token in ends:
                return
            new.append(token)
            yield token


def _propose(draft: DecoderModel, cache: Cache, ids: list[int], new: list[int], *, how: Sampling, seed: int,
             most: int) -> list[tuple[int, Tensor]]:
    """Return up to `most` ids, each with the probabilities [V] that it was drawn from."""
    found: list[tuple[int, Tensor]] = []
    while len(found) < most:
        said = [*new, *(token for token, _p in found)]
        logits = _read(draft, cache, [*ids, *said], 1)[-1]
        p = probabilities(logits, ids, said, how)
        found.append((_drawn(p, _point(seed, "propose", len(said))), p))
    return found


def _judge(model: DecoderModel, cache: Cache, ids: list[int], new: list[int], *, how: Sampling, seed: int,
           proposals: list[tuple[int, Tensor]]) -> list[int]:
    """Return the proposals that are taken, and one id more, from a single pass of the model."""
    tokens = [token for token, _q in proposals]
    logits = _read(model, cache, [*ids, *new, *tokens], len(tokens) + 1)                                # [T, V]
    taken: list[int] = []
    for place, (token, q) in enumerate(proposals):
        number = len(new) + place
        p = probabilities(logits[place], ids, [*new, *taken], how)
        if _point(seed, "accept", number) * q[token] < p[token]:
            taken.append(token)
            continue
        rest = (p - q).clamp(min=0)                     # what the draft gave too little of
        return [*taken, _drawn(rest if rest.sum() > 0 else p, _point(seed, "again", number))]
    p = probabilities(logits[-1], ids, [*new, *taken], how)
    return [*taken, _drawn(p, _point(seed, "again", len(new) + len(taken)))]


def _read(model: DecoderModel, cache: Cache, text: list[int], last: int) -> Tensor:
    """Read what of `text` is not in the cache yet, and return the logits of its last ids, [T, V] in float32."""
    read = max(0, cache.length - model.ahead.tokens)
    logits = model(torch.tensor([text[read:]], device=next(model.parameters()).device), cache=cache, last=last == 1)["logits"][0]
    return logits[-last:].float().cpu()                                     # type: ignore[no-any-return]


def probabilities(logits: Tensor, prompt: Sequence[int], new: Sequence[int], how: Sampling) -> Tensor:
    """Return the probabilities [V], in float64, that the next token is drawn from by logits [V]."""
    logits = penalised(logits, prompt, new, how)
    if how.temperature == 0:
        return torch.zeros(len(logits), dtype=torch.float64).index_fill_(0, logits.argmax(), 1.0)
    return keep_probable(keep_best(logits / how.temperature, how.top_k), how.top_p).double().softmax(-1)


def _point(seed: int, purpose: str, number: int) -> float:
    return float(chance.generator(seed, purpose, (number,)).random())


def _drawn(p: Tensor, point: float) -> int:
    reached = p.cumsum(-1)
    return int(torch.searchsorted(reached, point * reached[-1], right=True).clamp(max=len(p) - 1))
