"""Answers that obey a JSON schema: before each token, those that no valid answer could go on with are forbidden.

The grammar is llguidance's (extra `schema`).  V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError
from danlu.words import _

SPELT = {"whitespace_flexible": False}      # `{"a": 1, "b": 2}`, or a weak model could add blanks for ever


class Grammar:
    """What llguidance knows of a tokenizer; made once, because it reads the whole vocabulary."""

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[int]) -> None:
        self._library = _library()
        self._ends = sorted(ends)
        if not self._ends:
            raise ConfigError(_("an answer by a schema ends with a token of its own, and this tokenizer has none"))
        self._tokenizer = self._library.LLTokenizer(tokenizer.raw.to_str(), n_vocab=tokenizer.size, eos_token=self._ends)

    def start(self, schema: dict[str, Any]) -> Matcher:
        """Return what watches over one answer.  Raises ConfigError for a schema that is wrong or asks for too much."""
        grammar = self._library.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=SPELT)
        wrong, messages = self._library.LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if wrong:
            raise ConfigError(_("this JSON schema cannot be obeyed: {why}").format(why=" ".join(messages)[:500]), where="schema")
        return Matcher(self._library.LLMatcher(self._tokenizer, grammar), frozenset(self._ends))


class Matcher:
    """How far one answer is on its way through a grammar."""

    def __init__(self, matcher: Any, ends: frozenset[int]) -> None:
        self._matcher, self._ends = matcher, ends

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits [V] with all that may not come next at -inf."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        allowed = np.pad(allowed, (0, len(logits) - len(allowed)))          # a table may be wider than the vocabulary
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on by a token."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing more can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(_("this JSON schema cannot be obeyed: {why}").format(why=self._matcher.get_error()), where="schema")


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(_("answers that obey a JSON schema need llguidance"), fix='pip install "danlu[schema]"') from None
    return llguidance
