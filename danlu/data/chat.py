"""A conversation as text and as ids, with the weight of each stretch: the one renderer, for training and serving alike.

The weights are made with the text and never searched for in it afterwards.  A special token becomes an id only where
the template itself writes it; in what people say it stays text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from danlu import files
from danlu.data import jinja
from danlu.data.example import Turn
from danlu.data.tokenizer import Tokenizer
from danlu.errors import DataError
from danlu.words import _

START, END = "<|im_start|>", "<|im_end|>"
TOOLS = ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
         "signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\nFor each function call, return a json "
         "object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
         '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>')

CHATML = """{%- set rest = messages %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {%- set rest = messages[1:] %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- TOOLS_BEFORE }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- TOOLS_AFTER + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in rest %}
    {%- if message.role == 'tool' %}
        {{- '\\n' if loop.previtem is defined and loop.previtem.role == 'tool' else '<|im_start|>user\\n' }}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '' if loop.first and not message.content else '\\n' }}
            {{- '<tool_call>\\n{"name": ' + call.function.name | tojson + ', "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- ENDED if message.role == 'assistant' else '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class Piece(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    weight: float                                   # of the loss; 0: only read
    special: bool                                   # one special token, which becomes its id; else plain text
    turn: int                                       # number of the turn that says it; -1: the template itself


@dataclass(frozen=True)
class Template:
    """How conversations are written down: a Jinja template, or ChatML."""

    source: str | None                              # None: ChatML
    with_tools: str | None                          # the template for rows with tools, where it is another one
    controls: tuple[str, ...]                       # spellings of the tokenizer's special tokens
    named: Mapping[str, str] = field(default_factory=dict)       # {"bos": "<s>", …}

    @classmethod
    def load(cls, tokenizer: Tokenizer, folder: Path | None = None) -> Template:
        """Return the template of chat_template.jinja, else of tokenizer_config.json, in `folder`; else ChatML.

        `folder` may be a Jinja file too.  Without one the settings that the tokenizer was loaded with are looked at.
        """
        found: Any = tokenizer.settings.get("chat_template")
        if folder is not None and folder.is_file() and folder.suffix != ".json":
            found = folder.read_text(encoding="utf-8")
        elif folder is not None:
            if not folder.exists():
                raise DataError(_("there is no such file"), where=str(folder), fix=_("name a Jinja file or a model's folder"))
            file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
            if file.is_file():
                found = file.read_text(encoding="utf-8")
            elif settings.is_file():
                found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(found, list):
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        several = found if isinstance(found, dict) else {"default": found}
        source, with_tools = several.get("default"), several.get("tool_use")
        if found and not isinstance(source, str):
            raise DataError(_("the chat template is neither text nor a list with one named \"default\""),
                            where=str(folder) if folder else None, fix=_("mend chat_template in tokenizer_config.json"))
        return cls(source or None, with_tools, tokenizer.controls, dict(tokenizer.named))


    @property
    def text(self) -> str:
        """What stands for the template in a digest: equal texts, equal renderings."""
        return json.dumps([self.source, self.with_tools, self.controls, sorted(self.named.items())])

    def save(self, folder: Path) -> None:
        """Write chat_template.jinja, with which other tools render the same text; ChatML is written out too."""
        files.write_text(folder / "chat_template.jinja", self.source or written(self))


def written(template: Template) -> str:
    """Return ChatML as a Jinja template, for the tokens that `template` has."""
    own = START in template.controls and END in template.controls
    before, after = (json.dumps(part) for part in TOOLS.format(tools="\0").split("\0"))
    return CHATML.replace("TOOLS_BEFORE", before).replace("TOOLS_AFTER", after).replace(
        "ENDED", f"'{END}\\n'" if own else "eos_token + '\\n'")


def weighed(turns: Sequence[Turn], learn: str) -> tuple[Turn, ...]:
    """Return the turns with weights as `learn` says: of all answers, of the last one only, or of all turns.

    A weight that a turn has of its own stays, but for `last`, where what stands before the last answer is only read.
    """
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if learn == "last":
        return tuple(turn if place >= last else turn._replace(weight=0.0, spans=()) for place, turn in enumerate(turns))
    if learn == "all":
        return tuple(turn if turn.weight is not None else turn._replace(weight=1.0) for turn in turns)
    assert learn == "answers", learn
    return tuple(turns)


def render(template: Template, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), *, generate: bool = False,
           variables: Mapping[str, Any] | None = None) -> list[Piece]:
    """Return the conversation as text, in pieces with their weights.

    An assistant's turn has its weight (1 if none is given) from the first character of the answer to the token that ends
    the turn; headers have 0; other turns have the weight they are given.  `generate` adds the header of the next answer.
    `variables` are the template's own, such as enable_thinking.  Raises Unusable for turns that the template refuses,
    DataError where it cannot be told which part of the text is the answer.
    """
    if template.source is None:
        return _chatml(template, turns, tools, generate)
    source = template.with_tools if tools and template.with_tools else template.source
    drawn = jinja.draw(source, template.controls, template.named, turns, tools, generate=generate,
                       variables=variables or {})
    pieces = [Piece(*one) for one in drawn]
    closing = turns and turns[-1].role == "assistant" and not generate
    if closing and not any(one.special for one in pieces if one.turn == len(turns) - 1):
        pieces.append(_eos(template, jinja.base(turns[-1]), len(turns) - 1))
    return pieces


def _eos(template: Template, weight: float, turn: int) -> Piece:
    if "eos" not in template.named:
        raise DataError(_("the template ends answers with no special token, and the tokenizer has no eos: the model could "
                          "not learn to stop"), fix=_("give the tokenizer an eos token"))
    return Piece(template.named["eos"], weight, True, turn)


def _chatml(template: Template, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], generate: bool) -> list[Piece]:
    """Write ChatML.  Without its markers in the vocabulary they are plain text, and eos ends the answers."""
    own = START in template.controls and END in template.controls
    pieces = list[Piece]()

    def head(role: str) -> None:
        pieces.extend((Piece(START, 0.0, own, -1), Piece(f"{role}\n", 0.0, False, -1)))

    def end(place: int, weight: float, *, answer: bool = False) -> None:
        pieces.append(_eos(template, weight, place) if answer and not own else
                      Piece(END, weight if answer else 0.0, own, place if answer else -1))
        pieces.append(Piece("\n", 0.0, False, -1))

    if tools:
        said = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        first = turns[0] if turns and turns[0].role == "system" else None
        head("system")
        if first is not None:
            pieces.extend(_said(first, 0))
        pieces.append(Piece(("\n\n" if first else "") + TOOLS.format(tools=said), 0.0, False, -1))
        end(-1, 0.0)
    for place, turn in enumerate(turns):
        if tools and place == 0 and turn.role == "system":
            continue
        if turn.role != "tool":
            head(turn.role)
            pieces.extend(_said(turn, place))
            end(place, jinja.base(turn), answer=turn.role == "assistant")
            continue
        if place == 0 or turns[place - 1].role != "tool":
            head("user")
        else:
            pieces.append(Piece("\n", 0.0, False, -1))
        pieces += [Piece("<tool_response>\n", 0.0, False, -1), *_said(turn, place),
                   Piece("\n</tool_response>", 0.0, False, -1)]
        if place + 1 == len(turns) or turns[place + 1].role != "tool":
            end(place, 0.0)
    if generate:
        head("assistant")
    return [piece for piece in pieces if piece.text]


def _said(turn: Turn, place: int) -> list[Piece]:
    """Return what a turn says, then its tool calls, cut where the weight changes."""
    weights = np.full(len(turn.content), jinja.base(turn), np.float32)
    for first, end, weight in turn.spans:
        weights[first:end] = weight
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    pieces = [Piece(turn.content[a:b], float(weights[a]), False, place)
              for a, b in pairwise(cuts) if a < b]
    for number, call in enumerate(turn.calls):
        inner = call.get("function", call)
        written = json.dumps({"name": inner["name"], "arguments": inner.get("arguments", {})}, ensure_ascii=False)
        lead = "\n" if number or turn.content else ""
        pieces.append(Piece(f"{lead}<tool_call>\n{written}\n</tool_call>", jinja.base(turn), False, place))
    return pieces


def encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids [n] int64 of a conversation and their weights [n] float32.

    A token over the border of two pieces has the greater weight.  There is one bos at most in front: the template's, or
    else the tokenizer's where it adds one.
    """
    ids, weights = list[np.ndarray](), list[np.ndarray]()
    bos, last = tokenizer.special.bos, -1
    own = bool(pieces) and pieces[0].special and tokenizer.id(pieces[0].text) == bos
    if tokenizer.add_bos and not own and bos is not None:
        ids.append(np.array([bos], np.int64))
        weights.append(np.zeros(1, np.float32))
    written = False
    for special, group in groupby(pieces, key=lambda piece: piece.special):
        run = list(group)
        if special:
            for piece in run:
                number = tokenizer.id(piece.text)
                if number is None:
                    raise DataError(_("the template's token {token!r} is not in the vocabulary").format(token=piece.text))
                if not (number == bos == last):
                    ids.append(np.array([number], np.int64))
                    weights.append(np.array([piece.weight], np.float32))
                last = number
        elif text := "".join(piece.text for piece in run):
            found, spans = tokenizer.encode_spans(text, inside=written)
            ids.append(found)
            weights.append(_weights(run, spans))
            last = -1
        written = True
    empty = np.zeros(0)
    return np.concatenate([empty.astype(np.int64), *ids]), np.concatenate([empty.astype(np.float32), *weights])


def _weights(run: Sequence[Piece], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the greatest weight of the characters that each token stands for [n]."""
    by_character = np.concatenate([np.full(len(piece.text), piece.weight, np.float32) for piece in run]
                                  + [np.zeros(1, np.float32)])
    places = np.array(spans, np.int64).reshape(-1, 2).clip(0, len(by_character) - 1)
    found: np.ndarray = np.maximum.reduceat(by_character, places.ravel())[::2] if len(places) else by_character[:0]
    return found
