"""Decoding: many texts at once, of unequal length, joining and leaving at any step; drafts, beams, answers that obey a schema.

`rows` steps texts through a model, `batcher` does so in a thread of its own for those who ask, `prefix` remembers what prompts
begin with, `draft` and `beam` are other ways to the next token, `schema` forbids tokens that break a JSON schema.
"""

from __future__ import annotations

from danlu.decode.batcher import Batcher, Full, Patience, Ticket
from danlu.decode.pace import Pace, Work
from danlu.decode.sampling import Logprob, Sampling
from danlu.decode.spoken import Piece

__all__ = ["Batcher", "Full", "Logprob", "Pace", "Patience", "Piece", "Sampling", "Ticket", "Work"]
