"""The paths of the server, and how a request becomes an answer: read, checked, given to its task, stopped if nobody waits.

Starlette routes; everything else is plain functions.
"""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from danlu.decode import Batcher, Patience
from danlu.errors import ConfigError, DanluError, DataError, ResourceError, TemporaryError
from danlu.evaluate.explain import explain
from danlu.log import say
from danlu.serve import openapi, pages, score, write
from danlu.serve.asked import Asked, Chat, Classes, Complete, Embeddings, Questions, Tags
from danlu.serve.audit import Log
from danlu.serve.door import Door
from danlu.serve.filter import Filter
from danlu.serve.gather import Gather
from danlu.serve.keys import Keys, Sessions
from danlu.serve.limits import Limits, Refused
from danlu.serve.meters import TYPE, Meters
from danlu.serve.served import Served, Shelf
from danlu.words import _

Told = dict[str, Any]
Handler = Callable[["Service", Served, Any, Told], Awaitable[Told | AsyncIterator[Told]]]


@dataclass(frozen=True)
class Service:
    """All that requests are answered with."""

    shelf: Shelf
    limits: Limits
    meters: Meters
    scorer: score.Scorer
    writer: write.Writer | None                          # None: no model writes

    def model(self, name: str | None) -> Served:
        """Return the model of that name.  Raises Refused."""
        if name is None and self.shelf.models:
            return self.shelf.first
        if not self.shelf.models:
            raise Refused(404, _("no model is served here, only the page of runs"), code="model_not_found")
        if name is None or name not in self.shelf.models:
            raise Refused(404, _("there is no model {name!r}; there are {names}").format(
                name=str(name)[:100], names=", ".join(self.shelf.models)), code="model_not_found", param="model")
        return self.shelf.models[name]


def _writes(write_: Callable[[write.Writer, Served, Any, Told], Awaitable[Any]]) -> Handler:
    async def handler(service: Service, served: Served, asked: Any, told: Told) -> Any:
        if service.writer is None or not served.writes:
            raise Refused(400, _("the model {name} does not write").format(name=served.name), code="wrong_task", param="model")
        return await write_(service.writer, served, asked, told)

    return handler


def _scores(score_: Callable[[score.Scorer, Served, Any, Told], Awaitable[Told]]) -> Handler:
    async def handler(service: Service, served: Served, asked: Any, told: Told) -> Told:
        return await score_(service.scorer, served, asked, told)

    return handler


PATHS: Mapping[str, tuple[type[Asked], Handler]] = {
    "/v1/chat/completions": (Chat, _writes(write.converse)),
    "/v1/completions": (Complete, _writes(write.complete)),
    "/v1/embeddings": (Embeddings, _scores(score.embed)),
    "/v1/classify": (Classes, _scores(score.classify)),
    "/v1/tag": (Tags, _scores(score.tag)),
    "/v1/answer": (Questions, _scores(score.answer)),
}


