"""`danlu VERB …`: picks one verb and imports only that."""

from __future__ import annotations

import argparse
import errno
import gettext
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import danlu
from danlu import files
from danlu.errors import ConfigError, DanluError, ResourceError, Stopped, TemporaryError
from danlu.words import DOMAIN, _


class Verb(NamedTuple):
    """What a verb is called, where it lives, and how its arguments read."""

    module: str                                          # its `main` takes the options as keywords
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    recipe: bool = False                                 # takes FILE and a.b=c beside options
    options: Callable[[argparse.ArgumentParser], None] | None = None             # those options, if `recipe`
    starts: bool = False                                 # is told its own command line, to start it in other processes


def _verbs() -> dict[str, Verb]:
    return {
        "quickstart": Verb("danlu.quickstart", _("the whole way on text that Python brings, in minutes"), _quickstart),
        "prepare": Verb("danlu.verbs.prepare", _("files to shards, tokenizer and report"), _recipe, recipe=True),
        "train": Verb("danlu.verbs.train", _("a recipe to a trained, verified model"), _recipe, recipe=True, starts=True),
        "tune": Verb("danlu.verbs.tune", _("the best values of some keys, by trying"), _recipe, recipe=True,
                      options=_tune_options),
        "audit": Verb("danlu.verbs.audit", _("what a run would really learn from"), _recipe, recipe=True, options=_audit_options),
        "launch": Verb("danlu.verbs.launch", _("the job file of a recipe for SLURM or Kubernetes"), _recipe, recipe=True,
                       options=_launch_options),
        "verify": Verb("danlu.verbs.verify", _("show that a layout changes nothing"), _recipe, recipe=True,
                       options=_verify_options, starts=True),
        "rehearse": Verb("danlu.verbs.rehearse", _("every process of a layout, on one CPU: memory, messages"),
                         _recipe, recipe=True, options=_rehearse_options),
        "eval": Verb("danlu.verbs.eval", _("figures of a task, answers, perplexity, bits per byte, with intervals"), _eval),
        "predict": Verb("danlu.verbs.predict", _("what a model of a task says of new rows"), _predict),
        "generate": Verb("danlu.verbs.generate", _("let a model write"), _generate),
        "chat": Verb("danlu.verbs.chat", _("talk with a model"), _chat),
        "merge": Verb("danlu.verbs.merge", _("an adapter and its base as one model, compared"), _merge),
        "inspect": Verb("danlu.verbs.inspect", _("a prepared row as the model sees it"), _inspect),
        "report": Verb("danlu.report", _("curves and results of a run as one HTML file"), _report),
        "ckpt": Verb("danlu.verbs.ckpt", _("list, verify or hash checkpoints"), _ckpt),
        "doctor": Verb("danlu.doctor", _("what this machine and installation can do"), _doctor),
        "config": Verb("danlu.verbs.config", _("the schema of a recipe, or a check of one"), _recipe, recipe=True,
                       options=_config_options),
        "import-config": Verb("danlu.verbs.import_config", _("another tool's YAML file to a recipe, line by line"),
                              _import_config),
        "version": Verb("danlu.verbs.version", _("the version"), lambda parser: None),
    }


ALIASES = {"preprocess": "prepare", "pretrain": "train", "pt": "train", "evaluate": "eval", "infer": "generate",
           "merge-lora": "merge", "env": "doctor", "checkpoint": "ckpt"}


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
    if words and words[0] in ALIASES:
        words[0] = ALIASES[words[0]]
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
    if isinstance(error, MemoryError):
        return ResourceError(_("memory has run out"), fix=advice)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return ResourceError(_("the disk is full: {why}").format(why=error), fix=_("free some space and run it again"))
        return None
    if any(words in str(error) for words in ("not enough memory", "out of memory", "can't allocate memory")):
        return ResourceError(_("memory has run out: {why}").format(why=str(error).splitlines()[0]), fix=advice)
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
    verbs = _verbs()
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


