"""What is foretold of answers: the fit against known costs, and a crowd in a time of its own, where nothing is noisy."""

from __future__ import annotations

import heapq
import random
from collections import deque

import pytest

from danlu.decode import Pace, Patience, Work
from danlu.serve.again import Again

COSTS = (0.03, 0.004, 0.0002)                            # seconds of a pass, a text, a token of a prompt


def took(passes: float, texts: float, tokens: float) -> float:
    return passes * COSTS[0] + texts * COSTS[1] + tokens * COSTS[2]


def test_the_fit_finds_the_costs_and_keeps_what_it_is_not_shown() -> None:
    draw, pace = random.Random(0), Pace()
    for _n in range(400):
        did = (1 + draw.randint(0, 1), draw.randint(1, 8), draw.randint(0, 200))
        pace.saw(*did, took(*did) * draw.uniform(0.95, 1.05))
    for did in ((1, 1, 0), (1, 8, 0), (2, 4, 100)):
        assert pace.of(*did) == pytest.approx(took(*did), rel=0.05)
    for _n in range(3000):                               # one client alone for long
        pace.saw(1, 1, 0, took(1, 1, 0))
    assert pace.of(1, 8, 0) == pytest.approx(took(1, 8, 0), rel=0.1)
    pace.saw(1, 1, 0, 60.0)                              # the machine slept
    assert pace.of(1, 1, 0) < 1.1 * took(1, 1, 0)


def test_nothing_is_foretold_before_steps_were_seen() -> None:
    pace = Pace()
    assert Patience(1.0, 0.0).lets(pace, 1.0, 100.0)
    for _n in range(20):
        pace.saw(1, 1, 0, 0.1)
    assert not Patience(1.5, 0.0).lets(pace, 1.0, 1.6) and Patience(1.5, 0.7).lets(pace, 1.0, 1.6)


def test_a_place_that_comes_free_soon_is_worth_waiting_for() -> None:
    pace = Pace()
    for texts in (1, 2, 1, 2) * 20:
        pace.saw(1, texts, 0, took(1, texts, 0))
    work = Work(0, 10)
    alone = pace.alone(work)
    soon, late = (pace.beside(work, [Work(0, left)], [], 1) for left in (2, 10))
    assert soon - alone == pytest.approx(2 / 10 * (late - alone), rel=0.1)           # it waits so many steps
    assert pace.beside(work, [Work(0, 10)], [Work(0, 10)], 1) > late


class Simulated:
    """A server whose steps take what COSTS say; clients who ask, are refused, come again.  Returns seconds of answers."""

    def __init__(self, slots: int, patience: Patience) -> None:
        self.slots, self.patience, self.now, self.pace = slots, patience, 0.0, Pace()
        self.again = Again(lambda: self.now)
        self.running: dict[int, list[int]] = {}          # client: tokens left
        self.waiting: deque[int] = deque()
        self.since: dict[int, float] = {}
        self.seconds: list[float] = []
        self.refused = 0

    def run(self, clients: int, seconds: float, work: Work) -> None:
        draw = random.Random(1)
        coming = [(self.now + draw.random(), client) for client in range(clients)]
        heapq.heapify(coming)
        until = self.now + seconds
        while self.now < until:
            while coming and coming[0][0] <= self.now:
                _at, client = heapq.heappop(coming)
                wait = self._ask(client, work)
                if wait:
                    heapq.heappush(coming, (self.now + wait * draw.uniform(1, 1.2), client))
            fresh = []
            while self.waiting and len(self.running) + len(fresh) < self.slots:
                fresh.append(self.waiting.popleft())
            if not self.running and not fresh:
                self.now = coming[0][0]
                continue
            for client in self._step(fresh, work):
                heapq.heappush(coming, (self.now + 1.0, client))

    def _ask(self, client: int, work: Work) -> int:
        running, waiting = [Work(work.read, left[0]) for left in self.running.values()], [work] * len(self.waiting)
        if (running or waiting) and not self.patience.lets(
                self.pace, self.pace.alone(work), self.pace.beside(work, running, waiting, self.slots)):
            self.refused += 1
            return self.again.refused()
        self.waiting.append(client)
        self.since[client] = self.now
        return 0

    def _step(self, fresh: list[int], work: Work) -> list[int]:
        did = (len(fresh) + bool(self.running), len(self.running), work.read * len(fresh))
        self.now += took(*did)
        self.pace.saw(*did, took(*did))
        done = []
        for client in [*self.running]:
            self.running[client][0] -= 1
            if not self.running[client][0]:
                del self.running[client]
                done.append(client)
        self.running |= {client: [work.write] for client in fresh}
        for client in done:
            self.seconds.append(self.now - self.since[client])
            self.again.answered()
        return done


@pytest.mark.parametrize("slots", [1, 8, 64])
def test_those_who_are_let_in_take_less_than_twice_as_long_as_alone(slots: int) -> None:
    work = Work(10, 16)
    server = Simulated(slots, Patience(1.5, 0.05))
    server.run(1, 10, work)
    alone = sorted(server.seconds)[-1]
    server.seconds.clear()
    server.run(200, 60, work)
    ordered = sorted(server.seconds)
    assert ordered[int(0.99 * len(ordered))] < 2 * alone, (ordered[int(0.99 * len(ordered))], alone)
    assert len(ordered) > 0.6 * 60 / alone               # and it is at work nearly all the time, on several if it has places
    if slots > 1:
        assert len(ordered) > 1.5 * 60 / alone
    assert server.refused < 60 * len(ordered) / 2        # … and few come in vain again and again


def test_who_is_refused_comes_again_before_all_others_are_answered_and_not_at_once() -> None:
    """Ten answers a second, two hundred clients who do as they are told: all are answered in twenty seconds, two tries each."""
    now = [0.0]
    again = Again(lambda: now[0])
    assert again.refused() == 1
    coming, told, free = [(0.005 * client, client) for client in range(200)], list[int](), 0.0
    while now[0] < 120:
        now[0], client = heapq.heappop(coming)
        if now[0] >= free:
            free = now[0] + 0.1
            again.answered()
            heapq.heappush(coming, (now[0] + 1.0, client))
            continue
        told.append(again.refused())
        heapq.heappush(coming, (now[0] + told[-1], client))
    late = sorted(told[len(told) // 2:])
    assert 5 <= late[len(late) // 2] <= 20, late[:: len(late) // 20]
