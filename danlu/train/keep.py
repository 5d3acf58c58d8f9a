"""How a run keeps what its start model knows: an engine with penalties, and with a frozen copy that it is distilled from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from danlu import chance
from danlu.data.stream import Mixed
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.models.decoder import Decoder
from danlu.nn.tasks import Head
from danlu.objectives.distil import Distilled
from danlu.objectives.protocol import Batch
from danlu.parallel import autocast
from danlu.parallel.place import Leaf, place
from danlu.train.continual import EWC, L2SP, Continual, Distil
from danlu.train.feed import Steps, stream
from danlu.train.penalty import Pull, fisher
from danlu.train.recipe import Run
from danlu.train.step import Engine
from danlu.words import _

if TYPE_CHECKING:
    from danlu.train.setup import Data


def keeping(run: Run, continual: Continual, data: Data, plain: Engine) -> Engine:
    """Return the engine that trains, of `plain`, whose model has the weights to start from.

    All that it keeps is made from those weights, the recipe and the old data, so that a resumed run makes the same again.
    """
    penalties = []
    if continual.l2sp is not None:
        penalties.append(_l2sp(continual.l2sp, plain))
    if continual.ewc is not None:
        penalties.append(_ewc(run, continual.ewc, data, plain))
    objective, frozen = plain.objective, None
    if continual.distil is not None:
        objective, frozen = _distilled(run, continual.distil, data, plain)
    return Engine(plain.placed, objective, precision=run.precision, clip=run.clip, seed=run.seed, penalties=penalties,
                  frozen=frozen)


def _l2sp(given: L2SP, plain: Engine) -> Pull:
    fresh = plain.placed.fresh
    return Pull(plain.leaves, lambda leaf: given.beta if leaf.name in fresh else given.alpha,
                towards=lambda leaf: leaf.name not in fresh)


def _ewc(run: Run, given: EWC, data: Data, plain: Engine) -> Pull:
    """Return the penalty of EWC; weights that the start model lacked are free."""
    engine = Engine(plain.placed, run.objective, precision=run.precision, clip=None, seed=run.seed)
    engine.scaler = None                                 # gradients are squared as they are
    found = {leaf.name: total for leaf, total in zip(engine.leaves, fisher(engine, _old_rows(run, given, data)), strict=True)}

    def weight(leaf: Leaf) -> Tensor | float:
        return 0.0 if leaf.name in plain.placed.fresh else found[leaf.name] * given.strength

    return Pull(plain.leaves, weight)


def _old_rows(run: Run, given: EWC, data: Data) -> Iterator[Batch]:
    """Yield batches in which one row of the old data counts; as many rows stand there as the layout needs."""
    streams = [stream(shards, run.objective, task=task, length=run.length, overlong=run.overlong, pack=run.pack,
                      seed=chance.torch_seed(run.seed, "fisher", (i,))) for i, (shards, task, _weight) in enumerate(data.fisher)]
    rows = Mixed(streams, [weight for _shards, _task, weight in data.fisher], seed=run.seed)
    size = run.layout.micro * (run.part_rows if run.layout.pp > 1 else 1)
    steps = Steps(rows, run.objective, data.tokenizer.special, per_step=size, length=run.length, seed=run.seed,
                  position=rows.begin(), fill=True, tight=run.tight)
    for plan, _after in islice(rows.plans(rows.begin()), min(given.rows, rows.rows(0))):
        yield steps.batch([plan])


def _distilled(run: Run, given: Distil, data: Data, plain: Engine) -> tuple[Distilled, dict[str, Callable[[Batch], Any]]]:
    """Return the objective with its divergences, and what asks the start model."""
    assert run.start is not None, "checked with the recipe"
    there, objective = weights.read_config(run.start), run.objective
    kept = tuple(head for head in there.tasks if head.kind == "classify" and head in objective.tasks())
    outputs = (("lm",) if there.lm else ()) if isinstance(there, Decoder) else there.outputs or ()
    text = next((name for name in outputs if name in ("lm", "mlm") and name in objective.heads and data.replayed), "")
    if not (kept or text):
        named = {head.name for head in objective.tasks()}
        raise ConfigError(_("there is nothing to distil: the start model has the heads {there}, and this run {here}").format(
            there=", ".join([*outputs, *map(_shown, there.tasks)]) or "-",
            here=", ".join([*(name for name in objective.heads if name not in named), *map(_shown, objective.tasks())])),
            where="continual.distil", fix=_("text is distilled on replayed rows: name some under continual.replay"))
    cfg = there.with_heads([*(head.name for head in kept), *([text] if text else [])])
    world = plain.world
    frozen = place(cfg, world, objective, precision=run.precision, length=run.length, rows=run.part_rows)
    weights.fill(dict(frozen.named_parameters()), cfg, run.start)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    frozen.eval()

    def say(batch: Batch) -> Any:
        with autocast(run.precision, world.device):
            return frozen.call(**{name: batch[name] for name in objective.inputs if name in batch})

    made = Distilled(objective, kept, text, len(run.data), given.weight, given.temperature)
    return made, {"start": say}


def _shown(head: Head) -> str:
    """Return a head's name with its classes, which must be the same to be compared."""
    return f"{head.name} ({', '.join(head.labels)})" if head.labels else head.name
