"""Many texts at once against one at a time; who waits, who leaves, and what is never computed twice."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import MAKES, made, prompts, tiny, tokenizer

from danlu.adapt import Adapter, LoRA, Prefix, Prompt
from danlu.decode import Batcher, Full, Piece, Sampling, Ticket
from danlu.decode.rows import Row
from danlu.decode.spoken import Speech
from danlu.errors import ConfigError, TemporaryError
from danlu.generate import generate
from danlu.models.decoder import DecoderModel
from danlu.nn.paths import Choice


def ids(ticket: Ticket) -> list[int]:
    return [i for piece in ticket for i in piece.ids]


def alone(model: DecoderModel, prompt: list[int], how: Sampling) -> list[int]:
    return list(generate(model, prompt, max_new_tokens=how.max_new_tokens, temperature=how.temperature, top_k=how.top_k,
                         top_p=how.top_p, repetition_penalty=how.repetition_penalty, seed=how.seed or 0, eos=256))


WAYS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.3}, {"temperature": 0.9, "seed": 5},
                              {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "seed": 6}]


@pytest.mark.parametrize("chunk", [7, 256])
@pytest.mark.parametrize("make", MAKES)
def test_every_text_is_what_it_is_alone(make: str, chunk: int) -> None:
    model = tiny(make)
    asked = [(prompt, Sampling.model_validate({"max_new_tokens": 5 + 9 * n % 40, **WAYS[n % 4]}))
             for n, prompt in enumerate(prompts(11))]
    with Batcher(model, tokenizer(), slots=4, queue=20, chunk=chunk) as batcher:
        tickets = [batcher.submit(prompt, how) for prompt, how in asked]
        got = [ids(ticket) for ticket in tickets]
    assert got == [alone(model, prompt, how) for prompt, how in asked]


@pytest.mark.parametrize("path", ["plain", "block"])
@pytest.mark.parametrize("make", ["grouped", "window"])
def test_every_path_of_attention_writes_the_same(make: str, path: Any) -> None:
    model, how = made(make), Sampling(max_new_tokens=15, temperature=0)
    wanted = [alone(model, prompt, how) for prompt in prompts(4)]
    model.use(Choice(attention=path))
    with Batcher(model, tokenizer(), slots=4, queue=4) as batcher:
        assert [ids(ticket) for ticket in [batcher.submit(prompt, how) for prompt in prompts(4)]] == wanted


def test_prefix_blocks_are_computed_once_and_change_nothing() -> None:
    model, how = tiny("grouped"), Sampling(max_new_tokens=12, temperature=0.8, seed=3)
    shared = prompts(1, seed=9, longest=2)[0] * 70
    first, second = [*shared, 7, 8], [*shared, 9]
    with Batcher(model, tokenizer(), slots=2, queue=8) as batcher:
        tickets = []
        for prompt in (first, second, first):
            tickets.append(batcher.submit(prompt, how))
            assert ids(tickets[-1]) == alone(model, prompt, how)
        assert [ticket.cached_tokens for ticket in tickets] == [0, 64, 64]
        counts = batcher.counts()
    assert (counts.prompt_tokens, counts.cached_tokens) == (len(first) * 2 + len(second), 128)
    token = 2 * model.cfg.layers * model.cfg.kv_heads * model.cfg.head_width * 4
    assert counts.prefix_bytes == 64 * token                    # two blocks, kept once


def test_the_prefix_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    model, how = tiny("gpt2"), Sampling(max_new_tokens=1, temperature=0)
    block = 32 * 2 * model.cfg.layers * model.cfg.width * 4
    texts = [[n] * 70 for n in range(4)]
    with Batcher(model, tokenizer(), slots=1, queue=8, prefix_bytes=5 * block) as batcher:
        for prompt in texts:
            ids(batcher.submit(prompt, how))
            assert batcher.counts().prefix_bytes <= 5 * block
        again = [batcher.submit(prompt, how) for prompt in reversed(texts)]
        for ticket in again:
            ids(ticket)
    assert again[0].cached_tokens == again[1].cached_tokens == 64
    assert again[3].cached_tokens < 64


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    model, how = tiny("gpt2"), Sampling(max_new_tokens=4, temperature=0)
    prompt = [5] * 64
    with Batcher(model, tokenizer(), slots=1, queue=8) as batcher:
        assert ids(batcher.submit(prompt, how)) == ids(batcher.submit(prompt, how)) == alone(model, prompt, how)


class Gate:
    """Lets a model take its steps only when it is told to."""

    def __init__(self, model: DecoderModel) -> None:
        self.open, self.passes = threading.Event(), 0
        model.register_forward_pre_hook(self._wait)

    def _wait(self, *_given: Any) -> None:
        self.passes += 1
        assert self.open.wait(20)


@pytest.fixture
def gated() -> Iterator[tuple[Batcher, Gate]]:
    model = made("gpt2")
    gate = Gate(model)
    batcher = Batcher(model, tokenizer(), slots=2, queue=2, ends=())
    yield batcher, gate
    gate.open.set()
    batcher.close(drain=False)


def until(holds: Any) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


LONG = Sampling(max_new_tokens=60, temperature=0)


def test_no_more_wait_than_may(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    tickets = [batcher.submit([1, 2], LONG) for _n in range(4)]
    with pytest.raises(Full):
        batcher.submit([1, 2], LONG)
    assert issubclass(Full, TemporaryError)
    gate.open.set()
    assert [len(ids(ticket)) for ticket in tickets] == [60] * 4
    assert len(ids(batcher.submit([1, 2], LONG))) == 60


def test_a_cancelled_text_frees_its_place_within_one_step(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    one, two, waits = (batcher.submit([1, 2], LONG) for _n in range(3))
    until(lambda: gate.passes == 1)
    one.cancel()
    passes = gate.passes
    gate.open.set()
    pieces = list(one)
    assert pieces[-1].finish == "cancelled"
    assert sum(len(piece.ids) for piece in pieces) <= 2
    assert len(ids(waits)) == len(ids(two)) == 60
    assert gate.passes - passes <= 3 + 62               # two texts of 60 tokens, side by side but for the first steps


def test_one_that_waits_can_be_cancelled(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    tickets = [batcher.submit([1, 2], LONG) for _n in range(3)]
    tickets[2].cancel()
    gate.open.set()
    assert [piece.finish for piece in tickets[2]] == ["cancelled"]


def test_who_goes_away_is_cancelled(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    ticket = batcher.submit([1, 2], LONG)
    until(lambda: gate.passes == 1)
    del ticket
    gc.collect()
    gate.open.set()
    until(lambda: batcher.counts().running == 0)
    assert batcher.counts().new_tokens <= 3


def test_first_come_first_served(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    done: list[int] = []
    tickets: list[Ticket] = []

    def ended(n: int) -> None:
        if n not in done and tickets[n].new_tokens == 60:
            done.append(n)

    for n in range(4):
        tickets.append(batcher.submit([1, 2], LONG, notify=lambda n=n: ended(n)))       # type: ignore[misc]
    gate.open.set()
    for ticket in tickets:
        ids(ticket)
    assert done == [0, 1, 2, 3]


def test_a_long_prompt_does_not_hold_up_short_ones() -> None:
    model, order = tiny("gpt2"), list[str]()
    with Batcher(model, tokenizer(), slots=4, queue=4, chunk=8) as batcher:
        long = batcher.submit([3] * 80, Sampling(max_new_tokens=1, temperature=0), notify=lambda: order.append("long"))
        short = batcher.submit([3] * 4, Sampling(max_new_tokens=1, temperature=0), notify=lambda: order.append("short"))
        ids(long), ids(short)
    assert order == ["short", "long"]


def test_an_error_of_the_model_reaches_everyone_and_the_next_is_served(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    tickets = [batcher.submit([1, 2], LONG) for _n in range(4)]
    model: Any = batcher._base
    broken = model.register_forward_hook(lambda *_given: (_ for _ in ()).throw(RuntimeError("the memory burns")))
    gate.open.set()
    for ticket in tickets:
        with pytest.raises(RuntimeError, match="burns"):
            ids(ticket)
    broken.remove()
    assert len(ids(batcher.submit([1, 2], LONG))) == 60


def test_closing_drains_or_cancels(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    tickets = [batcher.submit([1, 2], LONG) for _n in range(3)]
    gate.open.set()
    batcher.close(drain=True)
    assert [len(ids(ticket)) for ticket in tickets] == [60] * 3
    with pytest.raises(TemporaryError):
        batcher.submit([1], LONG)


def test_closing_at_once_tells_everyone(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    tickets = [batcher.submit([1, 2], LONG) for _n in range(4)]
    threading.Timer(0.05, gate.open.set).start()
    batcher.close(drain=False)
    assert [list(ticket)[-1].finish for ticket in tickets] == ["cancelled"] * 4


@pytest.mark.parametrize(("prompt", "most"), [([], 3), ([1] * 90, 7), ([257], 3), ([-1], 3)])
def test_what_cannot_be_is_refused_at_once(prompt: list[int], most: int) -> None:
    with Batcher(tiny("gpt2"), tokenizer(), slots=1, queue=1) as batcher, pytest.raises(ConfigError):
        batcher.submit(prompt, Sampling(max_new_tokens=most))


def test_unknown_adapters_are_refused() -> None:
    with Batcher(tiny("gpt2"), tokenizer(), slots=1, queue=1) as batcher, pytest.raises(ConfigError, match="x7"):
        batcher.submit([1], LONG, adapter="x7")


def test_a_timeout_leaves_the_ticket_as_it_was(gated: tuple[Batcher, Gate]) -> None:
    batcher, gate = gated
    ticket = batcher.submit([1, 2], LONG)
    with pytest.raises(TimeoutError):
        ticket.get(timeout=0.01)
    gate.open.set()
    assert len(ids(ticket)) == 60


@pytest.mark.parametrize("chunk", [5, 256])
@pytest.mark.parametrize("make", ["gpt2", "window"])
def test_logprobs_are_those_of_the_whole_text_read_at_once(make: str, chunk: int) -> None:
    model, prompt = tiny(make), prompts(3, seed=4)[1]
    how = Sampling(max_new_tokens=8, temperature=0.9, seed=2, logprobs=3, frequency_penalty=0.5)
    with Batcher(model, tokenizer(), slots=2, queue=2, ends=(), chunk=chunk) as batcher:
        pieces: list[Piece] = list(batcher.submit(prompt, how, echo=True))
        scored = list(batcher.submit(prompt, Sampling(max_new_tokens=0, logprobs=1), echo=True))
    text = [i for piece in pieces for i in piece.ids]
    told = [one for piece in pieces for one in piece.logprobs or ()]
    assert text[: len(prompt)] == prompt and len(text) == len(prompt) + 8
    assert [one.id for one in told] == text
    assert told[0].logprob is None
    with torch.inference_mode():
        right = model(torch.tensor([text]))["logits"][0].log_softmax(-1)
    for place, one in enumerate(told[1:]):
        assert one.logprob == pytest.approx(float(right[place, one.id]), abs=2e-5)
        best = right[place].topk(3)
        assert [i for i, _p in one.top] == best.indices.tolist()
        assert [p for _i, p in one.top] == pytest.approx(best.values.tolist(), abs=2e-5)
    assert [one.logprob for piece in scored for one in piece.logprobs or ()] == [one.logprob for one in told[: len(prompt)]]
    assert scored[-1].finish == "length"


def test_penalties_are_taken_from_what_was_written() -> None:
    model, prompt = tiny("gpt2"), [4, 4, 9]
    how = Sampling(max_new_tokens=20, temperature=0, presence_penalty=1.5, frequency_penalty=0.7)
    with Batcher(model, tokenizer(), slots=1, queue=2, ends=()) as batcher:
        got = ids(batcher.submit(prompt, how))
    new: list[int] = []
    for _n in range(20):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *new]]))["logits"][0, -1]
        for token in set(new):
            logits[token] -= 1.5 + 0.7 * new.count(token)
        new.append(int(logits.argmax()))
    assert got == new


def test_a_stop_string_ends_the_text_and_is_not_told() -> None:
    model, prompt = tiny("gpt2"), [70, 71]
    with Batcher(model, tokenizer(), slots=1, queue=2, ends=()) as batcher:
        how = Sampling(max_new_tokens=40, temperature=0.7, seed=1)
        whole = "".join(piece.text for piece in batcher.submit(prompt, how))
        stop = whole[9:12]
        pieces = list(batcher.submit(prompt, how.model_copy(update={"stop": (stop,)})))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"


class Several:
    """What a batcher needs of a switch."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.models = models

    def use(self, name: str) -> Any:
        return self.models[name]


