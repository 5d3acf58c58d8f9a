"""Text from a decoder, a token at a time: a cache of the past, the usual ways to sample, numbers keyed by the seed.

B is 1 throughout; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from danlu import chance
from danlu.data import chat
from danlu.data.example import Turn
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError
from danlu.models.decoder import DecoderModel
from danlu.models.foreign import ForeignModel
from danlu.nn.cache import Cache
from danlu.words import _

Writer = DecoderModel | ForeignModel


def writes(model: object) -> TypeGuard[Writer]:
    """Return whether a model can continue a text: a decoder with the vocabulary's head."""
    return model.cfg.lm if isinstance(model, DecoderModel) else isinstance(model, ForeignModel) and "lm" in model.cfg.outputs


def generate(model: Writer, ids: Sequence[int], *, max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
             stop: tuple[Sequence[int], ...] = (), eos: int | Sequence[int] | None = None,
             seed: int = 0) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `ids`, each as soon as it is known.

    temperature 0 takes the likeliest.  Ends before an `eos` id (which is not yielded) and after a sequence of `stop`.
    Token n is a function of (weights, ids, seed, n).  The order of the steps is that of `transformers`: repetition
    penalty, temperature, top_k, top_p.  Raises ConfigError, at once, for impossible values and where prompt and new
    tokens do not fit the context: nothing is ever dropped from the prompt behind the caller's back.
    """
    _check(ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, penalty=repetition_penalty)
    limit = model.cfg.context - model.ahead.room()
    if len(ids) + max_new_tokens > limit:
        raise ConfigError(
            _("{n} prompt tokens and {m} new ones do not fit the model's context of {limit}").format(
                n=len(ids), m=max_new_tokens, limit=limit),
            fix=_("ask for at most {n} new tokens, or shorten the prompt").format(n=max(0, limit - len(ids))))
    ends = frozenset([eos] if isinstance(eos, int) else eos or ())

    def pick(logits: Tensor, read: list[int], number: int) -> int:
        return choose(logits, read, temperature=temperature, top_k=top_k, top_p=top_p,
                      repetition_penalty=repetition_penalty, seed=seed, number=number)

    return _generate(model, list(ids), max_new_tokens, pick=pick, stop=tuple(map(tuple, stop)), ends=ends)


def _generate(model: Writer, ids: list[int], most: int, *, pick: Callable[[Tensor, list[int], int], int],
              stop: tuple[tuple[int, ...], ...], ends: frozenset[int]) -> Iterator[int]:
    assert not model.training, "dropout would blur the text: call model.eval() first"
    # a model of transformers has caches of its own kinds, which are not used: it reads the whole text again for each token
    kept = {"cache": Cache(model.cfg.layers, model.cfg.context)} if isinstance(model, DecoderModel) else {}
    device = next(model.parameters()).device
    fresh, new = list(ids), list[int]()
    while len(new) < most:
        with torch.inference_mode():
            out = model(torch.tensor([fresh], device=device), last=True, **kept)
            token = pick(out["logits"][0, -1].float(), [*ids, *new], len(new))
        if token in ends:
            return
        new.append(token)
        fresh = [token] if kept else [*fresh, token]
        yield token
        if any(tuple(new[-len(s):]) == s for s in stop):
            return


def choose(logits: Tensor, read: Sequence[int], *, temperature: float, top_k: int | None, top_p: float | None,
           repetition_penalty: float, seed: int, number: int) -> int:
    """Return the id of new token `number` from its logits [V], after the ids `read`."""
    return draw(penalise(logits, read, repetition_penalty), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                number=number)


def draw(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, seed: int, number: int) -> int:
    """Return the id of new token `number` from its logits [V], which hold all penalties already."""
    if temperature == 0:
        return int(logits.argmax())
    logits = keep_probable(keep_best(logits / temperature, top_k), top_p)
    # The draw is made on the CPU, so that the same logits give the same token on every device.
    source = torch.Generator().manual_seed(chance.torch_seed(seed, "generate", (number,)))
    point = torch.rand((), generator=source, dtype=torch.float64)
    reached = torch.softmax(logits.double().cpu(), -1).cumsum(-1)
    return int(torch.searchsorted(reached, point * reached[-1], right=True).clamp(max=len(reached) - 1))


def penalise(logits: Tensor, read: Sequence[int], penalty: float) -> Tensor:
    """Return logits [V], those of ids in `read` divided by `penalty`, or multiplied if negative (Keskar, 2019)."""
    if penalty == 1.0:
        return logits
    seen = torch.tensor(sorted(set(read)), device=logits.device)
    score = logits[seen]
    return logits.index_copy(0, seen, torch.where(score < 0, score * penalty, score / penalty))


def keep_best(logits: Tensor, k: int | None) -> Tensor:
    """Return logits [V] with all but the k largest at -inf; ties with the kth stay."""
    if k is None or k >= len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_probable(logits: Tensor, p: float | None) -> Tensor:
    """Return logits [V] with all at -inf but the fewest likeliest ids that hold probability p (Holtzman, 2020)."""
    if p is None or p >= 1.0:
        return logits
    values, order = logits.sort()                               # least likely first
    improbable = values.softmax(-1).cumsum(-1) <= 1 - p
    improbable[-1] = False                                      # the likeliest always stays
    return logits.masked_fill(torch.zeros_like(improbable).scatter(0, order, improbable), -torch.inf)


def endings(template: chat.Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: the last that a template lets the model learn of one, if special, and eos."""
    ids, weights = chat.encode(chat.render(template, (Turn("user", "a"), Turn("assistant", "b")), generate=False), tokenizer)
    learned = ids[weights > 0]
    last = [int(learned[-1])] if len(learned) and tokenizer.special.reserved[learned[-1]] else []
    return tuple(dict.fromkeys([*last, *([] if tokenizer.special.eos is None else [tokenizer.special.eos])]))