def recipe_options(verb: Verb, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
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


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", help=_("the YAML file"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help=_("changes to it; --a.b c means the same"))


def _audit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, help=_("write the audit to this file, too (default: audit.json of the run folder)"))


def _launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--render", required=True, choices=["slurm", "k8s"], help=_("what the job file is for"))
    parser.add_argument("--nodes", type=int, help=_("machines (default: what the layout's processes fill)"))
    parser.add_argument("--gpus-per-node", "--gpus_per_node", type=int,
                        help=_("processes, and GPUs, of one machine (default: 8, or fewer if the layout needs fewer)"))
    parser.add_argument("--image", default=f"danlu:{danlu.__version__}", help=_("container image, for k8s"))


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["layout"], help=_("what to verify: layout = the recipe's layout against one process"))
    parser.add_argument("--steps", type=int, default=4, help=_("steps to compare"))
    parser.add_argument("--precision", default="fp64", choices=["fp64", "fp32"], help=_("arithmetic of both"))
    parser.add_argument("--tolerance", type=float, help=_("largest relative difference allowed (default: 1e-6, in fp32 1e-3)"))
    parser.add_argument("--against", type=Path, help=argparse.SUPPRESS)


def _rehearse_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, help=_("processes; those beyond tp·pp·cp are data parallel if layout.dp=1"))
    parser.add_argument("--vocab", type=int, help=_("ids of the tokenizer, where the recipe leaves them to it"))
    parser.add_argument("--memory", help=_("memory of one device, such as 80GB: does it fit?"))


def _quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help=_("folder for everything it makes"))
    parser.add_argument("--steps", type=int, help=_("training steps (default: what fits into the time)"))
    parser.add_argument("--minutes", type=float, default=1.6, help=_("time to train for"))


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--data", help=_("files of rows or of text, or a prepared folder; default: what the run holds out"))
    parser.add_argument("--split", default="val", choices=["train", "val", "test"], help=_("part of a prepared folder"))
    parser.add_argument("--sample-by", "--sample_by", default="line", choices=["line", "paragraph", "document"],
                        help=_("what one document is in a txt file"))
    parser.add_argument("--text", default="text", help=_("column of the text in jsonl, csv and parquet files"))
    parser.add_argument("--label", help=_("column of the label"))
    _rows(parser)
    parser.add_argument("--task", choices=["text", "chat", "generate"],
                        help=_("of a decoder: loss of text, loss of answers, answers it writes (default: seen from the rows)"))
    parser.add_argument("--generate", dest="task", action="store_const", const="generate", help=_("the same as --task generate"))
    parser.add_argument("--answer-after", "--answer_after",
                        help=_("the final answer is what follows this pattern, for example '####'"))
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, help=_("tokens of an answer (default: 256)"))
    parser.add_argument("--out", type=Path, help=_("write the result as JSON"))
    parser.add_argument("--samples", type=Path, help=_("write each row or document with what was found, as JSON lines"))


def _rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=NAME", help=_("columns by role, as in a recipe"))
    parser.add_argument("--encoding", help=_("encoding of the file, for example gb18030 (default: the recipe's)"))
    parser.add_argument("--format", choices=["txt", "jsonl", "json", "csv", "tsv", "conll", "parquet"],
                        help=_("format of the file (default: by its name)"))
    parser.add_argument("--overlong", choices=["error", "cut", "drop", "split"],
                        help=_("what becomes of rows that are too long (default: as the recipe says)"))
    parser.add_argument("--length", type=int, help=_("tokens in a row (default: the run's)"))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help=_("arithmetic of the forward pass"))
    parser.add_argument("--batch", type=int, help=_("most rows computed at a time"))
    parser.add_argument("--head", help=_("which of several tasks (eval without --data: each)"))


