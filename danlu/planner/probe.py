"""A few real steps of a run's own shape, in a process of its own: how long one takes here.

The rows are those of the run, the weights random; nothing is written.  One process alone is measured, as large as one of the
layout's, with its share of the threads: what several say to each other is reckoned.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from danlu import config
from danlu.errors import DanluError, ResourceError
from danlu.words import _

STEPS, SECONDS = 24, 4.0                                 # at most; three at least


def probe(file: Path, overrides: list[str], *, threads: int | None) -> float:
    """Return the median seconds of a step of the recipe.  Raises ResourceError if it cannot be made."""
    words = json.dumps([str(file.resolve()), overrides, threads])
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run([sys.executable, "-m", "danlu.planner.probe", words], capture_output=True, text=True, check=False,
                          env=environment)
    if done.returncode:
        raise ResourceError(_("the probe failed: {why}").format(why=(done.stderr.strip().splitlines() or [""])[-1][:300]),
                            fix=_("leave --probe out"))
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def steps(file: Path, overrides: list[str], threads: int | None) -> list[float]:
    """Make the steps; return the seconds of each of the later half: the first ones make state, kernels and fresh memory."""
    from danlu import parallel
    from danlu.layout import Layout
    from danlu.planner.rows import batches_of
    from danlu.train import setup
    from danlu.train.recipe import Run

    run = config.load(Run, file, overrides)
    device = parallel.start(threads=run.threads or threads, device=run.device, allocator=run.allocator)
    rows = max(1, run.step_rows // run.layout.dp)
    run = run.model_copy(update={"layout": Layout(micro=run.layout.micro), "rows": rows, "tokens": None, "micro_rows": None})
    with tempfile.TemporaryDirectory(prefix="danlu-probe-") as folder:
        run = run.model_copy(update={"out": Path(folder)})
        world = parallel.join(run.layout, device)
        data = setup.open_data(run)
        run, choice = setup.settle(run, data, world, None)
        work = setup.assemble(run, data, setup.make_model(run, choice, world))
        batch = batches_of(run, data).step
        taken: list[float] = []
        began = time.perf_counter()
        while len(taken) < 3 or (len(taken) < STEPS and time.perf_counter() - began < SECONDS):
            at = time.perf_counter()
            work.engine.forward_backward(batch, step=len(taken))
            work.engine.update(work.optimizer, 1e-6, allow=lambda norm: True)
            taken.append(time.perf_counter() - at)
    return taken[len(taken) // 2 :]


if __name__ == "__main__":
    try:
        told = json.loads(sys.argv[1])
        print(json.dumps({"seconds": statistics.median(steps(Path(told[0]), told[1], told[2]))}))
    except DanluError as error:
        sys.exit(str(error))
