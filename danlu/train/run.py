"""Run to directory: everything is made, checked and handed to the loop here.  Read `train` first; it fits on a screen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu import chance, config, files, parallel
from danlu.data.shards import Shards, read_manifest
from danlu.data.stream import Mixed, Stream
from danlu.data.tokenizer import Tokenizer
from danlu.errors import IncompatibleError, NumericError, ResourceError
from danlu.evaluate.loss import Loss, measure
from danlu.generate import generate
from danlu.log import Metrics, count, duration, say
from danlu.models import weights
from danlu.models.build import build
from danlu.nn import paths
from danlu.train import checkpoint, guard, receipt
from danlu.train.feed import Steps, batches, stream
from danlu.train.loop import Hooks, Plan, Progress, fit
from danlu.train.recipe import Run, Source
from danlu.train.signals import listening
from danlu.train.step import Engine
from danlu.words import _


def train(run: Run) -> Path:
    """Train as `run` says, or go on where an interrupted run of the same folder stopped; return the last checkpoint."""
    files.check_writable(run.out)
    device = parallel.start(threads=run.threads, device=run.device)
    data = open_data(run)
    checkpoint.sweep(run.out)
    found = checkpoint.newest(run.out) if run.resume else None
    run, choice = settle(run, data, device, found)
    model = make_model(run, choice, device)
    work = assemble(run, data, model, device)
    metrics = Metrics(run.out, trackers=run.trackers)
    if found is not None:
        resume(run, work, found, data)
    recorded = metrics.rewind(work.progress.step)
    begin(run, work, data, metrics, choice)
    if found is None and run.guard.reload:
        check_reload(run, work, data, choice)
    with listening() as asked:
        steps = Steps(work.rows, run.objective, data.tokenizer.special, per_step=run.step_rows, length=run.length,
                      seed=run.seed, position=work.progress.position)
        feed = batches(steps, workers=run.workers)
        saver = Saver(run, work, data, choice)
        try:
            fit(work.engine, work.optimizer, feed, work.plan, hooks(run, work, data, saver), work.guard, work.progress,
                metrics, recorded if receipt.same_machine(found, run) else {}, asked, run.out)
            last = saver.finish(work.progress)
        finally:
            saver.writer.wait()
            metrics.close()
    receipt.finish(run.out, work.progress.evaluation | {"steps": work.progress.step, "tokens": work.progress.tokens})
    return last


@dataclass
class Data:
    """Opened data: training parts, held-out parts, the one tokenizer they share."""

    train: list[Shards]
    held_out: list[Shards]
    tokenizer: Tokenizer
    folder: Path                                         # of the tokenizer
    fingerprint: str
    shares: tuple[float, ...]


def open_data(run: Run) -> Data:
    """Open and verify the prepared folders of `run`.  Raises DataError or IncompatibleError."""
    def opened(source: Source) -> Shards:
        return Shards(source.path, source.split, verify=run.verify == "full")

    train = [opened(source) for source in run.data]
    held_out = [opened(source) for source in run.eval] or [
        opened(s.model_copy(update={"split": "val"})) for s in run.data if "val" in read_manifest(s.path)["splits"]]
    held_out = [shards for shards in held_out if shards.documents]
    folders = {str(s.path): Tokenizer.load(s.path / "tokenizer") for s in (*run.data, *run.eval)}
    hashes = {t.sha256 for t in folders.values()}
    if len(hashes) > 1:
        raise IncompatibleError(
            _("the sources were prepared with different tokenizers: {hashes}").format(
                hashes=", ".join(f"{p} {t.sha256[:12]}" for p, t in folders.items())),
            fix=_("prepare them again with one tokenizer: name its folder under `tokenizer`"))
    first = str(run.data[0].path)
    return Data(train, held_out, folders[first], run.data[0].path / "tokenizer",
                files.digest([s.fingerprint for s in train]), tuple(s.weight for s in run.data))


def settle(run: Run, data: Data, device: torch.device, found: Path | None) -> tuple[Run, paths.Choice]:
    """Fill in what the recipe leaves to the data and the machine; a resumed run takes what it had before."""
    special = data.tokenizer.special
    changes: dict[str, Any] = {}
    if run.start is not None:
        model = weights.read_config(run.start)
        changes["model"] = model
    elif run.model is not None:
        model = run.model.filled(vocab=special.size, heads=run.objective.heads, pad=special.pad)
        changes["model"] = model
    top = max(shards.top for shards in (*data.train, *data.held_out))
    if model.vocab < special.size or model.vocab <= top:
        raise IncompatibleError(
            _("the tokenizer has {n} ids and the model {m}").format(n=max(special.size, top + 1), m=model.vocab),
            fix=_("set model.vocab={n}, or use the tokenizer the model was trained with").format(n=special.size))
    before = files.read_json(found / "manifest.json") if found else {}
    if run.precision == "auto":
        changes["precision"] = before.get("precision") or parallel.fastest(device)
    run = run.model_copy(update=changes)
    if before.get("choice"):
        return run, paths.Choice.restore(before["choice"])
    rows = max(1, run.step_rows // run.layout.micro)
    shape = (rows, model.heads, run.length, model.width // model.heads)
    return run, paths.choose(device, parallel.DTYPES[run.precision], shape, causal=model.kind == "decoder")


def make_model(run: Run, choice: paths.Choice, device: torch.device) -> nn.Module:
    """Return the model with its first weights: random by the seed, or those of `start`."""
    if run.start is not None:
        model = weights.load(run.start, device=device)
    else:
        model = build(run.model)
        model.to_empty(device=device)
        model.init(run.seed)
    model.use(choice)
    model.train()
    return parallel.shard(model, recompute=run.recompute, compile=run.compile)


@dataclass
class Work:
    """A run in the making: what the loop needs, and how far it is."""

    model: nn.Module
    engine: Engine
    optimizer: Optimizer
    ema: dict[str, Tensor] | None
    rows: Stream | Mixed
    plan: Plan
    guard: guard.Guard
    progress: Progress


def assemble(run: Run, data: Data, model: nn.Module, device: torch.device) -> Work:
    """Return engine, optimizer, rows and plan for `model`; every check that needs no step is made here."""
    engine = Engine(model, run.objective, device=device, precision=run.precision, micro=run.layout.micro,
                    clip=run.clip, seed=run.seed)
    optimizer = run.optim.build((n, p) for n, p in model.named_parameters() if p.requires_grad)
    streams = [stream(s, run.objective, length=run.length, overlong=run.overlong, pack=run.pack and run.objective.packs,
                      seed=chance.torch_seed(run.seed, "order", (i,))) for i, s in enumerate(data.train)]
    for source, part in zip(run.data, streams, strict=True):
        guard.check_source(part, str(source.path))
    rows = streams[0] if len(streams) == 1 else Mixed(streams, data.shares, seed=run.seed)
    total = run.steps or math.ceil(sum(s.rows(0) for s in streams) * (run.epochs or 1) / run.step_rows)
    guard.check_schedule(run.schedule, total)
    every = run.every
    plan = Plan(total=total, lr=run.optim.lr, schedule=run.schedule, log=every.log, evaluate=every.evaluate,
                save=every.save, sample=every.sample, patience=run.stop.patience if run.stop else None,
                min_delta=run.stop.min_delta if run.stop else 0.0, metric=run.stop.metric if run.stop else "eval/loss",
                flops=model.flops(run.length) * run.step_rows * run.length,
                peak=parallel.peak(device, run.precision))
    ema = {n: p.detach().clone() for n, p in model.state_dict().items()} if run.ema else None
    watch = guard.Guard(max_skips=run.guard.max_skips, spike=run.guard.spike)
    return Work(model, engine, optimizer, ema, rows, plan, watch, Progress(position=rows.begin()))


def resume(run: Run, work: Work, found: Path, data: Data) -> None:
    """Fill `work` from a checkpoint.  Raises IncompatibleError if its data or tokenizer are others."""
    manifest = files.read_json(found / "manifest.json")
    for name, now in (("tokenizer", data.tokenizer.sha256), ("data", data.fingerprint)):
        if manifest[name] != now:
            raise IncompatibleError(
                _("the {what} has changed: {then} then, {now} now").format(what=name, then=manifest[name][:12], now=now[:12]),
                where=str(found), fix=_("give the data the run began with, or choose another `out`"))
    state = checkpoint.load(found, work.model, work.optimizer, ema=work.ema)
    known = {f.name for f in fields(Progress)}
    work.progress = Progress(**{k: v for k, v in state["progress"].items() if k in known})
    work.progress.position = work.rows.restore(work.progress.position)
    work.guard = guard.Guard(max_skips=run.guard.max_skips, spike=run.guard.spike,
                             history=work.progress.history, skipped=work.progress.skipped)
    if work.engine.scaler is not None and state.get("scaler"):
        work.engine.scaler.load_state_dict(state["scaler"])
    changed = receipt.differences(manifest["run"], config.dump(run))
    if changed:
        say(_("resuming with other settings than the run began with: {changes}").format(changes="; ".join(changed)))
    say(_("resuming from {checkpoint}").format(checkpoint=found.name))


def begin(run: Run, work: Work, data: Data, metrics: Metrics, choice: paths.Choice) -> None:
    """Write the receipt, say the plan, and look for evaluation rows in the training data."""
    parameters = sum(p.numel() for p in work.model.parameters())
    shared = {}
    for shards in data.held_out:
        shared[str(shards.folder / shards.split)] = guard.check_overlap(data.train, shards, share=run.guard.overlap)
    receipt.begin(run, data_records=[record(s) for s in (*data.train, *data.held_out)], tokenizer=data.tokenizer.sha256,
                  parameters=parameters, choice=choice.record(), audit={"overlap": shared, "rows": work.rows.counts})
    say(_("{model}: {parameters} parameters · {total} steps of {rows} rows × {length} tokens · {precision} on {device}, "
          "{threads} threads").format(
        model=run.model.kind, parameters=count(parameters), total=work.plan.total, rows=run.step_rows, length=run.length,
        precision=run.precision, device=work.engine.device.type, threads=torch.get_num_threads()))
    lost = work.rows.counts
    if lost["split"] or lost["dropped"] or lost["cut"]:
        say(_("documents longer than a row: {split} split, {dropped} dropped, {cut} cut; {tokens} tokens are not learned "
              "from").format(split=lost["split"], dropped=lost["dropped"], cut=lost["cut"], tokens=lost["tokens_lost"]))


def record(shards: Shards) -> dict[str, Any]:
    """Return what the receipt says of one part of the data."""
    return {"path": str(shards.folder), "split": shards.split, "documents": shards.documents, "tokens": shards.tokens,
            "fingerprint": shards.fingerprint}


def held_out(run: Run, work: Work, data: Data) -> Loss | None:
    """Return the loss on all held-out rows, in stored order, with masks that never change."""
    if not data.held_out:
        return None
    parts = []
    for shards in data.held_out:
        rows = stream(shards, run.objective, length=run.length, overlong=run.overlong,
                      pack=run.pack and run.objective.packs, seed=None)
        number = rows.rows(0)
        steps = Steps(rows, run.objective, data.tokenizer.special, per_step=min(number, max(1, run.step_rows // run.layout.micro)),
                      length=run.length, seed=0, position=rows.begin(), rows_in_all=number)
        parts.append(measure(work.model, run.objective, (work.engine.to_device(b) for b, _after in steps),
                             work.engine.sums, bytes=int(shards.column("bytes").sum()) if rows.counts["tokens_lost"] == 0 else 0))
    return Loss(parts[0].terms, parts[0].scales, torch.cat([p.sums for p in parts]), torch.cat([p.counts for p in parts]),
                sum(p.bytes for p in parts) if all(p.bytes for p in parts) else 0)


def hooks(run: Run, work: Work, data: Data, saver: Saver) -> Hooks:
    """Return what the loop calls out for."""
    return Hooks(measure=lambda: averaged(work, lambda: held_out(run, work, data)), save=saver.save, saved=saver.age,
                 poll=saver.poll, sample=lambda: averaged(work, lambda: show_sample(run, work, data)),
                 after_update=lambda: average(work, run.ema))


def average(work: Work, decay: float | None) -> None:
    """Move the averaged weights towards the new ones (exponential moving average)."""
    if work.ema is not None and decay is not None:
        now = work.model.state_dict()
        names = [n for n, t in work.ema.items() if t.is_floating_point()]
        torch._foreach_lerp_([work.ema[n] for n in names], [now[n].detach() for n in names], 1 - decay)


def averaged(work: Work, do: Callable[[], Any]) -> Any:
    """Return `do()` computed with the averaged weights where there are any."""
    if work.ema is None:
        return do()
    now = {n: t.detach().clone() for n, t in work.model.state_dict().items()}
    work.model.load_state_dict(work.ema)
    try:
        return do()
    finally:
        work.model.load_state_dict(now)


def show_sample(run: Run, work: Work, data: Data, most: int = 48) -> None:
    """Print a short text that the model writes."""
    if run.model.kind != "decoder" or not data.held_out:
        return
    prompt = data.held_out[0].document(0).ids[:8].tolist()
    work.model.eval()
    out = list(generate(work.model, prompt, max_new_tokens=min(most, run.length - len(prompt)), temperature=0.8, top_k=50,
                        seed=work.progress.step))
    work.model.train()
    say(_("sample: {text}").format(text=repr(data.tokenizer.decode([*prompt, *out]))))


class Saver:
    """Writes checkpoints for the loop: copies the state, lets a thread write it, keeps the best."""

    def __init__(self, run: Run, work: Work, data: Data, choice: paths.Choice) -> None:
        self.run, self.work, self.data, self.choice = run, work, data, choice
        self.writer = checkpoint.Writer(run.out, done=self.written)
        self.at: float | None = None
        self.last: Path | None = None
        self.lost: str | None = None

    def snapshot(self, progress: Progress, *, own: bool) -> checkpoint.Snapshot:
        """Return the state of the run now."""
        run, work = self.run, self.work
        state = {"global_step": progress.step, "max_steps": work.plan.total, "best_metric": progress.best,
                 "best_global_step": progress.best_step, "progress": progress.record(),
                 "scaler": work.engine.scaler.state_dict() if work.engine.scaler else None}
        facts = {"run": config.dump(run), "tokenizer": self.data.tokenizer.sha256, "data": self.data.fingerprint,
                 "precision": run.precision, "choice": self.choice.record(), **receipt.machine(),
                 "parent": self.last.name if self.last else None}
        return checkpoint.snapshot(progress.step, run.model, work.model, work.optimizer, ema=work.ema, state=state,
                                   facts=facts, tokenizer=self.data.folder, copy=self.writer.spare, own=own)

    def save(self, progress: Progress, wait: bool) -> None:
        """Begin to save; training goes on unless `wait`."""
        if not (wait and self.last and self.last.name == f"checkpoint-{progress.step}"):
            self.writer.wait()
            self.writer.submit(self.snapshot(progress, own=not wait), wait=wait)
            self.poll()

    def written(self, path: Path) -> None:
        self.last, self.at = path, time.monotonic()
        best = self.work.progress.best_step
        checkpoint.prune(self.run.out, keep=self.run.every.keep,
                         best=self.run.out / f"checkpoint-{best}" if best is not None else None)

    def age(self) -> str:
        return duration(time.monotonic() - self.at) if self.at is not None else ""

    def poll(self) -> None:
        """Tell of a save that failed."""
        error = self.writer.poll()
        if error is None:
            return
        self.lost = str(error)
        say(_("warning: a checkpoint could not be written: {why}").format(why=error))
        if self.writer.failures >= 2:
            say(_("warning: {n} saves in a row have failed; a crash now loses the work since the last one").format(
                n=self.writer.failures))

    def finish(self, progress: Progress) -> Path:
        """Save the last state; raise ResourceError if the run ends without it on disk."""
        self.lost = None
        self.save(progress, True)
        self.writer.wait()
        self.poll()
        if self.lost is not None or self.last is None:
            raise ResourceError(_("training ended, but its last checkpoint could not be written: {why}").format(why=self.lost),
                                where=str(self.run.out), fix=_("free some space and run the same command again"))
        return self.last


def check_reload(run: Run, work: Work, data: Data, choice: paths.Choice) -> None:
    """Save the first state, load it into a fresh model and compare the loss of one batch; raise NumericError if it differs."""
    saver = Saver(run, work, data, choice)
    saver.finish(work.progress)
    assert saver.last is not None
    batch, _after = next(iter(Steps(work.rows, run.objective, data.tokenizer.special, per_step=1, length=run.length,
                                    seed=run.seed, position=work.progress.position)))
    batch = work.engine.to_device(batch)
    work.model.eval()
    with torch.no_grad():
        before = work.engine.sums(batch)
        fresh = build(run.model)
        fresh.to_empty(device=work.engine.device)
        checkpoint.load(saver.last, fresh)
        fresh.use(choice)
        fresh.eval()
        other = Engine(fresh, run.objective, device=work.engine.device, precision=run.precision, micro=1, clip=None, seed=0)
        after = other.sums(batch)
    work.model.train()
    if not torch.allclose(before, after, rtol=1e-5, atol=0):
        raise NumericError(_("the first checkpoint does not reload to the same loss: {a} saved, {b} reloaded").format(
            a=before.tolist(), b=after.tolist()), where=str(saver.last))

