"""Rows against counts: everything once, nothing lost unseen, any position reached, any number of ranks."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data import pack, permute
from danlu.data.stream import Mixed, Plan, Position, Row, Stream
from danlu.errors import ConfigError, DataError


class Memory:
    """Documents in memory: id = place in one long count, so that every token can be told from every other."""

    fingerprint = "memory"

    def __init__(self, lengths: list[int], weights: bool = False) -> None:
        self.sizes = np.array(lengths, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.weighted = weights

    answers: tuple[str, ...] = ()

    def answer(self, name: str, document: int, start: int, stop: int) -> np.ndarray:
        raise AssertionError(name)

    def lengths(self) -> np.ndarray:
        return self.sizes

    def part(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        ids = np.arange(self.first[document] + start, self.first[document] + min(stop, self.sizes[document]))
        return ids.astype(np.uint32), (ids % 3 / 2).astype(np.float16) if self.weighted else None

    def where(self, number: int) -> str:
        return f"memory.txt:{number + 1}"


LENGTHS = [5, 1, 12, 0, 40, 7, 7, 3, 25, 10, 2, 9, 16, 8, 33, 4]
SETTINGS: dict[str, Any] = {"length": 11, "overlap": 1, "overlong": "split", "pack": True, "seed": 3, "window": 4}


def stream(lengths: list[int] = LENGTHS, weights: bool = False, **change: Any) -> Stream:
    return Stream(Memory(lengths, weights), **(SETTINGS | change))


def epoch(rows: Stream, number: int = 0) -> list[Plan]:
    return [plan for plan, _after in islice(rows.plans(Position(number)), rows.rows(number))]


def learned(rows: list[Row]) -> Counter[int]:
    """Count the tokens that next-token prediction asks for: all but the first of each segment, by weight."""
    found: Counter[int] = Counter()
    for row in rows:
        follows = np.flatnonzero(row["segments"][1:] == row["segments"][:-1]) + 1
        found.update(row["ids"][follows[row["weights"][follows] > 0]].tolist())
    return found


documents = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any)
shapes = st.fixed_dictionaries({
    "length": st.integers(6, 30), "overlap": st.integers(0, 4), "pack": st.booleans(), "window": st.integers(1, 50),
    "seed": st.none() | st.integers(0, 2**63 - 1)})


@settings(max_examples=150, deadline=None)
@given(lengths=documents, shape=shapes, number=st.integers(0, 3))
def test_every_token_is_learned_exactly_once(lengths: list[int], shape: dict[str, Any], number: int) -> None:
    rows = stream(lengths, **shape)
    made = [rows.read(plan) for plan in epoch(rows, number)]
    firsts = {int(f) for f, size in zip(np.cumsum([0, *lengths]), lengths, strict=False) if size}
    if shape["overlap"] > 0:
        wanted = set(range(sum(lengths))) - firsts
        assert learned(made) == dict.fromkeys(wanted, 1)
    by_weight: Counter[int] = Counter()
    for row in made:
        by_weight.update(row["ids"][row["weights"] > 0].tolist())
    assert by_weight == dict.fromkeys(range(sum(lengths)), 1)      # all but overlaps weigh 1, once
    assert all(len(row["ids"]) <= shape["length"] for row in made)
    assert rows.counts["tokens"] == sum(lengths) and rows.counts["tokens_lost"] == 0


@settings(max_examples=150, deadline=None)
@given(lengths=documents, shape=shapes, start=st.integers(0, 40), more=st.integers(1, 60))
def test_any_position_gives_the_rest_of_the_uninterrupted_order(
        lengths: list[int], shape: dict[str, Any], start: int, more: int) -> None:
    rows, again = stream(lengths, **shape), stream(lengths, **shape)
    whole = list(islice(rows.plans(rows.begin()), start + more))
    position = whole[start - 1][1] if start else rows.begin()
    position = again.restore(json.loads(json.dumps(position)))
    assert list(islice(again.plans(position), more)) == whole[start:]


@settings(max_examples=60, deadline=None)
@given(lengths=documents, shape=shapes)
def test_epochs_have_the_number_of_rows_they_say_and_every_document(lengths: list[int], shape: dict[str, Any]) -> None:
    rows, other = stream(lengths, **shape), stream(lengths, **shape)
    plans = rows.plans(rows.begin())
    for number in range(3):
        made = [next(plans)[0] for _ in range(other.rows(number))]
        assert {plan.epoch for plan in made} == {number}
        pieces = Counter(piece for plan in made for piece in plan.pieces)
        assert set(pieces.values()) == {1} and len(pieces) == rows.counts["pieces"]
        assert {document for document, _start, _size in pieces} == {i for i, n in enumerate(lengths) if n}
    assert next(plans)[0].epoch == 3


def test_ranks_share_one_global_order() -> None:
    one = [plan for plan, _after in islice(stream().plans(Position()), 40)]
    for ranks in (2, 4):
        dealt = [list(islice(stream().plans(Position()), rank, 40, ranks)) for rank in range(ranks)]
        assert [dealt[n % ranks][n // ranks][0] for n in range(40)] == one


def test_orders_differ_by_seed_and_epoch_and_stored_order_is_stored() -> None:
    def order(seed: int | None, number: int) -> list[Any]:
        return [plan.pieces for plan in epoch(stream(pack=False, seed=seed), number)]

    orders = [order(1, 0), order(1, 1), order(2, 0)]
    assert all(sorted(a) == sorted(orders[0]) for a in orders)
    assert orders[0] not in orders[1:] and orders[1] != orders[2]
    assert order(None, 0) == order(None, 5) == sorted(orders[0])


def test_a_row_says_where_its_tokens_are_from() -> None:
    rows = stream()
    for plan in epoch(rows):
        row = rows.read(plan)
        source = Memory(LENGTHS)
        for number, document in enumerate(row["documents"].tolist(), 1):
            ids = row["ids"][row["segments"] == number]
            assert source.first[document] <= ids[0] <= ids[-1] < source.first[document + 1]
            assert (np.diff(ids) == 1).all()
        assert row["key"].tolist() == [0, plan.epoch, plan.window, plan.offset]
        assert (np.diff(row["segments"]) >= 0).all() and row["segments"][0] == 1
        assert [row[n].dtype for n in ("ids", "weights", "segments", "key", "documents")] == [
            np.int64, np.float32, np.int32, np.int64, np.int64]


def test_keys_are_never_shared() -> None:
    rows = stream()
    keys = [tuple(rows.read(plan)["key"]) for n in range(3) for plan in epoch(rows, n)]
    assert len(set(keys)) == len(keys)


def test_stored_weights_come_along_but_overlaps_are_silent() -> None:
    rows = stream(weights=True, overlap=3)
    for plan in epoch(rows):
        row = rows.read(plan)
        wanted = row["ids"] % 3 / 2
        for number, (_document, start, _size) in enumerate(plan.pieces, 1):
            if start:
                wanted[np.flatnonzero(row["segments"] == number)[:3]] = 0
        assert row["weights"].tolist() == wanted.tolist()


# over-length policies: lengths above 11 are 12, 40, 25, 16, 33

def test_error_names_the_first_offender_and_counts_them() -> None:
    with pytest.raises(DataError, match=r"memory\.txt:3: .*12 tokens.*room for 11; 5 documents") as caught:
        stream(overlong="error")
    assert caught.value.code == 3
    assert stream(overlong="error", length=40).counts["pieces"] == 15


def test_drop_and_cut_are_counted() -> None:
    dropped, cut = stream(overlong="drop"), stream(overlong="cut")
    assert (dropped.counts["dropped"], dropped.counts["tokens_lost"]) == (5, 12 + 40 + 25 + 16 + 33)
    assert (cut.counts["cut"], cut.counts["tokens_lost"]) == (5, 1 + 29 + 14 + 5 + 22)
    for rows in (dropped, cut):
        tokens = sum(size for plan in epoch(rows) for _document, _start, size in plan.pieces)
        assert tokens == rows.counts["tokens"] == sum(LENGTHS) - rows.counts["tokens_lost"]
    assert {s for plan in epoch(cut) for _document, s, _size in plan.pieces} == {0}
    assert stream().counts == {
        "documents": 16, "pieces": 10 + 2 + 4 + 3 + 2 + 4, "empty": 1, "split": 5, "dropped": 0, "cut": 0,
        "tokens": sum(LENGTHS), "tokens_lost": 0}      # 40 tokens: 0..10, 10..20, 20..30, 30..39


def test_nothing_left_and_no_room_are_errors() -> None:
    with pytest.raises(DataError, match="0 rows"):
        stream([50, 60], overlong="drop")
    with pytest.raises(DataError, match="0 rows"):
        stream([])
    with pytest.raises(ConfigError, match="length=3"):
        stream(length=3, reserve=2)


@pytest.mark.parametrize("reserve", [0, 2, 3])
def test_reserved_places_are_kept_for_each_piece(reserve: int) -> None:
    rows = stream(reserve=reserve, overlap=0)
    plans = epoch(rows)
    assert max(len(plan.pieces) for plan in plans) > 1
    assert all(sum(size + reserve for _d, _s, size in plan.pieces) <= 11 for plan in plans)


@pytest.mark.parametrize("packed", [False, True])
def test_partner_is_a_piece_of_another_document(packed: bool) -> None:
    rows = stream(partner=True, pack=packed, overlap=0)
    source, seen = Memory(LENGTHS), Counter[int]()
    for number in range(60):
        for plan in epoch(rows, number):
            row = rows.read(plan)
            owner = int(np.searchsorted(source.first, row["other"][0], side="right")) - 1
            owner = int(np.flatnonzero(source.first[:-1] <= row["other"][0])[-1]) if not LENGTHS[owner] else owner
            assert owner not in row["documents"] and 0 < len(row["other"]) <= 11
            assert source.first[owner] <= row["other"][0] <= row["other"][-1] < source.first[owner + 1]
            seen[int(row["other"][0])] += 1
            assert np.array_equal(row["other"], rows.read(plan)["other"])
    assert len(seen) == rows.counts["pieces"]                # every piece is somebody's partner
    assert max(seen.values()) < 4 * min(seen.values())
    with pytest.raises(DataError, match="only one"):
        stream([30], partner=True)


def test_a_position_of_other_data_is_refused() -> None:
    for bad in ([0, 99, 0], [0, 0, 4], [-1, 0, 0]):
        with pytest.raises(DataError, match="position"):
            stream().restore(bad)


def test_fingerprint_follows_what_the_order_depends_on() -> None:
    changes = {}, {"seed": 4}, {"length": 12}, {"pack": False}, {"window": 5}
    prints = {stream(**change).fingerprint for change in changes}
    assert len(prints) == len(changes) and stream().fingerprint in prints


# packing

def first_fit_decreasing(sizes: list[int], room: int) -> list[list[int]]:
    """The textbook rule: largest first, each into the first row that has space."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        row = next((r for r in rows if sum(r) + size <= room), None)
        if row is None:
            rows.append([size])
        else:
            row.append(size)
    return rows


