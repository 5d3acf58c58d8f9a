"""Texts that are written at the same time: each joins when there is room, and leaves when it is done, between any two steps.

A prompt is read in chunks into a cache of its own; then its text joins those of the same adapter, which all get their next
token from one forward pass.  B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu.decode.prefix import Prefixes
from danlu.decode.sampling import Logprob, Sampling, chosen, told
from danlu.decode.schema import Grammar, Matcher
from danlu.decode.spoken import Finish, Piece, Speech
from danlu.errors import ConfigError
from danlu.generate import Writer
from danlu.models.decoder import DecoderModel
from danlu.nn.cache import Cache, Slots
from danlu.words import _

CHUNK = 256             # tokens of prompts that are read between two steps of the texts under way


class Did(NamedTuple):
    """What a step was made of."""

    passes: int                                         # through the model
    texts: int                                          # written on by a token
    tokens: int                                         # of prompts


class Row:
    """One text: what was asked, how far it is, and who is told."""

    def __init__(self, ids: Sequence[int], how: Sampling, tell: Callable[[Piece | Exception], None], *,
                 adapter: str | None = None, echo: bool = False) -> None:
        self.ids, self.how, self.tell, self.adapter, self.echo = list(ids), how, tell, adapter, echo
        self.seed = secrets.randbits(62) if how.seed is None else how.seed
        self.new: list[int] = []
        self.cached = 0                                 # prompt tokens that were known already
        self.cancelled = False                          # set by any thread, seen before the next step
        self.done = False
        self.cache: Cache | None = None                 # while the prompt is read
        self.read = 0                                   # prompt tokens in the cache
        self.before: list[Logprob] = []                 # of the prompt, if asked for
        self.speech: Speech
        self.matcher: Matcher | None = None
        self._ids: list[int] = []                       # not yet told
        self._logprobs: list[Logprob] = []

    @property
    def scores_prompt(self) -> bool:
        """Whether the probabilities of the prompt are asked for."""
        return self.echo and self.how.logprobs is not None

    def give(self, text: str, finish: Finish | None) -> None:
        """Tell what is certain by now."""
        if text or finish:
            asked = self.how.logprobs is not None
            self.tell(Piece(text, tuple(self._ids), tuple(self._logprobs) if asked else None, finish))
            self._ids, self._logprobs = [], []
        self.done = finish is not None

    def echoed(self, text: str) -> None:
        """Tell the prompt."""
        self._ids, self._logprobs = list(self.ids), list(self.before)
        self.give(text, None)

    def hear(self, token: int, logits: Tensor, ends: frozenset[int]) -> None:
        """Take the next token, chosen from logits [V]; tell what is certain, and end where it ends."""
        if token in ends:
            if self.scores_prompt:                      # who adds up the prompt's own tokens counts on one more after them
                self._logprobs += told(logits[None], [token], self.how.logprobs or 0)
            return self.give(self.speech.end(), "stop")
        self.new.append(token)
        self._ids.append(token)
        if self.how.logprobs is not None:
            self._logprobs += told(logits[None], [token], self.how.logprobs)
        text = self.speech.add(token)
        finish: Finish | None = None
        if self.matcher is not None:
            self.matcher.take(token)
        if self.speech.stopped or (self.matcher is not None and self.matcher.complete):
            finish = "stop"
        elif len(self.new) == self.how.max_new_tokens:
            finish = "length"
        return self.give(text + self.speech.end() if finish else text, finish)


class Pool:
    """The texts of one adapter that are being written, and their past."""

    def __init__(self, limit: int) -> None:
        self.rows: list[Row] = []
        self.slots = Slots(limit)


class Rows:
    """Texts under way.  `step` takes each one token further; nothing here waits or locks."""

    def __init__(self, model: Callable[[str | None], Writer], decode: Callable[[Sequence[int]], str], *,
                 ends: frozenset[int] = frozenset(), chunk: int = CHUNK, prefixes: Prefixes | None = None,
                 grammar: Callable[[], Grammar] | None = None,
                 precision: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.model, self.decode, self.ends, self.chunk, self.prefixes = model, decode, ends, chunk, prefixes
        self.grammar, self.precision = grammar, precision
        self.reading: deque[Row] = deque()
        self.pools: dict[str | None, Pool] = {}
        self.prompt_tokens = self.cached_tokens = self.new_tokens = self.steps = 0          # since the beginning

    def __len__(self) -> int:
        return len(self.reading) + sum(len(pool.rows) for pool in self.pools.values())

    def all(self) -> Iterator[Row]:
        """Yield every text under way."""
        yield from self.reading
        for pool in self.pools.values():
            yield from pool.rows

    def add(self, row: Row) -> None:
        """Let a text join.  Its own troubles it is told itself; they are no other's."""
        model = self.model(row.adapter)
        assert not model.training, "dropout would blur the text: call model.eval() first"
        try:
            row.speech = Speech(self.decode, row.how.stop)
            if row.how.form is not None:
                row.matcher = self._grammar().start(row.how.form)
        except Exception as error:
            row.done = True
            row.tell(error)
            return
        if isinstance(model, DecoderModel):
            row.cache = Cache(model.cfg.layers, model.cfg.context)
            if self.prefixes is not None and not row.scores_prompt and not model.ahead.tokens:
                row.cached = row.read = self.prefixes.fill(row.cache, row.ids, row.adapter)
        self.prompt_tokens += len(row.ids)
        self.cached_tokens += row.cached
        self.reading.append(row)

    def _grammar(self) -> Grammar:
        if self.grammar is None:
            raise ConfigError(_("a schema needs a tokenizer"))
        return self.grammar()

    @torch.inference_mode()
    def step(self) -> Did:
        """Read a chunk of prompts, then write one token of every text; return what that was."""
        self._forget()
        passes, tokens = self._read()
        texts = 0
        with self.precision():
            for adapter, pool in list(self.pools.items()):
                if pool.rows:
                    passes, texts = passes + 1, texts + len(pool.rows)
                    self._write(self.model(adapter), pool)
        self._forget()
        self.steps += 1
        return Did(passes, texts, tokens)

    def _forget(self) -> None:
        for row in [row for row in self.all() if row.cancelled and not row.done]:
            row.give(row.speech.end(), "cancelled")
        self.reading = deque(row for row in self.reading if not row.done)
        for adapter, pool in list(self.pools.items()):
            for place in reversed(range(len(pool.rows))):
                if pool.rows[place].done:
                    if pool.slots.places:               # a model without a cache of ours has none
                        pool.slots.drop(place)
                    pool.rows[place] = pool.rows[-1]
                    pool.rows.pop()
            if not pool.rows:
                del self.pools[adapter]                 # and with it its memory

    def _read(self) -> tuple[int, int]:
        """Read up to `chunk` tokens of prompts and return the number of passes and of tokens.

        The texts take turns, so that a long one holds up no short ones.
        """
        left, passes, tokens = self.chunk, 0, 0
        while self.reading and left > 0:
            row = self.reading.popleft()
            model = self.model(row.adapter)
            if row.how.max_new_tokens == 0 and not row.scores_prompt:
                row.read = len(row.ids)
                self._answer(row, None)
                continue
            stop = min(len(row.ids), row.read + left) if row.cache is not None else len(row.ids)
            fresh, whole = row.ids[row.read:stop], row.scores_prompt
            with self.precision():
                logits = _logits(model, [fresh], row.cache, last=not whole)[0]              # [T or 1, V]
            if whole:
                self._score(row, logits, stop)
            left, row.read = left - len(fresh), stop
            passes, tokens = passes + 1, tokens + len(fresh)
            if stop < len(row.ids):
                self.reading.append(row)
                continue
            if self.prefixes is not None and row.cache is not None and not model.ahead.tokens:
                self.prefixes.keep(row.cache, row.ids, row.adapter)
            self._answer(row, logits[-1].float())
        return passes, tokens

    def _score(self, row: Row, logits: Tensor, stop: int) -> None:
        """Note how likely the prompt's tokens were by logits [T, V] of those from `row.read` to `stop`."""
        assert row.how.logprobs is not None
        if not row.before:
            row.before.append(Logprob(row.ids[0], None, ()))
        foretold = row.ids[row.read + 1:stop + 1]
        row.before += told(logits[: len(foretold)], foretold, row.how.logprobs)

    def _answer(self, row: Row, logits: Tensor | None) -> None:
        """Let a text whose prompt is read begin, with its first token from logits [V]."""
        if row.echo:
            row.echoed(self.decode(row.ids))
        if row.how.max_new_tokens == 0 or logits is None:
            return row.give("", "length")
        self._hear([row], logits[None])
        if row.done:
            return None
        pool = self.pools.setdefault(row.adapter, Pool(self.model(row.adapter).cfg.context))
        if row.cache is not None:
            pool.slots.add(row.cache)
        row.cache = None
        pool.rows.append(row)
        return None

    def _write(self, model: Writer, pool: Pool) -> None:
        """Write one more token of each text of a pool."""
        if isinstance(model, DecoderModel):
            step: Any = pool.slots.step()
            logits = _logits(model, [row.new[-1:] for row in pool.rows], step, last=True)[:, -1]
            return self._hear(pool.rows, logits.float())
        for row in pool.rows:                           # its caches are of other kinds, and not used: all is read again
            self._hear([row], _logits(model, [[*row.ids, *row.new]], None, last=True)[:, -1].float())
        return None

    def _hear(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose the next token of each row from logits [B, V], and let the rows take them."""
        best = logits.argmax(-1).tolist() if any(row.how.plain for row in rows) else []
        for place, row in enumerate(rows):
            try:
                if row.how.plain:
                    token = best[place]
                else:
                    allowed = logits[place] if row.matcher is None else row.matcher.mask(logits[place])
                    token = chosen(allowed, row.ids, row.new, row.how, row.seed)
                row.hear(token, logits[place], self.ends)
            except Exception as error:                  # of this text alone: a grammar that outgrew its limits, say
                row.done = True
                row.tell(error)
        self.new_tokens += len(rows)


def _logits(model: Writer, ids: list[list[int]], cache: Any, *, last: bool) -> Tensor:
    """Return logits [B, T or 1, V] of ids [B, T] after what `cache` holds, if there is one."""
    kept = {} if cache is None else {"cache": cache}
    out: Tensor = model(torch.tensor(ids, device=next(model.parameters()).device), last=last, **kept)["logits"]
    return out


def check(model: Writer, ids: Sequence[int], how: Sampling) -> None:
    """Raise ConfigError where a prompt is empty or does not fit the context together with its new tokens."""
    if not len(ids):
        raise ConfigError(_("the prompt is empty"))
    vocab = model.cfg.vocab
    if not 0 <= min(ids) <= max(ids) < (vocab or 0):
        raise ConfigError(_("the prompt holds ids that are not in the vocabulary of {n}").format(n=vocab))
    limit = model.cfg.context - model.ahead.room()
    if len(ids) + how.max_new_tokens > limit:
        raise ConfigError(
            _("{n} prompt tokens and {m} new ones do not fit the model's context of {limit}").format(
                n=len(ids), m=how.max_new_tokens, limit=limit),
            fix=_("ask for at most {n} new tokens, or shorten the prompt").format(n=max(0, limit - len(ids))))
