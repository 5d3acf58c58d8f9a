"""What parity asks of an artefact, in whatever runtime.

T tokens of a row, K classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np


class Said(NamedTuple):
    """What an artefact says of one row."""

    ids: list[int]
    logits: np.ndarray                           # [T, V] of a language model, or [K], [T, K] … of a task; float64


class Artefact(Protocol):
    """A model that can be asked, in whatever runtime."""

    name: str                                    # what it is, as people read it
    kind: str                                    # danlu, hf, peft, merged, onnx, gguf, torch-export, quantized …

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return what is said of one row without padding, float64."""

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of `text` without special ones; None: no tokenizer of its own."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return a conversation with the header of the next answer, by its own chat template; None: it has none."""

    def ends(self) -> frozenset[int] | None:
        """Return the ids that stop it; None: it does not write, or does not say."""


@runtime_checkable
class Reads(Protocol):
    """An artefact that turns ids into text again."""

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of ids; None: no tokenizer of its own."""


@runtime_checkable
class Names(Protocol):
    """An artefact that names its classes."""

    def labels(self) -> tuple[str, ...] | None:
        """Return the names of the classes in the order of their numbers; None: it has no classes."""


Says = Literal["classes", "places", "vector"]    # scores of classes or tokens [.., K]; of places [T, 2]; numbers [.., D]


@runtime_checkable
class Tells(Protocol):
    """An artefact that knows what its numbers are."""

    def says(self) -> Says:
        """Return it.  Only of scores there is a distribution and a likeliest; an answer's are over the T places of a row."""


@runtime_checkable
class Heads(Protocol):
    """An artefact that may have several heads, of which one is asked."""

    def heads(self) -> tuple[str, ...]:
        """Return their names; () of one head or none."""

    def ask(self, head: str) -> None:
        """Let `logits` say what this head says."""
