"""`danlu explain run --text "…"`: which tokens made a model of a task say what it says, and where its attention lay."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from danlu import files, parallel
from danlu.data.stream import Overlong
from danlu.evaluate import rows
from danlu.evaluate.explain import Explained, explain
from danlu.evaluate.subject import open_subject
from danlu.log import say
from danlu.words import _

STYLE = """body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}
.t span{padding:.1rem .15rem;border-radius:.2rem}table{border-collapse:collapse}td,th{padding:.1rem .6rem;text-align:right}
.m{overflow:auto;max-height:80vh}.m td{width:.9rem;height:.9rem;padding:0}
.m th{font-weight:normal;font-size:.75rem;white-space:pre}"""


def main(run: Path, *, text: str, pair: str | None, target: str | None, word: int | None, out: Path | None, head: str | None,
         overlong: Overlong | None, as_json: bool) -> int:
    """Print the tokens with their shares; `out` takes the same and the attention maps as one HTML file."""
    device = parallel.start(threads=None, device="auto")
    task = rows.task_of(open_subject(run), rows.How(overlong=overlong, head=head), device)
    found = explain(task, (text,) if pair is None else (text, pair), target=target, word=word)
    if out is not None:
        files.write_text(out, page(found, str(task.subject.folder)))
        say(_("explanation: {file}").format(file=out))
    if as_json:
        print(json.dumps({**found.told, "target": found.target, "tokens": found.tokens, "scores": found.scores, "gap": found.gap},
                         ensure_ascii=False))
    elif out is None:
        Console().print(coloured(found), soft_wrap=True)
    return 0


def shade(score: float, most: float) -> tuple[int, int, int]:
    """Return the colour of a token: green where it speaks for what is asked about, red where against."""
    share = min(1.0, abs(score) / most) if most else 0.0
    fade = round(255 - 150 * share)
    return (fade, 255, fade) if score >= 0 else (255, fade, fade)


def coloured(found: Explained) -> Text:
    """Return the tokens for a terminal, with what was asked about before them."""
    most, text = max(map(abs, found.scores), default=0.0), Text(f"{found.target}\n", style="bold")
    for token, score in zip(found.tokens, found.scores, strict=True):
        red, green, blue = shade(score, most)
        text.append(f" {token} ", style=f"black on rgb({red},{green},{blue})")
    text.append("\n")
    for token, score in sorted(zip(found.tokens, found.scores, strict=True), key=lambda one: -abs(one[1]))[:10]:
        text.append(f"{score:+.4f}  {token}\n")
    return text


def page(found: Explained, model: str) -> str:
    """Return one HTML file, without anything from elsewhere."""
    most = max(map(abs, found.scores), default=0.0)
    spans = " ".join(f'<span style="background:rgb{shade(score, most)}" title="{score:+.4f}">{html.escape(token)}</span>'
                     for token, score in zip(found.tokens, found.scores, strict=True))
    maps = "".join(f"<details><summary>{html.escape(_('layer {n}').format(n=number))}</summary><div class=m>"
                   f"{_map(found.tokens, layer)}</div></details>" for number, layer in enumerate(found.attention))
    told = "".join(f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
                   for name, value in found.told.items())
    title = html.escape(_("Why {target}").format(target=found.target))
    note = html.escape(_("Integrated gradients of the logit, beside a text of padding; they miss {gap:.2g} of it.").format(
        gap=found.gap))
    heads = html.escape(_("Attention of each layer, mean of its heads: a row looks at the columns"))
    return (f"<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
            f"<style>{STYLE}</style><h1>{title}</h1><p>{html.escape(model)}</p><table>{told}</table><p class=t>{spans}</p>"
            f"<p><small>{note}</small></p><h2>{heads}</h2>{maps}")


def _map(tokens: list[str], layer: Any) -> str:
    names = [html.escape(token) for token in tokens]
    lines = []
    for name, row in zip(names, layer, strict=True):
        cells = "".join(f'<td style="background:rgba(30,90,200,{share:.3f})" title="{other} {share:.3f}">'
                        for other, share in zip(names, row, strict=True))
        lines.append(f"<tr><th>{name}</th>{cells}")
    return f"<table>{''.join(lines)}</table>"