@settings(max_examples=200, deadline=None)
@given(room=st.integers(1, 80), data=st.data())
def test_packing_is_first_fit_decreasing(room: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, room), min_size=1, max_size=60))
    rows = pack.pack(np.array(sizes), room)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert sorted([sizes[i] for i in row] for row in rows) == sorted(first_fit_decreasing(sizes, room))
    assert pack.count(np.array(sizes), room) == len(rows)


def test_packing_fills_rows() -> None:
    sizes = np.minimum(np.random.default_rng(0).lognormal(4, 1, 20_000).astype(int) + 1, 512).tolist()
    rows = stream(sizes, length=513, overlap=0, window=2048)
    assert rows.counts["tokens"] / (rows.rows(0) * 513) > 0.99


# the permutation

@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63 - 1))
def test_the_permutation_is_one(size: int, seed: int) -> None:
    sent = permute.permute(np.arange(size), size, permute.keys(seed, "test", 0))
    assert np.array_equal(np.sort(sent), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_every_number_is_as_likely_at_every_place(size: int) -> None:
    tries = 2000
    seen = np.zeros((size, size))
    for seed in range(tries):
        seen[np.arange(size), permute.permute(np.arange(size), size, permute.keys(seed, "test"))] += 1
    square = ((seen - tries / size) ** 2 / (tries / size)).sum()
    freedom = (size - 1) ** 2
    assert square < freedom + 6 * (2 * freedom) ** 0.5         # chi-square, 6 standard deviations


def test_neighbours_are_scattered() -> None:
    size = 100_003
    sent = permute.permute(np.arange(size), size, permute.keys(1, "test"))
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 0.02
    assert abs(np.abs(np.diff(sent)).mean() / (size / 3) - 1) < 0.02      # two random places are a third apart
    assert 0.48 < (np.diff(sent) % 2).mean() < 0.52


# mixtures

def mixed(weights: tuple[float, ...] = (3, 1, 0.5), seed: int = 7) -> Mixed:
    return Mixed([stream(seed=5), stream([9, 9, 9], seed=6), stream([3] * 50, pack=False, seed=8)], weights, seed)


def test_shares_hold_in_every_thousand_rows() -> None:
    plans = mixed().plans(mixed().begin())
    for _ in range(3):
        taken = Counter(next(plans)[0].source for _ in range(1000))
        assert taken == {0: 667, 1: 222, 2: 111}               # 666.67, 222.22, 111.11 by largest remainder


def test_a_mixture_goes_on_where_it_stopped() -> None:
    rows = mixed()
    whole = list(islice(rows.plans(rows.begin()), 700))
    for stop in (1, 350, 699):
        position = mixed().restore(json.loads(json.dumps(whole[stop - 1][1])))
        assert list(islice(mixed().plans(position), 700 - stop)) == whole[stop:]
    other = islice(mixed(seed=8).plans(rows.begin()), 700)
    assert [p.source for p, _after in whole] != [p.source for p, _after in other]


def test_a_mixture_keeps_each_source_in_its_own_order_and_names_it() -> None:
    rows = mixed()
    made = [plan for plan, _after in islice(rows.plans(rows.begin()), 500)]
    for source, one in enumerate(rows.streams):
        own = [plan._replace(source=0) for plan in made if plan.source == source]
        assert own == [plan for plan, _after in islice(one.plans(one.begin()), len(own))]
    plan = next(plan for plan in made if plan.source == 2)
    assert rows.read(plan)["key"][0] == 2
    assert rows.rows(0) == sum(s.rows(0) for s in rows.streams)
    assert rows.counts["documents"] == 16 + 3 + 50 and rows.counts["cut"] == 0


@pytest.mark.parametrize("weights", [(1, 0, 1), (1, -1, 1), (1, float("nan"), 1), (1, 1e-5, 1)])
def test_a_source_without_share_is_an_error(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"weight|source"):
        mixed(weights)


@pytest.mark.slow
def test_ten_million_documents_open_at_once_and_any_row_is_near() -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, 10_000_000)
    source = Memory([])
    source.sizes = sizes
    begun = time.process_time()
    rows = Stream(source, length=1025, overlap=1, overlong="split", pack=True, seed=1)
    plan, after = next(rows.plans(Position(5, 3000, 7)))
    assert plan[:4] == (0, 5, 3000, 7) and after == Position(5, 3000, 8)
    assert time.process_time() - begun < 15            # about 1 s on a core of its own
    assert rows.counts["tokens"] == sizes.sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=150), st.integers(2, 9), st.integers(3, 50), st.integers(0, 3))
