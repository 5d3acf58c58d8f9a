"""Every layout gives the losses, norms and gradients of one process: real processes over gloo, float64, four steps.

The steps clip and, where there are micro-batches, accumulate; matrix.py is what each process runs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parallel import matrix

from danlu.layout import Layout

SCRIPT = Path(__file__).with_name("matrix.py")
ADAPTED = ("fsdp", "tp", "pp 1f1b")
HEADED = ("ddp, micro", "hsdp", "cp", "pp interleaved", "pp uneven", "tp+sp×pp")
QUICK = ("ddp", "fsdp", "tp+sp", "cp", "pp 1f1b", "fsdp×tp", "local")


def together(processes: int, *cases: str) -> list[dict[str, Any]]:
    """Run the cases in that many processes; return what the first one and every failing one printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
              "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, str(SCRIPT), *cases], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(processes)]
    try:
        ended = [process.communicate(timeout=1100) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(err[-2000:] for _out, err in ended)
    return [json.loads(line) for out, _err in ended for line in out.splitlines() if line.startswith("{")]


def judge(results: list[dict[str, Any]], expected: int) -> None:
    assert [r for r in results if not max(r["loss"], r["norm"], r["gradient"]) <= 1e-6] == []
    assert len(results) == expected


@pytest.mark.timeout(600)
def test_the_common_layouts_change_nothing() -> None:
    judge(together(4, *QUICK), len(matrix.MODELS) * (len(QUICK) - 1) + 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_common_layouts_change_no_adapter() -> None:
    judge(together(4, "adapters", *ADAPTED), sum(len(matrix.possible(layout_of(case))) for case in ADAPTED))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_common_layouts_change_no_head() -> None:
    quick = ("fsdp", "tp+sp", "pp 1f1b")
    judge(together(4, "heads", *quick), len(matrix.HEADS) * len(quick))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("processes", [4, 8])
def test_no_layout_changes_a_head(processes: int) -> None:
    each = HEADED if processes == 4 else ("dp×tp×pp",)
    judge(together(processes, "heads", *each), len(matrix.HEADS) * len(each))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_layout_changes_an_adapter() -> None:
    each = ("tp+sp", "cp", "fsdp×tp")
    judge(together(4, "adapters", *each), sum(len(matrix.possible(layout_of(case))) for case in each))


def layout_of(case: str) -> Layout:
    return Layout(**{name: value for name, value in matrix.FOUR[case].items() if name != "recompute"})


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("processes", [4, 8])
def test_no_layout_changes_anything(processes: int) -> None:
    cases = matrix.FOUR if processes == 4 else matrix.EIGHT
    judge(together(processes), len(matrix.MODELS) * len(cases) + (processes == 4))
