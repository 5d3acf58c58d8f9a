"""Stands in for danlu.decode until that is there."""

from __future__ import annotations

import queue as queues
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import torch

from danlu.adapt.switch import Switch
from danlu.config import Model
from danlu.errors import ConfigError
from danlu.generate import generate, text


class Full(Exception):
    pass


class Sampling(Model):
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    schema: dict[str, Any] | None = None                 # type: ignore[assignment]


class Logprob(NamedTuple):
    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] | None
    finish: Literal["stop", "length", "cancelled"] | None


class Ticket:
    def __init__(self, notify: Any) -> None:
        self.notify = notify
        self.pieces: queues.SimpleQueue[Piece] = queues.SimpleQueue()
        self.cancelled = threading.Event()
        self.over = False

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return self.get()

    def put(self, piece: Piece) -> None:
        self.pieces.put(piece)
        if self.notify is not None:
            self.notify()

    def get(self, timeout: float | None = None) -> Piece:
        if self.over:
            raise StopIteration
        try:
            piece = self.pieces.get(timeout=timeout) if timeout != 0 else self.pieces.get_nowait()
        except queues.Empty:
            raise TimeoutError from None
        self.over = piece.finish is not None
        return piece

    def cancel(self) -> None:
        self.cancelled.set()


class Batcher:
    def __init__(self, model: Any, tokenizer: Any, *, slots: int, queue: int, adapters: Switch | None = None,
                 ends: Sequence[int] | None = None) -> None:
        self.model, self.tokenizer, self.switch = model, tokenizer, adapters
        self.most, self.count, self.lock = slots + queue, 0, threading.Lock()
        self.pool = ThreadPoolExecutor(slots)
        self.ends = ends or ()

    def submit(self, ids: Sequence[int], sampling: Sampling, *, adapter: str | None = None, echo: bool = False,
               notify: Any = None) -> Ticket:
        model = self.switch.use(adapter) if self.switch is not None else self.model
        if len(ids) + sampling.max_new_tokens > model.cfg.context:
            raise ConfigError("too long")
        with self.lock:
            if self.count >= self.most:
                raise Full("full")
            self.count += 1
        ticket = Ticket(notify)
        self.pool.submit(self._work, model, list(ids), sampling, ticket, echo)
        return ticket

    def _logprob(self, logits: Any, token: int, top: int) -> Logprob:
        logp = torch.log_softmax(logits.double(), -1)
        best = logp.topk(max(1, top))
        pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Logprob(token, float(logp[token]), pairs if top else ())

    @torch.inference_mode()
    def _logits(self, model: Any, ids: list[int]) -> Any:
        return model(torch.tensor([ids]))["logits"][0]

    def _work(self, model: Any, ids: list[int], s: Sampling, ticket: Ticket, echo: bool) -> None:
        try:
            if echo:
                told: tuple[Logprob, ...] | None = None
                if s.logprobs is not None:
                    out = self._logits(model, ids)
                    told = (Logprob(ids[0], None, ()),
                            *(self._logprob(out[i - 1], ids[i], s.logprobs) for i in range(1, len(ids))))
                ticket.put(Piece(self.tokenizer.decode(ids, special=False), tuple(ids), told, None))
            new: list[int] = []
            seen = 0

            def kept() -> Iterator[int]:
                for token in generate(model, ids, max_new_tokens=max(1, s.max_new_tokens), temperature=s.temperature, top_k=s.top_k,
                                      top_p=s.top_p, repetition_penalty=s.repetition_penalty, eos=self.ends, seed=s.seed or 0):
                    if ticket.cancelled.is_set() or not s.max_new_tokens:
                        return
                    new.append(token)
                    yield token

            def made(part: str, finish: Any) -> Piece:
                nonlocal seen
                fresh, before = new[seen:], seen
                seen = len(new)
                logprobs = None
                if s.logprobs is not None:
                    out = self._logits(model, [*ids, *new])
                    logprobs = tuple(self._logprob(out[len(ids) + before + i - 1], t, s.logprobs) for i, t in enumerate(fresh))
                return Piece(part, tuple(fresh), logprobs, finish)

            whole = ""
            for part in text(kept(), lambda p: self.tokenizer.decode(p, special=False), stop=s.stop):
                whole += part
                ticket.put(made(part, None))
            decoded = self.tokenizer.decode(new, special=False)
            finish = "cancelled" if ticket.cancelled.is_set() else "length" if len(new) == s.max_new_tokens and not any(
                stop in decoded for stop in s.stop) else "stop"
            ticket.put(made("", finish))
        finally:
            with self.lock:
                self.count -= 1

    def close(self, *, drain: bool) -> None:
        self.pool.shutdown(wait=drain, cancel_futures=not drain)
