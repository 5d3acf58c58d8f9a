"""`danlu report run`: curves, figures, samples and origin of a run as one HTML file, without network or script."""

from __future__ import annotations

import gettext
import importlib.util
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from danlu import files
from danlu.errors import ConfigError
from danlu.log import count, duration
from danlu.words import DOMAIN, LOCALE, _

POINTS = 1500                                            # of a curve; more would not be seen
SAMPLES = 12                                             # texts shown: the first, the last and some between
COLOURS = ("#2563a8", "#c2410c")
STYLE = """
body{font:15px/1.5 system-ui,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;color:#1c2024;
background:#fff;max-width:68rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d9dde1}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}
figure{margin:0}figure svg{width:100%;height:auto}figcaption{font-weight:600}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 .9em}
table{border-collapse:collapse;width:100%}td,th{padding:.22rem .6rem;text-align:left;vertical-align:top}
tr:nth-child(odd) td{background:#f4f6f8}th{white-space:nowrap}.n{text-align:right;font-variant-numeric:tabular-nums}
td{overflow-wrap:anywhere}pre{font:13px/1.45 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
background:#f4f6f8;padding:.8rem}
.muted{color:#667085}
"""


def main(run: Path, *, as_json: bool) -> int:
    """Write the report and print where it is."""
    path = write(run)
    print(json.dumps({"report": str(path)}) if as_json else path)
    return 0


def require() -> None:
    """Raise ConfigError unless reports can be drawn; asked before training, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(_("a report needs matplotlib, which is not installed"), where="report",
                          fix='pip install "danlu[report]"')


def write(run: Path) -> Path:
    """Write `run`/report.html from run.json, metrics.jsonl, samples.jsonl and eval*.json; return its path."""
    require()
    if not (run / "run.json").is_file():
        raise ConfigError(_("there is no run in this folder: run.json is missing"), where=str(run),
                          fix=_("give the `out` folder of a training run"))
    record, lines = files.read_json(run / "run.json"), list(files.read_lines(run / "metrics.jsonl"))
    parts = [
        heading(run, record, lines), charts(lines), evaluation(run, lines), samples(run), origin(record),
        audit(record, lines), recipe(run)]
    files.write_text(run / "report.html", page(f"{run.resolve().name} · Danlu", "\n".join(parts)))
    return run / "report.html"


def page(title: str, body: str) -> str:
    """Return a whole HTML page around `body`."""
    language = "zh-CN" if gettext.find(DOMAIN, LOCALE) else "en"
    return (f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n")


def heading(run: Path, record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the title and what one wants to know first."""
    steps = [line for line in lines if "train/loss" in line]
    last = steps[-1] if steps else {}
    taken = lines[-1]["time"] - lines[0]["time"] if lines else 0.0
    state = _("finished") if "ended" in record else _("not finished: step {step}").format(step=last.get("step", 0))
    told = [record["run"]["model"]["kind"], _("{n} parameters").format(n=count(record["parameters"])),
            _("{n} steps").format(n=last.get("step", 0)),
            _("{n} tokens learned from").format(n=count(last.get("tokens", 0))), duration(taken), state]
    return (f"<h1>{escape(str(run.resolve().name))}</h1>\n<p class=muted>{escape(' · '.join(told))}<br>"
            f"{escape(_('began {time}').format(time=record['began']))}</p>")


