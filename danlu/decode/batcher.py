"""Continuous batching: a thread that owns the model; whoever has a prompt gets a ticket and reads the answer from it.

The thread never waits for a reader: what it has to tell a ticket goes into a queue of the ticket's own, which holds no more than
the answer.  A ticket that nobody holds any more is cancelled.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple

from danlu.adapt.switch import Switch
from danlu.data.tokenizer import Tokenizer
from danlu.decode.pace import Pace, Work
from danlu.decode.prefix import Prefixes
from danlu.decode.rows import CHUNK, Row, Rows, check
from danlu.decode.sampling import Sampling
from danlu.decode.schema import Grammar
from danlu.decode.spoken import Piece
from danlu.errors import ConfigError, TemporaryError
from danlu.generate import Writer, writes
from danlu.words import _

PREFIX_BYTES = 256 * 2**20


class Patience(NamedTuple):
    """How much longer an answer may take than alone: so many times, or so many seconds more, whichever is longer."""

    times: float
    seconds: float

    def lets(self, pace: Pace, alone: float, beside: float) -> bool:
        """Return whether somebody who would take `alone` seconds waits for what takes `beside` seconds."""
        return not pace.known or beside <= self.grants(alone)

    def grants(self, alone: float) -> float:
        """Return the seconds that somebody waits who would take `alone` seconds."""
        return max(self.times * alone, alone + self.seconds)


class Full(TemporaryError):
    """As many requests wait as may, or one more would take too long; try again later."""


class Counts(NamedTuple):
    """What a batcher does, and has done since it began."""

    running: int
    waiting: int
    prompt_tokens: int
    cached_tokens: int                                  # of the prompts', those that were not computed again
    new_tokens: int
    steps: int
    prefix_bytes: int


class Ticket:
    """An answer on its way: iterate over its pieces, from any thread.  Errors of the thread that writes are raised here."""

    def __init__(self, row: Row, told: SimpleQueue[Piece | Exception]) -> None:
        self._row, self._told, self._over = row, told, False
        weakref.finalize(self, _cancel, row).atexit = False

    def __iter__(self) -> Ticket:
        return self

    def __next__(self) -> Piece:
        return self.get()

    def get(self, timeout: float | None = None) -> Piece:
        """Return the next piece; wait for it, at most `timeout` seconds.  Raises TimeoutError, StopIteration after the last."""
        if self._over:
            raise StopIteration
        try:
            piece = self._told.get(timeout=timeout) if timeout is None or timeout > 0 else self._told.get_nowait()
        except Empty:
            raise TimeoutError from None
        if isinstance(piece, Exception):
            self._over = True
            raise piece
        self._over = piece.finish is not None
        return piece

    def cancel(self) -> None:
        """End the answer before the next step; its last piece then says so.  May be called at any time, from any thread."""
        _cancel(self._row)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._row.ids)

    @property
    def cached_tokens(self) -> int:
        """… of which so many were not computed again."""
        return self._row.cached

    @property
    def new_tokens(self) -> int:
        """Tokens written so far."""
        return len(self._row.new)


def _work(row: Row) -> Work:
    """Return what is left to do of a text."""
    return Work(len(row.ids), max(0, row.how.max_new_tokens - len(row.new)), row.adapter)


def _cancel(row: Row) -> None:
    row.cancelled = True        # no lock, because the garbage collector may come here while its thread holds it


class Batcher:
    """Writes up to `slots` texts at a time, in the order in which they were asked for; up to `queue` more may wait.

    `ends`: ids that end an answer (default: the tokenizer's eos).  `notify` of `submit` is called, in the batcher's thread,
    whenever the ticket has something new; it must return at once.
    """

    def __init__(self, model: Writer, tokenizer: Tokenizer, *, slots: int, queue: int, adapters: Switch | None = None,
                 ends: Sequence[int] | None = None, chunk: int = CHUNK, prefix_bytes: int = PREFIX_BYTES) -> None:
        if slots < 1 or queue < 0 or chunk < 1:
            raise ConfigError(_("slots and chunk must be at least 1, and queue at least 0"))
        eos = tokenizer.special.eos
        self.slots, self.queue = slots, queue
        self._base, self._adapters = model.eval(), adapters
        self._ends = frozenset(ends if ends is not None else [] if eos is None else [eos])
        self._tokenizer = tokenizer
        self._grammar_made: Grammar | None = None
        self._prefixes = Prefixes(prefix_bytes)
        self._rows = Rows(self._model, lambda ids: tokenizer.decode(ids, special=False), ends=self._ends, chunk=chunk,
                          prefixes=self._prefixes, grammar=self._grammar)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._waiting: deque[Row] = deque()
        self._closing = self._stopping = False
        self._running = 0                               # texts under way, as of the last look
        self._under_way: list[Row] = []                 # … and which
        self.pace = Pace()
        self._thread = threading.Thread(target=self._run, name="danlu-batcher", daemon=True)
        self._thread.start()

    def _model(self, adapter: str | None) -> Writer:
        if adapter is None:
            return self._base
        if self._adapters is None:
            raise ConfigError(_("there is no adapter {name}; there are {names}").format(name=adapter, names="-"))
        model = self._adapters.use(adapter)
        if not writes(model):
            raise ConfigError(_("this model does not write; give a decoder with a vocabulary"), where=adapter)
        return model

    def _grammar(self) -> Grammar:
        if self._grammar_made is None:
            self._grammar_made = Grammar(self._tokenizer, self._ends)
        return self._grammar_made

    def submit(self, ids: Sequence[int], sampling: Sampling, *, adapter: str | None = None, echo: bool = False,
               notify: Callable[[], None] | None = None, patience: Patience | None = None) -> Ticket:
        """Return the ticket of a new request.

        patience: None waits however long.  Raises Full where too many wait, or for longer than `patience`; ConfigError for what
        cannot be done.
        """
        check(self._model(adapter), ids, sampling)
        told: SimpleQueue[Piece | Exception] = SimpleQueue()

        def tell(piece: Piece | Exception) -> None:
            told.put(piece)
            if notify is not None:
                notify()

        row = Row([int(i) for i in ids], sampling, tell, adapter=adapter, echo=echo)
        with self._wake:
            if self._closing:
                raise TemporaryError(_("the batcher is closing and takes no more requests"))
            if len(self._waiting) >= self.queue + max(0, self.slots - self._running):
                raise Full(_("{n} requests are waiting already").format(n=len(self._waiting)), fix=_("try again later"))
            if patience is not None and not self._soon(_work(row), patience):
                raise Full(_("the answer would take much longer than it does alone"), fix=_("try again later"))
            self._waiting.append(row)
            self._wake.notify()
        return Ticket(row, told)

    def soon(self, work: Work, patience: Patience) -> bool:
        """Return whether a text of so much would be done in time if it were submitted now."""
        with self._lock:
            return self._soon(work, patience)

    def _soon(self, work: Work, patience: Patience) -> bool:
        running = [_work(row) for row in self._under_way if not row.done and not row.cancelled]
        waiting = [_work(row) for row in self._waiting if not row.cancelled]
        if not running and not waiting:
            return True
        return patience.lets(self.pace, self.pace.alone(work), self.pace.beside(work, running, waiting, self.slots))

    def counts(self) -> Counts:
        """Return what the batcher does now and has done."""
        with self._lock:
            rows = self._rows
            return Counts(self._running, len(self._waiting), rows.prompt_tokens, rows.cached_tokens, rows.new_tokens,
                          rows.steps, self._prefixes.bytes)

    def close(self, *, drain: bool) -> None:
        """Take no more requests and end: with `drain` after all answers are written, else at once, all cancelled."""
        with self._wake:
            self._closing = True
            self._stopping |= not drain
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=False)

    def _run(self) -> None:
        while (fresh := self._admit()) is not None:
            try:
                for row in fresh:
                    self._rows.add(row)
                began = time.perf_counter()
                did = self._rows.step()
                if did.passes:
                    self.pace.saw(*did, time.perf_counter() - began)
            except Exception as error:                  # whatever it is: nobody may wait for ever
                self._fail(error, fresh)

    def _admit(self) -> list[Row] | None:
        """Wait until there is something to do, and return those who may join.  None: there will never be anything more to do."""
        with self._wake:
            while True:
                self._running = len(self._rows)
                for row in (*self._waiting, *self._rows.all()) if self._stopping else ():
                    row.cancelled = True
                gone = [row for row in self._waiting if row.cancelled]
                self._waiting = deque(row for row in self._waiting if not row.cancelled)
                fresh = [self._waiting.popleft() for _n in range(min(self.slots - self._running, len(self._waiting)))]
                self._running += len(fresh)
                self._under_way = [*self._rows.all(), *fresh]
                if gone or self._running:
                    break
                if self._closing:
                    return None
                self._wake.wait()
        for row in gone:
            row.give("", "cancelled")
        return fresh

    def _fail(self, error: Exception, fresh: list[Row]) -> None:
        """Tell every ticket of an error, and begin anew: what the caches hold is not known."""
        with self._lock:
            lost = {id(row): row for row in (*self._rows.all(), *fresh, *self._waiting) if not row.done}
            self._waiting.clear()
            self._rows.reading.clear()
            self._rows.pools.clear()
            self._under_way = []
            self._prefixes.clear()
        for row in lost.values():
            row.done = True
            row.tell(error)
