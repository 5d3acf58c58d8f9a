"""How a run lies on devices."""

from __future__ import annotations

from pydantic import Field, model_validator

from danlu.config import Model
from danlu.words import _


class Layout(Model):
    """One process on one device, for now: only `micro` is open.  Other axes are refused rather than ignored."""

    dp: int = Field(1, ge=1, description="Data-parallel copies.")
    micro: int = Field(1, ge=1, description="Micro-batches that a step's rows are split into (gradient accumulation).")

    @model_validator(mode="after")
    def _one_process(self) -> Layout:
        if self.dp != 1:
            raise ValueError(_("layout.dp={dp}: this version trains in one process; set layout.dp=1").format(dp=self.dp))
        return self

    def check(self, rows: int) -> None:
        """Raise ValueError unless `rows` rows split evenly into the micro-batches."""
        if rows % self.micro:
            choices = [n for n in range(1, rows + 1) if rows % n == 0]
            raise ValueError(
                _("layout.micro={micro} does not divide rows={rows}; use one of {choices}").format(
                    micro=self.micro, rows=rows, choices=choices)
            )
