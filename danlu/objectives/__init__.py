"""What is learned: rows to batches, model output to sums and counts.  No model is imported here."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from danlu.objectives.answer import Answer
from danlu.objectives.choose import Choose
from danlu.objectives.classify import Classify, Regress
from danlu.objectives.embed import Embed
from danlu.objectives.lm import CausalLM, MaskedLM
from danlu.objectives.mixture import Mixture, Part, spell_out
from danlu.objectives.pairs import NextSentence, SentenceOrder
from danlu.objectives.protocol import Batch, Objective, Row
from danlu.objectives.tag import Tag
from danlu.objectives.tasks import Task, Tasks

Objectives = Annotated[
    Annotated[CausalLM | MaskedLM | NextSentence | SentenceOrder | Mixture | Classify | Regress | Tag | Answer | Choose |
              Embed | Tasks,
              Field(discriminator="kind")],
    BeforeValidator(spell_out),
]

__all__ = [
    "Answer", "Batch", "CausalLM", "Choose", "Classify", "Embed", "MaskedLM", "Mixture", "NextSentence", "Objective",
    "Objectives", "Part", "Regress", "Row", "SentenceOrder", "Tag", "Task", "Tasks",
]
