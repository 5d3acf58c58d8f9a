"""What `danlu doctor` says, against what the system says."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from danlu import cli, doctor, parallel


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[tuple[str, str], dict[str, object]]]:
    code = cli.main(["doctor", "--json", *words])
    return code, {(fact["topic"], fact["name"]): fact for fact in json.loads(capsys.readouterr().out)}


def test_it_tells_versions_speed_and_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (parallel, parallel.device):
        monkeypatch.setattr(module, "peak", lambda device, precision: {"fp32": 100e9, "bf16": 250e9}[precision])
    code, facts = run(capsys)
    assert code == 0
    assert facts["versions", "torch"]["value"] == torch.__version__
    assert str(len(os.sched_getaffinity(0))) in str(facts["processor", "cores"]["value"])
    assert facts["speed", "matrix products, fp32"]["value"] == "100 GFLOP/s"
    assert str(facts["speed", "precision: auto"]["value"]).startswith("bf16: bf16 is 2.5 times")
    assert facts["files", str(tmp_path)]["good"] and {name for topic, name in facts if topic == "extras"} == {
        "parquet", "zstd", "hub", "report", "tensorboard", "metrics", "tune", "bnb", "serve"}
    assert cli.main(["doctor"]) == 0 and "GFLOP/s" in capsys.readouterr().out


def test_a_missing_extra_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    told = {fact.name: fact.value for fact in doctor.extras()}
    assert told == {name: f'not installed: pip install "danlu[{name}]"' for name in doctor.EXTRAS}


def test_limits_of_the_control_group_count(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"/sys/fs/cgroup/cpu.max": ["150000 100000"], "/sys/fs/cgroup/memory.max": ["2000000000"],
            "/sys/fs/cgroup/memory.current": ["500000000"],
            "/proc/meminfo": ["MemTotal: 16000000 kB", "MemAvailable: 9000000 kB"]}
    monkeypatch.setattr(doctor, "_lines", lambda path: told.get(path, []))
    assert doctor.cpu_quota() == 1.5
    assert doctor.memory() == (2_000_000_000, 1_500_000_000)
    told["/sys/fs/cgroup/cpu.max"] = ["max 100000"]
    assert doctor.cpu_quota() is None


def test_nothing_listens_until_something_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "--security")[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, facts = run(capsys, "--security")
        assert code == 7 and str(server.getsockname()[1]) in str(facts["network", "listening sockets"]["value"])


def test_folders_that_others_may_change_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder = tmp_path / "runs" / "x"
    run_folder.mkdir(parents=True)
    (run_folder / "run.json").write_text("{}")
    (run_folder / "run.json").chmod(0o600)
    run_folder.chmod(0o700)
    code, facts = run(capsys, "--security")
    assert code == 0 and facts["folders", str(run_folder)]["value"] == "only you and your group"
    (run_folder / "run.json").chmod(0o666)
    (run_folder / "old.pt").write_bytes(b"")
    code, facts = run(capsys, "--security")
    assert code == 7 and facts["folders", str(run_folder)]["fix"] in (
        f"chmod -R o-w {run_folder}", "remove them, or keep them elsewhere")
    assert cli.main(["doctor", "--security"]) == 7
    assert f"chmod -R o-w {run_folder}" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    fact = next(iter(doctor.surroundings(file)))
    assert not fact.good and fact.fix