def text(ids: Iterable[int], decode: Callable[[Sequence[int]], str], *, stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield the text of `ids` piece by piece, never a part of a character; end before the first of the `stop` strings.

    What may be the beginning of a stop string is held back until it is known not to be one.
    """
    held = ""
    for piece in _characters(ids, decode):
        held += piece
        found = [at for at in (held.find(s) for s in stop) if at >= 0]
        if found:
            held = held[: min(found)]
            break
        safe = len(held) - max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _characters(ids: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Yield text that ends at character borders.

    A token of a byte-level tokenizer may hold some bytes of a character; `decode` then ends in U+FFFD and the piece
    waits for the tokens that complete it, or for the end.  Each piece is decoded after the one before it, because
    tokenizers join tokens by what stands before them; no further back, so that the cost does not grow.
    """
    held: list[int] = []
    start, told = 0, 0                                          # held[start:told] is the piece before, already yielded
    for token in ids:
        held.append(token)
        before, now = decode(held[start:told]), decode(held[start:])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before):]
            start, told = told, len(held)
    rest = decode(held[start:])[len(decode(held[start:told])):]
    if rest:
        yield rest


def _check(ids: Sequence[int], max_new_tokens: int, *, temperature: float, top_k: int | None, top_p: float | None,
           penalty: float) -> None:
    """Raise ConfigError that tells every impossible value."""
    wrong = [text for bad, text in (
        (not len(ids), _("the prompt is empty")),
        (max_new_tokens < 1, _("max_new_tokens must be at least 1")),
        (not 0 <= temperature < math.inf, _("temperature must be 0 or more")),
        (top_k is not None and top_k < 1, _("top_k must be at least 1")),
        (top_p is not None and not 0 < top_p <= 1, _("top_p must be above 0 and at most 1")),
        (not 0 < penalty < math.inf, _("repetition_penalty must be above 0")),
    ) if bad]
    if wrong:
        raise ConfigError("; ".join(wrong))
