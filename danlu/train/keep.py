"""How a run keeps what its start model knows, or learns from teachers: an engine with penalties and with frozen models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from danlu import chance
from danlu.adapt import folder as adapters
from danlu.data.stream import Mixed
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, IncompatibleError
from danlu.models import formed, weights
from danlu.models.build import Config
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.models.foreign_config import Foreign
from danlu.nn.tasks import Head
from danlu.objectives.distil import Distilled
from danlu.objectives.inside import Inside, uniform
from danlu.objectives.protocol import Batch
from danlu.parallel import World, autocast
from danlu.parallel.place import Leaf, place
from danlu.train import checkpoint
from danlu.train.continual import EWC, L2SP, Continual, Distil, Teach
from danlu.train.feed import Steps, stream
from danlu.train.penalty import Pull, fisher
from danlu.train.probes import Probes
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
    objective, frozen, probes = plain.objective, None, None
    if continual.distil is not None:
        objective, frozen = _distilled(run, continual.distil, data, plain)
    if run.frozen:
        objective, frozen = _taught(run, run.distil or Teach(), data, plain)
        probes = _probes(run, objective.inside, plain.world)
    if not penalties and frozen is None:
        return plain
    return Engine(plain.placed, objective, precision=run.precision, clip=run.clip, seed=run.seed, penalties=penalties,
                  frozen=frozen, probes=probes)


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
    return made, {"start": _asked(run, run.start, made, plain)} if asks(plain) else {}


def _taught(run: Run, given: Teach, data: Data, plain: Engine) -> tuple[Distilled, dict[str, Ask]]:
    """Return the objective with its divergences from the teachers, and what asks them."""
    folders = {name: checkpoint.chosen(Path(folder)) for name, folder in run.frozen.items()}
    shared = {name: _shared(run, folder) for name, folder in folders.items()}
    kept, text, _shows = next(iter(shared.values()))
    for name, (heads, words, shown) in shared.items():
        where = f"frozen.{name}={run.frozen[name]}"
        if not (heads or words or given.hidden or given.relations):
            raise ConfigError(_("there is nothing to distil: the teacher has the heads {there}, and this run {here}").format(
                there=shown[0], here=shown[1]), where=where,
                fix=_("a teacher of classes, scores or tags has a head of the same name and labels; of text, a vocabulary"))
        if (heads, words) != (kept, text):
            raise ConfigError(_("the teachers do not share the same heads"), where=where)
        if Tokenizer.load(adapters.tokenizer_in(folders[name])).sha256 != data.tokenizer.sha256:
            raise IncompatibleError(_("the teacher has another tokenizer than the run"), where=where,
                                    fix=_("prepare the data with the teacher's tokenizer, for example tokenizer={folder}").format(
                                        folder=folders[name]))
    inside = _inside(run, given, [weights.read_config(folder) for folder in folders.values()])
    made = Distilled(run.objective, kept, text, 0, given.weight, given.temperature, given.top, learn=1 - given.weight,
                     inside=inside)
    if inside is not None:
        _open(plain.placed.whole, range(run.network.layers), inside)
    asked = {name: _asked(run, folder, made, plain, i) for i, (name, folder) in enumerate(folders.items()) if asks(plain)}
    return made, asked


def asks(plain: Engine) -> bool:
    """Return whether this process asks frozen models: in a pipeline those of the last stage do, where they are listened to."""
    return plain.placed.pipe is None or plain.placed.pipe.last


def _inside(run: Run, given: Teach, teachers: Sequence[Config]) -> Inside | None:
    """Return what of the teachers' inside is learned.  Raises ConfigError for models that cannot be compared so."""
    if not (given.hidden or given.relations):
        return None
    own = run.network
    if foreign := [cfg.family for cfg in (own, *teachers) if isinstance(cfg, Foreign)]:
        raise ConfigError(_("{family} is a model of transformers: what its parts are is not known here").format(
            family=foreign[0]), where="distil", fix=_("leave distil.hidden and distil.relations out"))
    assert isinstance(own, Decoder | Encoder)
    heads = given.relation_heads or own.heads
    for cfg in (own, *teachers) if given.relations else ():
        assert isinstance(cfg, Decoder | Encoder)
        for wide in {width_of(cfg, "heads"), width_of(cfg, "kv_heads")}:
            if wide % heads:
                raise ConfigError(_("distil.relation_heads={heads} does not divide {width}, the width of all heads of a "
                                    "model").format(heads=heads, width=wide), where="distil.relation_heads",
                                  fix=_("choose a number that divides all of them"))
    return Inside(tuple(uniform(own.layers, cfg.layers) for cfg in teachers), given.hidden, given.like, given.relations,
                  heads=heads, causal=own.causal)


