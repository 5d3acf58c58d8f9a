"""What a process holds after it has let go of tensors, as the system counts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLD = """
import sys
import torch
from danlu import parallel

def held():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

parallel.start(threads=1, device="cpu", allocator=sys.argv[1])
before = held()
taken = [torch.ones(1 << 20) for _ in range(64)]          # 4 MiB each
most = held()
last = taken.pop()                                       # which keeps the heap from shrinking
taken.clear()
print(before, most, held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("allocator", ["keep", "return"])
def test_what_is_freed_stays_or_goes_back(allocator: str) -> None:
    done = subprocess.run([sys.executable, "-c", HOLD, allocator], capture_output=True, text=True, check=True)
    before, most, after = map(float, done.stdout.split())
    assert most - before > 250
    if allocator == "keep":
        assert after - before > 250
    else:
        assert after - before < 16
