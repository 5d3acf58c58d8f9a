"""The paths of the page: its files, a token that becomes a session, a folder of runs, what each token of a text adds.

The door lets only a browser with a session come here, but for / itself, which asks for the token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from danlu.serve import page, runs
from danlu.serve.asked import Asked, Name, Text
from danlu.serve.keys import Sessions
from danlu.serve.limits import Refused
from danlu.words import _

Answers = Callable[[Request], Awaitable[Response]]


class Explain(Asked):
    """A text of which is asked what each token adds to the class that the model says."""

    text: Text
    head: Name | None = None
    target: Annotated[str, Field(max_length=256)] | None = None


def routes(sessions: Sessions, root: Path | None, explain: Answers) -> list[Route]:
    """Return the page's paths.  root: the folder of runs, None: there is none.  explain: answers with attributions."""

    async def index(request: Request) -> Response:
        chosen = page.language(request.headers.get("accept-language", ""))
        token = request.query_params.get("token")
        if token is not None:
            cookie = sessions.enter(token)
            if cookie is not None:
                answer = Response(status_code=303, headers={"Location": "/"})
                answer.set_cookie(Sessions.COOKIE, cookie, httponly=True, samesite="strict", path="/")
                return answer
        if token is not None or request.scope["state"]["told"].get("key") != "page":
            return _html(page.door(chosen, wrong=token is not None), 403)
        return _html(page.index(chosen), 200)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in page.TYPES:
            raise Refused(404, _("there is no such file"), code="not_found")
        return Response(page.file(name), headers={"Content-Type": page.TYPES[name]})

    return [Route("/", index), Route("/page/file/{name}", file), Route("/page/explain", explain, methods=["POST"]),
            *_runs(root)]


def _html(body: bytes, status: int) -> Response:
    return Response(body, status, media_type="text/html", headers={"Vary": "Accept-Language"})


def _runs(root: Path | None) -> list[Route]:
    def run(request: Request) -> Path:
        known = runs.found(root) if root is not None else {}
        if request.path_params["name"] not in known:
            raise Refused(404, _("there is no such run"), code="not_found")
        return known[request.path_params["name"]]

    def apart(work: Callable[[Request], Any]) -> Answers:
        """Read files in a thread: the disk may be slow, and other requests must not wait for it."""
        async def answer(request: Request) -> Response:
            return JSONResponse(await asyncio.to_thread(work, request))

        return answer

    def listed(request: Request) -> Any:
        return {"runs": runs.listed(root) if root is not None else []}

    def told(request: Request) -> Any:
        return runs.told(run(request))

    def grown(request: Request) -> Any:
        return runs.grown(run(request), _number(request, "from"), _number(request, "file"))

    def table(request: Request) -> Any:
        file = runs.TABLES.get(request.path_params["table"])
        found = runs.read(run(request), file) if file is not None else None
        if found is None:
            raise Refused(404, _("there is no such table"), code="not_found")
        return found

    return [Route("/page/runs", apart(listed)), Route("/page/runs/{name}", apart(told)),
            Route("/page/runs/{name}/metrics", apart(grown)), Route("/page/runs/{name}/{table}", apart(table))]


def _number(request: Request, name: str) -> int:
    said = request.query_params.get(name, "0")
    if not (said.isascii() and said.isdigit() and len(said) < 20):
        raise Refused(400, _("{name} is a number of bytes").format(name=name), param=name)
    return int(said)
