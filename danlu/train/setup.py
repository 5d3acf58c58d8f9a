"""What a run is made of: data opened and checked, the model built, everything ready for the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu import chance, config, files, parallel
from danlu.adapt import QAT, folder
from danlu.adapt.lora import LoRA
from danlu.adapt.targets import kept
from danlu.data.shards import Shards, read_manifest
from danlu.data.stream import Mixed, Stream
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, IncompatibleError
from danlu.figures import direction
from danlu.log import count, say
from danlu.models import foreign_config, formed, weights
from danlu.nn import paths, placed
from danlu.objectives import Objectives
from danlu.objectives.answer import Answer
from danlu.objectives.tasks import Tasks
from danlu.parallel import World
from danlu.parallel.place import Placed, place
from danlu.train import adapted, audit, checkpoint, guard, receipt, sparsify
from danlu.train.continual import Continual, Replay
from danlu.train.feed import stream
from danlu.train.keep import keeping
from danlu.train.loop import Plan, Progress
from danlu.train.recipe import Run
from danlu.train.shards import Crew
from danlu.train.sources import Source
from danlu.train.step import Engine
from danlu.train.zeros import Zeros
from danlu.words import _

MANY = 0.05                                              # of weights that are 0: the model was pruned


@dataclass
class Data:
    """Opened data: training parts, held-out parts, the one tokenizer they share."""

    train: list[Shards]
    held_out: list[Shards]
    tokenizer: Tokenizer
    folder: Path                                         # of the tokenizer
    fingerprint: str
    shares: tuple[float, ...]
    tasks: tuple[str | None, ...]                        # of each training part, where there are several
    held_tasks: tuple[str | None, ...]                   # … and of each held-out one
    old: list[Old]
    replayed: int = 0                                    # how many training parts, the last ones, are replayed
    fisher: list[tuple[Shards, str | None, float]] = field(default_factory=list)    # with task and weight

    @property
    def judged(self) -> list[Shards]:
        """The parts that the model is judged by: held-out ones, and old ones."""
        return [*self.held_out, *(each.shards for each in self.old)]


class Old(NamedTuple):
    """A part that tells what the model could do before."""

    name: str
    shards: Shards
    task: str | None


def open_data(run: Run) -> Data:
    """Open and verify the prepared folders of `run`.  Raises DataError or IncompatibleError."""
    def opened(source: Source) -> Shards:
        return Shards(source.folder, source.split, verify=run.verify == "full")

    continual = run.continual or Continual()
    replay = continual.replay.data if continual.replay else ()
    train = [opened(source) for source in run.learned]
    held = [(opened(s), s.task) for s in run.eval or measured(run.data)]
    old = [Old(name_of(s), opened(s), s.task) for s in continual.old or measured(replay)]
    fisher = [(opened(s), s.task, s.weight) for s in (continual.ewc.data or replay if continual.ewc else ())]
    held = [(shards, task) for shards, task in held if shards.documents]
    held_out = [shards for shards, _task in held]
    folders = {str(s.folder): Tokenizer.load(s.folder / "tokenizer") for sources in run.named.values() for s in sources}
    if run.start is not None and (run.start / "tokenizer.json").is_file():
        folders[str(run.start)] = Tokenizer.load(run.start)
    for shards in (*train, *held_out, *(each.shards for each in old), *(each[0] for each in fisher)):
        prepared, there = shards.manifest["tokenizer"], folders[str(shards.folder)].sha256
        if prepared != there:
            raise IncompatibleError(
                _("the data was prepared with the tokenizer {then} and the folder holds {now}").format(
                    then=prepared[:12], now=there[:12]),
                where=str(shards.folder), fix=_("put the tokenizer back, or prepare the data again"))
    hashes = {t.sha256 for t in folders.values()}
    if len(hashes) > 1:
        raise IncompatibleError(
            _("the tokenizers differ: {hashes}").format(
                hashes=", ".join(f"{p} {t.sha256[:12]}" for p, t in folders.items())),
            fix=_("prepare the data with the tokenizer of the model: name its folder under `tokenizer`"))
    first = str(run.data[0].folder)
    return Data(train, held_out, folders[first], run.data[0].folder / "tokenizer",
                files.digest([s.fingerprint for s in train]), shares(run.data, continual.replay),
                tuple(s.task for s in run.learned), tuple(task for _shards, task in held), old, len(replay), fisher)


def measured(sources: Sequence[Source]) -> list[Source]:
    """Return the held-out parts of sources, of those that have one."""
    return [s.model_copy(update={"split": "val"}) for s in sources if "val" in read_manifest(s.folder)["splits"]]


def name_of(source: Source) -> str:
    """Return what a table calls a source."""
    return Path(source.path.partition("#")[0]).stem or source.path


def shares(sources: Sequence[Source], replay: Replay | None) -> tuple[float, ...]:
    """Return the weight of each source, those of replay after the others, of whose sum they have their share."""
    given = [s.weight for s in sources]
    if replay is None:
        return tuple(given)
    again = sum(given) * replay.share / (1 - replay.share) / sum(s.weight for s in replay.data)
    return (*given, *(s.weight * again for s in replay.data))


def settle(run: Run, data: Data, world: World, found: Path | None) -> tuple[Run, paths.Choice]:
    """Fill in what the recipe leaves to the data and the machine; a resumed run takes what it had before."""
    special = data.tokenizer.special
    objective = met(run.objective, data)
    changes: dict[str, Any] = {"objective": objective}
    tasks = objective.tasks()
    plain = [name for name in objective.heads if name not in {task.name for task in tasks}]
    if run.start is not None:
        adapted.refuse(run.start)
        model = weights.read_config(run.start)
        if tasks:
            model = model.with_tasks(tasks, outputs=plain)
        elif model.kind != "decoder":
            model = model.with_heads(plain)
        if model.kind == "foreign":
            model = model.filled(vocab=special.size, pad=special.pad)
            foreign_config.refuse(model, run.layout, {
                "pack=false": run.packed, "compile=false": run.compile, "recompute=none": run.recompute != "none",
                "optim.layer_decay=1": run.optim.layer_decay != 1.0,
                "adapt=lora": run.adapt is not None and not isinstance(run.adapt, LoRA | QAT),
                "adapt.base=null": isinstance(run.adapt, LoRA) and run.adapt.base is not None})
        if run.length > model.context:                   # or the first row that is as long would end the run, however late
            raise ConfigError(_("length={length} is more than the model's context of {context}").format(
                length=run.length, context=model.context), where="length",
                fix=_("set length={n}").format(n=model.context))
        changes["model"] = model
    elif run.model is not None:
        model = (run.model.with_tasks(tasks, outputs=plain) if tasks else run.model).filled(
            vocab=special.size, heads=objective.heads, pad=special.pad)
        changes["model"] = model
    top = max(shards.top for shards in (*data.train, *data.held_out))
    if (model.vocab or 0) < max(special.size, top + 1):
        raise IncompatibleError(
            _("the tokenizer has {n} ids and the model {m}").format(n=max(special.size, top + 1), m=model.vocab),
            fix=_("set model.vocab={n}, or use the tokenizer the model was trained with").format(n=special.size))
    before = files.read_json(found / "manifest.json") if found else {}
    crew = Crew(world.saving)                            # of what is measured, processes might not agree: the first decides
    if run.precision == "auto":
        changes["precision"] = before.get("precision") or crew.first(lambda: parallel.fastest(world.device))
    run = run.model_copy(update=changes)
    adapted.table_of(run)                                # what cannot be with it is said first
    if adapted.apart(run) and run.start is not None:
        run = run.model_copy(update={"adapt": adapted.settle(run, run.start)})
    if run.layout.offload and world.device.type == "cpu":
        raise ConfigError(_("layout.offload moves weights from a device to the host, and this device is the host"),
                          where="layout.offload", fix=_("leave it out"))
    try:
        run.layout.check(run.step_rows, length=run.length, model=model.model_dump(), optimizer=run.optim.kind)
    except ValueError as error:
        raise ConfigError(str(error), where="layout") from None
    if before.get("choice"):
        return run, paths.Choice.restore(before["choice"])
    dtype, causal = parallel.DTYPES[run.precision], model.causal
    if run.paths == "rule":
        return run, paths.rule(world.device, dtype, run.length, causal=causal)
    shape = (run.part_rows, model.heads, run.length, model.width // model.heads)
    return run, crew.first(lambda: paths.choose(world.device, dtype, shape, causal=causal))


def met(objective: Objectives, data: Data) -> Objectives:
    """Return the objective, which knows the classes of the data now."""
    if isinstance(objective, Tasks):
        made = objective.met({task: classes(data, task) for task in objective.parts})
        return made.model_copy(update={"parts": {task: part.model_copy(update={"objective": _may_be_empty(
            part.objective, data, task)}) for task, part in made.parts.items()}})
    return _may_be_empty(objective.meet(*classes(data)), data, None)


def _may_be_empty(objective: Any, data: Data, task: str | None) -> Any:
    """Return the objective, which may give no answer if some question of its data has none."""
    if not isinstance(objective, Answer) or objective.may_be_empty:
        return objective
    given = [*zip(data.train, data.tasks, strict=True), *zip(data.held_out, data.held_tasks, strict=True)]
    empty = any(not text["answers"] for shards, its in given if its == task for text in shards.texts())
    return objective.model_copy(update={"may_be_empty": empty})


def classes(data: Data, task: str | None = None) -> tuple[list[str], list[int]]:
    """Return the names of the classes of a task and how often each stands in its training data; none where there are none."""
    train = [shards for shards, its in zip(data.train, data.tasks, strict=True) if its == task]
    rest = [shards for shards, its in zip(data.held_out, data.held_tasks, strict=True) if its == task]
    rest += [each.shards for each in data.old if each.task == task] + [shards for shards, its, _w in data.fisher if its == task]
    named = train[0].manifest.get("labels") or []
    for shards in (*train, *rest):
        if (shards.manifest.get("labels") or []) != named:
            raise IncompatibleError(_("the classes of the sources differ: {a} here, {b} there").format(
                a=", ".join(shards.manifest.get("labels") or []), b=", ".join(named)), where=shards.name,
                fix=_("prepare them together, or name all classes in objective.labels"))
    counts = np.zeros(len(named), np.int64)
    for shards in train if named else ():
        for name in ("label", "tags"):
            if name in shards.answers:
                counts += shards.tally(name, len(named))
    return list(named), counts.tolist()


def make_model(run: Run, choice: paths.Choice, world: World) -> Placed:
    """Return this process's part of the model, with its first weights: random by the seed, or those of `start`."""
    placed = place(run.network, world, run.objective, precision=run.precision, recompute=run.recompute, compile=run.compile,
                   length=run.length, rows=run.part_rows, adapt=run.adapt, device=adapted.first_device(run),
                   table=adapted.table_of(run))
    placed.fresh = frozenset(first_weights(run, placed))
    if placed.fresh:
        say(_("new weights, made at random: {names}").format(names=", ".join(sorted(placed.fresh))))
    return placed.use(choice).train().begin()


