"""`danlu chat run`: talk with a model in its own template; answers come as they are written.  Reads lines from a pipe, too."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from danlu import files, parallel
from danlu.data import chat
from danlu.data.example import Turn, Unusable
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError
from danlu.evaluate.subject import open_subject
from danlu.evaluate.written import template_of
from danlu.generate import Writer, endings, generate, text, writes
from danlu.log import say
from danlu.nn import paths
from danlu.words import _


def main(run: Path, *, system: str | None, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
         repetition_penalty: float, seed: int, as_json: bool) -> int:
    """Answer one line after another until /exit or the end of input."""
    device = parallel.start(threads=None, device="auto")
    subject = open_subject(run)
    model: Any = subject.model.to(device).eval()
    if not writes(model):
        raise ConfigError(_("this model does not write; give a decoder with a vocabulary"), where=str(run))
    model.use(paths.rule(device, next(model.parameters()).dtype, model.cfg.context, causal=True))
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty,
                "seed": seed}
    if max_new_tokens < 1:
        raise ConfigError(_("max_new_tokens must be at least 1"))
    talk = Talk(model, subject.tokenizer, template_of(subject), max_new_tokens, sampling, system or "")
    for line in said():
        if line.startswith("/"):
            if not obeyed(talk, line):
                return 0
        elif line.strip():
            _answer(talk, line, as_json=as_json)
    return 0


def said() -> Iterator[str]:
    """Yield what the user says, line by line: typed after a prompt, or from a pipe."""
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")        # type: ignore[union-attr]
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    say(_("/reset forgets all, /system TEXT tells the model who it is, /save FILE keeps the conversation, /exit ends it"))
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _answer(talk: Talk, line: str, *, as_json: bool) -> None:
    """Print what the model answers, as it comes; ^C ends an answer, not the conversation."""
    try:
        pieces = talk.answer(line)
        try:
            for piece in pieces:
                if not as_json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            talk.keep("interrupted")
    except Unusable as error:
        say(_("the template refuses this: {why}").format(why=error.detail))
        return
    if talk.last is None:
        return
    print(json.dumps(talk.last._asdict(), ensure_ascii=False) if as_json else "", flush=True)
    if not as_json and talk.last.finish_reason == "length":
        say(_("(the answer stopped after {n} tokens)").format(n=talk.last.completion_tokens))


def obeyed(talk: Talk, line: str) -> bool:
    """Do what a line with a slash asks for; return whether the conversation goes on."""
    command, _blank, rest = line.strip().partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        talk.turns.clear()
    elif command == "/system":
        talk.system = rest.strip()
    elif command == "/save" and rest.strip():
        try:
            talk.save(Path(rest.strip()))
        except OSError as error:
            say(_("it could not be saved: {why}").format(why=error))
    else:
        say(_("there are /reset, /system TEXT, /save FILE and /exit"))
    return True


class Answer(NamedTuple):
    """What the model said last, as JSON lines tell it."""

    role: str
    content: str
    finish_reason: str                                   # stop, length, interrupted
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Talk:
    """A conversation with a model: what was said so far, within its context."""

    model: Writer
    tokenizer: Tokenizer
    template: chat.Template
    most: int                                            # tokens of an answer
    sampling: dict[str, Any]
    system: str = ""
    turns: list[Turn] = field(default_factory=list)      # without the system's
    last: Answer | None = None
    new: list[int] = field(default_factory=list)         # ids of the answer that is being written
    written: str = ""
    prompt: int = 0

    @property
    def whole(self) -> list[Turn]:
        """The conversation with what the model is told before."""
        return [*([Turn("system", self.system)] if self.system else []), *self.turns]

    def ids(self) -> list[int]:
        """Return the conversation as ids, up to where the next answer begins.  Raises Unusable."""
        ids, _weights = chat.encode(chat.render(self.template, self.whole, generate=True), self.tokenizer)
        return ids.tolist()                              # type: ignore[no-any-return]

    @property
    def context(self) -> int:
        """The tokens of a conversation and its answer: those that an adapter puts before them have their place, too."""
        return int(self.model.cfg.context - self.model.ahead.room())

    def fitted(self) -> list[int]:
        """Return the ids after the oldest turns are dropped until an answer has room; [] if the last turn alone is too long."""
        context = self.context
        room, dropped, ids = min(self.most, max(1, context // 2)), 0, self.ids()
        while len(ids) + room > context and len(self.turns) > 1:
            del self.turns[:2 if len(self.turns) > 2 else 1]
            dropped, ids = dropped + 1, self.ids()
        if dropped and len(ids) < context:
            say(_("(the conversation has outgrown the context of {n} tokens; of the oldest exchanges {dropped} are dropped)")
                .format(n=context, dropped=dropped))
        return ids if len(ids) < context else []

    def answer(self, line: str) -> Iterator[str]:
        """Yield the answer to what the user says, as it is written, in whole characters.  Raises Unusable."""
        self.last, self.new, self.written = None, [], ""
        before, ids = list(self.turns), list[int]()
        self.turns.append(Turn("user", line))
        try:
            ids = self.fitted()
        finally:
            if not ids:
                self.turns = before
        if not ids:
            say(_("(this does not fit the model's context of {n} tokens)").format(n=self.context))
            return iter(())
        self.prompt = len(ids)
        return self._written(ids, min(self.most, self.context - len(ids)))

    def _written(self, ids: list[int], room: int) -> Iterator[str]:
        tokens = generate(self.model, ids, max_new_tokens=room, eos=endings(self.template, self.tokenizer), **self.sampling)
        for piece in text(self._kept(tokens), lambda part: self.tokenizer.decode(part, special=False)):
            self.written += piece
            yield piece
        self.keep("length" if len(self.new) == room else "stop")

    def _kept(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.new.append(token)
            yield token

    def keep(self, reason: str) -> None:
        """Take the answer, as far as it is written, into the conversation."""
        self.turns.append(Turn("assistant", self.written))
        self.last = Answer("assistant", self.written, reason, self.prompt, len(self.new))

    def save(self, path: Path) -> None:
        """Write the conversation as OpenAI messages: one more line of a .jsonl file, else a file of its own."""
        record = {"messages": [{"role": turn.role, "content": turn.content} for turn in self.whole]}
        if path.suffix == ".jsonl":
            files.append_line(path, record)
        else:
            files.write_json(path, record)
