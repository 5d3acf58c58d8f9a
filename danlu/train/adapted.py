"""What a run with an adapter does otherwise: the adapter settled, filled in, stored, and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from danlu.adapt import Adapter, folder
from danlu.adapt.freeze import Freeze
from danlu.adapt.lora import LoRA
from danlu.adapt.qat import QAT
from danlu.adapt.quantize import pack_all, require
from danlu.adapt.targets import kept
from danlu.adapt.unpack import same
from danlu.errors import ConfigError, IncompatibleError
from danlu.models import formed, weights
from danlu.models.build import Config
from danlu.nn.forms import Table
from danlu.optim.groups import depth_factor, rescale
from danlu.parallel.place import Placed
from danlu.train.recipe import Run
from danlu.words import _


def settle(run: Run, start: Path) -> Adapter:
    """Return the adapter of a settled run on the base in `start`.

    It is that of `adapt.start` where there is one.  What the base lacks (a pooler) is trained in full, and saved.  Raises
    ConfigError for what cannot be.
    """
    assert run.adapt is not None and not isinstance(run.adapt, QAT)
    if first_device(run) is not None:
        require()
    adapt: Any = _continued(run.adapt, start)
    lacking = {name.rpartition(".")[0] for name in weights.lacking(run.network, start) if not name.startswith("heads.")}
    if lacking:
        adapt = adapt.model_copy(update={"modules_to_save": tuple(dict.fromkeys((*adapt.modules_to_save, *sorted(lacking))))})
    problems = adapt.check(run.layout, length=run.length, context=run.network.context, pack=run.packed)
    if problems:
        raise ConfigError("; ".join(problems), where="adapt")
    return adapt


def refuse(start: Path) -> None:
    """Raise ConfigError if what a run is to start from is an adapter and not a model."""
    if folder.is_adapter(start):
        raise ConfigError(_("start is an adapter; give its base as start, and it as adapt.start"), where=str(start),
                          fix=_("or merge it first: danlu merge {folder}").format(folder=start))


def _continued(adapt: Adapter, base: Path) -> Adapter:
    """Return the adapter with what its `start` says of its make."""
    begun = adapt.model_dump().get("start")
    if begun is None:
        return adapt
    found = folder.describe(begun, base=base).adapt
    given = adapt.model_dump(include=adapt.model_fields_set)
    if found.kind != adapt.kind:
        raise ConfigError(_("adapt.start holds the adapter {found}, and adapt.kind is {kind}").format(
            found=found.kind, kind=adapt.kind), where=str(begun))
    made = type(adapt).model_validate(found.model_dump() | given)
    if not same(made, found):
        raise ConfigError(_("adapt.start holds an adapter of another make; leave out what differs"), where=str(begun))
    return made


def apart(run: Run) -> bool:
    """Return whether checkpoints hold an adapter alone, its base being elsewhere, and not the whole model."""
    return run.adapt is not None and not isinstance(run.adapt, QAT)


def first_device(run: Run) -> str | None:
    """Return where a model is placed at first: "meta" if its base is packed, so that it never lies anywhere in full."""
    return "meta" if isinstance(run.adapt, LoRA) and run.adapt.base is not None else None


def pack_base(run: Run, model: Placed) -> None:
    """Pack the base's matrices where the recipe says so, and give the rest of `model` memory."""
    if not isinstance(run.adapt, LoRA) or run.adapt.base is None or run.start is None:
        return
    state = weights.from_hf(run.network, weights.read_tensors(run.start), where=str(run.start), fresh=lambda name: True,
                            heads=False)
    for part in model.parts:
        pack_all(part, state, run.adapt.base, model.world.device)
        part.to_empty(device=model.world.device)


def begin(run: Run, model: Placed) -> None:
    """Fill in the adapter, the base's weights being there: as new ones begin, or as `adapt.start` has it."""
    assert run.adapt is not None and run.start is not None
    for part in model.parts:
        run.adapt.begin(part, run.seed)
    begun = run.adapt.model_dump().get("start")
    if begun is not None:
        stored = folder.tensors(folder.describe(begun, base=run.start))
        held = dict(model.named_parameters())
        folder.put({name: held[name] for name in kept(model, run.network) if name in stored}, stored, where=str(begun))


def table_of(run: Run) -> Table:
    """Return the forms of the layers of `start` that are not as its config says, and learn all the same.

    Raises ConfigError for what cannot be with them.
    """
    if run.start is None or not (run.start / weights.PACKED).is_file():
        return []
    table = formed.table_of(run.start)
    wrong = [_("an adapter needs whole weights under it; leave adapt out, and the thinner or smaller layers learn themselves")
             ] if run.adapt is not None else []
    if table and run.layout.tp > 1:
        wrong.append(_("layout.tp cuts matrices that are as the config says; set layout.tp=1"))
    if table and run.continual is not None and run.continual.average is not None:
        wrong.append(_("continual.average averages whole weights; leave it out"))
    if wrong:
        raise ConfigError("; ".join(wrong), where=str(run.start))
    return table


def base_of(model: Placed, cfg: Config, table: Table) -> dict[str, Tensor]:
    """Return the parameters and stored buffers that are here and the base's, not an adapter's."""
    whole = formed.names(cfg, table)
    held = {**dict(model.named_parameters()), **{name: b for part in model.parts for name, b in part.named_buffers()}}
    return {name: tensor for name, tensor in held.items() if name in whole}


def check_resumed(run: Run, found: Path) -> None:
    """Raise IncompatibleError unless the checkpoint `found` holds what the run trains: the same adapter, or a whole model."""
    then = folder.describe(found).adapt if folder.is_adapter(found) else folder.rounding(found)
    if (then is None) != (run.adapt is None) or (then is not None and run.adapt is not None and not same(then, run.adapt)):
        raise IncompatibleError(_("the adapter is not the one the run began with"), where=str(found),
                                fix=_("give the adapter of {file}, or choose another `out`").format(file=run.out / "recipe.yaml"))


def rates(run: Run, optimizer: Optimizer) -> None:
    """Give parameters their own learning rates where the recipe asks for it: by depth, or those of an adapter's parts."""
    adapt, decay, layers = run.adapt, run.optim.layer_decay, run.network.layers
    if decay != 1.0 or adapt is not None:
        rescale(optimizer, lambda name: depth_factor(name, layers, decay) * (1.0 if adapt is None else adapt.rate(name)))


def asleep(run: Run, name: str, step: int) -> bool:
    """Return whether a parameter does not learn yet in step number `step` (gradual unfreezing)."""
    return isinstance(run.adapt, Freeze) and run.adapt.asleep(name, step, run.network.layers)
