"""`danlu eval run --data test.csv`: how well a model does what it was trained for, and how sure those figures are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from danlu import files, parallel
from danlu.data.stream import Overlong
from danlu.errors import ConfigError
from danlu.evaluate import rows, written
from danlu.evaluate import run as on_text
from danlu.evaluate.lines import named, source
from danlu.evaluate.record import merged, show
from danlu.evaluate.subject import Subject, open_subject
from danlu.words import _


def main(run: Path, *, data: str | None, split: str | None, sample_by: str, text: str, label: str | None, columns: list[str],
         encoding: str | None, format: str | None, overlong: Overlong | None, length: int | None, precision: str,
         batch: int | None, head: str | None, task: Literal["text", "chat", "generate"] | None, answer_after: str | None,
         max_new_tokens: int | None, out: Path | None, samples: Path | None, as_json: bool) -> int:
    """Print the figures of a task, or of answers that are written, or loss and perplexity; each with its 95 % interval."""
    device = parallel.start(threads=None, device="auto")
    subject = open_subject(run, graph=True)
    names = by_role(columns) | ({} if text == "text" else {"text": text}) | ({} if label is None else {"label": label})
    how = rows.How(split=split, names=names, encoding=encoding, format=format, overlong=overlong, length=length,
                   precision=precision, rows=batch, head=head)
    home = run if (run / "run.json").is_file() else None
    if subject.cfg.tasks:
        found: list[Any] = _of_task(subject, data, how, device, samples, home)
    elif task == "generate" or answer_after is not None or max_new_tokens is not None:
        writing = written.Writing(most=max_new_tokens or 256, after=answer_after)
        found = [_of_answers(subject, data, how, writing, device, samples, home)]
    else:
        return _of_text(subject, data, how, device, out, samples, sample_by=sample_by, text=text, task=task, as_json=as_json)
    record = merged([one.record() for one in found])
    for path in {out, home / "eval_results.json" if home is not None else None} - {None}:
        assert path is not None
        files.write_json(path, record)
    if as_json:
        print(json.dumps(record, ensure_ascii=False, indent=1))
        return 0
    for one in found:
        show(f"{subject.folder} · {one.place}", one.judged.figures, one.told())
    return 0


def by_role(columns: list[str]) -> dict[str, str]:
    """Return the columns by role from texts like text=review.  Raises ConfigError for another."""
    wrong = [one for one in columns if not all(one.partition("="))]
    if wrong:
        raise ConfigError(_("{given!r} does not name a column").format(given=wrong[0]), where="--columns",
                          fix=_("write role=name, for example --columns text=review label=stars"))
    return {role: name for role, _sign, name in (one.partition("=") for one in columns)}


def _of_task(subject: Subject, data: str | None, how: rows.How, device: torch.device, samples: Path | None,  # noqa: PLR0917
             home: Path | None) -> list[rows.Finding]:
    task = rows.task_of(subject, how, device) if data is not None else None
    with predictions(samples, home) as write:
        if task is None or data is None:
            return rows.on_all_held_out(subject, how, device, write)
        return [rows.judged_on(task, data, how, write)]


def _of_answers(subject: Subject, data: str | None, how: rows.How, writing: written.Writing, device: torch.device,  # noqa: PLR0917
                samples: Path | None, home: Path | None) -> written.Written:
    if data is None:
        raise ConfigError(_("answers are written to prompts; name the file that holds them"), where=str(subject.folder),
                          fix="danlu eval RUN --task generate --data test.jsonl")
    item = source(data, next(iter(subject.sources()), None), format=how.format, encoding=how.encoding, split=how.split)
    with predictions(samples, home) as write:
        return written.evaluate(subject, item, how.names, writing, name=named(data), precision=how.precision, device=device,
                                write=write)


def _of_text(subject: Subject, data: str | None, how: rows.How, device: torch.device, out: Path | None,  # noqa: PLR0917
             samples: Path | None, *, sample_by: str, text: str, task: str | None, as_json: bool) -> int:
    """Print loss and perplexity: of text, or of the answers in conversations."""
    chats = None if data is None or task not in (None, "chat") else written.of_answers(
        subject, data, how, device, asked=task == "chat")
    if chats is not None and data is not None:
        found = [(chats, data)]
    else:
        found = on_text.on_text(subject, data, split=how.split, sample_by=sample_by, text=text, encoding=how.encoding,
                                length=how.length, precision=how.precision, device=device)
    record = merged([result.record() for result, _place in found])
    if samples is not None:
        files.rewrite_lines(samples, ({"task": r.task, **line} for r, _place in found for line in r.tally.samples()))
    if out is not None:
        files.write_json(out, record)
    if as_json:
        print(json.dumps(record, ensure_ascii=False, indent=1))
    for result, place in () if as_json else found:
        on_text.tell(result, place)
    return 0


@contextmanager
def predictions(samples: Path | None, home: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what writes a row's prediction: to `samples`, else into the run folder, else nowhere."""
    path = samples or (home / "predictions.jsonl" if home is not None else None)
    if path is None:
        yield lambda line: None
        return
    with files.growing(path) as write:
        yield write
