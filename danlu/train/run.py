"""Run to directory: everything is made, checked and handed to the loop.  `train` fits on a screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu import files, parallel, report
from danlu.data.shards import Shards
from danlu.errors import ConfigError
from danlu.evaluate.judge import RESAMPLES, Said, can_judge, judge
from danlu.evaluate.judge import require as require_metrics
from danlu.evaluate.loss import Loss, measure, predicted_bytes
from danlu.evaluate.rows import leave
from danlu.generate import generate, writes
from danlu.log import Metrics, say, silence
from danlu.nn import placed
from danlu.objectives import Embed
from danlu.objectives.protocol import Batch
from danlu.objectives.tasks import Tasks, single, singles, terms_of
from danlu.parallel import World
from danlu.train import checkpoint, forgotten, receipt
from danlu.train.feed import Steps, batches, stream, watched
from danlu.train.intake import located
from danlu.train.loop import Hooks, Loop, Progress
from danlu.train.meter import Meter
from danlu.train.outer import Outer
from danlu.train.recipe import Run
from danlu.train.saver import Saver, check_reload
from danlu.train.setup import Data, Old, Work, assemble, begin, make_model, open_data, resume, settle
from danlu.train.signals import listening
from danlu.train.watchdog import Watchdog
from danlu.words import _

AT_ONCE = 8192                                           # tokens of a batch that is only measured, at least


@parallel.old_objects_apart()
def train(run: Run) -> Path:
    """Train as `run` says, or go on where an interrupted run of the same folder stopped; return the last checkpoint."""
    meter = Meter()
    files.check_writable(run.out)
    if not run.resume and checkpoint.listing(run.out):
        raise ConfigError(_("the folder holds checkpoints, and resume is false: old and new ones would mix"), where=str(run.out),
                          fix=_("choose another `out`, or leave resume at true"))
    if run.report:
        report.require()
    for objective in singles(run.objective):
        require_metrics(objective)
    run = located(run)
    world = parallel.join(run.layout, parallel.start(threads=run.threads, device=run.device, allocator=run.allocator))
    silence(not world.main)
    data = open_data(run)
    found = checkpoint.agreed(run.out, world) if run.resume else None
    run, choice = settle(run, data, world, found)
    work = assemble(run, data, make_model(run, choice, world))

    def look(old: Old) -> Loss:
        return averaged(work, lambda: measured(run, work, data, [old.shards], task=old.task))      # type: ignore[no-any-return]

    with meter.during("evaluate"):
        forgotten.before(run, work, data, look)
    metrics = Metrics(run.out, trackers=run.trackers, writes=world.main)
    if found is not None:
        with meter.during("resume"):
            resume(run, work, found, data)
    recorded = metrics.rewind(work.progress.step or -1, micro=work.progress.micro)      # step 0 is evaluated again
    begin(run, work, data, choice)
    if found is None and run.guard.reload:
        check_reload(run, work, data, choice)
    watchdog = Watchdog(run.out, run.guard.hang, world)
    with listening() as asked, watched(), watchdog:
        feed = batches(steps_of(run, work, data), workers=run.workers)
        saver = Saver(run, work, data, choice, last=found)
        try:
            calls = hooks(run, work, data, saver, beats=(watchdog, meter))
            loop = Loop(work.engine, work.optimizer, work.plan, calls, work.guard, work.progress, metrics, run.out,
                        outer=Outer(run.layout.local, work.engine.leaves, world) if run.layout.local is not None else None)
            loop.fit(feed, recorded=recorded if receipt.same_machine(found, run) else {}, asked=asked)
            watchdog.beat(work.progress.step, "save")
            with meter.during("save"):
                last = saver.finish(work.progress)
            meter.enter("evaluate")
            told = forgotten.after(run, work, data, look)
        finally:
            saver.writer.wait()
            metrics.close()
    conclude(run, work, meter, told)
    parallel.leave()
    return last


def steps_of(run: Run, work: Work, data: Data) -> Steps:
    """Return the batches of this process from where the run is."""
    return Steps(work.rows, work.engine.objective, data.tokenizer.special, per_step=run.step_rows, length=run.length,
                 seed=run.seed, position=work.progress.position, tight=run.tight,
                 share=(work.engine.world.index("dp"), run.layout.dp))


def conclude(run: Run, work: Work, meter: Meter, told: Any) -> None:
    """Leave figures, predictions, what the run has needed, and the report.  told: what was forgotten, if it was asked."""
    world, zeros = work.engine.world, work.engine.zeros
    if world.main:
        receipt.finish(run.out, {**work.progress.evaluation, **({"forgetting": told} if told else {}),
                                 **({} if zeros is None else {"sparsity": zeros.share}),
                                 "steps": work.progress.step, "tokens": work.progress.tokens})
    with meter.during("results"):
        leave_results(run, work)
    needed = meter.record(world)
    if world.main:
        receipt.add(run.out, {"measured": needed})
    if run.report and world.main:
        say(_("report: {file}").format(file=report.write(run.out)))


def leave_results(run: Run, work: Work) -> None:
    """Leave the figures and predictions of the held-out rows of a task in the run's folder, by its best checkpoint."""
    layout = run.layout
    if not any(map(can_judge, singles(run.objective))) or not work.engine.world.main or not work.progress.evaluation:
        return
    if layout.tp * layout.pp * layout.cp > 1 or work.model.sharded:
        say(_("no process has the whole model; for predictions: danlu eval {out}").format(out=run.out))
        return
    leave(run.out, device=work.engine.device, precision="fp32")


