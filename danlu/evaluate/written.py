"""How well a model answers: the answers it writes to prompts beside right ones, and the loss of right ones."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from danlu import parallel
from danlu.data import chat, detect, records
from danlu.data.encode import Encoder, encode
from danlu.data.example import Chat, Content, Segments, Tokens, Unusable
from danlu.data.examples import FIRST
from danlu.data.inputs import Input
from danlu.decode import Sampling
from danlu.decode.many import answers as write_answers
from danlu.errors import ConfigError, DataError
from danlu.evaluate import metrics, text
from danlu.evaluate import run as on_text
from danlu.evaluate.interval import Estimate, estimate
from danlu.evaluate.lines import named, source
from danlu.evaluate.metrics import Judged
from danlu.evaluate.record import whole
from danlu.evaluate.rows import How
from danlu.evaluate.run import Result
from danlu.evaluate.score import Document
from danlu.evaluate.subject import Subject
from danlu.generate import endings, writes
from danlu.nn import paths
from danlu.words import _

Write = Callable[[dict[str, Any]], None]
SLOTS = 16              # answers written side by side


def contents(item: Input, names: Mapping[str, str]) -> Iterator[tuple[records.Record, Content]]:
    """Yield every row of conversations, or of prompts and answers.  Raises DataError for one that cannot be used."""
    found = records.read(item)
    first = list(islice(found, FIRST))
    if not first:
        raise DataError(_("there is no row to evaluate"), where=item.path)
    columns = list(dict.fromkeys(name for row in first for name in row.columns))
    try:
        understand = detect.reader(columns, [row.columns for row in first], "chat", names)
    except DataError as error:
        raise DataError(error.what, where=error.where or item.path, fix=error.fix) from None
    for row in chain(first, found):
        try:
            yield row, understand(row.columns)
        except Unusable as error:
            raise _unusable(row, error.detail) from None


def _unusable(row: records.Record, why: str) -> DataError:
    return DataError(_("the row cannot be used: {detail}").format(detail=why), where=f"{row.file}:{row.line}",
                     fix=_("mend or remove the row"))


def answers(item: Input, names: Mapping[str, str]) -> bool:
    """Return whether the first row of an input says which part of it is an answer: it is not plain text."""
    if item.path == "-":
        return False
    try:
        _row, content = next(contents(item.model_copy(update={"take": FIRST, "take_seed": None}), names))
    except DataError:
        return False
    return isinstance(content, Chat | Tokens) or (isinstance(content, Segments) and any(w != 1 for _text, w in content.pieces))


def template_of(subject: Subject) -> chat.Template:
    """Return the chat template that the model was trained with."""
    given = subject.run.chat.template if subject.run is not None else None
    kept = (subject.folder / "chat_template.jinja").is_file()            # with the weights, and so what they were trained with
    return chat.Template.load(subject.tokenizer, subject.folder if kept or given is None else given)


def of_answers(subject: Subject, data: str, how: How, device: torch.device, *, asked: bool = False) -> Result | None:
    """Return loss and perplexity of the answers in rows of conversations; None where `data` is plain text or prepared.

    asked: that they are conversations is known.
    """
    if on_text.is_prepared(data) or not subject.cfg.causal:
        return None
    item = source(data, next(iter(subject.sources()), None), format=how.format, encoding=how.encoding, split=how.split)
    if not asked and not answers(item, how.names):
        return None
    return on_text.evaluate(subject, documents(subject, item, how.names), task=named(data), length=how.length,
                            precision=how.precision, device=device)


def documents(subject: Subject, item: Input, names: Mapping[str, str]) -> Iterator[Document]:
    """Yield rows as documents, of which the answers alone count."""
    learn = subject.run.chat.learn if subject.run is not None else "answers"
    by = Encoder(subject.tokenizer, length=1 << 40, overlong="error", template=template_of(subject), learn=learn)
    for row, content in contents(item, names):
        try:
            made = encode(content, by)
        except Unusable as error:
            raise _unusable(row, error.detail) from None
        for one in made:
            yield Document(one.ids.astype(np.int64), row.bytes, one.weights, f"{row.file}:{row.line}")


class Prompt(NamedTuple):
    """What a model is asked, and what it should answer."""

    ids: list[int]
    text: str                                            # what is shown of it
    reference: str


def prompt(content: Content, subject: Subject, template: chat.Template) -> Prompt:
    """Return the prompt of a row and its answer: the assistant's last turn, or the last stretch that is learned."""
    tokenizer = subject.tokenizer
    if isinstance(content, Chat):
        place = max((i for i, turn in enumerate(content.turns) if turn.role == "assistant"), default=-1)
        if place < 1:
            raise Unusable("no_answer", "no turn of the assistant's stands after another")
        before, last = content.turns[:place], content.turns[place]
        ids, _weights = chat.encode(chat.render(template, before, content.tools, generate=True), tokenizer)
        return Prompt(ids.tolist(), before[-1].content, last.content)
    if isinstance(content, Segments) and len(content.pieces) > 1:
        asked = "".join(said for said, _weight in content.pieces[:-1])
        stretches = tokenizer.encode_pieces([said for said, _weight in content.pieces[:-1]])
        bos = [tokenizer.special.bos] if tokenizer.add_bos and content.ends and tokenizer.special.bos is not None else []
        return Prompt([*bos, *(int(i) for one in stretches for i in one)], asked, content.pieces[-1][0].strip())
    raise Unusable("no_answer", "the row does not say what is asked and what is answered")


