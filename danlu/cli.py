"""`danlu VERB …`: picks one verb and imports only that."""

from __future__ import annotations

import argparse
import errno
import gettext
import json
import re
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import danlu
from danlu import files
from danlu.errors import ConfigError, DanluError, OutOfMemory, ResourceError, Stopped, TemporaryError, short_of_memory
from danlu.train.launch import SETTINGS
from danlu.verbs import table
from danlu.words import DOMAIN, _


def language(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--lang X`, and X as gettext knows it."""
    rest, chosen = list(arguments), None
    for number, word in enumerate(rest):
        if word == "--lang" and number + 1 < len(rest):
            chosen = rest[number + 1]
            del rest[number : number + 2]
            break
        if word.startswith("--lang="):
            chosen = rest.pop(number).partition("=")[2]
            break
    return rest, {"zh": "zh_CN", "zh-cn": "zh_CN", "zh_CN": "zh_CN", "en": "en"}.get(chosen, chosen) if chosen else None


def main(arguments: Sequence[str], *, rank: int | None = None, told: Path | None = None) -> int:
    """Run one verb; return the exit code.  Errors go to stderr, one sentence each, without a traceback unless --debug.

    rank: of this process among those that a launcher started; told: folder in which they mark what one has said for all.
    """
    gettext.textdomain(DOMAIN)                           # argparse speaks through gettext's global domain
    words = list(arguments)
    debug, as_json = "--debug" in words, "--json" in words
    words = [w for w in words if w not in ("--debug", "--json")]
    if words and words[0] in table.ALIASES:
        words[0] = table.ALIASES[words[0]]
    try:
        return _run(words, as_json, list(arguments))
    except DanluError as error:
        problem: DanluError = error
        if debug and not isinstance(error, Stopped):
            raise
    except KeyboardInterrupt:
        problem = Stopped(_("interrupted"), signal=2)
    except BrokenPipeError:
        return 0
    except (MemoryError, OSError, RuntimeError) as error:
        known = _resource(error) or (_parted(error, told) if rank is not None else None)
        if known is None or debug:
            raise
        problem = known
    if isinstance(problem, OutOfMemory) and told is not None:
        (told / SETTINGS).write_text("\n".join(problem.settings), encoding="utf-8")
        return problem.code                              # whoever started this process says it, and starts again
    if rank is not None and not _speaks(problem, rank, told):
        return problem.code
    if as_json:
        print(json.dumps(problem.record(), ensure_ascii=False), file=sys.stderr)
    else:
        print(_("danlu: {problem}").format(problem=problem), file=sys.stderr)
    return problem.code


def _resource(error: BaseException) -> ResourceError | None:
    """Return the shortage behind an error of the system or of PyTorch's allocators, or None."""
    advice = _("lower rows or length, raise layout.micro, or set recompute=full")
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return ResourceError(_("the disk is full: {why}").format(why=error), fix=_("free some space and run it again"))
        return None
    if short_of_memory(error):
        why = (str(error).splitlines() or [""])[0]
        return ResourceError(_("memory has run out: {why}").format(why=why) if why else _("memory has run out"), fix=advice)
    return None


LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out")


def _parted(error: BaseException, told: Path | None) -> TemporaryError | None:
    """Return what it means that PyTorch lost the other processes, or None if `error` says something else."""
    text, kinds = str(error).lower(), {each.__name__ for each in type(error).__mro__}
    if "DistError" not in kinds and not (isinstance(error, RuntimeError) and any(words in text for words in LOST)):
        return None
    if told is not None:
        time.sleep(1.0)                                  # the one at fault speaks first
    return TemporaryError(_("the other processes of the run do not answer any more: {why}").format(
        why=re.sub(r"^\[[^\]]*\.\w+:\d+\]\s*", "", str(error)).split("\n")[0].split(". ")[0]))     # without PyTorch's own file


def _speaks(problem: DanluError, rank: int, told: Path | None) -> bool:
    """Return whether this rank tells the user: what several ranks would say is said once."""
    if isinstance(problem, Stopped) or told is None:
        return rank == 0 or not isinstance(problem, Stopped)
    try:
        if isinstance(problem, TemporaryError) and any(told.iterdir()):
            return False                                 # the cause has been told
        with (told / ("lost" if isinstance(problem, TemporaryError) else files.digest(problem.record()))).open("x"):
            return True
    except FileExistsError:
        return False
    except OSError:
        return True


def _run(words: list[str], as_json: bool, command: list[str]) -> int:
    verbs = table.verbs()
    parser = argparse.ArgumentParser(
        prog="danlu", description=_("Danlu: train large models from raw text to a verified model."),
        epilog=_("Every verb: --lang zh|en, --json (machine-readable), --debug (tracebacks).  Exit codes: 0 ok, 2 configuration, "
                 "3 data, 4 incompatible artefacts, 5 memory or disk, 6 numbers, 7 refused, 75 start again, 130/143 signals."))
    parser.add_argument("--version", action="version", version=f"danlu {danlu.__version__}",
                        help=_("show program's version number and exit"))
    commands = parser.add_subparsers(dest="verb", metavar=_("VERB"), title=_("verbs"))
    for name, verb in verbs.items():
        child = commands.add_parser(name, help=verb.help, description=verb.help)
        if verb.options is not None:
            verb.options(child)
        verb.arguments(child)
    if words and words[0] in verbs and verbs[words[0]].recipe and not {"-h", "--help"} & set(words):
        chosen = words[0]
        options, rest = recipe_options(verbs[chosen], words)
        file, overrides = recipe_words(rest)
        options |= {"file": file, "overrides": overrides}
    else:
        options = vars(parser.parse_args(words))
        chosen = options.pop("verb")
        if chosen is None:
            parser.print_help()
            return 2 if words else 0
    if verbs[chosen].starts:
        options["command"] = command
    return int(import_module(verbs[chosen].module).main(**options, as_json=as_json))


def recipe_options(verb: table.Verb, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the verb's own options among its words, and the words that are left."""
    if verb.options is None:
        return {}, list(words[1:])
    parser = argparse.ArgumentParser(prog=f"danlu {words[0]}", allow_abbrev=False, add_help=False)
    verb.options(parser)
    known, rest = parser.parse_known_args(words[1:])
    return vars(known), rest


def recipe_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file and the overrides: `a.b=c`, `--a.b=c`, `--a.b c` and `--flag` all say the same."""
    file, overrides, number = None, [], 0
    while number < len(words):
        word = words[number]
        number += 1
        if word.startswith("--") and "=" not in word:
            follows = number < len(words) and not words[number].startswith("--")
            overrides.append(f"{word}={words[number] if follows else 'true'}")
            number += follows
        elif "=" in word:
            overrides.append(word)
        elif file is None:
            file = Path(word)
        else:
            raise ConfigError(_("two files are given: {a} and {b}").format(a=file, b=word), where=_("command line"))
    return file, overrides
