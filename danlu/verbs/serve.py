"""`danlu serve run`: a model over HTTP, for programs that speak OpenAI's protocol and for a browser on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from danlu import config, parallel
from danlu.errors import ConfigError, IncompatibleError, SecurityError, Stopped
from danlu.log import say
from danlu.serve.limits import Limits
from danlu.words import _

NEEDED = ("starlette", "uvicorn", "prometheus_client")
HERE = frozenset({"127.0.0.1", "localhost", "::1"})


def main(run: Path | None, *, adapter: list[str], host: str, port: int, key_file: Path | None, allow_host: list[str],
         name: str | None, filter: list[str], filter_test: Path | None, filter_where: str, audit: Path | None,
         check_audit: Path | None, no_page: bool, runs: Path | None, length: int | None, precision: str, as_json: bool,
         **limits: Any) -> int:
    """Serve until a signal; or only try out filters, or check an audit log."""
    if check_audit is not None:
        return _check(check_audit, as_json)
    if filter_test is not None:
        return _try(filter, filter_test, as_json)
    if runs is not None and not runs.is_dir():
        raise ConfigError(_("there is no such folder"), where=f"--runs {runs}")
    if run is None and (runs is None or no_page or host not in HERE):
        raise ConfigError(_("a run folder is needed"), where=_("command line"),
                          fix=_("danlu serve RUN, or danlu serve --runs FOLDER for the page alone"))
    require()
    bounds = config.validate(Limits, {key: value for key, value in limits.items() if value is not None})
    hosts = names(host, allow_host)
    from danlu.serve import keys as of_keys

    keys = of_keys.read(key_file) if key_file is not None else of_keys.Keys()
    if host not in HERE and not keys:
        raise SecurityError(_("{host} can be reached from other machines, and anybody could ask").format(host=host),
                            where="--host", fix=_("give keys, --key-file FILE, or listen on 127.0.0.1"))
    from danlu.serve import app, connection, served
    from danlu.serve.audit import Log
    from danlu.serve.filters import opened

    sock = connection.bind(host, port)                   # before minutes of loading
    log = Log(audit) if audit is not None else None
    device = parallel.start(threads=None, device="auto")
    with ThreadPoolExecutor(1) as apart:                 # OpenMP keeps helpers for each living thread that ever computed: …
        shelf = served.Shelf({}, None) if run is None else apart.submit(
            served.open_shelf, run, by_name(adapter), device=device, name=name, length=length, precision=precision).result()
        found = apart.submit(lambda: tuple(opened(one, device) for one in filter)).result()
    # … were there more of them than cores, those of the thread that answers would be woken anew for every product
    sessions = of_keys.Sessions() if not no_page and host in HERE else None
    door = app.build(shelf, limits=bounds, keys=keys, hosts=hosts, literal=host not in HERE, log=log, sessions=sessions,
                     runs=runs or _beside(run),
                     before=found if filter_where != "answers" else (), after=found if filter_where != "prompts" else ())
    server = connection.Server(door, sock, limits=bounds, door=door, began=lambda: _began(server, host, shelf, sessions, as_json))
    number = server.run()
    if number is not None:
        raise Stopped(_("told to stop; what was under way was answered"), signal=number)
    return 0


def _beside(run: Path | None) -> Path | None:
    """Return the folder of runs that a run stands in, or None for what is no run."""
    if run is None:
        return None
    home = run.resolve().parent if run.resolve().name.startswith("checkpoint-") else run.resolve()
    return home.parent if (home / "run.json").is_file() else None


def require() -> None:
    """Raise ConfigError unless what the server needs is installed."""
    missing = [one for one in NEEDED if importlib.util.find_spec(one) is None]
    if missing:
        raise ConfigError(_("serving needs {names}, which is not installed").format(names=", ".join(missing)),
                          fix='pip install "danlu[serve]"')


def names(host: str, more: list[str]) -> frozenset[str]:
    """Return the names that a Host header may have."""
    own = {host.lower(), f"[{host.lower()}]"} if host not in ("0.0.0.0", "::") else set()
    return frozenset({"127.0.0.1", "localhost", "[::1]"} | own | {one.lower() for one in more})


def _began(server: Any, host: str, shelf: Any, sessions: Any, as_json: bool) -> None:
    """Tell where the server is, and the address of the page."""
    at = f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
    page = f"{at}/?token={sessions.fresh()}" if sessions is not None else None
    if as_json:
        print(json.dumps({"url": f"{at}/v1", "page": page, "models": [one.record for one in shelf.models.values()],
                          "pid": os.getpid()}), flush=True)
        return
    for one in shelf.models.values():
        say(_("{name}: {offers}").format(name=one.name, offers=", ".join(one.record["offers"])))
    say(_("listening on {url}").format(url=f"{at}/v1"))
    if page is not None:
        say(_("page, for one browser on this machine: {url}").format(url=page))


def by_name(given: list[str]) -> dict[str, Path]:
    """Return the adapters of name=path.  Raises ConfigError."""
    found: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or not path or name in found:
            raise ConfigError(_("{text!r} is not of the form name=path, or the name stands twice").format(text=one),
                              where="--adapter")
        found[name] = Path(path)
    return found


def _check(path: Path, as_json: bool) -> int:
    """Tell whether an audit log is what it was.  Raises IncompatibleError if not."""
    from danlu.serve.audit import check

    if not path.is_file():
        raise ConfigError(_("there is no such file"), where=str(path))
    found = check(path)
    if found.broken is not None:
        raise IncompatibleError(_("the audit log was changed: {why}").format(why=found.why), where=f"{path}:{found.broken}",
                                fix=_("the {n} lines before it are what they were").format(n=found.lines))
    print(json.dumps(found._asdict()) if as_json else
          _("{n} lines, none changed; the last hash is {hash}").format(n=found.lines, hash=found.last))
    return 0


def _try(filter: list[str], path: Path, as_json: bool) -> int:
    """Print how many of the texts of a file each filter stops."""
    from danlu.serve.filters import measured, opened, shown

    if not filter:
        raise ConfigError(_("name the filters to try: --filter"), where="--filter-test")
    device = parallel.start(threads=None, device="auto")
    found = measured([opened(one, device) for one in filter], path)
    print(json.dumps(found, ensure_ascii=False) if as_json else shown(found))
    return 0