@dataclass(frozen=True)
class Writing:
    """How answers are written and compared."""

    most: int = 256                                      # new tokens of an answer
    after: str | None = None                             # pattern: what follows its last match is the final answer


@dataclass
class Written:
    """What was found about the answers to one data set."""

    name: str
    place: str
    subject: Subject
    judged: Judged
    rows: int
    unended: int                                         # answers that were still going on after the most tokens
    unanswered: int                                      # without a final answer, where one is looked for
    precision: str
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return what the figures rest on."""
        return {"rows": self.rows, "unended": self.unended, "unanswered": self.unanswered, "interval_over": "rows"}

    def record(self) -> dict[str, Any]:
        """Return the result as lm-eval writes it."""
        return whole(self.name, self.judged.record(self.name), self.subject, self.facts(), read=self.rows, judged=self.rows,
                     length=self.subject.cfg.context, precision=self.precision, seconds=self.seconds, resamples=metrics.RESAMPLES)

    def told(self) -> list[str]:
        """Return the lines below the table."""
        lines = [_("{rows} answers, the likeliest token at each place, {precision}").format(
            rows=self.rows, precision=self.precision),
                 _("intervals: bootstrap over rows")]
        if self.unended:
            lines.append(_("{n} answers did not end within the tokens they may have").format(n=self.unended))
        if self.unanswered:
            lines.append(_("{n} answers hold no final answer, and count as wrong").format(n=self.unanswered))
        return lines


def evaluate(subject: Subject, item: Input, names: Mapping[str, str], how: Writing, *, name: str, precision: str,
             device: torch.device, write: Write) -> Written:
    """Return how near the answers that the model writes come to those of the rows.  Greedy, some side by side."""
    text.require()
    model: Any = subject.model.to(device).eval()
    if not writes(model):
        raise ConfigError(_("this model does not write; give a decoder with a vocabulary"), where=str(subject.folder))
    pattern = _pattern(how.after)
    model.use(paths.rule(device, parallel.DTYPES[precision], model.cfg.context, causal=True))
    began, template = time.perf_counter(), template_of(subject)
    ends, said, wanted, right = endings(template, subject.tokenizer), list[str](), list[str](), list[bool]()
    unended = unanswered = 0
    context = model.cfg.context - model.ahead.room()
    rows = list(_asked(contents(item, names), subject, template, context))
    asks = [(asked.ids, Sampling(max_new_tokens=min(how.most, context - len(asked.ids)), temperature=0)) for _row, asked in rows]
    found = write_answers(model, asks, slots=SLOTS, ends=ends, precision=partial(parallel.autocast, precision, device))
    for (row, asked), (_ids, sampling), new in zip(rows, asks, found, strict=True):
        answer = subject.tokenizer.decode(new.ids, special=False)
        unended += len(new.ids) == sampling.max_new_tokens
        told = {"file": row.file, "line": row.line, "text": asked.text, "label": asked.reference, "predicted": answer}
        if pattern is not None:
            both = final(asked.reference, pattern), final(answer, pattern)
            if both[0] is None:
                raise _unusable(row, _("its answer holds nothing after {pattern!r}").format(pattern=how.after))
            unanswered += both[1] is None
            right.append(both[0] == both[1])
            told |= {"answer": both[0], "answered": both[1]}
        write(told)
        said.append(answer)
        wanted.append(asked.reference)
    judged = text.texts(said, [[one] for one in wanted])
    if pattern is not None:
        judged = replace(judged, figures=judged.figures | {"exact_match": _share(right)})
    return Written(name, item.path, subject, judged, len(said), unended, unanswered, precision, time.perf_counter() - began)


def _asked(found: Iterable[tuple[records.Record, Content]], subject: Subject, template: chat.Template,
           context: int) -> Iterator[tuple[records.Record, Prompt]]:
    """Yield each row with its prompt.  Raises DataError for one that cannot be asked."""
    for row, content in found:
        try:
            asked = prompt(content, subject, template)
        except Unusable as error:
            raise _unusable(row, error.detail) from None
        if len(asked.ids) >= context:
            raise _unusable(row, _("{n} prompt tokens fill the model's context of {limit}").format(
                n=len(asked.ids), limit=context))
        yield row, asked


def _share(right: list[bool]) -> Estimate:
    return estimate(np.array(right, np.float64), np.ones(len(right)), resamples=metrics.RESAMPLES)


def _pattern(after: str | None) -> re.Pattern[str] | None:
    try:
        return None if after is None else re.compile(after)
    except re.error as error:
        raise ConfigError(_("this is not a regular expression: {why}").format(why=error), where="--answer-after") from None


def final(answer: str, pattern: re.Pattern[str]) -> str | None:
    """Return what follows the last match in its line, bare: no blanks or full stop around, no commas between digits."""
    found = list(pattern.finditer(answer))
    if not found:
        return None
    rest = answer[found[-1].end():].strip().partition("\n")[0].strip().rstrip(".")
    return re.sub(r"(?<=\d),(?=\d)", "", rest).strip()
