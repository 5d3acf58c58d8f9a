"""Machines: the table says where its figures come from, and names are read as people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from danlu.errors import ConfigError
from danlu.planner import hardware
from danlu.planner.hardware import devices, here, parse


def test_every_device_says_where_its_figures_come_from() -> None:
    assert {"V100-16GB", "V100-32GB", "A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB", "B200-180GB", "RTX3090-24GB",
            "RTX4090-24GB", "Ascend910B-64GB"} <= {one.name for one in devices()}
    for one in devices():
        assert one.sources and all(len(source) > 15 for source in one.sources), one.name
        assert one.price is None                         # prices are the user's
        assert one.link is not None and one.network <= one.link
        halves = {one.flops[name] for name in ("fp16", "bf16") if name in one.flops}
        assert len(halves) <= 1 and all(rate > one.flops.get("fp32", 0) for rate in halves)


@pytest.mark.parametrize(("text", "count", "name"), [
    ("8xH100", 8, "H100-80GB"), ("285xV100", 285, "V100-32GB"), ("4 × A100-40GB", 4, "A100-40GB"),
    ("RTX 4090", 1, "RTX4090-24GB"), ("2*3090", 2, "RTX3090-24GB"), ("1,024xA100", 1024, "A100-80GB"),
    ("昇腾910B", 1, "Ascend910B-64GB"), ("laptop", 1, "laptop")])
def test_machines_by_name(text: str, count: int, name: str) -> None:
    made = parse(text, price=2.5)
    assert (made.count, made.device.name, made.device.price) == (count, name, 2.5)
    assert made.nodes == -(-count // made.device.node)


@pytest.mark.parametrize(("text", "says"), [
    ("8xH10", "did you mean 'H100-80GB'"), ("24x", "is no machine"), ("x", "is no machine"), ("", "is no machine"),
    ("0xH100", "0 devices cannot be"), ("-3xH100", "-3 devices cannot be"), ("1.5xH100", "1.5 devices cannot be"),
    ("99999999xH100", "cannot be"), ("8xtoaster", "unknown device")])
def test_what_is_no_machine(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as told:
        parse(text)
    assert told.value.where == "--hardware" and told.value.code == 2


def test_a_price_that_cannot_be() -> None:
    for price in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="price"):
            parse("8xH100", price=price)


def test_this_machine_by_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    plain = here(path=path)
    assert not plain.calibrated and plain.rate("fp32") == pytest.approx(plain.device.reached * plain.device.flops["fp32"])
    path.write_text(json.dumps({"format": 1, "date": "2026-01-01", "torch": "2.13", "threads": 2, "processor": "x",
                                "flops": {"fp32": 1e11, "bf16": 2e11}, "bandwidth": 1e10, "disk": 5e8, "base": 300_000_000}))
    made = parse("2xhere", path=path)
    assert made.calibrated and made.rate("bf16") == 1e11 and made.base == 300_000_000 and made.disk == 5e8
    assert made.device.memory == plain.device.memory // 2
    path.write_text('{"format": 2}')
    with pytest.raises(ConfigError):
        here(path=path)


def test_where_measurements_lie() -> None:
    assert hardware.measured_at("/x") == Path("/x/danlu/machine.json")
    assert hardware.measured_at("").is_absolute()
