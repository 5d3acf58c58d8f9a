"""How a run lies on devices."""

from __future__ import annotations

from pydantic import Field

from danlu.config import Model
from danlu.words import _


class Layout(Model):
    """One process on one device; more axes come with the engine that can carry them."""

    micro: int = Field(1, ge=1, description="Micro-batches that a step's rows are split into (gradient accumulation).")

    def check(self, rows: int) -> None:
        """Raise ValueError unless `rows` rows split evenly into the micro-batches."""
        if rows % self.micro:
            choices = [n for n in range(1, rows + 1) if rows % n == 0]
            raise ValueError(
                _("layout.micro={micro} does not divide rows={rows}; use one of {choices}").format(
                    micro=self.micro, rows=rows, choices=choices)
            )