def first_weights(run: Run, model: Placed) -> list[str]:
    """Fill in what a run begins with; return the names of weights that `start` lacks."""
    adapted.pack_base(run, model)
    model.init(run.seed)
    if run.start is None:
        return []
    base = adapted.base_of(model, run.network, adapted.table_of(run))
    fresh = formed.fill(base, run.network, run.start, fresh=is_head)
    if run.adapt is not None:
        adapted.begin(run, model)
    return fresh


def is_head(name: str) -> bool:
    """Return whether a weight of ours belongs to a task, so that a model to start from may lack it."""
    return name.startswith(("heads.", "pooler.")) or ".pooler." in name


@dataclass
class Work:
    """A run in the making: what the loop needs, and how far it is."""

    model: Placed
    engine: Engine
    optimizer: Optimizer
    ema: dict[str, Tensor] | None
    rows: Stream | Mixed
    plan: Plan
    guard: guard.Guard
    progress: Progress
    plain: Engine                                        # what measures: the model without what is distilled


def training_rows(run: Run, data: Data) -> tuple[Stream | Mixed, int]:
    """Return the rows that the run learns from, in their order, and the number of its steps."""
    streams = [stream(s, run.objective, task=task, length=run.length, overlong=run.overlong, pack=run.pack,
                      seed=chance.torch_seed(run.seed, "order", (i,)), group=run.step_rows if run.group_by_length else 0)
               for i, (s, task) in enumerate(zip(data.train, data.tasks, strict=True))]
    rows = streams[0] if len(streams) == 1 else Mixed(streams, data.shares, seed=run.seed)
    new = sum(s.rows(0) for s in streams[: len(run.data)]) * sum(data.shares) / sum(data.shares[: len(run.data)])
    return rows, run.steps or math.ceil(new * (run.epochs or 1) / run.step_rows)