def adapted(adapt: Adapter) -> Any:
    model: Any = made("gpt2")
    adapt.apply(model)
    adapt.begin(model, 3)
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=source), alpha=0.3)
    return model.eval()


def test_adapters_are_written_side_by_side_and_share_no_prefix() -> None:
    models = {"lora": adapted(LoRA(rank=4)), "prefix": adapted(Prefix(tokens=5)), "prompt": adapted(Prompt(tokens=5))}
    how = Sampling(max_new_tokens=12, temperature=0)
    asked = [(prompt, name) for prompt in ([7] * 40, [7] * 41, [3, 4]) for name in (None, *models)]
    with Batcher(tiny("gpt2"), tokenizer(), slots=5, queue=20, chunk=16,
                 adapters=Several(models)) as batcher:      # type: ignore[arg-type]
        for _again in range(2):
            tickets = [batcher.submit(prompt, how, adapter=name) for prompt, name in asked]
            got = [ids(ticket) for ticket in tickets]
            assert got == [alone(tiny("gpt2") if name is None else models[name], prompt, how) for prompt, name in asked]
        first = {name: ticket.cached_tokens for ticket, (_prompt, name) in zip(tickets[:4], asked[:4], strict=True)}
    assert first == {None: 32, "lora": 32, "prefix": 32, "prompt": 0}           # virtual tokens are read anew
    assert len({tuple(one) for one in got[:4]}) > 1


def test_an_echo_with_logprobs_tells_the_token_that_ends_it() -> None:
    """Who adds up what stands before the last token needs one more after the prompt, also where the model ends."""
    for echo, ends in ((True, {3}), (False, {3}), (True, set())):
        heard: list[Any] = []
        row = Row([1, 2], Sampling(max_new_tokens=1, logprobs=1), heard.append, echo=echo)
        row.speech = Speech(lambda ids: "x" * len(ids), ())
        row.hear(3, torch.tensor([0.0, 0.0, 0.0, 5.0]), frozenset(ends))
        (piece,) = heard
        assert [one.id for one in piece.logprobs] == ([3] if echo else [])
        assert piece.finish == ("stop" if ends else "length") and piece.ids == (() if ends else (3,))
