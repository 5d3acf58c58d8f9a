"""When memory runs out in a step: the same rows in smaller micro-batches.

Nothing is lost: the sums of a step are divided once, by the count of all its rows, so that its gradient does not depend on how
the rows are cut up; only dropout draws other numbers.
"""

from __future__ import annotations

import gc
from contextlib import suppress

import torch
from torch import Tensor

from danlu.errors import OutOfMemory, ResourceError, short_of_memory
from danlu.log import say
from danlu.objectives.embed import Embed
from danlu.objectives.protocol import Batch
from danlu.train.step import Engine
from danlu.words import _


def fit_in(engine: Engine, batch: Batch, *, step: int, rows: tuple[str, ...] = ()) -> Tensor:
    """Return what `engine.forward_backward` does, in as many more micro-batches as memory asks for.

    rows: further settings that whoever starts again with another layout.micro must give.  Raises OutOfMemory where processes
    of several ranks must all start again, ResourceError where a single row does not fit.
    """
    while True:
        try:
            return engine.forward_backward(batch, step=step)
        except (RuntimeError, MemoryError) as error:
            if not short_of_memory(error):
                raise
            why = (str(error).splitlines() or [""])[0]
        # out here the error is gone, and with it the frames that hold tensors
        many = finer(len(batch["ids"]), engine.micro)
        if many is None or (isinstance(engine.objective, Embed) and engine.objective.across):
            raise ResourceError(_("memory ran out in step {step}, and its micro-batches cannot become smaller: {why}").format(
                step=step + 1, why=why), fix=_("set recompute=full, adapt=lora or a smaller length; see `danlu plan`"))
        if engine.world.size > 1:
            raise OutOfMemory(_("memory ran out in step {step}: {why}").format(step=step + 1, why=why),
                              settings=(f"layout.micro={many}", *rows))
        _clear(engine)
        say(_("memory ran out in step {step}: from now on {n} micro-batches of {rows} rows instead of {before} of {more}, "
              "the same {all} rows a step").format(step=step + 1, n=many, rows=len(batch["ids"]) // many, before=engine.micro,
                                                   more=len(batch["ids"]) // engine.micro, all=len(batch["ids"])))
        engine.micro = many


def finer(rows: int, micro: int) -> int | None:
    """Return the next number of equal micro-batches: twice as many where that divides `rows`.  None: each is one row."""
    return next((n for n in (2 * micro, *range(micro + 1, rows + 1)) if n <= rows and rows % n == 0), None)


def _clear(engine: Engine) -> None:
    for leaf in engine.leaves:
        leaf.param.grad = leaf.local.grad = None
    gc.collect()
    with suppress(RuntimeError):
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
