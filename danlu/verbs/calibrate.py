"""`danlu calibrate`: this machine measured once, so that plans are its own."""

from __future__ import annotations

import json
from pathlib import Path

from danlu.log import count
from danlu.planner.calibrate import measure, write
from danlu.planner.hardware import measured_at
from danlu.words import _


def main(*, out: Path | None, as_json: bool) -> int:
    """Measure, write, and print what was found."""
    found = measure()
    path = write(found, out or measured_at())
    if as_json:
        print(json.dumps({"file": str(path), **json.loads(found.model_dump_json())}))
        return 0
    for name, rate in found.flops.items():
        print(_("products in {precision}: {rate} FLOP/s").format(precision=name, rate=count(rate)))
    print(_("memory: {rate:.1f} GB/s · disk, hashed: {disk:.2f} GB/s · link: {link:.2f} GB/s · a process: {base:.0f} MB").format(
        rate=found.bandwidth / 1e9, disk=found.disk / 1e9, link=(found.link or 0.0) / 1e9, base=found.base / 1e6))
    print(path)
    return 0
