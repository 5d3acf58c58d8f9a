"""`danlu report run`: curves, figures, samples and origin of a run as one HTML file, without network or script.

Two files of a run folder tell how well a task is done; a key may be missing, a figure that is not a number is null.

eval*.json, as lm-eval writes results, with more beside; TASK is the name of a data set, NAME that of a metric:
    {"results": {TASK: {"NAME,none": 0.91, "NAME_stderr,none": 0.01}}, "intervals": {TASK: {NAME: [0.89, 0.93]}},
     "higher_is_better": {TASK: {NAME: true}}, "report": {TASK: "a table as text"},
     "confusion": {TASK: {"labels": ["bad", "good"], "counts": [[40, 3], [5, 52]]}}}      row: true class, column: predicted
predictions*.jsonl, one line for each row, in any order:
    {"file": "test.csv", "line": 7, "text": "…", "label": "good", "predicted": "bad", "probability": 0.98, "loss": 3.9}
    text, label and predicted may be lists (pairs of texts, several labels) or numbers; probability: of what was predicted;
    loss: of the row, in nats.
"""

from __future__ import annotations

import gettext
import heapq
import importlib.util
import io
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from danlu import files
from danlu.errors import ConfigError
from danlu.figures import direction
from danlu.log import count, duration
from danlu.words import DOMAIN, LOCALE, _

POINTS = 1500                                            # of a curve; more would not be seen
SAMPLES = 12                                             # texts shown: the first, the last and some between
CLASSES = 30                                             # a confusion matrix of more is told as its most frequent mistakes
MISTAKES = 20                                            # shown: the rows of the highest loss, the pairs most often confused
LONGEST = 500                                            # characters shown of a row's text
COLOURS = ("#2563a8", "#c2410c")
STYLE = """
body{font:15px/1.5 system-ui,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;color:#1c2024;
background:#fff;max-width:68rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d9dde1}h3{font-size:1rem}
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
    """Write `run`/report.html from the run's own files; return its path."""
    require()
    if not (run / "run.json").is_file():
        raise ConfigError(_("there is no run in this folder: run.json is missing"), where=str(run),
                          fix=_("give the `out` folder of a training run"))
    record, lines = files.read_json(run / "run.json"), list(files.read_lines(run / "metrics.jsonl"))
    parts = [
        heading(run, record, lines), charts(lines), evaluation(run, lines, record.get("run", {}).get("metric") or "eval/loss"),
        confusions(run), mistakes(run), samples(run), needed(run, record), origin(record), audit(record, lines), recipe(run)]
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
        return drawn(figure)


def drawn(figure: Any, style: str = "") -> str:
    """Return a matplotlib figure as an SVG element without metadata."""
    out = io.StringIO()
    bare = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=bare)
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue()[out.getvalue().index("<svg"):], flags=re.DOTALL)
    return text.replace("<svg", f'<svg style="{style}"', 1) if style else text


def evaluation(run: Path, lines: Sequence[Mapping[str, Any]], metric: str = "eval/loss") -> str:
    """Return the held-out figures at the start, where `metric` was best, and at the end; those of `danlu eval` with intervals."""
    measured = [line for line in lines if "eval/loss" in line]
    out = ""
    if measured:
        first, last = measured[0], measured[-1]
        sign = 1 if direction(metric) else -1
        known = [line for line in measured if line.get(metric) is not None and math.isfinite(float(line[metric]))]
        best = max(known or measured[-1:], key=lambda line: sign * float(line.get(metric) or 0.0))
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


