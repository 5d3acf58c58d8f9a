"""What all tests share: the folder of helpers on the path, real data if there is any."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The public data sets; skips, saying so, where DANLU_REALDATA does not point to them."""
    folder = os.environ.get("DANLU_REALDATA")
    if not folder:
        pytest.skip("DANLU_REALDATA is not set: no real data here")
    return Path(folder)