def assemble(run: Run, data: Data, model: Placed) -> Work:
    """Return engine, optimizer, rows and plan for `model`; every check that needs no step is made here."""
    for part in model.parts:
        part.unpadded = run.tight and model.world.device.type == "cpu"      # elsewhere it would wait for the device
    plain = Engine(model, run.objective, precision=run.precision, clip=run.clip, seed=run.seed)
    engine = keeping(run, data, plain)
    engine.asleep = partial(adapted.asleep, run)
    optimizer = run.optim.build((leaf.name, leaf.local) for leaf in engine.leaves)
    adapted.rates(run, optimizer)
    rows, total = training_rows(run, data)
    for shards, part in zip(data.train, rows.streams if isinstance(rows, Mixed) else (rows,), strict=True):
        guard.check_source(part, shards.name)
    guard.check_schedule(run.schedule, total)
    if run.sparsify is not None:
        sparsify.check(run.sparsify, total)
        engine.zeros = Zeros(run.sparsify, run.network, engine.leaves, engine.world, total=total)
    elif run.start is not None and run.adapt is None:
        zeros = Zeros(sparsify.KeepZeros(), run.network, engine.leaves, engine.world, total=total).share
        if zeros > MANY:
            say(_("warning: {share:.0%} of the start model's weights are 0, and training fills them; sparsify=keep keeps "
                  "them").format(share=zeros))
    every = run.every
    plan = Plan(total=total, lr=run.optim.lr, schedule=run.schedule, log=every.log, evaluate=every.evaluate,
                save=every.save, sample=every.sample, best=every.best, patience=run.stop.patience if run.stop else None,
                min_delta=run.stop.min_delta if run.stop else 0.0, metric=run.metric,
                higher=direction(run.metric),
                settled=sparsify.settled(run.sparsify, total) if run.sparsify is not None else 0,
                flops=model.whole.flops(run.length) * run.step_rows * run.length,
                peak=parallel.peak(engine.device, run.precision) * engine.world.size,
                rows=() if run.micro_rows is None else (f"rows={run.step_rows}", "micro_rows=null"))
    stored = model.state_dict() if not adapted.apart(run) else {n: model.state_dict()[n] for n in kept(model, run.network)}
    ema = {n: placed.local(p).clone() for n, p in stored.items()} if run.ema else None
    watch = guard.Guard(max_skips=run.guard.max_skips, spike=run.guard.spike)
    return Work(model, engine, optimizer, ema, rows, plan, watch, Progress(position=rows.begin()), plain)


