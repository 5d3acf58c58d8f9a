"""Slow: the page in a real Chromium, driven by playwright; skipped, saying so, where one of the two is not installed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from danlu.serve import page as files
from danlu.serve.keys import Sessions
from tests.evaluate import small
from tests.serve.at import At, serving, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

SAID = ["the furnace learns from text", "丹炉 keeps what it reads"] * 20
HOSTILE = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'


def run(root: Path, name: str, *, lr: float, loss: float, steps: int = 3, **more: Any) -> Path:
    """A run's folder as training leaves it, but for the weights."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({
        "schema": 1, "kind": "train", "began": "2026-01-01T00:00:00+0000", "ended": "2026-01-01T01:00:00+0000", "parameters": 10,
        "run": {"optim": {"kind": "adamw", "lr": lr}, "steps": steps}, "metrics": {"eval/loss": loss}, **more}), encoding="utf-8")
    for step in range(1, steps + 1):
        line(folder, step)
    return folder


def line(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "time": 1.0, "train/loss": 3 / step, "train/loss_hex": "0x1p+0"}) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    one = run(root, "one", lr=0.001, loss=2.5)
    (one / "audit.json").write_text(json.dumps({"passed": True, "findings": [{"what": HOSTILE, "n": 3}]}), encoding="utf-8")
    (one / "plan.json").write_text(json.dumps({"layout": {"dp": 2}, "memory": float("inf")}), encoding="utf-8")
    run(root, "two", lr=0.002, loss=2.25)
    run(root, HOSTILE.replace("/", "\N{FRACTION SLASH}"), lr=0.003, loss=2.0, kind=HOSTILE)
    return root


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Iterator[At]:
    folder = small.decoder(tmp_path_factory.mktemp("decoder"), SAID)
    with serving(folder, sessions=Sessions(), runs=runs) as at:
        yield at


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Iterator[At]:
    pytest.importorskip("captum")
    folder = tmp_path_factory.mktemp("judge")
    start = small.encoder(folder)
    data = small.table(folder / "rows.csv", ["text", "label"], small.texts(60, 1))
    (folder / "run").mkdir()
    trained = small.trained(folder / "run", start, [str(data)], objective="classify", steps=4, length=32, rows=8, seed=1)
    with serving(trained, name="judge", sessions=Sessions(), runs=runs) as at:
        yield at


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """Return what opens the page; at the end nothing may have gone wrong in it, and no request may have left its origin."""
    contexts, asked, wrong = list[Any](), list[tuple[str, str]](), list[str]()

    def open_(at: At, **how: Any) -> Any:
        assert at.door.sessions is not None
        context = chromium.new_context(**({"locale": "en-US"} | how))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda request: asked.append((at.url, request.url)))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        page.goto(f"{at.url}/?token={at.door.sessions.fresh()}")
        page.wait_for_selector("[role=tab][aria-selected=true]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not wrong
    assert all(urlsplit(there).netloc == urlsplit(here).netloc for here, there in asked)


def test_both_languages_say_everything() -> None:
    told = json.loads((files.FILES / "words.json").read_text(encoding="utf-8"))
    assert told["en"].keys() == told["zh"].keys()
    assert all(text.strip() for words in told.values() for text in words.values())
    source = "".join((files.FILES / name).read_text(encoding="utf-8") for name in (*files.SCRIPTS, "index.html", "door.html"))
    used = set(re.findall(r'word\("(\w+)"\)|data-(?:word|label)="(\w+)"', source))
    assert {one or other for one, other in used} <= told["en"].keys()
    assert {path.name for path in files.FILES.glob("*.js")} == set(files.SCRIPTS)


def test_the_token_is_asked_for_and_opens_once(chromium: Any, writer: At) -> None:
    token = writer.door.sessions.fresh()
    with chromium.new_context(locale="en-US") as context:
        page = context.new_page()
        assert page.goto(writer.url).status == 403
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.get_by_text("used already").wait_for()
        page.fill("#token", token)
        page.keyboard.press("Enter")
        page.wait_for_selector("[role=tab][aria-selected=true]")
        assert token not in page.url
    with chromium.new_context(locale="zh-CN") as context:
        page = context.new_page()
        page.goto(f"{writer.url}/?token={token}")
        assert page.get_by_text("一次性令牌").is_visible()


def test_a_curve_grows_while_it_is_looked_at(opened: Any, writer: At, runs: Path) -> None:
    page = opened(writer)
    page.click("[data-run=two]")
    page.wait_for_selector("#run-curve svg[data-points='3']")
    line(runs / "two", 4)
    line(runs / "two", 5)
    page.wait_for_selector("#run-curve svg[data-points='5']")
    assert page.locator("#run-curve polyline").get_attribute("points").count(",") == 5
    assert page.input_value("#run-key") == "train/loss"
    with (runs / "two" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/loss": "nan"}\n' + "[" * 100_000 + "\n")
    page.wait_for_selector("#run-curve svg[data-breaks='1']")
    assert page.locator("#run-curve .broke").text_content() == "nan"
    (runs / "two" / "metrics.jsonl").unlink()            # it went on from an older checkpoint
    for step in (1, 2):
        line(runs / "two", step)
    page.wait_for_selector("#run-curve svg[data-points='2']")


def test_two_runs_are_compared(opened: Any, writer: At) -> None:
    page = opened(writer)
    page.click("#tab-compare")
    page.select_option("#compare-first", "one")
    page.select_option("#compare-second", "two")
    page.wait_for_selector("#compare-table :text('0.002')")
    rows = {row.locator("th").inner_text(): row.locator("td").all_inner_texts()
            for row in page.locator("#compare-table tr").all()[1:]}
    assert rows["recipe.optim.lr"] == ["0.001", "0.002"]
    assert rows["results.eval/loss"] == ["2.5", "2.25"]
    assert "recipe.optim.kind" not in rows
    assert page.locator("#compare-curve polyline").count() == 2


def test_tables_show_text_as_text(opened: Any, writer: At) -> None:
    page = opened(writer)
    page.click("#tab-audit")
    page.select_option("#audit-run", "one")
    page.wait_for_selector("#audit-table table")
    assert HOSTILE in page.inner_text("#audit-table")
    page.select_option("#audit-run", "two")
    page.get_by_text("no such table").wait_for()
    page.click("#tab-plan")
    page.select_option("#plan-run", "one")
    page.get_by_text("Infinity").wait_for()
    assert page.evaluate("window.hurt") is None


def test_hostile_names_and_texts_do_nothing(opened: Any, writer: At) -> None:
    page = opened(writer)
    page.locator("#runs-list button", has_text="onerror").first.click()
    page.wait_for_selector("#run-curve svg")
    page.click("#tab-chat")
    page.fill("#say", HOSTILE)
    page.keyboard.press("Enter")
    until(lambda: page.evaluate("document.querySelector('#stop').disabled && document.querySelectorAll('#turns li').length > 0"))
    assert page.locator("#turns .user").inner_text() == HOSTILE
    assert page.locator("main img, main script").count() == 0 and page.evaluate("window.hurt") is None


def test_a_chat_streams_and_stops(opened: Any, writer: At) -> None:
    page = opened(writer)
    page.click("#tab-chat")
    page.evaluate("""() => { window.lengths = new Set();
        new MutationObserver(() => { const said = document.querySelector('#turns .assistant');
                                     if (said) window.lengths.add(said.textContent.length); })
        .observe(document.querySelector('#turns'), {childList: true, subtree: true, characterData: true}); }""")
    page.fill("#say", "the furnace")
    page.keyboard.press("Enter")
    until(lambda: page.evaluate("window.lengths.size > 3"))
    until(lambda: page.evaluate("document.querySelector('#stop').disabled"))
    page.click("#clear")
    assert page.locator("#turns li").count() == 0


def test_a_text_is_judged_and_explained(opened: Any, judge: At) -> None:
    page = opened(judge)
    page.click("#tab-classify")
    page.fill("#text", "a fine film, not dull")
    page.check("#explain")
    page.click("#judge button")
    page.wait_for_selector("#marked span")
    assert page.locator("#classes tr").count() == 2
    tokens = page.locator("#marked span").all_inner_texts()
    assert any("film" in token for token in tokens)
    assert page.inner_text("#about").removeprefix("Shares are about: ") in ("good", "bad")


def test_everything_is_reached_by_keys(opened: Any, writer: At) -> None:
    page = opened(writer)
    where = "() => document.activeElement.id || document.activeElement.dataset.run || document.activeElement.tagName"
    page.wait_for_selector("#runs-list button")

    def walk() -> list[str]:
        page.evaluate("document.activeElement.blur()")
        seen = list[str]()
        for _n in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(where) in ("BODY", *seen[:1]):
                break
            seen.append(page.evaluate(where))
        return seen

    assert walk()[:4] == ["language", "tab-runs", *page.locator("#runs-list button").evaluate_all(
        "all => all.slice(0, 2).map((one) => one.dataset.run)")]
    page.locator("[data-run=one]").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#run-curve svg")
    page.locator("#tab-runs").focus()
    for name in ("compare", "audit", "plan", "chat", "classify"):
        page.keyboard.press("ArrowRight")
        assert page.evaluate(where) == f"tab-{name}" and page.is_visible(f"#{name}")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#runs")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert [one for one in walk() if one in ("turns", "say", "clear")] == ["turns", "say", "clear"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_never_scroll_sideways(opened: Any, writer: At, scheme: str) -> None:
    page = opened(writer, viewport={"width": 360, "height": 640}, color_scheme=scheme)
    page.locator("#runs-list button", has_text="onerror").first.click()
    page.wait_for_selector("#run-curve svg")
    for name in ("runs", "compare", "audit", "plan", "chat", "classify"):
        page.click(f"#tab-{name}")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
    grey = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--first')").strip()
    assert grey == {"light": "#0b62d6", "dark": "#6cb0ff"}[scheme]


def test_chinese_follows_the_browser_and_is_kept(opened: Any, writer: At) -> None:
    page = opened(writer, locale="zh-CN")
    assert page.inner_text("#tab-compare") == "比较" and page.evaluate("document.documentElement.lang") == "zh-CN"
    page.select_option("#language", "en")
    assert page.inner_text("#tab-compare") == "Compare" and page.evaluate("document.documentElement.lang") == "en"
    page.reload()
    page.wait_for_selector("[role=tab][aria-selected=true]")
    assert page.inner_text("#tab-compare") == "Compare"


def test_no_name_leads_out_of_the_folder(chromium: Any, writer: At, runs: Path, tmp_path: Path) -> None:
    run(tmp_path, "secret", lr=1, loss=1)
    (runs / "link").symlink_to(tmp_path / "secret")
    with chromium.new_context() as context:
        page = context.new_page()
        page.goto(f"{writer.url}/?token={writer.door.sessions.fresh()}")
        for name in ("..", "%2e%2e", "..%2f..", "link", "%2Fetc", "one%2f..%2f..", "%00", "one%00"):
            for part in ("", "/metrics", "/audit", "/run.json"):
                assert context.request.get(f"{writer.url}/page/runs/{name}{part}").status in (403, 404), name
        assert context.request.get(f"{writer.url}/page/runs/one/metrics?from=-1").status == 400
    (runs / "link").unlink()
