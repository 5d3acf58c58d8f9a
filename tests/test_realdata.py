"""Public data, where DANLU_REALDATA points to it: the figures the docs promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import danlu

RECIPES = Path(__file__).parent.parent / "recipes"
pytestmark = [pytest.mark.realdata, pytest.mark.timeout(900)]


def test_shakespeare_by_characters_ends_below_nanogpt(realdata: Path, tmp_path: Path) -> None:
    """nanoGPT's README gives 1.88 after 2,000 steps, estimated on some batches; here the whole last tenth is measured."""
    data = tmp_path / "data"
    source = f"inputs=[{{path: {realdata}/shakespeare/input.txt, sample_by: document}}]"
    ended = danlu("prepare", RECIPES / "shakespeare.yaml", source, f"out={data}")
    assert ended.code == 0, ended.err
    manifest = json.loads((data / "manifest.json").read_text())
    tokens = {name: sum(e["tokens"] for e in entries) for name, entries in manifest["splits"].items() if entries}
    text = (realdata / "shakespeare" / "input.txt").read_text()
    assert tokens == {"train": int(0.9 * len(text)), "val": len(text) - int(0.9 * len(text))}
    ended = danlu("train", RECIPES / "shakespeare-char.yaml", f"data={data}", f"out={tmp_path / 'run'}", "every.sample=0",
                  timeout=800)
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/loss" in line][-1]
    assert last["step"] == 2000 and last["eval/loss"] <= 1.88


@pytest.mark.parametrize(("name", "text", "rows"), [("train", "text_a", 9600), ("dev", "text_a", 1200), ("test", "text_a", 1200)])
def test_chinese_reviews_are_read_to_the_last_row(realdata: Path, tmp_path: Path, name: str, text: str, rows: int) -> None:
    (tmp_path / "p.yaml").write_text(
        f"out: {tmp_path}/data\ninputs: [{{path: {realdata}/chnsenticorp/{name}.tsv, text: {text}, label: label}}]\n"
        "tokenizer: {kind: bpe, vocab: 2000}\ndedup: none\nsplit: {by: none}\nworkers: 0\n", encoding="utf-8")
    ended = danlu("prepare", tmp_path / "p.yaml", timeout=300)
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["rows"]["read"] == rows