def test_groups_lose_nothing_and_any_place_is_reached(lengths: list[int], group: int, window: int, begun: int) -> None:
    rows = stream(lengths, length=60, overlap=0, overlong="error", pack=False, window=window, group=group)
    for number in (0, 1, 2):
        plans = epoch(rows, number)
        assert sorted(plan.pieces[0][0] for plan in plans) == list(range(len(lengths)))
    walk = list(islice(rows.plans(Position()), 3 * len(lengths)))
    place = min(begun * len(lengths) // 3, len(walk) - 1)
    again = list(islice(rows.plans(walk[place][1]), len(walk) - place - 1))
    assert [plan for plan, _after in again] == [plan for plan, _after in walk[place + 1 :]]


def test_groups_are_of_like_length_and_batches_meet_them() -> None:
    draw = np.random.default_rng(0)
    lengths, group = draw.integers(1, 100, 1003).tolist(), 8
    rows = stream(lengths, length=100, overlap=0, overlong="error", pack=False, window=200, group=group)
    walk = [plan for plan, _after in islice(rows.plans(Position()), 4 * 1003)]
    batches = [[lengths[plan.pieces[0][0]] for plan in walk[i : i + group]] for i in range(0, len(walk) - group, group)]
    padding = sum(max(batch) * group - sum(batch) for batch in batches) / sum(max(batch) * group for batch in batches)
    assert padding < 0.06                                 # in random order about a half of every batch
    means = [float(np.mean(batch)) for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15          # long and short batches follow each other at random
