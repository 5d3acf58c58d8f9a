"""Choosing among ways: targets, the Pareto front, the cheapest that keeps the quality; and the verb that does it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluate.small import decoder, encoder, table, texts, trained

from danlu import cli
from danlu.compress import folder
from danlu.errors import ConfigError
from danlu.evaluate import tradeoff
from danlu.evaluate.interval import Estimate
from danlu.evaluate.rows import How
from danlu.evaluate.subject import open_subject
from danlu.evaluate.tradeoff import Measured, Target, Way


def one(name: str, size: int, latency: float, value: float, figure: str = "accuracy") -> Measured:
    return Measured(Way(name), size, latency, 1.0, figure, Estimate(value, 0.01, value - 0.02, value + 0.02))


def test_targets_are_read_with_their_units() -> None:
    assert tradeoff.target(["size=50MB", "latency=5ms"]) == Target(size=5e7, latency=5e-3)
    assert tradeoff.target(["size=1.5gb"]) == Target(size=1.5e9) and tradeoff.target([]) == Target()
    for wrong in ("size=50", "speed=3ms", "size=-1MB", "latency=ms", "size=nanMB"):
        with pytest.raises(ConfigError, match="no target"):
            tradeoff.target([wrong])


def test_the_front_holds_what_nothing_beats() -> None:
    found = [one("whole", 100, 5, 0.92), one("half", 50, 6, 0.92), one("worse", 60, 7, 0.90), one("small", 10, 2, 0.80)]
    assert tradeoff.front(found) == {"whole", "half", "small"}


def test_the_cheapest_is_chosen_that_is_as_good_as_the_best() -> None:
    found = [one("whole", 100, 5, 0.92), one("half", 50, 6, 0.915), one("quarter", 25, 4, 0.89), one("small", 10, 2, 0.80)]
    pick = {name: tradeoff.chosen(found, wanted) for name, wanted in {
        "any": Target(), "small": Target(size=30), "quick": Target(latency=5), "none": Target(size=5)}.items()}
    assert {name: best.way.name if best else None for name, best in pick.items()} == {
        "any": "half", "small": "quarter", "quick": "whole", "none": None}
    losses = [one("whole", 100, 5, 9.0, "perplexity"), one("half", 50, 6, 9.01, "perplexity"),
              one("small", 10, 2, 30.0, "perplexity")]
    best = tradeoff.chosen(losses, Target())
    assert best is not None and best.way.name == "half"


def test_the_verb_tries_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tradeoff, "SECONDS", 0.02)
    data = table(tmp_path / "train.csv", ["text", "label"], texts(120, 1))
    run = trained(tmp_path, encoder(tmp_path), [{"path": str(data)}], steps=20)
    test = table(tmp_path / "test.csv", ["text", "label"], texts(40, 2))
    capsys.readouterr()
    whole = folder.size(open_subject(run).folder)
    words = ["compress", str(run), "--data", str(test), "--out", str(tmp_path / "small"), "--target", f"size={whole // 2}B"]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"as it is", "bf16", "int8", "int8 dynamic", "int4 gptq", "layers -50%", "layers -50%, int8 dynamic"} <= {
        way["way"] for way in told["ways"]}
    assert all(way["interval"][0] <= way["quality"] <= way["interval"][1] and way["latency"] > 0 for way in told["ways"])
    best = next(way for way in told["ways"] if way["way"] == told["chosen"])
    assert best["bytes"] == folder.size(tmp_path / "small") <= whole / 2 and best["meets"]
    assert json.loads((tmp_path / "small/compress.json").read_text())["chosen"] == told["chosen"]
    assert cli.main(["eval", str(tmp_path / "small"), "--data", str(test)]) == 0
    capsys.readouterr()
    words[words.index(str(tmp_path / "small"))] = str(tmp_path / "none")
    assert cli.main([*words[:-1], "size=10B", "--only", "int8", "bf16"]) == 2
    seen = capsys.readouterr()
    assert "none of the 2 ways" in seen.err and "int8" in seen.out
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".tmp*"))
    assert cli.main(["compress", str(run), "--data", str(test), "--only", "int5"]) == 2


def test_a_decoder_is_measured_by_its_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tradeoff, "SECONDS", 0.02)
    start = decoder(tmp_path, [text for text, _label in texts(100, 3)])
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text, _label in texts(40, 4)))
    words = ["compress", str(start), "--data", str(lines), "--only", "as it is", "int8", "ffn -50%", "int4 gptq"]
    assert cli.main([*words, "--json"]) == 0
    seen = capsys.readouterr()
    told = json.loads(seen.out)
    assert [way["figure"] for way in told["ways"]] == ["perplexity"] * 4 and "calibrated on rows of" in seen.err
    assert told["ways"][0]["way"] == "as it is"


def test_conversations_are_judged_by_their_answers(tmp_path: Path) -> None:
    start = decoder(tmp_path, [text for text, _label in texts(100, 3)])
    rows = [{"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": text}]}
            for text, _label in texts(8, 4)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure, quality = tradeoff.judged(open_subject(start), str(tmp_path / "chats.jsonl"), How())
    assert figure == "perplexity" and quality.value > 1
