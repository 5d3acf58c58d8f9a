"""What `danlu plan` predicts beside what real runs need: peak resident memory of each phase, seconds of a step.

    python -m bench.plan --cells 64 --seed 0 --out plan.jsonl       # goes on where it was interrupted
    python -m bench.plan --only qlora --out plan.jsonl              # cells whose description has this word
    python -m bench.plan --table plan.jsonl                         # the table again, without a run

Every cell is drawn by the seed over all axes, is planned by `danlu plan --probe`, trained by `danlu train` in processes of
its own, and trained again for a step more, so that it resumes.  The run itself measures its peaks (run.json: measured).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from danlu import files

PHASES = ("load", "evaluate", "step", "save", "resume")
PROMISED = ("evaluate", "step", "save", "resume")       # whose bounds are 1 and MOST
MOST, USUAL, NEAR = 1.15, 0.07, 0.15
WHOLE = ("muon", "adafactor", "lamb")                   # optimizers that want whole matrices
STEPS, MOST_STEPS, FLOPS = 5, 60, 2e12                  # steps at least and at most; FLOPs of five, forward and backward, at most
SECONDS, RATE = 3.0, 1e11                               # that steps should last, and FLOP/s by which their number is chosen
LENGTHS = (64, 128, 256, 512, 1024, 2048)
WORDS, HELD_OUT = 700, 0.04
SIZES = ((64, 2, 2), (128, 2, 4), (256, 4, 4), (384, 4, 6), (512, 6, 8), (768, 4, 12), (768, 8, 12))     # width, layers, heads
VOCABULARIES = (1024, 8192, 32000)
OPTIMIZERS = ("adamw", "adamw", "sgd", "momentum", "lion", "adafactor", "lamb", "rmsprop", "adagrad", "muon")
RATES = {"sgd": 1.0, "momentum": 0.1, "rmsprop": 1e-3}   # so that every weight moves in a few steps, and the loss stays above 0
WAYS: dict[str, dict[str, Any]] = {
    "full": {}, "lora": {"adapt": {"kind": "lora", "rank": 8}}, "qlora": {"adapt": {"kind": "lora", "rank": 8, "base": "nf4"}},
    "prompt": {"adapt": {"kind": "prompt", "tokens": 16}, "pack": False}}
PROCESSES: dict[str, dict[str, Any]] = {"1": {}, "2 dp": {"dp": 2}, "2 fsdp": {"dp": 2, "shard": "full"}, "2 tp": {"tp": 2}}


def cell(seed: int, number: int) -> dict[str, Any]:
    """Return the axes of a cell; what cannot be is drawn anew."""
    draw = random.Random(f"{seed}/{number}")
    while True:
        width, layers, heads = draw.choice(SIZES)
        made = {
            "family": draw.choice(("llama", "gpt2", "bert")), "width": width, "layers": layers, "heads": heads,
            "vocab": draw.choice(VOCABULARIES), "length": draw.choice(LENGTHS), "rows": draw.choice((1, 2, 4, 8, 16)),
            "micro": draw.choice((1, 1, 2)), "way": draw.choice(("full", "full", "lora", "qlora", "prompt")),
            "precision": draw.choice(("fp32", "fp32", "bf16")), "recompute": draw.choice(("none", "none", "full", 2)),
            "optim": draw.choice(OPTIMIZERS), "objective": draw.choice(("lm", "lm", "classify")),
            "processes": draw.choice(("1", "1", "1", "2 dp", "2 dp", "2 fsdp", "2 tp")),
            "allocator": draw.choice(("keep", "return"))}
        if possible(made):
            return made


def work(of: dict[str, Any]) -> float:
    """Return about how many FLOPs of fp32 a step would be that takes as long."""
    parameters = 12 * of["layers"] * of["width"] ** 2 + of["vocab"] * of["width"] + 2 * of["layers"] * of["width"] * of["length"]
    slower = (4 if of["precision"] == "bf16" else 1) * (1.3 if of["recompute"] != "none" else 1)
    return float(6 * parameters * of["rows"] * of["length"] * slower)


def steps_of(of: dict[str, Any]) -> int:
    """Return the steps of a cell: short ones are many, since the first seconds of a process differ from the rest."""
    return max(STEPS, min(MOST_STEPS, int(SECONDS / (work(of) / RATE + 0.02))))


def possible(of: dict[str, Any]) -> bool:
    """Return whether the axes go together, and the cell takes seconds."""
    parameters = 12 * of["layers"] * of["width"] ** 2 + of["vocab"] * of["width"] + 2 * of["layers"] * of["width"] * of["length"]
    layout = PROCESSES[of["processes"]]
    alone = of["processes"] == "1"
    return (work(of) * STEPS <= FLOPS
            and 2 * parameters * 10_000 * 3 * (4 if of["precision"] == "bf16" else 1) <= FLOPS
            and of["rows"] % (of["micro"] * layout.get("dp", 1)) == 0
            and (alone or (of["way"] in ("full", "lora") and of["objective"] == "lm"))
            and not (layout.get("shard") and of["optim"] in WHOLE)
            and not (layout.get("tp") and (of["optim"] in WHOLE or of["way"] != "full" or of["family"] == "bert"))
            and (of["way"] != "prompt" or (alone and of["optim"] != "muon")))         # which works on matrices of the blocks


def described(of: dict[str, Any]) -> str:
    """Return a cell in one line."""
    return " ".join(map(str, (
        of["family"], f"{of['width']}×{of['layers']}", f"v{of['vocab']}", f"{of['rows']}×{of['length']}", f"m{of['micro']}",
        of["way"], of["precision"], f"re={of['recompute']}", of["optim"], of["objective"], of["processes"], of["allocator"])))


def kind_of(of: dict[str, Any]) -> str:
    """Return the kind of a cell's model, which is also the name of its tokenizer's folder."""
    return "encoder" if of["family"] == "bert" else "decoder"


def model_of(of: dict[str, Any]) -> dict[str, Any]:
    """Return the section `model` of a cell's recipe."""
    preset = {"gpt2": {"preset": "gpt2"}}.get(of["family"], {})
    return {"kind": kind_of(of), **preset, "width": of["width"], "layers": of["layers"], "heads": of["heads"],
            "context": 2048 + 64, "vocab": of["vocab"]}


