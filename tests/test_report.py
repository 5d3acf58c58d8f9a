"""The report: complete, whole without network, and unable to run what stands in the data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from danlu import cli, config, report
from danlu.errors import ConfigError
from danlu.train.recipe import Run
from danlu.train.run import train

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "br", "path", "use", "rect"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, with a hostile name in every text."""
    folder = tmp_path / "run & <b>"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({
        "began": "2026-01-01T00:00:00", "ended": "2026-01-01T00:01:00", "run": {"model": {"kind": "decoder"}},
        "parameters": 2_560_000, "tokenizer": "ab" * 32, "choice": {"attention": "sdpa"}, "machine": {"cpu": EVIL},
        "data": [{"path": EVIL, "split": "train", "documents": 3190, "tokens": 481_814, "fingerprint": "cd" * 32}],
        "audit": {"overlap": {"data/val": 0.0}, "rows": {"split": 820}}}))
    lines: list[dict[str, object]] = [{"step": 0, "time": 1.0, "eval/loss": 8.25, "eval/bits_per_byte": 3.25}]
    for step in range(1, 41):
        lines.append({"step": step, "time": 1.0 + step, "train/loss": 8.0 / step, "learning_rate": 0.01, "grad_norm": 1.5,
                      "tokens_per_second": 900.5, "tokens": 2048 * step, "skipped": 2 if step == 40 else 0})
    lines[20]["train/loss"] = "nan"
    lines += [{"step": 20, "time": 22.0, "eval/loss": 3.125, "eval/bits_per_byte": 1.25},
              {"step": 40, "time": 61.0, "eval/loss": 3.5, "eval/bits_per_byte": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "tor')
    (folder / "samples.jsonl").write_text(json.dumps({"step": 20, "text": EVIL + " 丹炉"}, ensure_ascii=False) + "\n")
    (folder / "eval_results.json").write_text(json.dumps({
        "results": {EVIL: {"alias": "x", "loss,none": 3.0625, "loss_stderr,none": 0.5}},
        "intervals": {EVIL: {"loss": [2.0, 4.0]}}, "report": {EVIL: f"{EVIL} precision"},
        "confusion": {EVIL: {"labels": [EVIL, "$\\frac$ 好评", "x" * 50], "counts": [[40, 3, 0], [5, 521, 1], [0, 0, 0]]}}}))
    lines = [{"file": "a.csv", "line": n, "text": f"{EVIL} row {n} " + "长" * 600 * (n == 3), "label": "bad",
              "predicted": "bad" if n % 2 else "good", "probability": 0.75, "loss": n / 10} for n in range(100)]
    lines.append({"file": "a.csv", "line": 100, "text": ["one", "two"], "label": ["x", "y"], "predicted": [], "loss": 77.125})
    lines += [{"file": "a.csv", "line": 101, "text": "not labelled", "predicted": "bad"},
              {"file": "a.csv", "line": 102, "text": "endless", "label": "bad", "predicted": "good", "loss": None}]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(f"out: {EVIL}\n")
    return folder


class Page(HTMLParser):
    """Collects tags, text, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_it_shows_everything_a_run_knows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert page.open == []
    assert [tag for tag, _a in page.tags].count("svg") == 5             # four curves, one confusion matrix
    for told in ("2.56M parameters", "40 steps", "finished", "ab" * 32, "cd" * 32, "481,814", "820", "丹炉",
                 "8.2500", "3.1250", "3.5000", "2.0000 – 4.0000", "step 20 (best)"):
        assert told in text, told
    cells = re.findall(r"<td[^>]*>(.*?)</td>", (run / "report.html").read_text(encoding="utf-8"))
    assert cells[cells.index("updates skipped") + 1] == "2"
    assert cells[cells.index("steps whose loss was not a number") + 1] == "1"


def test_the_best_is_by_the_metric_of_the_recipe() -> None:
    lines = [{"step": n, "eval/loss": loss, "eval/accuracy": accuracy, "eval/mse": error} for n, loss, accuracy, error in (
        (0, 3.0, 0.25, 9.0), (10, 1.0, None, None), (20, 2.0, 0.75, 4.0), (30, 2.5, 0.5, 4.5))]
    for metric, step in (("eval/loss", 10), ("eval/accuracy", 20), ("eval/mse", 20), ("eval/absent_loss", 30)):
        assert f"step {step} (best)" in report.evaluation(Path("absent"), lines, metric), metric


def test_nothing_in_it_runs_or_is_fetched(run: Path) -> None:
    source = report.write(run).read_text(encoding="utf-8")
    page = Page(source)
    assert {tag for tag, _attributes in page.tags} & {"script", "iframe", "img", "link", "object", "embed", "base"} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert value is not None and value.startswith("#"), (tag, value)
    assert "url(http" not in source and "@import" not in source
    assert EVIL not in source and source.count("alert(&#x27;x&#x27;)") >= 5


def test_the_matrix_and_the_worst_errors_are_told(run: Path) -> None:
    source = report.write(run).read_text(encoding="utf-8")
    text = Page(source).text
    for told in ("40", "521", "$\\frac$ 好评", "x" * 24 + "…", f"{EVIL} precision", f"eval_results.json · {EVIL}"):
        assert told in text, told
    rows = re.findall(r"<td>a\.csv:(\d+)</td><td>(.*?)</td>", source, re.DOTALL)
    assert [int(line) for line, _text in rows] == [100, *range(98, 60, -2)]      # of the wrong ones, by falling loss
    assert rows[0][1] == "one | two" and "<td>x | y</td>" in source
    assert "not labelled" not in source and "endless" not in source
    assert report.plain("长" * 600) == "长" * report.LONGEST + "…"


def test_a_large_matrix_is_told_as_its_mistakes() -> None:
    counts = [[1000 if i == j else i if j == 0 else 0 for j in range(50)] for i in range(50)]
    page = Page(report.confusion([f"class {i}" for i in range(50)], counts))
    assert "svg" not in [tag for tag, _a in page.tags]
    cells = [text for text in page.text if text.strip()][3:]
    assert cells[:6] == ["class 49", "class 0", "49", "class 48", "class 0", "48"] and len(cells) == 3 * report.MISTAKES


@pytest.mark.parametrize("size", [1, 2, 30])
def test_a_matrix_of_any_size_is_drawn(size: int) -> None:
    page = Page(report.confusion([f"类别 {i}" for i in range(size)], [[i * j for i in range(size)] for j in range(size)]))
    assert page.open == [] and f"类别 {size - 1}" in page.text
    assert {tag for tag, _a in page.tags} & {"image", "script"} == set()


def test_curves_hold_the_metrics_and_nothing_else() -> None:
    lines = [{"step": n, "train/loss": "inf" if n == 3 else float(n)} for n in range(1, 5001)]
    points = report.curve(lines, "train/loss")
    assert len(points) <= report.POINTS + 1
    assert points[0] == (1, 1.0) and points[-1] == (5000, 5000.0) and all(step == value for step, value in points)
    assert report.curve(lines, "eval/loss") == []


def test_every_word_of_ours_goes_through_the_catalogue(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_", lambda text: f"«{text}»")
    source = report.write(run).read_text(encoding="utf-8")
    for pattern in (r"<h2>(.*?)</h2>", r"<th>(.*?)</th>", r"<figcaption>(.*?)<"):
        found = re.findall(pattern, source)
        assert found and all("«" in text for text in found), pattern


def test_a_run_that_was_stopped_says_so(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    del record["ended"]
    (run / "run.json").write_text(json.dumps(record))
    assert "not finished: step 40" in report.write(run).read_text(encoding="utf-8")


def test_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"run\.json is missing"):
        report.write(tmp_path)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        report.require()
    assert error.value.fix == 'pip install "danlu[report]"'
    wanted = config.validate(Run, {
        "out": str(tmp_path / "r"), "data": [{"path": "nowhere"}], "model": {"kind": "decoder"}, "steps": 1, "rows": 1,
        "length": 8, "objective": {"kind": "causal_lm"}, "optim": {"kind": "adamw"}, "schedule": {"kind": "cosine"},
        "report": True})
    with pytest.raises(ConfigError, match="matplotlib"):      # before the data is looked for, not after the training
        train(wanted)
