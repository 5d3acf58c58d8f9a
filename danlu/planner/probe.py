"""A few real steps of a run's own shape, in as many processes as it has, with their share of the cores: how long one takes here.

The rows are those of the run, the weights random; nothing is written.
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

import torch

from danlu import config, doctor, files
from danlu.errors import DanluError, ResourceError
from danlu.parallel import World
from danlu.train.recipe import Run
from danlu.words import _

STEPS, SECONDS = 24, 4.0                                 # at most; three at least


def probe(run: Run) -> float:
    """Return the median seconds of a step of a run whose rows are prepared, what its processes say to each other included.

    Raises ResourceError if it cannot be made.
    """
    world, command = run.layout.world, [sys.executable]
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(run.threads)} if run.threads else {})
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        environment = {"OMP_NUM_THREADS": str(max(1, doctor.cores_here() // world)), "GLOO_SOCKET_IFNAME": "lo",
                       "TORCH_CPP_LOG_LEVEL": "FATAL"} | environment
    with tempfile.TemporaryDirectory(prefix="danlu-probe-") as folder:
        file = Path(folder) / "recipe.json"
        files.write_json(file, config.dump(run))
        done = subprocess.run([*command, "-m", "danlu.planner.probe", str(file)], capture_output=True, text=True, check=False,
                              env=environment)
    told = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or not told:
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith((" ", "=", "-", "E1", "W1"))]
        raise ResourceError(_("the probe failed: {why}").format(why=(lines or [""])[-1][:300]), fix=_("leave --probe out"))
    return float(json.loads(told[-1])["seconds"])


def steps(run: Run) -> list[float]:
    """Make the steps; return the seconds of each of the later half: the first ones make state, kernels and fresh memory."""
    from danlu import parallel
    from danlu.planner.rows import batches_of
    from danlu.train import setup

    device = parallel.start(threads=run.threads, device=run.device, allocator=run.allocator)
    with tempfile.TemporaryDirectory(prefix="danlu-probe-") as folder:
        run = run.model_copy(update={"out": Path(folder)})
        world = parallel.join(run.layout, device)
        data = setup.open_data(run)
        run, choice = setup.settle(run, data, world, None)
        work = setup.assemble(run, data, setup.make_model(run, choice, world))
        batch = batches_of(run, data).step
        taken: list[float] = []
        while len(taken) < 3 or (len(taken) < STEPS and agreed(world, sum(taken)) < SECONDS):
            at = time.perf_counter()
            work.engine.forward_backward(batch, step=len(taken))
            work.engine.update(work.optimizer, 1e-6, allow=lambda norm: True)
            taken.append(agreed(world, time.perf_counter() - at))
        parallel.leave()
    return taken[len(taken) // 2 :]


def agreed(world: World, seconds: float) -> float:
    """Return the largest of the seconds of all processes."""
    return seconds if world.size == 1 else float(world.most(torch.tensor([seconds], dtype=torch.float64)))


if __name__ == "__main__":
    try:
        seconds = statistics.median(steps(config.load(Run, Path(sys.argv[1]), [])))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({"seconds": seconds}))
    except DanluError as error:
        sys.exit(str(error))
