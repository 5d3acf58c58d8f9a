"""Conversations and completions: from what was asked to ids, through the batcher, to OpenAI's answers, whole or streamed."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from danlu.data import chat
from danlu.data.example import Turn, Unusable
from danlu.decode import Batcher, Full, Patience, Piece, Sampling, Ticket, Work
from danlu.errors import ConfigError, DanluError, DataError
from danlu.serve import filter as filters
from danlu.serve.again import Again
from danlu.serve.asked import Chat, Complete, Writing
from danlu.serve.limits import Limits, Refused, busy
from danlu.serve.logprobs import of_chat, of_completion
from danlu.serve.meters import Meters
from danlu.serve.served import Served
from danlu.words import _

Told = dict[str, Any]
PER_TURN = 32                                            # tokens that a template puts around a turn, generously
AGAIN = 0.05                                             # seconds until a further prompt of one request is tried again


@dataclass(frozen=True)
class Writer:
    """What it takes to let models write.  reads: threads that tokenise and filter."""

    batcher: Batcher
    limits: Limits
    meters: Meters
    reads: Executor
    before: Sequence[filters.Filter] = ()
    after: Sequence[filters.Filter] = ()
    again: Again = field(default_factory=Again)

    @property
    def patience(self) -> Patience:
        """How long anybody waits."""
        return Patience(self.limits.patience, self.limits.spared)

    def full(self) -> Refused:
        """Return the answer to what there is no room for."""
        return busy(_("too many texts wait to be continued; come again later"), retry=self.again.refused())


class Prompt(NamedTuple):
    """A prompt, ready to be submitted."""

    served: Served
    ids: list[int]
    sampling: Sampling
    echo: bool = False


class Bit(NamedTuple):
    """A piece of an answer as it may be given out."""

    text: str
    piece: Piece
    finish: str | None = None


async def prepared(writer: Writer, served: Served, asked: Writing, read: Callable[[], tuple[list[int], str]], *, most: int | None,
                   logprobs: int | None, size: int, echo: bool = False) -> Prompt:
    """Return the prompt that `read` makes, as ids and as the text that filters see.  Raises Refused.

    most: new tokens that are asked for; None: as many as there is room for, up to the limit.  size: tokens that the prompt has
    at most; 0: it does not matter when it is answered.
    """
    if logprobs is not None and writer.after:
        raise Refused(400, _("logprobs are not given while a filter reads the answers"), param="logprobs")
    loop = asyncio.get_running_loop()
    if most is not None and size and not writer.batcher.soon(Work(size, most, served.adapter), writer.patience):
        raise writer.full()                              # before it costs anything: a shorter prompt would be less patient yet
    try:
        ids, text = await loop.run_in_executor(writer.reads, read)
    except (Unusable, DataError) as error:
        raise Refused(400, str(error), param="messages" if isinstance(asked, Chat) else "prompt") from None
    model: Any = served.subject.model
    room = model.cfg.context - model.ahead.room() - len(ids)
    if most is None:
        most = min(writer.limits.max_tokens, room)
    if most > writer.limits.max_tokens:
        raise Refused(400, _("{n} new tokens are asked for; this server writes at most {most}").format(
            n=most, most=writer.limits.max_tokens), param="max_tokens")
    if not ids:
        raise Refused(400, _("the prompt has no token"), param="prompt")
    if room < max(most, 1 - echo):
        raise Refused(400, _("{n} prompt tokens and {m} new ones do not fit the model's context of {limit}").format(
            n=len(ids), m=max(most, 1), limit=model.cfg.context), code="context_length_exceeded", param="prompt")
    if writer.before:
        hit = await loop.run_in_executor(writer.reads, filters.judge, writer.before, text)
        if hit is not None:
            writer.meters.filtered.labels("prompt", hit.filter).inc()
            raise Refused(400, _("the filter {name} does not let this through").format(name=hit.filter), code="content_filter")
    return Prompt(served, ids, _sampling(asked, most, logprobs), echo)


def _sampling(asked: Writing, most: int, logprobs: int | None) -> Sampling:
    given = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k, "seed": asked.seed,
             "repetition_penalty": asked.repetition_penalty, "presence_penalty": asked.presence_penalty,
             "frequency_penalty": asked.frequency_penalty, "logprobs": logprobs,
             "schema": asked.response_format.wanted if asked.response_format is not None else None}
    return Sampling(max_new_tokens=most, stop=asked.stops, **{name: value for name, value in given.items() if value is not None})


class Submitted(NamedTuple):
    """A prompt that the batcher has, and what is set whenever there is something new."""

    ticket: Ticket
    news: asyncio.Event


def submitted(writer: Writer, prompt: Prompt, *, first: bool = True) -> Submitted:
    """Return the ticket of a prompt.  Raises Refused if there is no room now, or for what cannot be done.

    first: of its request; the others wait however long, once the request was let in.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        with suppress(RuntimeError):                     # the server has ended
            loop.call_soon_threadsafe(news.set)

    try:
        return Submitted(writer.batcher.submit(prompt.ids, prompt.sampling, adapter=prompt.served.adapter, echo=prompt.echo,
                                               notify=notify, patience=writer.patience if first else None), news)
    except Full:
        raise writer.full() if first else busy("") from None
    except ConfigError as error:
        raise Refused(400, error.what) from None


