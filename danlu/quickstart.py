"""`danlu quickstart`: the whole way, from text that every Python has to a trained and verified small model, in minutes.

It only calls what the other verbs call; the YAML files it writes repeat it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import danlu
from danlu import chance, config, files, parallel, report
from danlu.data.prepare import Prepare, prepare
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, DataError, NumericError, Stopped
from danlu.evaluate.run import Result, evaluate, read_prepared
from danlu.evaluate.subject import Subject, open_subject
from danlu.log import count, duration, say
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.nn import paths
from danlu.parallel.place import alone
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.step import Engine
from danlu.words import _

OTHER = 45                                               # seconds for all but the training itself, about
SHORTEST = 120                                           # characters of a docstring worth reading
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
PROBES = 10                                              # steps that are timed
FEWEST, MOST = 20, 5000                                  # steps

ROWS, LENGTH, VOCAB = 16, 128, 4096
MODEL: Mapping[str, Any] = {"kind": "decoder", "family": "llama", "context": 256, "tied": True}
SIZE: Mapping[str, int] = {"width": 128, "layers": 4, "heads": 4}

CORPUS = """\
# What `danlu quickstart` prepared; `danlu prepare {file}` repeats it.
# 快速上手的语料：Python 自带的说明文字，加上几篇中文。
"""
PRETRAIN = """\
# What `danlu quickstart` trained; `danlu train {file}` repeats it.
# The steps are what fitted into {minutes:g} minutes on the machine that wrote this.
# 快速上手的模型：约 140 万参数的解码器，从零训练；步数按本机速度算出。
"""


def main(out: Path, *, steps: int | None, minutes: float, as_json: bool) -> int:
    """Do it all, or what is left of it, in the folder `out`; return 0 if the model is better than before training."""
    began = time.monotonic()
    if (steps is not None and steps < 5) or not 0 < minutes < 1e4:     # five hold a warm-up and a decay
        raise ConfigError(_("--steps must be 5 or more, --minutes above 0"), where=_("command line"))
    files.check_writable(out)
    device = parallel.start(threads=None, device="auto")
    try:
        tell_plan(out, device, minutes)
        data = make_data(out)
        run = make_recipe(out, data, device, steps=steps, minutes=minutes)
        tokenizer = Tokenizer.load(data / "tokenizer")
        first = Subject(run.out, tokenizer, fresh_model(run, tokenizer.special.size, device), run)
        before = judge(run, first, "eval_before.json", device)
        last = train(run)
        after = judge(run, open_subject(run.out), "eval_results.json", device)
    except (KeyboardInterrupt, Stopped) as stop:
        again = f"{command()} quickstart" + (f" --out {shlex.quote(str(out))}" if out != Path("quickstart") else "")
        raise Stopped(_("stopped; `{command}` goes on from here").format(command=again),
                      signal=stop.code - 128 if isinstance(stop, Stopped) else 2) from None
    if run.report:
        report.write(run.out)                            # once more: now with what the evaluation found
    tell_result(out, run, before, after, time.monotonic() - began)
    if as_json:
        print(json.dumps({"checkpoint": str(last), "before": before.record()["results"],
                          "after": after.record()["results"], "next": next_commands(out, run)}, ensure_ascii=False))
    last_loss = after.tally.estimates()["loss"]
    if not (last_loss.high or last_loss.value) < before.tally.estimates()["loss"].value:
        raise NumericError(_("the model predicts no better than before training"), where=str(run.out),
                           fix=_("remove {folder} and train longer: --minutes {n:g}").format(folder=out, n=4 * minutes))
    return 0


def tell_plan(out: Path, device: torch.device, minutes: float) -> None:
    """Say what will happen and how long it takes."""
    precision = parallel.fastest(device)
    rate = parallel.peak(device, precision)
    size = sum(p.numel() for p in build(Decoder.model_validate({**MODEL, **SIZE, "vocab": VOCAB})).parameters())
    for line in (
            _("Plan, all in the folder {out}, without network:").format(out=out),
            _("  1 collect text that Python brings (documentation of language and library) and a few Chinese pages"),
            _("  2 prepare it: clean, drop duplicates, hold some out, learn a tokenizer of {n} tokens").format(n=VOCAB),
            _("  3 train a decoder of {n} parameters for about {time} ({rate:.0f} GFLOP/s in {precision} here)").format(
                n=count(size), time=duration(60 * minutes), rate=rate / 1e9, precision=precision),
            _("  4 evaluate it before and after on the held-out text, write a report"),
            _("Expected: about {time} in all.  Ctrl-C stops; the same command goes on.").format(
                time=duration(60 * minutes + OTHER))):
        say(line)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores:
        say(_("other processes are busy (load {load:.1f} on {cores} cores): it will take longer, or learn less").format(
            load=load, cores=cores))


def make_data(out: Path) -> Path:
    """Return the folder of prepared data; what an earlier run left is used."""
    corpus, recipe = out / "corpus", out / "corpus.yaml"
    if not (corpus / "zh.jsonl").is_file():
        corpus.mkdir(exist_ok=True)
        python = python_texts(Path(sysconfig.get_path("stdlib")))
        for name, texts in (("python.jsonl", python), ("zh.jsonl", chinese_texts())):
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            files.write_text(corpus / name, lines)
            say(_("collected {file}: {size:.1f} MB").format(file=corpus / name, size=len(lines.encode()) / 1e6))
    if not recipe.is_file():
        wanted = config.validate(Prepare, {"out": str(out / "data"), "inputs": [str(corpus)], "split": {"val": 0.04},
                                           "tokenizer": {"kind": "bpe", "vocab": VOCAB}})
        files.write_text(recipe, CORPUS.format(file=shlex.quote(str(recipe))) + config.to_yaml(wanted, only_set=True))
    return prepare(config.load(Prepare, recipe), say=say)


def python_texts(root: Path) -> Iterator[str]:
    """Yield Python's help topics and the docstrings of its library in `root`, read from its files; nothing is imported."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):       # a file that is broken on purpose, or in another encoding
            continue
        if path.parent.name == "pydoc_data":
            yield from (node.value.strip() for node in ast.walk(tree)
                        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= SHORTEST)
        else:
            yield from docstrings(tree)


def docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the docstring of `node`, and of the classes and functions defined in it."""
    text = ast.get_docstring(node) or ""
    if len(text) >= SHORTEST:
        yield text
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(inner)


def chinese_texts() -> Iterator[str]:
    """Yield the parts of Danlu's own Chinese pages: those that are packaged, and its documentation in a checkout."""
    package = Path(danlu.__file__).parent
    found = sorted((package / "corpus").glob("*.md")) + sorted((package.parent / "docs" / "zh").glob("*.md"))
    if not found:
        raise DataError(_("the Chinese pages are missing from the installation"), where=str(package / "corpus"),
                        fix=_("install Danlu again"))
    for path in found:
        for part in path.read_text(encoding="utf-8").split("\n## "):
            if part.strip():
                yield part.strip()


def make_recipe(out: Path, data: Path, device: torch.device, *, steps: int | None, minutes: float) -> Run:
    """Return the recipe in out/pretrain.yaml; it is written first if there is none, with the steps that fit the time."""
    recipe = out / "pretrain.yaml"
    if not recipe.is_file():
        seconds, threads = fastest_threads(out, data, device)
        number = steps or min(MOST, max(FEWEST, round(60 * minutes / seconds)))
        say(_("a step takes {ms:.0f} ms here with {threads} threads: {steps} steps, {tokens} tokens, about {time}").format(
            ms=1000 * seconds, threads=threads, steps=number, tokens=count(number * ROWS * LENGTH),
            time=duration(number * seconds)))
        head = PRETRAIN.format(file=shlex.quote(str(recipe)), minutes=minutes)
        files.write_text(recipe, head + config.to_yaml(draft(out, data, number, threads, device), only_set=True))
        say(_("wrote {corpus} and {recipe}, which repeat this").format(corpus=out / "corpus.yaml", recipe=recipe))
    run = config.load(Run, recipe)
    if steps not in (None, run.steps):
        raise ConfigError(_("{recipe} says steps={now}; --steps {wanted} would make another run of it").format(
            recipe=recipe, now=run.steps, wanted=steps), where=_("command line"),
            fix=_("leave --steps out to go on, or remove {folder} to begin anew").format(folder=out))
    return run


