"""Chat templates in Jinja, in a sandbox: the text they write, and which part of it each turn says.

Marks that occur nowhere else (private-use characters) go around what each turn says, and through the template with it.
That the text without them is the text the template writes unmarked is checked for every conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import chain, pairwise
from typing import Any, NoReturn

import numpy as np

from danlu.data.example import Turn, Unusable
from danlu.errors import ConfigError, DataError, SecurityError
from danlu.words import _

PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


def base(turn: Turn) -> float:
    """Return the weight of a turn: the one it is given, else 1 for the assistant and 0 for all others."""
    return turn.weight if turn.weight is not None else float(turn.role == "assistant")


@dataclass(frozen=True)
class Page:
    """What a template wrote.  Places are characters of `text`."""

    text: str
    specials: tuple[tuple[int, int], ...]           # (first, end) of the special tokens that the template wrote
    opens: Mapping[int, int]                        # {turn: where what it says begins}
    later: Mapping[int, int]                        # {turn: where what follows its thoughts begins}
    closes: Mapping[int, int]                       # {turn: where it ends}
    blocks: tuple[tuple[int, int], ...]             # what {% generation %} holds
    leads: Mapping[int, int]                        # {turn: characters of it that stand before its mark}

    def control(self, special: tuple[int, int]) -> str:
        return self.text[special[0]:special[1]]


@dataclass(frozen=True)
class Writer:
    """A template with all that is the same for every conversation of a row."""

    source: str
    controls: tuple[str, ...]
    variables: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]

    def plain(self, turns: Sequence[Turn], *, generate: bool) -> str:
        return self.written([_message(turn, turn.content) for turn in turns], list(self.tools), generate, ("", ""))

    def written(self, messages: list[dict[str, Any]], tools: list[Any], generate: bool, block: tuple[str, str]) -> str:
        compiled = _compiled(self.source)
        import jinja2  # it is there, or the line above had said which extra is missing

        try:
            return str(compiled.render(
                **self.variables, messages=messages, tools=tools or None, documents=None, add_generation_prompt=generate,
                generation_marks=block))
        except jinja2.exceptions.SecurityError as error:
            raise SecurityError(_("the chat template tries what a template may not: {why}").format(why=error)) from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise Unusable("template", f"the chat template refuses these turns: {error}") from error


def draw(source: str, controls: Sequence[str], named: Mapping[str, str], turns: Sequence[Turn],
         tools: Sequence[Mapping[str, Any]], *, generate: bool, variables: Mapping[str, Any]
         ) -> list[tuple[str, float, bool, int]]:
    """Return the text of a conversation as (text, weight, special, turn) pieces."""
    its = {f"{role}_token": token for role, token in named.items()} | dict(variables)
    writer = Writer(source, tuple(controls), its, tools)
    page = _page(writer, turns, generate)
    weights, owners = np.zeros(len(page.text), np.float32), np.full(len(page.text), -1, np.int32)
    for place, first, end in _answers(writer, page, turns, generate):
        weights[first:end], owners[first:end] = base(turns[place]), place
    for place, turn in enumerate(turns):
        begin, close = page.opens.get(place), page.closes.get(place)
        if turn.role != "assistant" and begin is not None and close is not None:
            weights[begin:close], owners[begin:close] = base(turn), place
        elif turn.role != "assistant" and base(turn):
            raise _unclear(place)
        if turn.spans:
            _weigh_spans(page, weights, place, turn)
    for first, end in page.specials:
        weights[first:end], owners[first:end] = weights[first:end].max(), owners[first]
    inside = np.zeros(len(page.text), bool)
    for first, end in page.specials:
        inside[first + 1:end] = True
    edges = np.flatnonzero((np.diff(weights) != 0) | (np.diff(owners) != 0)) + 1
    cuts = {0, len(page.text), *edges.tolist(), *chain.from_iterable(page.specials)}
    special = {first for first, _end in page.specials}
    return [(page.text[a:b], float(weights[a]), a in special, int(owners[a]))
            for a, b in pairwise(sorted(cut for cut in cuts if cut == len(inside) or not inside[cut]))]


def _answers(writer: Writer, page: Page, turns: Sequence[Turn], generate: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (turn, first, end) of what the assistant says, with the token that ends it."""
    spoken = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not spoken:
        return
    closing = _closing(writer, page, turns, spoken[-1], generate)
    if page.blocks:
        if len(page.blocks) != len(spoken) and any(turns[place].weight is not None for place in spoken):
            raise DataError(_("the template marks {blocks} answers in a conversation of {answers}, so that weights of turns "
                              "cannot be kept").format(blocks=len(page.blocks), answers=len(spoken)),
                            fix=_("leave the weights out, or put one generation block around each answer"))
        for number, (first, end) in enumerate(page.blocks):
            place = spoken[min(number, len(spoken) - 1)]
            ended = any(first <= one[0] < end and page.control(one) in closing for one in page.specials)
            after = [one[1] for one in page.specials if one[0] == end and page.control(one) in closing]
            yield place, first, end if ended or not after else after[0]
        return
    starts = {place: _begin(writer, page, turns, place) for place in spoken}
    for place in spoken:
        first = starts[place]
        following = [at for other, at in (*page.opens.items(), *starts.items()) if other > place and at >= first]
        limit = min(following, default=len(page.text))
        end = page.closes.get(place, first)
        yield place, first, _end(page, end, limit, closing, last=place + 1 == len(turns) and not generate)