def _predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--data", help=_("files of rows without labels; - reads JSON lines from stdin"))
    parser.add_argument("--text", help=_("one text, in place of --data"))
    parser.add_argument("--pair", help=_("the text that belongs to it"))
    parser.add_argument("--out", type=Path,
                        help=_("file to write, jsonl, csv or tsv by its name (default: JSON lines to stdout)"))
    parser.add_argument("--top-k", "--top_k", type=int, default=0, help=_("also list so many of the likeliest classes"))
    _rows(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--system", help=_("what the model is told before anything else"))
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512, help=_("most tokens of an answer"))
    parser.add_argument("--temperature", type=float, default=0.7, help=_("0 = always the likeliest"))
    parser.add_argument("--top-k", "--top_k", type=int, help=_("choose among the k likeliest"))
    parser.add_argument("--top-p", "--top_p", type=float, help=_("choose among the likeliest that make up p"))
    parser.add_argument("--repetition-penalty", "--repetition_penalty", type=float, default=1.0,
                        help=_("above 1: tokens already there become less likely"))
    parser.add_argument("--seed", type=int, default=0, help=_("same seed, same text"))


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--prompt", default="", help=_("how the text begins; - reads it from stdin"))
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int,
                        help=_("tokens to write (default: 128, or what the context has room for)"))
    parser.add_argument("--temperature", type=float, default=0.8, help=_("0 = always the likeliest"))
    parser.add_argument("--top-k", "--top_k", type=int, help=_("choose among the k likeliest"))
    parser.add_argument("--top-p", "--top_p", type=float, help=_("choose among the likeliest that make up p"))
    parser.add_argument("--repetition-penalty", "--repetition_penalty", type=float, default=1.0,
                        help=_("above 1: tokens already there become less likely"))
    parser.add_argument("--stop", action="append", default=[], help=_("text that ends the answer; may be repeated"))
    parser.add_argument("--seed", type=int, default=0, help=_("same seed, same text"))


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint, or an adapter's folder as PEFT writes it"))
    parser.add_argument("--out", type=Path, help=_("folder for the merged model (default: `merged` in the first)"))
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help=_("of the weights written (default: the base's)"))
    parser.add_argument("--tolerance", type=float,
                        help=_("largest difference allowed, as a share of the largest number said (default: by dtype)"))


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help=_("prepared folder"))
    parser.add_argument("--row", type=int, default=0, help=_("number of the row"))
    parser.add_argument("--split", default="train", choices=["train", "val", "test"], help=_("part of a prepared folder"))
    parser.add_argument("--recipe", type=Path, help=_("show the row as this recipe cuts, packs and masks it"))


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder"))


def _ckpt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["ls", "verify", "hash"], help=_("what to do"))
    parser.add_argument("path", type=Path, help=_("run folder or checkpoint"))


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--security", action="store_true", help=_("what is exposed"))


def _tune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=20, help=_("trials in all, those of earlier commands among them"))
    parser.add_argument("--search", action="append", default=[], metavar="KEY=WHAT",
                        help=_("a key and log(low,high), low..high, low..high:step or [a,b,c]; may be repeated"))
    parser.add_argument("--space", type=Path, help=_("YAML file with the same in a section `search`"))
    parser.add_argument("--metric", default="eval/loss", help=_("what decides; the best evaluation of a trial counts"))
    parser.add_argument("--direction", choices=["minimize", "maximize"], help=_("what is better (default: by the metric's name)"))
    parser.add_argument("--sampler", default="tpe", choices=["tpe", "random", "grid"], help=_("how values are chosen"))
    parser.add_argument("--pruner", choices=["median", "hyperband", "none"],
                        help=_("when a trial is stopped early (default: median, if the recipe evaluates on the way)"))
    parser.add_argument("--timeout", type=float, help=_("seconds after which no new trial begins"))
    parser.add_argument("--seed", type=int, default=0, help=_("same seed, same trials"))
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help=_("folder of the study and its trials"))


def _import_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help=_("the YAML file"))
    parser.add_argument("--from", dest="tool", required=True, choices=["llamafactory", "axolotl", "trl"],
                        help=_("the tool it is written for"))
    parser.add_argument("--out", type=Path, help=_("write the recipe here (default: print it)"))


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["schema", "check"], help=_("what to do"))
    parser.add_argument("--verb", dest="about", default="train", choices=["train", "prepare"], help=_("whose file it is"))