async def pieces(one: Submitted) -> AsyncGenerator[Piece]:
    """Yield the pieces of an answer as they come."""
    while True:
        one.news.clear()
        try:
            while True:
                yield one.ticket.get(0)
        except TimeoutError:
            await one.news.wait()
        except StopIteration:
            return


async def bits(writer: Writer, one: Submitted) -> AsyncGenerator[Bit]:
    """Yield what may be given out; the last has the reason of the end.  If it is closed early, the work ends, too."""
    loop, chain = asyncio.get_running_loop(), filters.Chain(writer.after) if writer.after else None
    began, first = time.perf_counter(), True
    try:
        async for piece in pieces(one):
            if first:
                writer.meters.first.observe(time.perf_counter() - began)
                first = False
            finish: str | None = piece.finish
            text = piece.text
            if chain is not None:
                text = await loop.run_in_executor(writer.reads, _filtered, chain, text, finish is not None)
                if chain.hit is not None:
                    writer.meters.filtered.labels("answer", chain.hit.filter).inc()
                    finish = "content_filter"
            yield Bit(text, piece, finish)
            if finish is not None:
                return
    finally:
        one.ticket.cancel()


def _filtered(chain: filters.Chain, text: str, last: bool) -> str:
    passed = chain.feed(text)
    return passed + chain.end() if last and chain.hit is None else passed


class Answer(NamedTuple):
    """A whole answer."""

    text: str
    finish: str
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        """Tokens of it, those of an echo among them."""
        return sum(len(piece.ids) for piece in self.pieces)


async def whole(writer: Writer, one: Submitted) -> Answer:
    """Return the answer once it is complete."""
    text, said_, finish = "", list[Piece](), "stop"
    async with aclosing(bits(writer, one)) as said:
        async for bit in said:
            text += bit.text
            said_.append(bit.piece)
            finish = bit.finish or finish
    return Answer(text, finish, said_)


def usage(writer: Writer, told: Told, read: int, written: int) -> Told:
    """Return OpenAI's count of tokens; the log and the meters get it, too."""
    told |= {"prompt_tokens": read, "completion_tokens": written}
    writer.again.answered()
    writer.meters.tokens.labels("prompt").inc(read)
    writer.meters.tokens.labels("completion").inc(written)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _head(kind: str, object: str, served: Served) -> Told:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "object": object, "created": int(time.time()), "model": served.name,
            "system_fingerprint": served.sha256[:12]}


async def converse(writer: Writer, served: Served, asked: Chat, told: Told) -> Told | AsyncIterator[Told]:
    """Return the answer to a conversation, or what streams it."""
    turns = [Turn("system" if one.role == "developer" else one.role, one.said) for one in asked.messages]

    def read() -> tuple[list[int], str]:
        ids, _weights = chat.encode(chat.render(served.template, turns, generate=True), served.subject.tokenizer)
        return ids.tolist(), "\n".join(turn.content for turn in turns)

    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    size = sum(len(turn.content.encode()) for turn in turns) + PER_TURN * len(turns)
    prompt = await prepared(writer, served, asked, read, most=most, logprobs=logprobs, size=size)
    one = submitted(writer, prompt)
    if asked.stream:
        return _chat_stream(writer, prompt, one, asked, told)
    answer = await whole(writer, one)
    told["finish"] = answer.finish
    return {**_head("chatcmpl", "chat.completion", served), "choices": [{
        "index": 0, "message": {"role": "assistant", "content": answer.text, "refusal": None}, "finish_reason": answer.finish,
        "logprobs": of_chat(served.subject.tokenizer, answer.pieces) if asked.logprobs else None}],
        "usage": usage(writer, told, len(prompt.ids), answer.tokens)}


async def _chat_stream(writer: Writer, prompt: Prompt, one: Submitted, asked: Chat, told: Told) -> AsyncGenerator[Told]:
    head, count = _head("chatcmpl", "chat.completion.chunk", prompt.served), 0
    counted = asked.stream_options is not None and asked.stream_options.include_usage
    empty = {"usage": None} if counted else {}

    def chunk(delta: Told, finish: str | None = None, logprobs: Any = None) -> Told:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}], **empty}

    try:
        yield chunk({"role": "assistant", "content": ""})
        async with aclosing(bits(writer, one)) as said:
            async for bit in said:
                count += len(bit.piece.ids)
                if bit.text or (asked.logprobs and bit.piece.ids):
                    own = of_chat(prompt.served.subject.tokenizer, [bit.piece]) if asked.logprobs else None
                    yield chunk({"content": bit.text}, None, own)
                if bit.finish:
                    told["finish"] = bit.finish
                    yield chunk({}, bit.finish)
    finally:
        one.ticket.cancel()
        spent = usage(writer, told, len(prompt.ids), count)
    if counted:
        yield {**head, "choices": [], "usage": spent}


