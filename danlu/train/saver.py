"""Checkpoints as the loop asks for them: copied in memory, written by a thread, the best kept, the first one tried."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from danlu import config, files
from danlu.adapt import QAT, folder
from danlu.errors import NumericError, ResourceError
from danlu.log import duration, say
from danlu.nn import paths
from danlu.parallel.place import place
from danlu.train import adapted, checkpoint, receipt
from danlu.train.feed import Steps
from danlu.train.loop import Progress
from danlu.train.recipe import Run
from danlu.train.setup import Data, Work, first_weights
from danlu.train.shards import Crew
from danlu.train.step import Engine
from danlu.train.writer import Writer
from danlu.words import _


class Saver:
    """Writes checkpoints for the loop: copies the state, lets a thread write it, keeps the best."""

    def __init__(self, run: Run, work: Work, data: Data, choice: paths.Choice, *, last: Path | None = None) -> None:
        self.run, self.work, self.data, self.choice = run, work, data, choice
        self.writer = Writer(run.out, done=self.written, group=work.engine.world.saving)
        self.at: float | None = None
        self.last = last
        self.lost: str | None = None
        crew, self.table = Crew(work.engine.world.saving), adapted.table_of(run)
        self.began: dict[str, Any] = crew.first(lambda: receipt.began_with(run))
        self.adapter = None if run.adapt is None or not adapted.apart(run) else folder.Stored(
            run.adapt, crew.first(lambda: folder.Base.of(run.start or Path())))

    def snapshot(self, progress: Progress, *, own: bool) -> checkpoint.Snapshot:
        """Return the state of the run now."""
        run, work = self.run, self.work
        state = {"global_step": progress.step, "max_steps": work.plan.total, "best_metric": progress.best,
                 "best_global_step": progress.best_step, "progress": progress.record(),
                 "scaler": work.engine.scaler.state_dict() if work.engine.scaler else None}
        facts = {"run": config.dump(run), "tokenizer": self.data.tokenizer.sha256, "data": self.data.fingerprint,
                 "precision": run.precision, "choice": self.choice.record(), **receipt.machine(),
                 "parent": self.last.name if self.last else None, **self.began}
        return checkpoint.snapshot(progress.step, run.model, work.model, work.optimizer, ema=work.ema, state=state,
                                   facts=facts, tokenizer=self.data.folder, copy=self.writer.spare, own=own,
                                   adapter=self.adapter, rounding=run.adapt if isinstance(run.adapt, QAT) else None,
                                   table=self.table)

    def save(self, progress: Progress, wait: bool) -> None:
        """Begin to save, unless this step is on disk; training goes on unless `wait`."""
        self.writer.wait()
        if self.last is None or self.last.name != f"checkpoint-{progress.step}":
            self.writer.submit(self.snapshot(progress, own=not wait), wait=wait)
        self.poll()

    def written(self, path: Path) -> None:
        self.last, self.at = path, time.monotonic()
        if not self.work.engine.world.main:
            return
        best = files.read_json(path / "trainer_state.json")["best_global_step"]      # by now there may be a better one, unsaved
        checkpoint.prune(self.run.out, keep=self.run.every.keep,
                         best=self.run.out / f"checkpoint-{best}" if best is not None else None)

    def growth(self) -> int:
        """Return the bytes of the checkpoint that is being written: while they grow, a wait for it is no hang."""
        return sum(p.stat().st_size for p in self.run.out.glob(".tmp-checkpoint-*/**/*") if p.is_file())

    def age(self) -> str:
        return duration(time.monotonic() - self.at) if self.at is not None else ""

    def kept(self) -> str:
        return self.last.name if self.last is not None else _("the beginning")

    def poll(self) -> None:
        """Tell of a save that failed.  Raises what it failed of if that is the loss of the other processes."""
        error = self.writer.poll()
        if error is None:
            return
        if self.writer.group is not None and isinstance(error, RuntimeError):      # a disk's errors come as ResourceError
            raise error
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
    engine, world = work.plain, work.engine.world
    rows = run.step_rows if run.layout.pp > 1 else run.layout.dp               # a pipeline takes no other number
    batch, _after = next(iter(Steps(work.rows, run.objective, data.tokenizer.special, length=run.length, seed=run.seed,
                                    per_step=rows, position=work.progress.position,
                                    share=(world.index("dp"), run.layout.dp), tight=run.tight)))
    batch = engine.to_device(batch)
    work.model.eval()
    with torch.no_grad():
        before = engine.total(engine.sums(batch))
        fresh = place(run.network, world, run.objective, precision=run.precision, compile=run.compile, length=run.length,
                      rows=run.part_rows, adapt=run.adapt, device=adapted.first_device(run), table=adapted.table_of(run))
        if run.adapt is not None:
            first_weights(run, fresh)
        checkpoint.load(saver.last, fresh)
        other = Engine(fresh.use(choice).eval(), run.objective, precision=run.precision, clip=None, seed=0)
        after = other.total(other.sums(batch))
    work.model.train()
    if not torch.allclose(before, after, rtol=1e-5, atol=0):
        raise NumericError(_("the first checkpoint does not reload to the same loss: {a} saved, {b} reloaded").format(
            a=before.tolist(), b=after.tolist()), where=str(saver.last))
