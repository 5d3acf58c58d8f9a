"""A model by its name on a hub, from the cache that the hub's own library keeps: no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from danlu.models import hub, weights
from danlu.models.build import build
from danlu.models.decoder import Decoder


def test_a_name_is_no_path(tmp_path: Path) -> None:
    assert hub.is_name(Path("owner/model-1.5b"))
    assert not any(hub.is_name(Path(text)) for text in ("model", "/owner/model", "a/b/c", "../b", str(tmp_path)))


@pytest.mark.parametrize("there", [True, False])
def test_a_cached_model_is_found_without_network_and_a_missing_one_is_told(there: bool, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / "abc"
    weights.save(snapshot, build(Decoder(vocab=20, width=8, layers=1, heads=2, context=8)).to_empty(device="cpu").init(0))
    refs = tmp_path / "hub" / "models--owner--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    code = "import sys; from pathlib import Path; from danlu.train import checkpoint; print(checkpoint.chosen(Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, "owner/tiny" if there else "owner/other"], capture_output=True, text=True,
                          check=False, env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    if there:
        assert Path(done.stdout.strip()) == snapshot, done.stderr
    else:
        assert "the hub does not give this model" in done.stderr
