"""`danlu predict run --data new.csv`: every row with what the model says of it, in order; none is left out."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from danlu import files, parallel
from danlu.data.encode import encode
from danlu.data.example import Labelled, Unusable
from danlu.data.stream import Overlong
from danlu.errors import ConfigError, DataError
from danlu.evaluate import rows
from danlu.evaluate.lines import Line, read, row_of, source
from danlu.evaluate.subject import open_subject
from danlu.evaluate.tell import tell
from danlu.log import say
from danlu.verbs.eval import by_role
from danlu.words import _

Write = Callable[[dict[str, Any], bool], None]           # a record, and whether it has no error
HELD = 1000


def main(run: Path, *, data: str | None, text: str | None, pair: str | None, out: Path | None, top_k: int, columns: list[str],
         encoding: str | None, format: str | None, overlong: Overlong | None, length: int | None, precision: str,
         batch: int | None, head: str | None, as_json: bool) -> int:
    """Write each row with prediction and probability; or print what is said of one text."""
    if (data is None) == (text is None):
        raise ConfigError(_("give either --data or --text"), where=_("command line"))
    if pair is not None and text is None:
        raise ConfigError(_("--pair stands beside --text"), where=_("command line"))
    device = parallel.start(threads=None, device="auto")
    how = rows.How(names=by_role(columns), encoding=encoding, format=format, overlong=overlong, length=length,
                   precision=precision, rows=batch, head=head)
    task = rows.task_of(open_subject(run, graph=True), how, device)
    if text is not None:
        told = said_of(task, (text,) if pair is None else (text, pair), top=top_k)
        print(json.dumps(told, ensure_ascii=False) if as_json or out is not None else plain(told))
        return 0
    assert data is not None
    count, wrong = 0, 0
    with writing(out) as write:
        lines = read(source(data, task.like, format=format, encoding=encoding), task.reading(how, unlabelled=True))
        for record, good in records(task, lines, top=top_k):
            write(record, good)
            count += 1
            wrong += not good
    say(_("{n} rows").format(n=count) + (f" → {out}" if out is not None else ""))
    if wrong:
        say(_("warning: {n} rows could not be read; `error` says why").format(n=wrong))
    return 0


def records(task: rows.Task, lines: Iterator[Line], *, top: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield every row, its columns as they stand in the file, with what the model says and True, or an error and False."""
    for line, outs in rows.answered(task, lines):
        if line.reason:
            yield joined(line.columns, {"error": f"{line.file}:{line.line}: {line.reason}: {line.detail}"}), False
        else:
            yield joined(line.columns, of_user(tell(task.objective, outs, line, top=top))), True


def of_user(told: dict[str, Any]) -> dict[str, Any]:
    """Return what is told of a row under the names of the output."""
    return {"prediction" if name == "predicted" else name: value for name, value in told.items() if name not in ("sure", "loss")}


def joined(columns: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Return both; where the file has a column of the same name, ours is called danlu_…, so that nothing is lost."""
    return columns | {f"danlu_{name}" if name in columns else name: value for name, value in told.items()}


def said_of(task: rows.Task, texts: tuple[str, ...], *, top: int) -> dict[str, Any]:
    """Return what the model says of one text, or of two that belong together.  Raises DataError if they do not fit."""
    if task.objective.wants not in ("label", "labels", "score"):
        raise ConfigError(_("this task needs more than a text; give --data"), where="--text")
    content = Labelled(texts, None)
    try:
        made = encode(content, task.encoder())
    except Unusable as error:
        raise DataError(error.detail, where="--text", fix="--overlong cut") from None
    line = Line("--text", 1, {}, texts[0] if len(texts) == 1 else list(texts), None, content, tuple(map(row_of, made)))
    (_line, outs), = rows.answered(task, [line])
    return of_user(tell(task.objective, outs, line, top=top))


def plain(told: dict[str, Any]) -> str:
    """Return what is told of one text as people read it."""
    if "top" in told:
        return "\n".join(f"{name}\t{chance:.4f}" for name, chance in told["top"])
    value, chance = told["prediction"], told.get("probability")
    if isinstance(value, list) and isinstance(chance, list):
        return "\n".join(f"{name}\t{one:.4f}" for name, one in zip(value, chance, strict=True))
    return f"{value:.4f}" if isinstance(value, float) else f"{value}\t{chance:.4f}" if isinstance(chance, float) else str(value)


@contextmanager
def writing(out: Path | None) -> Iterator[Write]:
    """Yield what writes a record: to stdout as JSON lines, or to a file that appears when all is written."""
    if out is None:
        yield lambda record, good: print(in_json(record))
        sys.stdout.flush()
    elif out.suffix in (".csv", ".tsv"):
        with files.text_growing(out) as file:
            table = Table(csv.writer(file, delimiter="," if out.suffix == ".csv" else "\t", lineterminator="\n"), str(out))
            yield table.write
            table.close()
    elif out.suffix in (".jsonl", ".json", ".ndjson"):
        with files.text_growing(out) as file:
            yield lambda record, good: print(in_json(record), file=file)
    else:
        raise ConfigError(_("the name does not show the format"), where=str(out), fix=_("call it .jsonl, .csv or .tsv"))


def in_json(value: Any) -> str:
    """Return a value as JSON; what JSON cannot hold is null (NaN) or text (dates of a parquet file)."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Table:
    """Writes records as rows of one table, lists as JSON.  The first record without an error names the columns."""

    def __init__(self, writer: Any, where: str) -> None:
        self.writer, self.where = writer, where
        self.names: list[str] = []
        self.held: list[dict[str, Any]] = []             # rows at fault before the columns are known

    def write(self, record: dict[str, Any], good: bool) -> None:
        """Write a record.  Raises DataError if it has a column that the first one lacks."""
        self.held.append(record)
        if self.names or good:
            self.flush()
        elif len(self.held) > HELD:
            raise DataError(_("none of the first {n} rows can be read: {why}").format(n=HELD, why=list(record.values())[-1]),
                            where=self.where)

    def flush(self) -> None:
        """Write what is held; the last of it names the columns, if they are not known."""
        if not self.names:
            self.names = list(dict.fromkeys([*self.held[-1], *(name for one in self.held for name in one), "error"]))
            self.writer.writerow(self.names)
        for record in self.held:
            stray = [name for name in record if name not in self.names]
            if stray:
                raise DataError(_("the rows have not all the same columns: {name!r}").format(name=stray[0]), where=self.where,
                                fix=_("write JSON lines: --out predictions.jsonl"))
            self.writer.writerow([_cell(record.get(name)) for name in self.names])
        self.held = []

    def close(self) -> None:
        if self.held:
            self.flush()


def _cell(value: Any) -> Any:
    return in_json(value) if isinstance(value, list | dict) else value
