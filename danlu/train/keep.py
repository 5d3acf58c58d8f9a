"""How a run keeps what its start model knows, or learns from teachers: an engine with penalties and with frozen models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from danlu import chance
from danlu.adapt import folder as adapters
from danlu.data.stream import Mixed
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, IncompatibleError
from danlu.models import weights
from danlu.models.decoder import Decoder
from danlu.nn.tasks import Head
from danlu.objectives.distil import Distilled
from danlu.objectives.protocol import Batch
from danlu.parallel import autocast
from danlu.parallel.place import Leaf, place
from danlu.train import checkpoint
from danlu.train.continual import EWC, L2SP, Continual, Distil, Teach
from danlu.train.feed import Steps, stream
from danlu.train.penalty import Pull, fisher
from danlu.train.recipe import Run
from danlu.train.step import Engine
from danlu.words import _

if TYPE_CHECKING:
    from danlu.train.setup import Data


def keeping(run: Run, data: Data, plain: Engine) -> Engine:
    """Return the engine that trains, of `plain`, whose model has the weights to start from; `plain` itself if nothing is kept.

    All that it keeps is made from those weights, the recipe and the old data, so that a resumed run makes the same again.
    """
    continual, penalties = run.continual or Continual(), []
    if continual.l2sp is not None:
        penalties.append(_l2sp(continual.l2sp, plain))
    if continual.ewc is not None:
        penalties.append(_ewc(run, continual.ewc, data, plain))
    objective, frozen = plain.objective, None
    if continual.distil is not None:
        objective, frozen = _distilled(run, continual.distil, data, plain)
    if run.frozen:
        objective, frozen = _taught(run, run.distil or Teach(), data, plain)
    if not penalties and frozen is None:
        return plain
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


Ask = Callable[[Batch, int], Any]                        # what a frozen model says of a batch, and how many ids of a text


def _distilled(run: Run, given: Distil, data: Data, plain: Engine) -> tuple[Distilled, dict[str, Ask]]:
    """Return the objective with its divergences, and what asks the start model."""
    assert run.start is not None, "checked with the recipe"
    kept, text, shown = _shared(run, run.start)
    text = text if data.replayed else ""
    if not (kept or text):
        raise ConfigError(_("there is nothing to distil: the start model has the heads {there}, and this run {here}").format(
            there=shown[0], here=shown[1]), where="continual.distil",
            fix=_("text is distilled on replayed rows: name some under continual.replay"))
    made = Distilled(run.objective, kept, text, len(run.data), given.weight, given.temperature, given.top)
    return made, {"start": _asked(run, run.start, made, plain)}


def _taught(run: Run, given: Teach, data: Data, plain: Engine) -> tuple[Distilled, dict[str, Ask]]:
    """Return the objective with its divergences from the teachers, and what asks them."""
    folders = {name: checkpoint.chosen(Path(folder)) for name, folder in run.frozen.items()}
    shared = {name: _shared(run, folder) for name, folder in folders.items()}
    kept, text, _shows = next(iter(shared.values()))
    for name, (heads, words, shown) in shared.items():
        where = f"frozen.{name}={run.frozen[name]}"
        if not (heads or words):
            raise ConfigError(_("there is nothing to distil: the teacher has the heads {there}, and this run {here}").format(
                there=shown[0], here=shown[1]), where=where,
                fix=_("a teacher of classes, scores or tags has a head of the same name and labels; of text, a vocabulary"))
        if (heads, words) != (kept, text):
            raise ConfigError(_("the teachers do not share the same heads"), where=where)
        if Tokenizer.load(adapters.tokenizer_in(folders[name])).sha256 != data.tokenizer.sha256:
            raise IncompatibleError(_("the teacher has another tokenizer than the run"), where=where,
                                    fix=_("prepare the data with the teacher's tokenizer, for example tokenizer={folder}").format(
                                        folder=folders[name]))
    made = Distilled(run.objective, kept, text, 0, given.weight, given.temperature, given.top, learn=1 - given.weight)
    return made, {name: _asked(run, folder, made, plain) for name, folder in folders.items()}


def _shared(run: Run, folder: Path) -> tuple[tuple[Head, ...], str, tuple[str, str]]:
    """Return which heads of classes a frozen model shares with the run, and which of text; and all heads of both, as shown."""
    there, objective = weights.read_config(folder), run.objective
    kept = tuple(head for head in there.tasks if head.kind in ("classify", "tag") and head in objective.tasks())
    outputs = (("lm",) if there.lm else ()) if isinstance(there, Decoder) else there.outputs or ()
    text = next((name for name in outputs if name in ("lm", "mlm") and name in objective.heads), "")
    named = {head.name for head in objective.tasks()}
    return kept, text, (", ".join([*outputs, *map(_shown, there.tasks)]) or "-", ", ".join(
        [*(name for name in objective.heads if name not in named), *map(_shown, objective.tasks())]))


def _asked(run: Run, folder: Path, objective: Distilled, plain: Engine) -> Ask:
    """Return what asks a frozen model, which is cut over the processes as the one that learns is."""
    cfg = weights.read_config(folder).with_heads([*(head.name for head in objective.kept), *filter(None, [objective.text])])
    world = plain.world
    frozen = place(cfg, world, run.objective, precision=run.precision, length=run.length, rows=run.part_rows)
    weights.fill(dict(frozen.named_parameters()), cfg, folder)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    frozen.eval()
    inputs = tuple(name for name in objective.inputs if name != "candidates")

    def say(batch: Batch, most: int) -> Any:
        with autocast(run.precision, world.device):
            return frozen.call(**{name: batch[name] for name in inputs if name in batch}, **({"most": most} if most else {}))

    return say


def _shown(head: Head) -> str:
    """Return a head's name with its classes, which must be the same to be compared."""
    return f"{head.name} ({', '.join(head.labels)})" if head.labels else head.name
