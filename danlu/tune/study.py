"""The study: which values are tried next, by Optuna; what came of each; all of it in a journal that survives a kill."""

from __future__ import annotations

import csv
import fcntl
import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from danlu import chance, config, files
from danlu.config import Model
from danlu.errors import ConfigError, DataError, IncompatibleError, Stopped
from danlu.log import duration, say
from danlu.train.recipe import Run
from danlu.train.signals import Asked, listening
from danlu.tune import space as spaces
from danlu.tune import trial as trials
from danlu.words import _

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError:
    raise ConfigError(_("danlu tune needs optuna, which is not installed"), fix='pip install "danlu[tune]"') from None

FALLING = {"loss", "perplexity", "mse", "mae", "rmse", "bits_per_byte", "error", "cer", "wer"}
STUDY = "danlu"                                          # its name in the journal
HOPELESS = 3                                             # failures in a row that end a study at its start


class Search(Model):
    """What makes a study repeat: the recipe, what is searched, and how."""

    recipe: dict[str, Any]
    space: dict[str, dict[str, Any]]
    metric: str
    direction: Literal["minimize", "maximize"]
    sampler: Literal["tpe", "random", "grid"]
    pruner: Literal["median", "hyperband", "none"]
    seed: int


class Limits(NamedTuple):
    """When a study ends: after so many trials in all, or once no trial may begin after so many seconds."""

    trials: int
    seconds: float | None


class Job(NamedTuple):
    """What every trial needs."""

    file: Path
    overrides: list[str]
    axes: Mapping[str, spaces.Axis]
    search: Search
    out: Path
    run: Run


def direction(metric: str) -> Literal["minimize", "maximize"]:
    """Return whether less or more of a metric is better, by its name."""
    word = metric.rsplit("/", 1)[-1]
    return "minimize" if word in FALLING or word.endswith("_loss") else "maximize"


def study(job: Job, limits: Limits) -> list[FrozenTrial]:
    """Go on with the study in `job.out` until `limits.trials` trials are over; return all of them.

    Stopped if a signal asks; the trial under way goes on from its checkpoint when the study does.
    """
    with alone(job.out):
        made = opened(job, limits.trials)
        total = limits.trials
        if job.search.sampler == "grid":
            total = min(total, len(spaces.points(job.axes, job.search.seed)))
        began = time.monotonic()
        with listening() as asked:
            while over(made) < total and not (limits.seconds is not None and time.monotonic() - began >= limits.seconds):
                one(job, made, total, asked)
                record(job, made)
                if asked.signal:
                    raise Stopped(_("stopped by a signal; the same command goes on from there"), signal=asked.signal)
                refuse_hopeless(made)
        record(job, made)
        return made.get_trials(deepcopy=False)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder: no other study may write there.  Raises ConfigError if one does."""
    files.check_writable(out)
    with (out / "study.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(_("another danlu tune is at work in this folder"), where=str(out),
                              fix=_("wait for it, or choose another --out")) from None
        yield


def opened(job: Job, total: int) -> optuna.Study:
    """Return the study of the folder, new or as it was left.  Raises IncompatibleError if it searched something else."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, about = job.out / "study.log", job.out / "study.json"
    now = config.dump(job.search)
    if about.exists() and path.exists():
        then = files.read_json(about)["search"]
        changed = [key for key in now if now[key] != then.get(key)]
        if changed:
            raise IncompatibleError(
                _("the study in this folder has another {what}").format(what=", ".join(changed)), where=str(about),
                fix=_("give what it began with, or choose another --out"))
        say(_("going on with the study in {folder}").format(folder=job.out))
    mend(path)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileSymlinkLock(str(path))))
    made = optuna.create_study(storage=storage, study_name=STUDY, direction=job.search.direction, load_if_exists=True,
                               pruner=pruner(job, total), sampler=sampler(job, 0))
    record(job, made)
    return made


def mend(path: Path) -> None:
    """Take away what a killed study leaves of its journal: half a line, and the lock."""
    with suppress(FileNotFoundError):
        Path(f"{path}.lock").unlink()
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def sampler(job: Job, number: int) -> optuna.samplers.BaseSampler:
    """Return what draws the values of trial `number`: a function of the seed, the number and the trials before it."""
    seed = chance.torch_seed(job.search.seed, "tune", (number,)) % 2**32
    return optuna.samplers.TPESampler(seed=seed) if job.search.sampler == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def pruner(job: Job, total: int) -> optuna.pruners.BasePruner:
    """Return what stops trials that fall behind."""
    if job.search.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=max(1, min(5, total // 5)))
    if job.search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, job.run.every.evaluate), max_resource=job.run.steps or "auto")
    return optuna.pruners.NopPruner()


def suggest(trial: Trial, key: str, axis: spaces.Axis) -> Any:
    """Return the trial's value on an axis."""
    if isinstance(axis, spaces.Choice):
        return trial.suggest_categorical(key, list(axis.values))
    if axis.whole:
        return trial.suggest_int(key, int(axis.low), int(axis.high), step=int(axis.step or 1), log=axis.log)
    return trial.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log)


def over(made: optuna.Study) -> int:
    """Return how many trials have ended, well or not."""
    return sum(each.state.is_finished() for each in made.get_trials(deepcopy=False))


