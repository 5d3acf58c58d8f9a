"""`danlu prepare file.yaml`: files to shards, tokenizer and report."""

from __future__ import annotations

import json
from pathlib import Path

from danlu import config, files
from danlu.data.prepare import Prepare, prepare
from danlu.log import say
from danlu.verbs import needed


def main(file: Path | None, overrides: list[str], *, as_json: bool) -> int:
    """Prepare data as a YAML file says; print the folder, or the report as JSON."""
    folder = prepare(config.load(Prepare, needed(file), overrides), say=say)
    report = files.read_json(folder / "report.json")
    print(json.dumps(report, ensure_ascii=False, indent=1) if as_json else folder)
    return 0
