"""Tasks over HTTP: classes and scores, tags, answers, vectors.  Rows are read, computed and told as `danlu predict` does."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from danlu.data.encode import encode
from danlu.data.example import Asked, Content, Labelled, Similar, Tagged, Unusable
from danlu.evaluate import rows
from danlu.evaluate.lines import Line, row_of
from danlu.evaluate.tell import Said, tell
from danlu.nn.tasks import Kind
from danlu.serve import filter as filters
from danlu.serve.asked import Classes, Embeddings, Questions, Tags
from danlu.serve.gather import Gather, Read
from danlu.serve.limits import Limits, Refused
from danlu.serve.meters import Meters
from danlu.serve.served import ENDPOINTS, Served
from danlu.words import _

Told = dict[str, Any]
FEW, SHORT = 4, 2048                                     # texts and characters that are read where they come in


@dataclass(frozen=True)
class Scorer:
    """What it takes to let models do their tasks."""

    gather: Gather
    limits: Limits
    meters: Meters
    reads: Executor
    before: Sequence[filters.Filter] = ()


def task_of(served: Served, kind: Kind, name: str | None) -> rows.Task:
    """Return the model's task of a kind, by name if it has several.  Raises Refused."""
    found = [one for one, head in served.heads.items() if head.kind == kind and one in served.tasks]
    if not found:
        able = sorted({f"/v1/{ENDPOINTS[head.kind]}" for head in served.heads.values() if head.kind in ENDPOINTS}
                      | ({"/v1/chat/completions", "/v1/completions"} if served.writes else set()))
        raise Refused(400, _("the model {name} does not do this; it answers {paths}").format(name=served.name,
                      paths=", ".join(able)), code="wrong_task", param="model")
    if name is None and len(found) > 1:
        raise Refused(400, _("the model has several heads for this: {names}").format(names=", ".join(found)), param="head")
    if name not in (None, *found):
        raise Refused(400, _("there is no such head; there are {names}").format(names=", ".join(found)), param="head")
    return served.tasks[name or found[0]]


async def said(scorer: Scorer, task: rows.Task, contents: Sequence[Content], told: Told) -> list[tuple[Line, list[Said]]]:
    """Return what the head gives for each content.  Raises Refused for one that cannot be read."""
    if len(contents) > scorer.limits.inputs:
        raise Refused(400, _("{n} texts; a request has at most {most}").format(n=len(contents), most=scorer.limits.inputs),
                      param="input")
    characters = sum(len(_shown(one)) for one in contents)
    read: Read | None = None
    if len(contents) <= FEW and not scorer.before and characters <= SHORT:
        lines = _lines(scorer, task, contents)           # done before another thread would have begun
    else:
        with scorer.gather.reading(len(contents), characters) as read:
            lines = await asyncio.get_running_loop().run_in_executor(scorer.reads, _lines, scorer, task, contents)
            read.found = sum(len(row["ids"]) for line in lines for row in line.rows)
    told["prompt_tokens"] = sum(len(row["ids"]) for line in lines for row in line.rows)
    told["rows"] = len(lines)
    scorer.meters.tokens.labels("prompt").inc(told["prompt_tokens"])
    return list(zip(lines, await scorer.gather.said(task, lines, read=read), strict=True))


def _lines(scorer: Scorer, task: rows.Task, contents: Sequence[Content]) -> list[Line]:
    by, lines = task.encoder(), []
    for number, content in enumerate(contents):
        try:
            made = encode(content, by)
        except Unusable as error:
            raise Refused(400, _("input {n}: {why}").format(n=number, why=error.detail), param="input",
                          code="context_length_exceeded" if error.reason in ("overlong", "dropped") else error.reason) from None
        hit = filters.judge(scorer.before, _shown(content)) if scorer.before else None
        if hit is not None:
            scorer.meters.filtered.labels("prompt", hit.filter).inc()
            raise Refused(400, _("the filter {name} does not let this through").format(name=hit.filter), code="content_filter")
        lines.append(Line("input", number, {}, None, None, content, tuple(map(row_of, made)),
                          cut=sum(one.cut for one in made), kept=made[0].text))
    return lines


def _shown(content: Content) -> str:
    parts = [part if isinstance(part, tuple) else (part,) for part in content]
    return "\n".join(" ".join(one for one in part if isinstance(one, str)) for part in parts)


def _listed(served: Served, task: rows.Task, found: Sequence[tuple[Line, list[Said]]], told: Told,
            record: Callable[[Told, Line], Told], *, top: int = 0) -> Told:
    data = []
    for number, (line, outs) in enumerate(found):
        cut = {"tokens_cut": line.cut} if line.cut else {}
        data.append({"index": number, **record(tell(task.objective, outs, line, top=top), line), **cut})
    return {"object": "list", "model": served.name, "head": task.head, "data": data, "usage": _usage(told)}


def _usage(told: Told) -> Told:
    return {"prompt_tokens": told["prompt_tokens"], "total_tokens": told["prompt_tokens"]}


async def classify(scorer: Scorer, served: Served, asked: Classes, told: Told) -> Told:
    """Return the class of each text with its probability, or its score."""
    task = task_of(served, "classify", asked.head)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    found = await said(scorer, task, [Labelled((one,) if isinstance(one, str) else tuple(one), None) for one in texts], told)

    def record(one: Told, line: Line) -> Told:
        if "probability" not in one:
            return {"score": one["predicted"]}
        several = {"labels": one["predicted"], "probabilities": one["probability"]}
        single = {"label": one["predicted"], "probability": one["probability"]}
        return (several if isinstance(one["predicted"], list) else single) | (
            {"top": [{"label": name, "probability": chance} for name, chance in one["top"]]} if "top" in one else {})

    return _listed(served, task, found, told, record, top=asked.top_k or 0)


async def tag(scorer: Scorer, served: Served, asked: Tags, told: Told) -> Told:
    """Return the tag of each word with its probability; None for one that was cut off."""
    task = task_of(served, "tag", asked.head)
    each: list[Any] = [asked.words] if isinstance(asked.words[0], str) else list(asked.words)
    found = await said(scorer, task, [Tagged(tuple(words), None) for words in each], told)
    return _listed(served, task, found, told, lambda one, line: {
        "words": list(line.content.words) if isinstance(line.content, Tagged) else [], "tags": one["predicted"],
        "probabilities": one["probability"]})


async def answer(scorer: Scorer, served: Served, asked: Questions, told: Told) -> Told:
    """Return the stretch of each context that answers its question; "" for none."""
    task = task_of(served, "answer", asked.head)
    found = await said(scorer, task, [Asked(one.question, one.context, ()) for one in asked.each], told)
    return _listed(served, task, found, told, lambda one, line: {
        "answer": one["predicted"], "score": one["score"], "null_score": one["null_score"]})


async def embed(scorer: Scorer, served: Served, asked: Embeddings, told: Told) -> Told:
    """Return a vector of length 1 of each text."""
    task = task_of(served, "embed", asked.head)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    found = await said(scorer, task, [Similar((text,)) for text in texts], told)
    data = []
    for number, (line, outs) in enumerate(found):
        vector = outs[0][0] / max(float(np.linalg.norm(outs[0][0])), 1e-12)
        small = vector.astype("<f4")
        shown: Any = base64.b64encode(small.tobytes()).decode() if asked.encoding_format == "base64" else small.tolist()
        cut = {"tokens_cut": line.cut} if line.cut else {}
        data.append({"object": "embedding", "index": number, "embedding": shown, **cut})
    return {"object": "list", "model": served.name, "data": data, "usage": _usage(told)}