def _closing(writer: Writer, page: Page, turns: Sequence[Turn], place: int, generate: bool) -> list[str]:
    """Return the special tokens after an answer that ends the conversation, or the one text there is instead."""
    if place + 1 < len(turns) or generate:
        turns = turns[:place + 1]
        page = _page(writer, turns, False)
    end = page.closes.get(place, 0) or (page.blocks[-1][0] if page.blocks else _begin(writer, page, turns, place))
    found = [page.control(one) for one in page.specials if one[0] >= end]
    rest = page.text[end:].strip()
    return found or ([rest] if rest and place in page.closes and not turns[place].calls else [])


def _end(page: Page, first: int, limit: int, closing: Sequence[str], *, last: bool) -> int:
    """Return where an answer ends whose words end at `first`: after the token that ends the turn."""
    after = [one for one in page.specials if first <= one[0] < limit and page.control(one) in closing]
    if after:
        final = [one for one in after if page.control(one) == closing[-1]]
        return (after[-1] if last else (final or after)[0])[1]
    for text in closing:
        found = page.text.find(text, first, limit)
        if found >= 0 and not page.text[first:found].strip():
            return found + len(text)
    return limit if last else first


def _begin(writer: Writer, page: Page, turns: Sequence[Turn], place: int) -> int:
    """Return where the answer of a turn begins: at its mark, else where the template's own header for answers ends."""
    turn, found = turns[place], page.opens.get(place)
    if found is not None:
        lead, before = turn.content[:page.leads.get(place, 0)].strip(), page.text[:found].rstrip()
        return len(before) - len(lead) if lead and before.endswith(lead) else found      # <think> is learned too
    if place in page.later:
        return page.later[place]
    try:
        before = writer.plain(turns[:place], generate=True)
    except Unusable:
        before = ""
    said = turn.content.rpartition("</think>")[2].strip()
    if not before or not page.text.startswith(before) or said not in page.text[len(before):]:
        raise _unclear(place)
    return len(before)


def _unclear(place: int) -> DataError:
    return DataError(_("the chat template changes what turn {turn} says, so that its answer cannot be told from the rest")
                     .format(turn=place + 1), fix=_("put generation tags around the answers in the template, or use ChatML"))


def _weigh_spans(page: Page, weights: np.ndarray, place: int, turn: Turn) -> None:
    lead = page.leads.get(place, 0)
    first, end = page.opens.get(place), page.closes.get(place)
    if first is None or end is None or not turn.content.startswith(page.text[first:end], lead):
        raise _unclear(place)
    for a, b, weight in turn.spans:
        weights[max(first, first + a - lead):max(first, min(end, first + b - lead))] = weight


def _page(writer: Writer, turns: Sequence[Turn], generate: bool) -> Page:
    """Write a conversation with marks around as much as the template bears, and prove that they change nothing."""
    plain = writer.plain(turns, generate=generate)
    used = set(writer.source).union(plain, *_strings([turn._asdict() for turn in turns]), *_strings(list(writer.tools)),
                                    *_strings(dict(writer.variables)))
    free = (chr(code) for code in chain(*PRIVATE) if chr(code) not in used)
    heads = {text[0]: next(free) for text in writer.controls}
    block = (next(free), next(free))
    marks = [(next(free), next(free), next(free)) for _turn in turns]
    pattern = re.compile("|".join(map(re.escape, sorted(writer.controls, key=len, reverse=True))) or r"(?!)")
    tools = _guarded(list(writer.tools), pattern, heads)
    best: Page | None = None
    for everyone, within in ((True, False), (True, True), (False, True), (False, None)):
        leads, messages = dict[int, int](), list[dict[str, Any]]()
        for place, turn in enumerate(turns):
            said = turn.content
            if said.strip() and within is not None and (everyone or turn.role == "assistant"):
                leads[place], cuts = _cuts(said, within)
                said = "".join(part + mark for part, mark in zip(
                    (said[:leads[place]], *cuts[:-1]), marks[place], strict=True)) + cuts[-1]
            message = _guarded(_message(turn, said), pattern, heads)
            messages.append({**message, "role": turn.role})
        try:
            page = _read(writer.written(messages, tools, generate, block), pattern, heads, marks=marks, block=block, leads=leads)
        except Unusable:
            continue
        if page.text != plain:
            continue
        if all((place in page.opens or place in page.later) and place in page.closes for place in leads):
            return page
        best = best or page                         # the template leaves out some of what is said
    if best:
        return best
    raise DataError(_("the chat template treats some texts in a way of its own, so that no part of them can be told apart"),
                    where=plain[:40], fix=_("use ChatML, or a template that writes what is said as it is"))