def held_out(run: Run, work: Work, data: Data, alive: Callable[[], None]) -> Loss | None:
    """Return the loss on all held-out rows, in stored order, with masks that never change; `alive` is called on the way."""
    parts: dict[str | None, list[Shards]] = {task: [] for task in data.held_tasks}
    for shards, task in zip(data.held_out, data.held_tasks, strict=True):
        parts[task].append(shards)
    found = {task: measured(run, work, data, each, task=task, alive=alive) for task, each in parts.items()}
    if not isinstance(run.objective, Tasks) or not found:
        return found.get(None)
    terms, figures = run.objective.terms, dict[str, float]()
    sums, counts = torch.zeros(2, 1, len(terms), dtype=torch.float64)
    for task, loss in found.items():
        where = terms_of(run.objective, task)
        sums[0, where], counts[0, where] = loss.sums.sum(0), loss.counts.sum(0)
        figures |= loss.values(f"{task}/")
    return Loss(terms, run.objective.scales, sums, counts, figures=figures)


def measured(run: Run, work: Work, data: Data, parts: Sequence[Shards], *, task: str | None,
             alive: Callable[[], None] = lambda: None) -> Loss:
    """Return loss and figures of a task on all rows of `parts`."""
    engine, objective, found = work.plain, single(run.objective, task), []
    said = Said(objective, run.length, engine.whole) if can_judge(objective) and run.layout.pp == 1 else None

    def sums(batch: Batch) -> Tensor:
        if said is None:
            return engine.sums(batch)
        out = engine.outputs(batch)
        said.add(out, batch if objective is run.objective else run.objective.view(task, batch))     # type: ignore[union-attr, arg-type]
        return run.objective.loss(out, batch)

    for shards in parts:
        rows = stream(shards, run.objective, task=task, length=run.length, overlong=run.overlong, pack=run.pack, seed=None)
        number, layout = rows.rows(0), run.layout
        alone = engine.world.size == 1
        if said is not None:
            said.begin(shards.texts())
        at_once = max(1, run.part_rows, AT_ONCE // run.length) if layout.pp == 1 else run.part_rows * layout.micro
        if isinstance(objective, Embed) and objective.across:
            at_once = run.part_rows                      # the others of a batch make its loss
        steps = Steps(rows, run.objective, data.tokenizer.special, length=run.length, seed=0, position=rows.begin(),
                      per_step=min(number, at_once) if alone else at_once * layout.dp, rows_in_all=number,
                      share=(engine.world.index("dp"), layout.dp), fill=not alone, tight=run.tight)
        told = rows.counts["tokens_lost"] == 0 and not shards.weighted
        each = measure(work.model, run.objective, _given(steps, work, alive), sums,
                       bytes=predicted_bytes(shards, data.tokenizer) if told else 0)
        found.append(replace(each, sums=engine.total(each.sums), counts=engine.world.add(each.counts, ("dp", "cp"))))
    figures = {} if said is None else {n: one.value for n, one in judge(
        objective, together(said.arrays(), engine.world), said.texts, resamples=RESAMPLES).figures.items() if n != "loss"}
    where = terms_of(run.objective, task)
    return Loss(objective.terms, objective.scales, torch.cat([p.sums for p in found])[:, where],
                torch.cat([p.counts for p in found])[:, where],
                sum(p.bytes for p in found) if all(p.bytes for p in found) else 0, figures)


def together(columns: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return columns [N, …] of every data-parallel process, one after the other; each has as many rows."""
    of = world.layout.dp
    if of == 1:
        return columns
    made = {}
    for name, column in columns.items():
        whole = torch.zeros(of, *column.shape, dtype=column.dtype)
        whole[world.index("dp")] = column
        made[name] = world.add(whole, ("dp",)).flatten(0, 1)
    return made


def _given(steps: Steps, work: Work, alive: Callable[[], None]) -> Iterator[Batch]:
    for batch, _after in steps:
        alive()
        yield work.engine.to_device(batch)


def hooks(run: Run, work: Work, data: Data, saver: Saver, *, beats: tuple[Watchdog, Meter]) -> Hooks:
    """Return what the loop calls out for; beats: who is told what it does."""
    (watchdog, meter), started, size = beats, work.progress.step, 0

    def writing() -> None:
        nonlocal size
        with suppress(FileNotFoundError):                # renamed meanwhile
            size, before = saver.growth(), size
            if size != before:
                watchdog.beat(work.progress.step, "save")

    saver.writer.alive = writing

    def beat(step: int, phase: str) -> None:
        if step > started:                               # the limit before the first step, which may compile, is another
            watchdog.beat(step, phase)

    def measure() -> Loss | None:
        with meter.during("evaluate"):
            return averaged(work, lambda: held_out(run, work, data, lambda: beat(work.progress.step, "evaluate")))   # type: ignore[no-any-return]

    def save(progress: Progress, wait: bool) -> None:
        with meter.during("save"):
            saver.save(progress, wait)

    return Hooks(measure=measure, save=save, saved=saver.age, kept=saver.kept, poll=saver.poll, beat=beat, enter=meter.enter,
                 sample=lambda: averaged(work, lambda: show_sample(run, work, data)),
                 after_update=lambda: average(work, run.ema))


def average(work: Work, decay: float | None) -> None:
    """Move the averaged weights towards the new ones (exponential moving average)."""
    if work.ema is not None and decay is not None:
        now = work.model.state_dict()
        names = [n for n, t in work.ema.items() if t.is_floating_point()]
        torch._foreach_lerp_([work.ema[n] for n in names], [placed.local(now[n]) for n in names], 1 - decay)
        if work.engine.zeros is not None:
            work.engine.zeros.of_average(work.ema)


def averaged(work: Work, do: Callable[[], Any]) -> Any:
    """Return `do()` computed with the averaged weights where there are any."""
    if work.ema is None:
        return do()
    held = {n: placed.local(t) for n, t in work.model.state_dict().items() if n in work.ema}
    now = {n: t.clone() for n, t in held.items()}
    try:
        for name, tensor in held.items():
            tensor.copy_(work.ema[name])
        return do()
    finally:
        for name, tensor in held.items():
            tensor.copy_(now[name])
        work.model.reshard()                             # or the next step would compute with the averages it has gathered


def show_sample(run: Run, work: Work, data: Data, most: int = 48) -> None:
    """Print a short text that the model writes, and keep it in samples.jsonl."""
    model, eos = work.model.whole, data.tokenizer.special.eos
    if not writes(model) or not data.held_out or run.length < 2:
        return
    prompt = data.held_out[0].document(0).ids[: min(8, run.length // 2)].tolist()
    work.model.eval()
    with parallel.autocast(run.precision, work.engine.device):           # shards come gathered in it
        out = list(generate(model, prompt, max_new_tokens=min(most, run.length - len(prompt)), temperature=0.8, top_k=50,
                            eos=eos if work.engine.world.size == 1 else None, seed=work.progress.step))
    work.model.train()
    out = out[: out.index(eos)] if eos in out else out   # processes compute together, so none may stop before another
    text = data.tokenizer.decode([*prompt, *out])
    if work.engine.world.main:
        files.append_line(run.out / "samples.jsonl", {"step": work.progress.step, "text": text})
    say(_("sample: {text}").format(text=repr(text)))