async def complete(writer: Writer, served: Served, asked: Complete, told: Told) -> Told | AsyncIterator[Told]:
    """Return the continuations of one prompt or several, or what streams that of one."""
    prompts = asked.prompts
    if len(prompts) > writer.limits.inputs:
        raise Refused(400, _("{n} prompts; a request has at most {most}").format(n=len(prompts), most=writer.limits.inputs),
                      param="prompt")
    if asked.stream and len(prompts) > 1:
        raise Refused(400, _("one prompt is streamed at a time"), param="stream")
    most = 16 if asked.max_tokens is None else asked.max_tokens
    sizes = [len(prompts[0].encode()) + 1 if isinstance(prompts[0], str) else len(prompts[0]), *[0] * (len(prompts) - 1)]
    ready = [await prepared(writer, served, asked, lambda one=one: _read(served, one), most=most,        # type: ignore[misc]
                            logprobs=asked.logprobs, echo=bool(asked.echo), size=size)
             for one, size in zip(prompts, sizes, strict=True)]
    if asked.stream:
        return _text_stream(writer, ready[0], submitted(writer, ready[0]), asked, told)
    answers = await _all(writer, ready)
    tokenizer, choices = served.subject.tokenizer, list[Told]()
    for number, answer in enumerate(answers):
        choices.append({"index": number, "text": answer.text, "finish_reason": answer.finish,
                        "logprobs": of_completion(tokenizer, answer.pieces) if asked.logprobs is not None else None})
    told["finish"] = ",".join(sorted({answer.finish for answer in answers}))
    read = sum(len(one.ids) for one in ready)
    written = sum(answer.tokens for answer in answers) - (read if asked.echo else 0)
    return {**_head("cmpl", "text_completion", served), "choices": choices, "usage": usage(writer, told, read, written)}


def _read(served: Served, prompt: str | list[int]) -> tuple[list[int], str]:
    """Return ids and text of a prompt; a text gets the token that begins texts where the tokenizer adds one."""
    tokenizer = served.subject.tokenizer
    if isinstance(prompt, list):
        top = tokenizer.special.size
        if max(prompt) >= top:
            raise DataError(_("id {id} is not in the vocabulary of {n}").format(id=max(prompt), n=top))
        return prompt, tokenizer.decode(prompt)
    ids: list[int] = tokenizer.encode(prompt).tolist()
    special = tokenizer.special
    start = special.bos if special.bos is not None else special.eos
    if start is not None and (not ids or tokenizer.add_bos):
        ids = [start, *ids]
    return ids, prompt


async def _all(writer: Writer, prompts: Sequence[Prompt]) -> list[Answer]:
    """Return all answers.  The first prompt is refused if there is no room; the others wait for theirs, few at a time."""
    tickets = {0: submitted(writer, prompts[0])}
    gate = asyncio.Semaphore(writer.limits.slots)

    async def one(number: int) -> Answer:
        async with gate:
            while number not in tickets:
                try:
                    tickets[number] = submitted(writer, prompts[number], first=False)
                except Refused as refused:
                    if refused.status != 503:
                        raise
                    await asyncio.sleep(AGAIN)
            return await whole(writer, tickets[number])

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number)) for number in range(len(prompts))]
    except* (Refused, DanluError) as several:
        raise several.exceptions[0] from None
    finally:
        for each in tickets.values():
            each.ticket.cancel()
    return [task.result() for task in tasks]


async def _text_stream(writer: Writer, prompt: Prompt, one: Submitted, asked: Complete, told: Told) -> AsyncGenerator[Told]:
    head, count, offset = _head("cmpl", "text_completion", prompt.served), 0, 0
    counted = asked.stream_options is not None and asked.stream_options.include_usage
    empty = {"usage": None} if counted else {}
    try:
        async with aclosing(bits(writer, one)) as said:
            async for bit in said:
                count += len(bit.piece.ids)
                own = None
                if asked.logprobs is not None:
                    own = of_completion(prompt.served.subject.tokenizer, [bit.piece], offset=offset)
                    offset += sum(map(len, own["tokens"]))
                if bit.finish:
                    told["finish"] = bit.finish
                if bit.text or bit.finish or (own and own["tokens"]):
                    choice = {"index": 0, "text": bit.text, "logprobs": own, "finish_reason": bit.finish}
                    yield {**head, "choices": [choice], **empty}
    finally:
        one.ticket.cancel()
        spent = usage(writer, told, len(prompt.ids), count)
    if counted:
        yield {**head, "choices": [], "usage": spent}