def draft(out: Path, data: Path, steps: int, threads: int, device: torch.device) -> Run:
    """Return the recipe of a small Llama; a report is asked for where it can be drawn."""
    drawable = importlib.util.find_spec("matplotlib") is not None
    if not drawable:
        say(_("no report.html will be written: {command} brings it").format(command='pip install "danlu[report]"'))
    return config.validate(Run, {
        "out": str(out / "run"), "data": [{"path": str(data)}],
        "model": {**MODEL, **SIZE},
        "objective": {"kind": "causal_lm"},
        "precision": parallel.fastest(device),           # as measured now: what repeats the run must not measure anew
        "optim": {"kind": "muon", "lr": 0.03, "adam_lr": 0.02, "weight_decay": 0.05},
        "schedule": {"kind": "wsd", "warmup": 0.03, "decay": 0.8, "shape": "linear", "floor": 0.02},
        "steps": steps, "rows": ROWS, "length": LENGTH, "overlong": "split", "threads": threads,
        "every": {"log": max(1, steps // 100), "evaluate": max(1, steps // 6), "save": max(1, steps // 6),
                  "sample": max(1, steps // 3)},
        "report": drawable})


def fastest_threads(out: Path, data: Path, device: torch.device) -> tuple[float, int]:
    """Return (seconds a step, threads): all cores, or one where that is faster.

    Where others keep a core busy, threads wait for the one it holds up: at each of a step's thousand barriers.
    """
    size, found = Tokenizer.load(data / "tokenizer").special.size, []
    for threads in sorted({1, torch.get_num_threads()}, reverse=True):
        torch.set_num_threads(threads)
        found.append((probe(draft(out, data, 1, threads, device), size, device), threads))
    torch.set_num_threads(min(found)[1])
    return min(found)


def probe(run: Run, vocab: int, device: torch.device) -> float:
    """Return the seconds of one step of `run` here, with random tokens: the quarter that nothing disturbed says it."""
    subject = fresh_model(run, vocab, device)
    precision = parallel.fastest(device)
    engine = Engine(alone(subject), run.objective, precision=precision, clip=run.clip, seed=0)
    optimizer = run.optim.build((leaf.name, leaf.local) for leaf in engine.leaves)
    draw, taken = chance.generator(0, "probe"), []
    for step in range(1 + PROBES):
        began = time.perf_counter()
        ids = torch.from_numpy(draw.integers(vocab, size=(ROWS, LENGTH + 1)))
        batch = {"ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "weights": torch.ones(ROWS, LENGTH)}
        engine.forward_backward(batch, step=step)
        engine.update(optimizer, 1e-4, allow=lambda norm: True)
        taken.append(time.perf_counter() - began)
    return float(np.quantile(taken[1:], 0.25))


def fresh_model(run: Run, vocab: int, device: torch.device) -> Any:
    """Return the model of `run` with the weights it starts from."""
    assert run.model is not None
    model: Any = build(run.model.filled(vocab=vocab, heads=run.objective.heads)).to_empty(device=device)
    model.init(run.seed)
    shape = (ROWS, model.cfg.heads, LENGTH, model.cfg.width // model.cfg.heads)
    model.use(paths.choose(device, parallel.DTYPES[parallel.fastest(device)], shape))
    return model.train()


def judge(run: Run, subject: Subject, file: str, device: torch.device) -> Result:
    """Return what the subject scores on the held-out part of the run's data, and keep it in the run folder."""
    folder = run.data[0].folder
    result = evaluate(subject, read_prepared(folder, "val", subject.tokenizer), task=folder.name, device=device)
    run.out.mkdir(parents=True, exist_ok=True)
    files.write_json(run.out / file, result.record())
    return result


def tell_result(out: Path, run: Run, before: Result, after: Result, seconds: float) -> None:
    """Print before and after, where everything is, and what to do next."""
    first, last = before.tally.estimates(), after.tally.estimates()
    table = Table(title=_("the same {n} held-out texts").format(n=len(after.tally.bytes)), title_justify="left")
    for heading in (_("figure"), _("before"), _("after"), _("95 % interval")):
        table.add_column(heading, justify="left" if heading == _("figure") else "right")
    for name, title in (("loss", _("loss")), ("perplexity", _("perplexity")), ("bits_per_byte", _("bits per byte"))):
        one = last[name]
        spread = f"{one.low:.3f} – {one.high:.3f}" if one.low is not None and one.high is not None else "–"
        table.add_row(title, f"{first[name].value:.3f}", f"{one.value:.3f}", spread)
    console = Console(stderr=True, highlight=False)
    console.print(table)
    say(_("done in {time}: model, metrics and receipt are in {folder}").format(time=duration(seconds), folder=run.out))
    if run.report:
        say(_("report: {file}").format(file=run.out / "report.html"))
    say(_("What next:"))
    for line in next_commands(out, run):
        say(f"  {line}")


def next_commands(out: Path, run: Run) -> list[str]:
    """Return commands that work as they stand, from this folder."""
    here, data, recipe = (shlex.quote(str(path)) for path in (run.out, run.data[0].folder, out / "pretrain.yaml"))
    longer = shlex.quote(str(out / "longer"))
    lines = [f'generate {here} --prompt "Return the"', f'generate {here} --prompt "训练模型"', f"eval {here} --data {data}",
             f"inspect {data} --row 17", f"ckpt verify {here}",
             f"train {recipe} steps={4 * (run.steps or 1)} out={longer}"]
    return [f"{command()} {line}" for line in lines]


def command() -> str:
    """Return how this installation of Danlu is called from this shell."""
    found = shutil.which("danlu")
    own = Path(sys.executable).with_name("danlu")
    if found is not None and Path(found).absolute() == own.absolute():
        return "danlu"
    if own.is_file():
        near = own.is_relative_to(Path.cwd())
        return shlex.quote(str(own.relative_to(Path.cwd()) if near else own))
    return f"{shlex.quote(sys.executable)} -m danlu"