def recipe(of: dict[str, Any], place: Path, shared: Path) -> dict[str, Any]:
    """Return the recipe of a cell, whose run folder is in `place`."""
    objective = {"lm": "masked_lm" if of["family"] == "bert" else "causal_lm", "classify": "classify"}[of["objective"]]
    made: dict[str, Any] = {
        "out": str(place / "run"), "data": [{"path": prepared(objective, of, shared)}],
        "objective": {"kind": objective}, "optim": {"kind": of["optim"], "lr": RATES.get(of["optim"], 1e-2)},
        "schedule": {"kind": "constant"}, "rows": of["rows"], "length": of["length"], "steps": steps_of(of),
        "overlong": "cut" if objective == "classify" or of["way"] == "prompt" else "split", "precision": of["precision"],
        "recompute": of["recompute"], "layout": {**PROCESSES[of["processes"]], "micro": of["micro"]}, "device": "cpu",
        "allocator": of["allocator"],
        "audit": {"stop": []}, "every": {"save": steps_of(of) // 2 + 1, "log": 1, "best": False}, "guard": {"spike": 1e9}}
    way = WAYS[of["way"]]
    if way or of["objective"] == "classify":
        return made | {"start": str(started(of, shared))} | way
    return made | {"model": model_of(of)}


def prepared(objective: str, of: dict[str, Any], shared: Path) -> str:
    """Return the folder that `danlu train` has made of the rows: for rows of a class it depends on the length."""
    overlong = "cut" if objective == "classify" or of["way"] == "prompt" else "split"
    folder = shared / f"data-{objective}-{of['length']}-{overlong}-{kind_of(of)}"
    if not folder.exists():
        from danlu.config import validate
        from danlu.train.intake import taken_in
        from danlu.train.recipe import Run

        file = shared / ("rows.csv" if objective == "classify" else "rows.txt")
        made = taken_in(validate(Run, {
            "out": str(shared / "intake"), "data": [{"path": str(file)}], "tokenizer": str(shared / kind_of(of)),
            "objective": {"kind": objective}, "optim": {"kind": "sgd"}, "rows": 1, "steps": 1,
            "schedule": {"kind": "constant"}, "overlong": overlong, "length": of["length"], "held_out": HELD_OUT,
            "model": {"kind": kind_of(of), "width": 8, "layers": 1, "heads": 1, "context": LENGTHS[-1]}}))
        made.data[0].folder.rename(folder)
    return str(folder)


def started(of: dict[str, Any], shared: Path) -> Path:
    """Return a folder with a model of the cell's shape and random weights."""
    from danlu.config import validate
    from danlu.models import weights
    from danlu.models.build import build
    from danlu.models.decoder import Decoder
    from danlu.models.encoder import Encoder

    given = model_of(of)
    folder = shared / f"model-{files.digest(given)[:12]}"
    if not folder.exists():
        kind: Any = Encoder if given["kind"] == "encoder" else Decoder
        heads: tuple[str, ...] = ("mlm",) if given["kind"] == "encoder" else ("lm",)
        cfg = validate(kind, given).filled(vocab=given["vocab"], heads=heads)
        weights.save(folder, build(cfg, "cpu").init(0), tokenizer=shared / kind_of(of))
    return folder


def shared_files(folder: Path) -> Path:
    """Make the tokenizers and the rows that all cells read; every row is longer than the longest length."""
    from danlu.data.kinds import BPE, WordPiece
    from danlu.data.tokenizer import train

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    if (folder / "rows.csv").exists():
        return folder
    words = ["".join(draw.choices("abcdefghij", k=5)) for _word in range(WORDS)]
    texts = [" ".join(draw.choices(words, k=1250)) for _row in range(100)]
    train(texts[:40], BPE(vocab=1000)).save(folder / "decoder")
    train(texts[:40], WordPiece(vocab=1000)).save(folder / "encoder")
    (folder / "rows.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(f"{text},{'ab'[n % 2]}" for n, text in enumerate(texts)),
                                     encoding="utf-8")
    return folder


def danlu(*words: str, seconds: float = 600) -> dict[str, Any]:
    """Return what a verb prints as JSON.  RuntimeError with its last lines if it fails."""
    done = subprocess.run([sys.executable, "-m", "danlu", *words, "--json"], capture_output=True, text=True, timeout=seconds,
                          check=False)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-3:])[-600:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(of: dict[str, Any], shared: Path, *, plan: bool = True, probe: bool = True) -> dict[str, Any]:
    """Plan a cell, train it, resume it; return what was predicted and what was measured."""
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        place = Path(folder)
        made = recipe(of, place, shared)
        file = place / "recipe.json"
        file.write_text(json.dumps(made), encoding="utf-8")
        told = danlu("plan", str(file), *(["--probe"] if probe else [])) if plan else {}
        danlu("train", str(file))
        first = files.read_json(place / "run" / "run.json")["measured"]
        danlu("train", str(file), f"steps={steps_of(of) + 1}")
        again = files.read_json(place / "run" / "run.json")["measured"]
    peaks = {**first["peak"], "resume": again["peak"]["resume"]}
    return {"cell": of, "predicted": told, "peak": peaks, "step_seconds": first["step_seconds"], "seconds": first["seconds"]}


def row(line: dict[str, Any]) -> tuple[dict[str, float], float | None]:
    """Return predicted / measured memory by phase, and the signed error of the step's time."""
    phases = line["predicted"].get("phases", {})
    ratios = {name: phases[name]["resident"] / line["peak"][name] for name in PHASES if line["peak"].get(name) and name in phases}
    seconds = line["predicted"].get("time", {}).get("step")
    return ratios, None if seconds is None else seconds / line["step_seconds"] - 1


def table(lines: list[dict[str, Any]]) -> str:
    """Return the Markdown table and the line that sums it up."""
    out = ["| cell | " + " | ".join(f"{name}, MB | ratio" for name in PHASES) + " | step, s | error |",
           "|---|" + "---|" * (2 * len(PHASES) + 2)]
    for line in lines:
        if "failed" in line:
            out.append(f"| {described(line['cell'])} | {line['failed']} |")
            continue
        ratios, error = row(line)
        told = {name: f"{ratio:.3f}" + ("" if 1 <= ratio <= MOST else " ✗") for name, ratio in ratios.items()}
        marks = [f"{line['peak'].get(name, 0) / 1e6:.0f} | {told.get(name, '–')}" for name in PHASES]
        out.append(f"| {described(line['cell'])} | " + " | ".join(marks) + f" | {line['step_seconds']:.3f} | "
                   + ("–" if error is None else f"{error:+.1%}" + ("" if abs(error) <= NEAR else " ✗")) + " |")
    good = [line for line in lines if "failed" not in line]
    out += ["", f"{len(good)} of {len(lines)} cells ran"]
    for kind in ("return", "keep"):
        for processes, single in (("one process", True), ("two processes", False)):
            chosen = [line for line in good if line["cell"]["allocator"] == kind and (line["cell"]["processes"] == "1") == single]
            out += summed(f"allocator={kind}, {processes}", chosen)
    return "\n".join(out)


def summed(kind: str, lines: list[dict[str, Any]]) -> list[str]:
    """Return what some cells come to: in how many each bound holds, and how far they are off."""
    if not lines:
        return []
    found = [row(line) for line in lines]
    held = sum(all(1 <= ratio <= MOST for name, ratio in ratios.items() if name in PROMISED) for ratios, _error in found)
    spread = []
    for name in PHASES:
        each = sorted(ratios[name] for ratios, _error in found if name in ratios)
        if each:
            inside = sum(1 <= ratio <= MOST for ratio in each)
            spread.append(f"{name} {each[0]:.3f} – {each[-1]:.3f} ({inside} of {len(each)})")
    out = [f"{kind}: memory within 1 – {MOST} in {held} of {len(lines)}: " + " · ".join(spread)]
    errors = [abs(error) for _ratios, error in found if error is not None]
    if errors:
        near = sum(error <= NEAR for error in errors)
        out.append(f"{kind}: time: median error {statistics.median(errors):.1%} (at most {USUAL:.0%}), within "
                   f"{NEAR:.0%} in {near} of {len(errors)}, worst {max(errors):.1%}")
    return out


def main() -> None:
    """Run the cells that are not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("bench-plan.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--replan", action="store_true", help="predict the cells of the file anew; measure nothing")
    parser.add_argument("--no-plan", action="store_true", help="measure only")
    parser.add_argument("--no-probe", action="store_true", help="predict time by calibrated rates alone")
    asked = parser.parse_args()
    if asked.table:
        print(table(list(files.read_lines(asked.table))))
        return
    shared = shared_files(Path(os.environ.get("BENCH_PLAN", tempfile.gettempdir())) / "bench-plan")
    lines = list(files.read_lines(asked.out))
    if asked.replan:
        lines = [replanned(line, shared) for line in lines]
        files.rewrite_lines(asked.out, lines)
        print(table(lines))
        return
    done = {json.dumps(line["cell"], sort_keys=True) for line in lines}
    for number in range(asked.cells):
        of = cell(asked.seed, number)
        if json.dumps(of, sort_keys=True) in done or asked.only not in described(of):
            continue
        print(f"{number}: {described(of)}", file=sys.stderr, flush=True)
        try:
            line = measured(of, shared, plan=not asked.no_plan, probe=not asked.no_probe)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            line = {"cell": of, "failed": str(error)}
            print(f"   failed: {error}", file=sys.stderr, flush=True)
        files.append_line(asked.out, line)
        lines.append(line)
    print(table(lines))


def replanned(line: dict[str, Any], shared: Path) -> dict[str, Any]:
    """Return a line of the file with the cell predicted anew."""
    if "failed" in line:
        return line
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        file = Path(folder) / "recipe.json"
        file.write_text(json.dumps(recipe(line["cell"], Path(folder), shared)), encoding="utf-8")
        try:
            return {**line, "predicted": danlu("plan", str(file))}
        except RuntimeError as error:
            return {"cell": line["cell"], "failed": str(error)}


if __name__ == "__main__":
    main()