def resume(run: Run, work: Work, found: Path, data: Data) -> None:
    """Fill `work` from a checkpoint.  Raises IncompatibleError if its data or tokenizer are others."""
    manifest = files.read_json(found / "manifest.json")
    for name, now in (("tokenizer", data.tokenizer.sha256), ("data", data.fingerprint)):
        if manifest[name] != now:
            raise IncompatibleError(
                _("the {what} has changed: {then} then, {now} now").format(what=name, then=manifest[name][:12], now=now[:12]),
                where=str(found), fix=_("give the data the run began with, or choose another `out`"))
    then, asked = (cfg.model_dump(exclude={"preset"}) for cfg in (folder.read_config(found), run.network))    # a name, no shape
    if then != asked:
        raise IncompatibleError(_("the model is not the one the run began with"), where=str(found),
                                fix=_("give the model of {file}, or choose another `out`").format(file=run.out / "recipe.yaml"))
    adapted.check_resumed(run, found)
    state = checkpoint.load(found, work.model, work.optimizer, ema=work.ema)
    known = {f.name for f in fields(Progress)}
    work.progress = Progress(**{k: v for k, v in state["progress"].items() if k in known})
    if (manifest["run"].get("metric"), manifest["run"].get("eval")) != tuple(config.dump(run).get(k) for k in ("metric", "eval")):
        work.progress.best = work.progress.best_step = None          # figures of another kind, or of other rows
        work.progress.waited = 0
    work.engine.micro = work.progress.micro or work.engine.micro
    work.progress.position = work.rows.restore(work.progress.position)
    work.guard = guard.Guard(max_skips=run.guard.max_skips, spike=run.guard.spike,
                             history=work.progress.history, skipped=work.progress.skipped)
    if work.engine.scaler is not None and state.get("scaler"):
        work.engine.scaler.load_state_dict(state["scaler"])
    if work.engine.probes is not None:
        work.engine.probes.restore(work.optimizer)
    if work.engine.zeros is not None:
        work.engine.zeros.share = work.engine.zeros.counted()
    changed = receipt.differences(manifest["run"], config.dump(run)) + receipt.elsewhere(manifest)
    if changed:
        say(_("resuming with other settings than the run began with: {changes}").format(changes="; ".join(changed)))
    say(_("resuming from {checkpoint}").format(checkpoint=found.name))