def _open(model: Any, blocks: Collection[int], inside: Inside) -> None:
    model.taps.open(model, blocks if inside.hidden else (), last=bool(inside.relations))


def width_of(cfg: Decoder | Encoder, heads: str) -> int:
    """Return the width of all heads of queries (heads), or of keys and values (kv_heads), together."""
    return getattr(cfg, heads) * cfg.head_width if isinstance(cfg, Decoder) else cfg.width     # type: ignore[no-any-return]


def _probes(run: Run, inside: Inside | None, world: World) -> Probes | None:
    """Return what makes the student's states as wide as those of wider or narrower teachers; None where none is needed."""
    if inside is None or not inside.hidden:
        return None
    own = run.network.width
    wide = [weights.read_config(checkpoint.chosen(Path(folder))).width for folder in run.frozen.values()]
    others = {number: width for number, width in enumerate(wide) if width != own}
    return Probes(own, others, world, seed=run.seed) if others else None


def _shared(run: Run, folder: Path) -> tuple[tuple[Head, ...], str, tuple[str, str]]:
    """Return which heads of classes a frozen model shares with the run, and which of text; and all heads of both, as shown."""
    there, objective = weights.read_config(folder), run.objective
    kept = tuple(head for head in there.tasks if head.kind in ("classify", "tag") and head in objective.tasks())
    outputs = (("lm",) if there.lm else ()) if isinstance(there, Decoder) else there.outputs or ()
    text = next((name for name in outputs if name in ("lm", "mlm") and name in objective.heads), "")
    named = {head.name for head in objective.tasks()}
    return kept, text, (", ".join([*outputs, *map(_shown, there.tasks)]) or "-", ", ".join(
        [*(name for name in objective.heads if name not in named), *map(_shown, objective.tasks())]))


def _asked(run: Run, folder: Path, objective: Distilled, plain: Engine, number: int = 0) -> Ask:
    """Return what asks a frozen model, which is cut over the processes as the one that learns is; but in a pipeline the last
    stage has all of its blocks, and asks it alone.
    """
    cfg = weights.read_config(folder).with_heads([*(head.name for head in objective.kept), *filter(None, [objective.text])])
    world = plain.world
    if world.layout.pp > 1:
        world = replace(world, layout=world.layout.model_copy(update={"pp": 1, "micro": 1, "stages": None, "pipeline": "1f1b"}))
    frozen = place(cfg, world, run.objective, precision=run.precision, length=run.length, rows=run.part_rows,
                   table=formed.table_of(folder))
    formed.fill(dict(frozen.named_parameters()), cfg, folder)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    frozen.eval()
    if objective.inside is not None:
        _open(frozen.whole, objective.inside.maps[number], objective.inside)
    inputs = tuple(name for name in objective.inputs if name != "candidates")

    def say(batch: Batch, most: int) -> Any:
        with autocast(run.precision, world.device):
            return frozen.call(**{name: batch[name] for name in inputs if name in batch}, **({"most": most} if most else {}))

    return say


def _shown(head: Head) -> str:
    """Return a head's name with its classes, which must be the same to be compared."""
    return f"{head.name} ({', '.join(head.labels)})" if head.labels else head.name
