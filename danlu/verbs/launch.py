"""`danlu launch --render slurm|k8s file.yaml`: the job file that trains a recipe on several machines."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from danlu import config
from danlu.errors import ConfigError
from danlu.train.recipe import Run
from danlu.verbs import needed
from danlu.words import _

MOST = 8                                                 # GPUs that a machine usually has
RESTARTS = 3
NOTICE = 120                                             # seconds between SLURM's warning and its end of the job
PORT = 29500


def main(file: Path | None, overrides: list[str], *, render: str, nodes: int | None, gpus_per_node: int | None, image: str,
         as_json: bool) -> int:
    """Print the job file of a recipe."""
    path = needed(file)
    run = config.load(Run, path, overrides)
    if not run.resume:                                   # a job that is put back into the queue goes on where it was
        run, overrides = run.model_copy(update={"resume": True}), [*overrides, "resume=true"]
    nodes, processes = spread(run.layout.world, nodes, gpus_per_node)
    name = re.sub(r"[^a-z0-9]+", "-", f"danlu-{run.out.name}".lower()).strip("-")[:40].strip("-")
    if render == "slurm":
        text = slurm(name, [str(path), *overrides], nodes=nodes, processes=processes, gpus=run.device != "cpu")
    else:
        text = kubernetes(name, config.to_yaml(run, only_set=True), nodes=nodes, processes=processes,
                          gpus=run.device != "cpu", image=image)
    print(json.dumps({"job": text, "nodes": nodes, "processes": processes}, ensure_ascii=False) if as_json else text,
          end="\n" if as_json else "")
    return 0


def spread(world: int, nodes: int | None, processes: int | None) -> tuple[int, int]:
    """Return (machines, processes of each) for `world` processes.  ConfigError if they do not come out even."""
    if processes is None:
        processes = world // nodes if nodes and world % nodes == 0 else min(world, MOST)
    machines = nodes if nodes is not None else -(-world // max(1, processes))
    if machines < 1 or processes < 1 or machines * processes != world:
        choices = [n for n in range(1, min(world, 64) + 1) if world % n == 0]
        raise ConfigError(
            _("the layout needs {world} processes, and {nodes} nodes with {n} each have {all}").format(
                world=world, nodes=machines, n=processes, all=machines * processes), where="layout",
            fix=_("give --gpus-per-node one of {choices}, or change layout.dp, tp, pp or cp").format(choices=choices))
    return machines, processes


def slurm(name: str, words: list[str], *, nodes: int, processes: int, gpus: bool) -> str:
    """Return a batch script: torchrun once on each node, a checkpoint and a new place in the queue when time is up."""
    asked = f"#SBATCH --gpus-per-node={processes}\n" if gpus else ""
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{asked}#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@{NOTICE}
# Yours to add: --partition, --account, --cpus-per-task, and whatever makes `torchrun` and `danlu` be found on the nodes.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1       # restarts of gloo fail now and then without it
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={NOTICE - 20}         # seconds to save, once the job is told to end

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

told=
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM    # to the steps, not to this shell

srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 \\
  torchrun --nnodes={nodes} --nproc-per-node={processes} --max-restarts={RESTARTS} \\
  --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" \\
  -m danlu train {shlex.join(words)} &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do             # the trap ends a wait early
  wait "$step"
  code=$?
done
if [ -n "$told" ] && [ "$code" -ne 0 ]; then      # out of time, and saved: the same job goes on later
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def kubernetes(name: str, recipe: str, *, nodes: int, processes: int, gpus: bool, image: str) -> str:
    """Return a manifest that needs no operator: the recipe, names for the pods, and an indexed Job of one pod a machine."""
    labels = {"app": name}
    start = (f"exec torchrun --nnodes={nodes} --nproc-per-node={processes} --max-restarts={RESTARTS} --rdzv-backend=c10d "
             f"--rdzv-endpoint={name}-0.{name}:{PORT} --rdzv-id={name} --local-addr=\"$POD_IP\" "
             # pod 0 may not find its own name yet, and the others may be faster than its image
             "--rdzv-conf=is_host=$([ \"$JOB_COMPLETION_INDEX\" = 0 ] && echo true || echo false),read_timeout=900 "
             "-m danlu train /recipe/recipe.yaml")
    container: dict[str, Any] = {
        "name": "danlu", "image": image, "command": ["sh", "-c", start], "workingDir": "/work",
        "env": [{"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"},
                {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(NOTICE - 20)},
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "ports": [{"containerPort": PORT}],
        "volumeMounts": [{"name": "work", "mountPath": "/work"}, {"name": "recipe", "mountPath": "/recipe"},
                         {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": processes}}
    pod = {
        "restartPolicy": "Never", "subdomain": name, "terminationGracePeriodSeconds": NOTICE, "containers": [container],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": "danlu"}},
                    {"name": "recipe", "configMap": {"name": name}},
                    {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    # a pod that is lost is made again under its name, and the others meet it there
    job = {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes, "backoffLimit": RESTARTS * nodes,
           "template": {"metadata": {"labels": labels}, "spec": pod}}
    ports = [{"name": "rendezvous", "port": PORT}]
    parts = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"recipe.yaml": recipe}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
         "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels, "ports": ports}},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job},
    ]
    text = yaml.safe_dump_all(parts, sort_keys=False, allow_unicode=True, width=1000)
    return (f"# Yours to set: the image (with Danlu in it), and the volume claim `danlu` that all pods mount at /work, where\n"
            f"# the recipe's paths begin.  kubectl apply -f this; kubectl logs -f job/{name}\n{text}")