def one(job: Job, made: optuna.Study, total: int, asked: Asked) -> None:
    """Make one trial, or finish the one that was left; tell the study what came of it."""
    trial = begun(job, made)
    values = {key: suggest(trial, key, axis) for key, axis in job.axes.items()}
    folder = job.out / trials.name(trial.number)
    say(_("trial {n} of {total}: {values}").format(n=trial.number + 1, total=total, values=", ".join(spaces.words(values))))
    before = made.get_trials(deepcopy=False)[trial.number].intermediate_values
    tail = trials.Tail(folder, job.search.metric, after=max(before, default=0))
    started = time.monotonic()

    def hopeless() -> bool:
        for step, value in tail.new():
            if math.isfinite(value):
                trial.report(value, step)
                if step < (job.run.steps or math.inf) and trial.should_prune():
                    return True
        return False

    ended = trials.run([str(job.file), *job.overrides, *spaces.words(values), f"out={folder}", "resume=true"], folder,
                       hopeless=hopeless,
                       asked=asked)
    if asked.signal and ended.code != 0:
        return                                           # it goes on when the study does
    trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
    tell(job, made, trial, ended, tail)


def begun(job: Job, made: optuna.Study) -> Trial:
    """Return the trial that was left under way, or a new one: of a grid its next point, else what the sampler draws."""
    found = made.get_trials(deepcopy=False)
    left = [each for each in found if each.state == TrialState.RUNNING]
    waiting = [each for each in found if each.state == TrialState.WAITING]
    number = left[0].number if left else len(found) - len(waiting)
    made.sampler = sampler(job, number)
    if left:
        return Trial(made, left[0]._trial_id)
    if job.search.sampler == "grid" and not waiting:     # Optuna's own grid can only be walked by its own loop
        made.enqueue_trial(spaces.points(job.axes, job.search.seed)[number])
    return made.ask()


def tell(job: Job, made: optuna.Study, trial: Trial, ended: trials.Ended, tail: trials.Tail) -> None:
    """Write down how a trial ended.  Raises ConfigError if it has no such metric: no other trial would have it."""
    seen = made.get_trials(deepcopy=False)[trial.number].intermediate_values
    label = trials.name(trial.number)
    if ended.pruned:
        made.tell(trial, state=TrialState.PRUNED)
        say(_("{trial}: stopped at step {step}, it fell behind").format(trial=label, step=max(seen)))
    elif ended.code == 0 and seen:
        value = (min if job.search.direction == "minimize" else max)(seen.values())
        made.tell(trial, value)
        say(f"{label}: {job.search.metric} {value:.6g}")
    else:
        missing = ended.code == 0
        why = _("no evaluation gave a finite {metric}").format(metric=job.search.metric) if missing else ended.last
        trial.set_user_attr("exit_code", ended.code)
        trial.set_user_attr("error", why)
        made.tell(trial, state=TrialState.FAIL)
        say(_("{trial}: failed with exit code {code}: {why}").format(trial=label, code=ended.code, why=why))
        if missing and tail.path.exists() and job.search.metric not in tail.names:
            record(job, made)
            raise ConfigError(_("there is no metric {name}; there are {names}").format(
                name=job.search.metric, names=", ".join(sorted(tail.names)) or "–"), where="--metric")


def refuse_hopeless(made: optuna.Study) -> None:
    """Raise DataError if the first trials have all failed: so would the others."""
    ended = [each for each in made.get_trials(deepcopy=False) if each.state.is_finished()]
    if len(ended) == HOPELESS and all(each.state == TrialState.FAIL for each in ended):
        raise DataError(_("the first {n} trials have failed, the last with: {why}").format(
            n=HOPELESS, why=ended[-1].user_attrs.get("error", "")), fix=_("see train.log in the folders of the trials"))


def best(found: list[FrozenTrial], search: Search) -> FrozenTrial | None:
    """Return the best trial that ran to its end; of equals the first."""
    done = [each for each in found if each.state == TrialState.COMPLETE and each.value is not None]
    sign = 1 if search.direction == "minimize" else -1
    return min(done, key=lambda each: (sign * (each.value or 0.0), each.number), default=None)


def rows(found: list[FrozenTrial]) -> list[dict[str, Any]]:
    """Return a line for each trial: number, state, value, steps, seconds, error, and the values tried."""
    return [{"trial": each.number, "folder": trials.name(each.number), "state": each.state.name.lower(),
             "value": each.value if each.state == TrialState.COMPLETE else None,
             "step": max(each.intermediate_values, default=0), "seconds": each.user_attrs.get("seconds"),
             "exit_code": each.user_attrs.get("exit_code"), "error": each.user_attrs.get("error"), "values": each.params}
            for each in found]


def record(job: Job, made: optuna.Study) -> None:
    """Write study.json, trials.csv and, once there is a best trial, best.yaml: the recipe with its values."""
    found = made.get_trials(deepcopy=False)
    lines, top = rows(found), best(found, job.search)
    files.write_json(job.out / "study.json", {"search": config.dump(job.search), "best": top.number if top else None,
                                              "trials": lines})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    plain = [key for key in lines[0] if key != "values"] if lines else []
    writer.writerow([*plain, *job.axes])
    for line in lines:
        writer.writerow([*(line[key] for key in plain), *(line["values"].get(key) for key in job.axes)])
    files.write_text(job.out / "trials.csv", text.getvalue())
    if top is not None:
        run = config.load(Run, job.file, [*job.overrides, *spaces.words(top.params), f"out={job.out / 'best'}"])
        files.write_text(job.out / "best.yaml", config.to_yaml(run, only_set=True))


def took(found: list[FrozenTrial]) -> str:
    """Return the time of all trials, for people."""
    return duration(sum(each.user_attrs.get("seconds", 0) for each in found))