def begin(run: Run, work: Work, data: Data, choice: paths.Choice) -> None:
    """Audit the data, write the receipt and say the plan: the first process, for all.  Raises DataError."""
    if not work.engine.world.main:
        return
    parameters = sum(p.numel() for p in formed.made(run.network, adapted.table_of(run)).parameters())
    found = audit.audited(run, work.rows, data.train, data.judged, data.tokenizer, total=work.plan.total)
    audit.tell(found, run.out / "audit.json")
    receipt.begin(run, data_records=[record(s) for s in (*data.train, *data.judged)], tokenizer=data.tokenizer.sha256,
                  parameters=parameters, choice=choice.record(), audit={**audit.digest(found), "rows": work.rows.counts})
    say(_("{model}: {parameters} parameters · {total} steps of {rows} rows × {length} tokens · {precision} on {device}, "
          "{threads} threads").format(
        model=run.network.family if run.network.kind == "foreign" else run.network.kind, parameters=count(parameters),
        total=work.plan.total, rows=run.step_rows, length=run.length,
        precision=run.precision, device=work.engine.device.type, threads=torch.get_num_threads()))
    learning = sum(p.numel() for p in work.model.parameters() if p.requires_grad)
    if run.adapt is not None and run.layout.world == 1:
        say(_("{adapter}: {learning} parameters are trained, {share:.2%}").format(
            adapter=run.adapt.kind, learning=count(learning), share=learning / parameters))
    axes = {name: getattr(run.layout, name) for name in ("dp", "tp", "pp", "cp") if getattr(run.layout, name) > 1}
    if axes:
        say(_("{n} processes: {layout}").format(n=run.layout.world, layout=" × ".join(f"{k} {v}" for k, v in axes.items())))
    lost = work.rows.counts
    if lost["split"] or lost["dropped"] or lost["cut"]:
        say(_("documents longer than a row: {split} split, {dropped} dropped, {cut} cut; {tokens} tokens are not learned "
              "from").format(split=lost["split"], dropped=lost["dropped"], cut=lost["cut"], tokens=lost["tokens_lost"]))


def record(shards: Shards) -> dict[str, Any]:
    """Return what the receipt says of one part of the data."""
    return {"path": str(shards.folder), "split": shards.split, "documents": shards.documents, "tokens": shards.tokens,
            "fingerprint": shards.fingerprint}
