"""How a run lies on devices: which part of the rows, of the model and of a row each process has.

world = dp × tp × pp × cp.  Ranks are counted with tp innermost, then cp, then dp, and pp outermost: what talks most is nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from danlu.config import Model
from danlu.words import _

WHOLE = ("muon", "adafactor", "lamb")                    # optimizers that look at a whole matrix, not at its elements


class Local(Model):
    """Replicas that step alone and are averaged now and then: DiLoCo (Douillard et al., 2023), for slow links.

    The successor of the parameter server.  The mean of what the replicas moved is the gradient of an outer step by
    SGD with Nesterov momentum; `lr: 1, momentum: 0` is plain averaging (local SGD; Stich, 2019).
    """

    steps: int = Field(ge=2, description="Steps that each replica takes alone between two averages.")
    lr: float = Field(0.7, gt=0, le=1, allow_inf_nan=False, description="Learning rate of the outer step.")
    momentum: float = Field(0.9, ge=0, lt=1, allow_inf_nan=False, description="Nesterov momentum of the outer step.")


class Layout(Model):
    """How many processes share the work, and along which axes."""

    dp: int = Field(1, ge=1, description="Data parallel: groups that the rows of a step are dealt to.")
    tp: int = Field(1, ge=1, description="Tensor parallel: processes that each matrix of a block is cut over.")
    pp: int = Field(1, ge=1, description="Pipeline parallel: stages that the blocks are cut into.")
    cp: int = Field(1, ge=1, description="Context parallel: processes that each row's tokens are cut over.")
    micro: int = Field(1, ge=1, description="Micro-batches that a step's rows are split into (gradient accumulation).")
    shard: Literal["none", "grads", "full", "hybrid"] = Field(
        "none", description="What dp and cp processes hold of the weights: none = copies (DDP); full = shards (FSDP2, ZeRO-3); "
        "grads = shards of gradients and optimizer, weights whole during a step (ZeRO-2); hybrid = shards in groups of "
        "`group`, copies across them (HSDP).")
    group: int | None = Field(None, ge=2, description="Processes of one group with shard=hybrid.")
    offload: bool = Field(False, description="Keep sharded weights and optimizer in host memory between uses.")
    sequence: bool = Field(False, description="Cut activations between blocks along the tokens over tp (sequence parallel).")
    pipeline: Literal["1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="Order of work in a pipeline; the last two give each process `chunks` stages.")
    chunks: int = Field(2, ge=2, description="Stages of one process with pipeline=interleaved or zero_bubble.")
    stages: tuple[int, ...] | None = Field(None, description="Blocks of each stage; empty: by cost.")
    local: Local | None = Field(None, description="Average the replicas only every so many steps (low communication).")

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def stage_count(self) -> int:
        """Number of pipeline stages, over all processes."""
        return self.pp if self.pipeline == "1f1b" or self.pp == 1 else self.pp * self.chunks

    @property
    def shards(self) -> int:
        """Number of processes that one copy of the weights is cut over by `shard`."""
        copies = self.dp * self.cp
        return {"none": 1, "hybrid": self.group or copies}.get(self.shard, copies)

    def check(self, rows: int, *, length: int | None = None, model: Mapping[str, Any] | None = None,
              optimizer: str | None = None) -> None:
        """Raise ValueError that names every setting that cannot be, with the choices that can.

        rows: of a step; model: the fields of its config, those that are known.
        """
        problems = [*self._of_rows(rows, length), *self._of_axes(), *self._of_pipeline(model or {}),
                    *self._of_tensors(model or {}, length), *self._of_optimizer(optimizer)]
        if problems:
            raise ValueError("; ".join(problems))

    def _of_rows(self, rows: int, length: int | None) -> list[str]:
        problems = []
        if rows % self.dp:
            problems.append(_divides("layout.dp", self.dp, "rows", rows))
        elif rows // self.dp % self.micro:
            name = "rows" if self.dp == 1 else "rows/dp"
            problems.append(_divides("layout.micro", self.micro, name, rows // self.dp))
        if self.cp > 1 and length is not None and length % (2 * self.cp):
            problems.append(_("layout.cp={cp} needs a length that 2·cp divides, for example {length}").format(
                cp=self.cp, length=_up(length, 2 * self.cp)))
        return problems

    def _of_axes(self) -> list[str]:
        problems, copies = [], self.dp * self.cp
        if self.shard != "none" and copies == 1:
            problems.append(_("layout.shard={shard} needs layout.dp or layout.cp above 1").format(shard=self.shard))
        if self.shard == "hybrid" and (self.group is None or copies % self.group or self.group == copies):
            problems.append(_("layout.shard=hybrid needs layout.group, one of {choices}").format(
                choices=[n for n in range(2, copies) if copies % n == 0] or "-"))
        if self.group is not None and self.shard != "hybrid":
            problems.append(_("layout.group is of use only with layout.shard=hybrid"))
        if self.offload and self.shard == "none":
            problems.append(_("layout.offload needs layout.shard=full, grads or hybrid"))
        if self.sequence and self.tp == 1:
            problems.append(_("layout.sequence needs layout.tp above 1"))
        if self.local is not None and (self.dp == 1 or self.shard != "none" or self.world != self.dp):
            problems.append(_("layout.local needs layout.dp above 1, layout.shard=none and no other axis"))
        return problems

    def _of_pipeline(self, model: Mapping[str, Any]) -> list[str]:
        if self.pp == 1:
            return [_("layout.stages needs layout.pp above 1")] if self.stages is not None else []
        problems, layers, count = [], model.get("layers"), self.stage_count
        if layers is not None and layers < count:
            problems.append(_("{count} stages need as many blocks, and model.layers={layers}; lower layout.pp or layout.chunks")
                            .format(count=count, layers=layers))
        if self.stages is not None and (len(self.stages) != count or min(self.stages) < 1
                                        or layers not in (None, sum(self.stages))):
            problems.append(_("layout.stages={stages} must be {count} numbers above 0 with the sum model.layers={layers}").format(
                stages=list(self.stages), count=count, layers=layers))
        if self.micro < self.pp or (self.pipeline != "1f1b" and self.micro % self.pp):
            choices = [self.pp * n for n in (1, 2, 4)]
            problems.append(_("a pipeline of {pp} needs as many micro-batches or more: set layout.micro to one of {choices}")
                            .format(pp=self.pp, choices=choices))
        return problems

    def _of_tensors(self, model: Mapping[str, Any], length: int | None) -> list[str]:
        if self.tp == 1:
            return []
        problems = [_divides("layout.tp", self.tp, f"model.{name}", model[name])
                    for name in ("heads", "kv_heads", "hidden", "vocab") if model.get(name) and model[name] % self.tp]
        if self.sequence and length is not None and length // self.cp % self.tp:
            problems.append(_divides("layout.tp", self.tp, "length" if self.cp == 1 else "length/cp", length // self.cp))
        return problems

    def _of_optimizer(self, optimizer: str | None) -> list[str]:
        if optimizer in WHOLE and (self.tp > 1 or self.shards > 1):
            return [_("optim.kind={kind} works on whole matrices, which this layout cuts; set layout.tp=1 and layout.shard=none, "
                      "or optim.kind=adamw").format(kind=optimizer)]
        return []


def _divides(key: str, value: int, name: str, whole: int) -> str:
    choices = [n for n in range(1, whole + 1) if whole % n == 0]
    shown = choices if len(choices) < 13 else [*choices[:12], "…"]
    if name not in ("rows", "model.vocab"):              # another number of heads, say, would be another model
        return _("{key}={value} does not divide {name}={whole}; use one of {choices}").format(
            key=key, value=value, name=name, whole=whole, choices=shown)
    return _("{key}={value} does not divide {name}={whole}; use one of {choices}, or {name}={near}").format(
        key=key, value=value, name=name, whole=whole, choices=shown, near=_up(whole, value))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