def understood(body: bytes, kind: type[Asked], content_type: str) -> Asked:
    """Return what a body asks.  Raises Refused, naming the first field at fault."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, _("the body must be JSON: Content-Type: application/json"))
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _misfit(error) from None


def _misfit(error: ValidationError) -> Refused:
    """Return what is wrong with a body: of a field that may be one of several things, what it most nearly is."""
    found = error.errors(include_url=False, include_input=False)
    deepest = max(len(one["loc"]) for one in found)
    plain = found[0]["type"] in ("extra_forbidden", "missing")
    near = found if plain else [one for one in found if len(one["loc"]) == deepest]
    told = []
    for one in near[:3]:
        field = ".".join(str(part) for part in one["loc"] if isinstance(part, int) or part.replace("_", "a").isalnum())
        told.append((field, _("{field}: {why}").format(field=field, why=one["msg"]) if field else one["msg"]))
    unknown = any(one["type"] == "extra_forbidden" for one in near[:3])
    return Refused(400, "; ".join(text for _where, text in told), param=told[0][0][:100] or None,
                   code="unknown_field" if unknown else None)


class Gone(Exception):
    """The client went away before its answer was ready."""


async def while_there(receive: Receive, work: Awaitable[Any]) -> Any:
    """Return what `work` gives; cancel it, and raise Gone, as soon as the client goes away."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        leaving.cancel()
        if not doing.done():
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream:
    """Server-sent events: each value as JSON, [DONE] after the last.  Ends what makes them when the client goes away."""

    def __init__(self, values: AsyncIterator[Told], headers: Mapping[str, str], seconds: float, service: Service) -> None:
        self.values, self.headers, self.seconds, self.service = values, headers, seconds, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no", **self.headers}
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()]})
        try:
            await while_there(receive, self._sent(send))
        except Gone:
            self.service.meters.cancelled.inc()
            scope["state"]["told"]["cancelled"] = True

    async def _sent(self, send: Send) -> None:
        async def event(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        try:
            async with asyncio.timeout(self.seconds):
                async for value in self.values:
                    await event(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except TimeoutError:
            await event(json.dumps(_late(self.seconds).record))
        except (DanluError, Refused) as error:
            await event(json.dumps((error if isinstance(error, Refused) else _refused(error)).record))
        finally:
            await self.values.aclose()                   # type: ignore[attr-defined]
        await event("[DONE]", more=False)


def _late(seconds: float) -> Refused:
    return Refused(503, _("the answer was not complete after {n:g} seconds").format(n=seconds), kind="server_error",
                   code="timeout", retry=5)


def endpoint(service: Service, kind: type[Asked], handler: Handler) -> Callable[[Request], Awaitable[Any]]:
    """Return what answers a path."""

    async def answer(request: Request) -> Any:
        told: Told = request.scope["state"]["told"]
        asked = understood(await request.body(), kind, request.headers.get("content-type", ""))
        served = service.model(asked.model)
        told |= {"model": served.name, "model_sha256": served.sha256}
        headers = {"X-Danlu-Ignored": ", ".join(asked.ignored)} if asked.ignored else {}
        try:
            async with asyncio.timeout(service.limits.request_seconds):
                found = await while_there(request.receive, handler(service, served, asked, told))
        except TimeoutError:
            raise _late(service.limits.request_seconds) from None
        except Gone:
            service.meters.cancelled.inc()
            told["cancelled"] = True
            return Response(status_code=499)
        if isinstance(found, dict):
            return JSONResponse(found, headers=headers)
        return Stream(found, headers, service.limits.request_seconds, service)

    return answer


def failed(request: Request, error: Exception) -> Response:
    """Return the answer to an error: one of ours, one of Starlette's, or a bug, of which the client learns nothing."""
    if isinstance(error, HTTPException):
        names = {404: "not_found", 405: "method_not_allowed"}
        error = Refused(error.status_code, error.detail, code=names.get(error.status_code))
        allowed = {"Allow": _allowed(request.url.path)} if error.status == 405 else {}
        return JSONResponse(error.record, error.status, headers=allowed)
    if isinstance(error, Refused):
        return JSONResponse(error.record, error.status, headers=error.headers)
    if isinstance(error, DanluError):
        refused = _refused(error)
        return JSONResponse(refused.record, refused.status, headers=refused.headers)
    say("".join(traceback.format_exception(error)))
    return JSONResponse(Refused(500, "internal error", kind="server_error").record, 500)


def _refused(error: DanluError) -> Refused:
    """Return one of our errors as an answer: the client's fault, a shortage that passes, or ours."""
    if isinstance(error, TemporaryError | ResourceError):
        return Refused(503, error.what, kind="server_error", code="overloaded", retry=1)
    if isinstance(error, ConfigError | DataError):
        return Refused(400, error.what)
    return Refused(500, error.what, kind="server_error")


def _allowed(path: str) -> str:
    return "POST" if path in PATHS else "GET, HEAD"


def build(shelf: Shelf, *, limits: Limits, keys: Keys, hosts: frozenset[str], literal: bool = False, log: Log | None = None,
          before: tuple[Filter, ...] = (), after: tuple[Filter, ...] = (), sessions: Sessions | None = None,
          runs: Path | None = None) -> Door:
    """Return the whole server as one ASGI app.  sessions: of the page; None: there is no page.  runs: the folder it shows."""
    meters = Meters()
    reads = ThreadPoolExecutor(2, thread_name_prefix="danlu-read")
    gather = Gather(most=limits.waiting, meters=meters, patience=Patience(limits.patience, limits.spared))
    writer, lead = None, shelf.writer
    if lead is not None:
        model: Any = shelf.switch.use(None) if shelf.switch is not None else lead.subject.model
        batcher = Batcher(model, lead.subject.tokenizer, slots=limits.slots, queue=limits.queue, adapters=shelf.switch,
                          ends=sorted({end for one in shelf.models.values() for end in one.ends}))
        meters.watch(batcher)
        writer = write.Writer(batcher, limits, meters, reads, before, after)
    service = Service(shelf, limits, meters, score.Scorer(gather, limits, meters, reads, before), writer)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        if log is not None:
            log.write({"event": "began", "models": {one.name: one.sha256 for one in shelf.models.values()}})
        yield
        await asyncio.to_thread(_close, service, gather)
        if log is not None:
            log.write({"event": "ended"})
            log.close()

    routes = [Route(path, endpoint(service, kind, handler), methods=["POST"]) for path, (kind, handler) in PATHS.items()]
    paged = pages.routes(sessions, runs, _explains(service)) if sessions else []
    app = Starlette(routes=[*routes, *_plain(service, lambda: door.draining), *paged],
                    lifespan=life, exception_handlers={Refused: failed, HTTPException: failed, DanluError: failed,
                                                       Exception: failed})
    app.router.redirect_slashes = False
    known = frozenset(route.path for route in app.routes if isinstance(route, Route))
    door = Door(app, limits=limits, keys=keys, hosts=hosts, literal=literal, meters=meters, log=log, sessions=sessions,
                paths=known)
    return door


def _close(service: Service, gather: Gather) -> None:
    if service.writer is not None:
        service.writer.batcher.close(drain=False)
    gather.close()
    service.scorer.reads.shutdown(wait=False, cancel_futures=True)


def _plain(service: Service, draining: Callable[[], bool]) -> list[Route]:
    """Return the paths that take no body."""

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [one.record for one in service.shelf.models.values()]})

    async def model(request: Request) -> Response:
        return JSONResponse(service.model(request.path_params["name"]).record)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        if draining():
            raise Refused(503, _("the server is about to end"), kind="server_error", code="draining", retry=5)
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:
        return Response(service.meters.text(), headers={"Content-Type": TYPE})

    async def described(request: Request) -> Response:
        kinds = {path: kind for path, (kind, _handler) in PATHS.items()}
        return JSONResponse(openapi.described(kinds, list(service.shelf.models)))

    return [Route("/v1/models", models), Route("/v1/models/{name}", model), Route("/health", health), Route("/ready", ready),
            Route("/metrics", metrics), Route("/openapi.json", described)]


def _explains(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """Return what tells a page how much each token of a text moves what the model says."""

    async def answer(request: Request) -> Response:
        asked = understood(await request.body(), pages.Explain, request.headers.get("content-type", ""))
        assert isinstance(asked, pages.Explain)
        served = service.model(asked.model)
        if served.writes:                                # its steps run in another thread, and gradients hook into its layers
            raise Refused(400, _("a model that writes is not explained while it serves"), code="wrong_task", param="model")
        task = score.task_of(served, "classify", asked.head)
        async with asyncio.timeout(service.limits.request_seconds):
            found = await while_there(request.receive, service.scorer.gather.alone(
                lambda: explain(task, (asked.text,), target=asked.target, attention=False)))
        return JSONResponse({"target": found.target, "tokens": found.tokens, "scores": found.scores, "gap": found.gap})

    async def bounded(request: Request) -> Response:
        try:
            return await answer(request)
        except TimeoutError:
            raise _late(service.limits.request_seconds) from None
        except Gone:
            service.meters.cancelled.inc()
            return Response(status_code=499)

    return bounded