def charts(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the four charts as inline SVG."""
    train, held = _("training"), _("validation")
    drawn = [
        (_("loss"), {train: curve(lines, "train/loss"), held: curve(lines, "eval/loss")}, False),
        (_("learning rate"), {"": curve(lines, "learning_rate")}, False),
        (_("gradient norm, before clipping"), {"": curve(lines, "grad_norm")}, True),
        (_("tokens a second"), {"": curve(lines, "tokens_per_second")}, False)]
    figures = []
    for title, curves, logarithmic in drawn:
        keys = "".join(f'<span class=key style="background:{colour}"></span>{escape(name)}'
                       for colour, (name, points) in zip(COLOURS, curves.items(), strict=False) if name and points)
        body = svg(list(curves.values()), logarithmic) if any(curves.values()) else paragraph(_("no data"))
        figures.append(f"<figure><figcaption>{escape(title)}{keys}</figcaption>{body}</figure>")
    return f"<h2>{escape(_('Curves'))}</h2>\n<div class=figures>{''.join(figures)}</div>"


def curve(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the (step, value) of a metric, thinned evenly; what is not a finite number is left out."""
    points = [(int(line["step"]), float(line[name])) for line in lines if name in line]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    every = -(-len(points) // POINTS) or 1
    return points[::every] + (points[-1:] if points[::every][-1:] != points[-1:] else [])


def svg(curves: Sequence[Sequence[tuple[int, float]]], logarithmic: bool) -> str:
    """Return a chart as an SVG element; its text stays text, so it shows in the reader's fonts."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "danlu", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, (points, colour) in enumerate(zip(curves, COLOURS, strict=False)):
            if points:
                mark = "o" if number else ""
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, marker=mark, markersize=3)
        if logarithmic and all(value > 0 for points in curves for _step, value in points):
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        out = io.StringIO()
        bare = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=bare)
    return re.sub(r"<metadata>.*?</metadata>", "", out.getvalue()[out.getvalue().index("<svg"):], flags=re.DOTALL)


def evaluation(run: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the held-out figures at the start and at the end, and those of `danlu eval` with their intervals."""
    measured = [line for line in lines if "eval/loss" in line]
    out = ""
    if measured:
        first, last = measured[0], measured[-1]
        best = min(measured, key=lambda line: float(line["eval/loss"]))
        names = [name for name in last if name.startswith("eval/") and not name.endswith("_hex")]
        rows = [[name.removeprefix("eval/"), *(number(line.get(name)) for line in (first, best, last))]
                for name in names]
        heads = [_("figure"), *(_("step {step}").format(step=line["step"]) + f" ({what})" for line, what in (
            (first, _("before")), (best, _("best")), (last, _("after"))))]
        out = table(heads, rows, numbers=True)
    rows = []
    for path in sorted(run.glob("eval*.json")):
        found = files.read_json(path)
        for task, figures in found.get("results", {}).items():
            for name in sorted(n.removesuffix(",none") for n in figures if n.endswith(",none") and "_stderr," not in n):
                low, high = found.get("intervals", {}).get(task, {}).get(name, (None, None))
                spread = f"{number(low)} – {number(high)}" if low is not None else "–"
                rows.append([path.name, task, name, number(figures[f"{name},none"]), spread])
    if rows:
        out += table([_("file"), _("data"), _("figure"), _("value"), _("95 % interval")], rows, numbers=True)
    return section(_("Evaluation"), out or paragraph(_("nothing was held out")))


def samples(run: Path) -> str:
    """Return some of the texts that the model wrote on the way."""
    lines = files.read_lines(run / "samples.jsonl")
    written = {line["step"]: line["text"] for line in lines}            # of one step, the last wins
    steps = sorted(written)
    if len(steps) > SAMPLES:
        steps = [steps[round(i * (len(steps) - 1) / (SAMPLES - 1))] for i in range(SAMPLES)]
    if not steps:
        return ""
    return section(_("Samples"), table([_("step"), _("text")], [[str(step), written[step]] for step in steps]))


def origin(record: Mapping[str, Any]) -> str:
    """Return what the run was made from: data, tokenizer, machine, versions."""
    data = [[str(d["path"]), d["split"], f"{d['documents']:,}", f"{d['tokens']:,}", d["fingerprint"]]
            for d in record["data"]]
    heads = [_("folder"), _("part"), _("documents"), _("tokens"), _("fingerprint")]
    facts = {_("parameters"): f"{record['parameters']:,}", _("tokenizer (SHA-256)"): record["tokenizer"],
             **{str(k): str(v) for k, v in record["machine"].items()},
             **{_("computed by {what}").format(what=k): str(v) for k, v in record["choice"].items()}}
    told = [[name, value] for name, value in facts.items()]
    return section(_("Made from"), table(heads, data) + table([_("fact"), _("value")], told))


def audit(record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """Return what was checked and counted: overlap, documents cut or dropped, updates skipped, rows refused."""
    rows = [[name, value] for name, value in flat(record["audit"])]
    rows.append([_("updates skipped"), str(max((int(line.get("skipped", 0)) for line in lines), default=0))])
    strange = sum("train/loss" in line and not math.isfinite(float(line["train/loss"])) for line in lines)
    rows.append([_("steps whose loss was not a number"), str(strange)])
    for folder in dict.fromkeys(str(d["path"]) for d in record["data"]):
        path = Path(folder) / "report.json"
        if path.is_file():
            told = files.read_json(path)
            rows += [[f"{folder}: {name}", value] for part in ("rows", "rejects", "filters")
                     for name, value in flat({part: told.get(part, {})})]
    return section(_("Audit"), table([_("checked"), _("found")], rows))


def recipe(run: Path) -> str:
    """Return the recipe that repeats the run."""
    path = run / "recipe.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return section(_("Recipe"), f"<pre>{escape(text)}</pre>")


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Return a nested mapping as (dotted name, text)."""
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in flat(inner, f"{name}.{key}" if name else str(key))]
    return [(name, json.dumps(value, ensure_ascii=False))]


def number(value: Any) -> str:
    """Return a figure as text, with four decimals where it has some."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{float(value):,.4f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a table; everything in it is escaped."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(cell(text, numbers) for text in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>\n"


def cell(text: str, numbers: bool) -> str:
    """Return one cell; figures stand to the right."""
    kind = ' class="n"' if numbers and re.fullmatch(r"[-\d.,–\s]+", text) else ""
    return f"<td{kind}>{escape(text)}</td>"


def section(title: str, body: str) -> str:
    """Return a part of the page with its title."""
    return f"<h2>{escape(title)}</h2>\n{body}"


def paragraph(text: str) -> str:
    """Return a line of text."""
    return f"<p class=muted>{escape(text)}</p>"
