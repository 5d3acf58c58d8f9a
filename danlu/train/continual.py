"""The section `continual` of a recipe: how a model that goes on learning keeps what it can do."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from danlu.config import Model
from danlu.train.sources import Sources


class Replay(Model):
    """Rows of what the model has learned before, mixed into those of `data`."""

    data: Sources = Field(min_length=1, description="Old data, by weight.")
    share: float = Field(0.1, gt=0, lt=1, allow_inf_nan=False, description="Share of all rows that are old ones.")


class EWC(Model):
    """Elastic weight consolidation (Kirkpatrick et al., 2017): strength/2 · Σ F (θ - θ₀)², F the diagonal Fisher information."""

    data: Sources = Field((), description="Old data that F is estimated on; empty: that of replay.")
    strength: float = Field(1000.0, gt=0, allow_inf_nan=False, description="λ of the paper.")
    rows: int = Field(256, ge=1, description="Rows that F is estimated on.")


class L2SP(Model):
    """L2-SP (Li et al., 2018): alpha/2 · |θ - θ₀|² for weights of the start model, beta/2 · |θ|² for new ones."""

    alpha: float = Field(0.1, ge=0, allow_inf_nan=False, description="Pull towards the weights of the start model.")
    beta: float = Field(0.01, ge=0, allow_inf_nan=False, description="Pull of weights that it lacks towards 0.")


class Distil(Model):
    """What the start model says is kept: KL from it, of heads it had (Li and Hoiem, 2016), and of text on replayed rows."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Weight in the loss.")
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False, description="What logits are divided by before they are compared.")
    top: int = Field(32, ge=1, description="Of a text: how many of the likeliest tokens are compared one by one; all others "
                     "together, which needs no logits of a whole vocabulary.")


class Teach(Model):
    """What models under `frozen` say is learned beside the data: (1 - weight) · the objective's loss + weight · KL from them.

    Hinton et al., 2015; of several teachers the mean.  What they hold inside comes on top.
    """

    weight: float = Field(0.5, gt=0, le=1, allow_inf_nan=False, description="Share of what the teachers say in the loss.")
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False, description="What logits are divided by before they are compared.")
    top: int = Field(32, ge=1, description="Of a text: how many of a teacher's likeliest tokens are compared one by one; all "
                     "others together, which needs no logits of a whole vocabulary.")
    hidden: float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight of the states of blocks, which are compared with "
                          "those of a teacher's block, evenly spread (TinyBERT; Jiao et al., 2019).")
    like: Literal["mse", "cosine"] = Field("mse", description="How states are compared: by the mean squared difference over "
                                           "their width, or by 1 - cosine.")
    relations: float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight of how tokens relate to one another, in "
                             "queries, keys and values of the last block (MiniLMv2; Wang et al., 2021).")
    relation_heads: int | None = Field(None, gt=0, description="Parts of their width that are related each by itself; empty: as "
                                       "many as the student has heads.")


class Average(Model):
    """The weights that the run ends with are averaged; they stand in `averaged`, and are what is used then."""

    start: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False, description="Share of the start model's weights (WiSE-FT; "
                         "Wortsman et al., 2022).")
    last: int = Field(1, ge=1, description="How many of the last checkpoints are averaged before.")


class Continual(Model):
    """How a model that goes on learning keeps what it can do, and a look at what it forgot."""

    replay: Replay | None = None
    ewc: EWC | None = None
    l2sp: L2SP | None = None
    distil: Distil | None = None
    average: Average | None = None
    old: Sources = Field((), description="Evaluation data of what was learned before, measured before and after; by default "
                         "the held-out part of replay.data.")