def _cuts(said: str, within: bool) -> tuple[int, tuple[str, str, str]]:
    """Return how much stands before the first mark, then the texts before the second, before the third, and after it.

    A template may trim what is said, or take the thoughts apart from the answer: then the marks stand within.
    """
    if not within:
        return 0, ("", said, "")
    end = len(said.rstrip())
    first = len(said) - len(said.lstrip())
    if match := re.match(r"\s*<think>\s*(?=\S)", said):
        middle = re.compile(r"</think>\s*").search(said, match.end())
        if middle and middle.end() < end:
            return match.end(), (said[match.end():middle.end()], said[middle.end():end], said[end:])
    return first, ("", said[first:end], said[end:])


def _read(written: str, pattern: re.Pattern[str], heads: Mapping[str, str], *, marks: Sequence[tuple[str, str, str]],
          block: tuple[str, str], leads: Mapping[int, int]) -> Page:
    """Take the marks out of a written text and say where they stood."""
    meant = {mark: (kind, place) for place, three in enumerate(marks) for kind, mark in enumerate(three)}
    restore = str.maketrans({guard: head for head, guard in heads.items()})
    places: tuple[dict[int, int], ...] = ({}, {}, {})
    blocks, specials, parts = list[tuple[int, int]](), list[tuple[int, int]](), list[str]()
    size = begun = 0
    every = "".join((*meant, *block))
    for part in re.split(f"([{re.escape(every)}])", written):
        if part in meant and part:
            kind, turn = meant[part]
            places[kind].setdefault(turn, size)
        elif part == block[0]:
            begun = size
        elif part == block[1]:
            blocks.append((begun, size))
        else:
            specials += [(size + match.start(), size + match.end()) for match in pattern.finditer(part)]
            parts.append(part.translate(restore))
            size += len(part)
    return Page("".join(parts), tuple(specials), places[0], places[1], places[2], tuple(blocks), leads)


def _message(turn: Turn, content: str) -> dict[str, Any]:
    return {"role": turn.role, "content": content} | ({"tool_calls": list(turn.calls)} if turn.calls else {})


def _guarded(value: Any, pattern: re.Pattern[str], heads: Mapping[str, str]) -> Any:
    """Return a value in whose texts no special token is spelt: the first character of each gives way to another."""
    if isinstance(value, Mapping):
        return {_guarded(key, pattern, heads): _guarded(inner, pattern, heads) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_guarded(one, pattern, heads) for one in value]
    if not isinstance(value, str):
        return value
    match = pattern.search(value)
    while match:
        at = match.start()
        value = f"{value[:at]}{heads[value[at]]}{value[at + 1:]}"
        match = pattern.search(value, at + 1)
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for one in chain(value, value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _strings(one)


@cache
def _compiled(source: str) -> Any:
    """Return a template as transformers compiles it, with the same names and filters."""
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError:
        raise ConfigError(_("this chat template needs an extra"), fix='pip install "danlu[chat]"') from None

    class Generation(ext.Extension):
        """{% generation %}: what is written inside stands between the two marks that the conversation brings."""

        tags = {"generation"}                       # noqa: RUF012  (jinja2 reads it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = nodes.Name("generation_marks", "load")
            return nodes.CallBlock(self.call_method("_wrapped", [marks]), [], [], body).set_lineno(line)

        def _wrapped(self, marks: tuple[str, str], caller: Any) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names such as __class__, through which a template could reach the interpreter."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(name)
            super().__setitem__(name, value)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=refuse, namespace=Namespace,
                               strftime_now=lambda pattern: datetime.now().strftime(pattern))
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(_("the chat template cannot be read: line {line}: {why}").format(line=error.lineno, why=error),
                        fix=_("mend chat_template.jinja or tokenizer_config.json")) from None