def confusions(run: Path) -> str:
    """Return what was taken for what, of each evaluation that tells it, and its report of each class."""
    out = ""
    for path in sorted(run.glob("eval*.json")):
        found = files.read_json(path)
        tables, told = found.get("confusion", {}), found.get("report", {})
        for task in dict.fromkeys([*tables, *told]):
            out += f"<h3>{escape(f'{path.name} · {task}')}</h3>"
            if task in tables:
                out += confusion([str(name) for name in tables[task]["labels"]], tables[task]["counts"])
            out += (f"<pre>{escape(str(told[task]))}</pre>" if task in told else "") + "\n"
    return section(_("What was taken for what"), out) if out else ""


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return a confusion matrix as an SVG element; of more than 30 classes the pairs most often confused, as a table."""
    if len(labels) <= CLASSES:
        return heat([short(name) for name in labels], counts)
    pairs = ((n, labels[i], labels[j]) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n)
    rows = [[true, guess, f"{n:,}"] for n, true, guess in heapq.nlargest(MISTAKES, pairs, key=lambda pair: pair[0])]
    return table([_("true"), _("predicted"), _("rows")], rows, numbers=True)


def short(name: str, columns: int = 24) -> str:
    """Return a name cut to so many columns, a wide character (Han) taking two."""
    out = ""
    for character in name:
        columns -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns < 0:
            return out + "…"
        out += character
    return out


def heat(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return a confusion matrix as an SVG element: darker, the greater the share of the true class; counts where they fit."""
    import matplotlib
    from matplotlib.figure import Figure

    size = len(labels)
    # the margins are reckoned here: matplotlib cannot measure characters of fonts that only the reader has
    wide = 0.075 * max(sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in name) for name in labels) + 0.45
    side = max(1.2, 0.36 * size)
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "danlu", "font.family": "sans-serif", "text.parse_math": False,
             "font.size": 9}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # glyphs matplotlib's own font lacks: the text stays text
        figure = Figure(figsize=(wide + side + 0.15, wide + side + 0.15))
        box = figure.bbox_inches
        axes = figure.add_axes((wide / box.width, wide / box.height, side / box.width, side / box.height))
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
        axes.set(xticks=[i + 0.5 for i in range(size)], yticks=[i + 0.5 for i in range(size)], aspect="equal")
        axes.set_xticklabels(labels, rotation=90)
        axes.set_yticklabels(labels)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.text(0.5 * (wide + box.width) / box.width, 0.08 / box.height, _("predicted"), ha="center")
        figure.text(0.08 / box.width, 0.5 * (wide + box.height) / box.height, _("true"), va="center", rotation=90)
        for i, row in enumerate(counts):
            for j, n in enumerate(row):
                if n and len(str(n)) <= 5:
                    axes.text(j + 0.5, i + 0.5, str(n), ha="center", va="center", fontsize=9 - max(0, len(str(n)) - 3),
                              color="white" if shares[i][j] > 0.55 else "#1c2024")
        return drawn(figure, f"max-width:{box.width:.2f}in;width:100%")


def mistakes(run: Path) -> str:
    """Return the rows judged wrongly that cost most: where the model was surest, or the label is wrong."""
    out = ""
    for path in sorted(run.glob("predictions*.jsonl")):
        wrong = (line for line in files.read_lines(path) if line.get("label") is not None
                 and line.get("label") != line.get("predicted") and isinstance(line.get("loss"), int | float))
        worst = heapq.nlargest(MISTAKES, wrong, key=lambda line: float(line["loss"]))
        rows = [[f"{line.get('file', '')}:{line.get('line', '')}", plain(line.get("text")), plain(line["label"]),
                 plain(line.get("predicted")), number(line.get("probability")), number(line["loss"])] for line in worst]
        if rows:
            out += f"<h3>{escape(path.name)}</h3>" + table(
                [_("row"), _("text"), _("true"), _("predicted"), _("probability"), _("loss")], rows, numbers=True)
    return section(_("Worst errors"), out) if out else ""


def plain(value: Any) -> str:
    """Return a text, a number or a list of them as text of bounded length."""
    if isinstance(value, list):
        return plain(" | ".join(map(plain, value)))
    text = number(value) if isinstance(value, float) else "" if value is None else str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


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


def needed(run: Path, record: Mapping[str, Any]) -> str:
    """Return what the run needed of memory and time, beside what its plan said if it had one."""
    measured, path = record.get("measured"), run / "plan.json"
    if not measured:
        return ""
    told = files.read_json(path) if path.is_file() else {}
    rows = []
    for name, size in measured["peak"].items():
        said = told.get("phases", {}).get(name, {}).get("resident")
        rows.append([_("{phase}, MB").format(phase=name), "–" if said is None else f"{said / 1e6:,.0f}", f"{size / 1e6:,.0f}"])
    step = told.get("time", {}).get("step")
    if measured["step_seconds"] is not None:
        rows.append([_("a step, seconds"), "–" if step is None else f"{step:.3f}", f"{measured['step_seconds']:.3f}"])
    return section(_("Predicted and actual"), table([_("figure"), _("predicted"), _("actual")], rows, numbers=True))


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
