"""Answers by a schema are JSON that another library accepts, whatever a random model would rather say."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from tiny import prompts, tiny, tokenizer

from danlu.decode import Batcher, Sampling
from danlu.errors import ConfigError

PERSON = {"type": "object", "additionalProperties": False, "required": ["name", "age", "kind"], "properties": {
    "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "kind": {"enum": ["cat", "狗"]}}}
LISTED = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}
ONE = {"anyOf": [{"const": 7}, {"type": "null"}, {"type": "object", "additionalProperties": False, "properties": {}}]}


@pytest.mark.parametrize("schema", [PERSON, LISTED, ONE])
def test_every_answer_parses_and_is_valid(schema: dict[str, Any]) -> None:
    model = tiny("gpt2")
    with Batcher(model, tokenizer(), slots=4, queue=20) as batcher:
        tickets = [batcher.submit([1, 2], Sampling(max_new_tokens=90, temperature=t, seed=seed, form=schema))
                   for seed, t in enumerate([0, 0.5, 1.0, 2.0, 5.0, 1.0, 1.0, 1.0])]
        beside = batcher.submit([1, 2], Sampling(max_new_tokens=20, temperature=0))
        answers = [list(ticket) for ticket in tickets]
        free = [i for piece in beside for i in piece.ids]
        again = [i for piece in batcher.submit([1, 2], Sampling(max_new_tokens=20, temperature=0)) for i in piece.ids]
    assert free == again                                        # who stands beside them is not bound by it
    for pieces in answers:
        assert pieces[-1].finish == "stop"
        jsonschema_rs.validate(schema, json.loads("".join(piece.text for piece in pieces)))


def test_a_schema_that_makes_no_sense_is_its_own_trouble_alone() -> None:
    with Batcher(tiny("gpt2"), tokenizer(), slots=2, queue=2) as batcher:
        wrong = batcher.submit([1], Sampling(max_new_tokens=9, form={"type": "no such type"}))
        right = batcher.submit(prompts(1)[0], Sampling(max_new_tokens=9, temperature=0))
        with pytest.raises(ConfigError, match="schema"):
            list(wrong)
        assert list(right)[-1].finish in ("stop", "length")
