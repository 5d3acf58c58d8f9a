"""`danlu ckpt ls|verify|hash path`: what is on disk, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu import files
from danlu.errors import ConfigError
from danlu.train import checkpoint
from danlu.words import _


def main(action: str, path: Path, *, as_json: bool) -> int:
    """Print a line for each checkpoint; exit 4 if one is damaged.  `hash` prints the hash of the newest weights."""
    if path.name.startswith("step-"):                    # run/step-40 names the checkpoint at step 40
        path = path.with_name(path.name.replace("step-", "checkpoint-"))
    found = [path] if checkpoint.NAME.match(path.name) else checkpoint.listing(path)
    if not found or not found[-1].is_dir():
        raise ConfigError(_("no checkpoint is there"), where=str(path))
    lines = [_describe(each, action) for each in (found[-1:] if action == "hash" else found)]
    for line in lines:
        print(json.dumps(line, ensure_ascii=False) if as_json else _plain(line, action))
    return 4 if any(line["damage"] for line in lines) else 0


def _describe(path: Path, action: str) -> dict[str, Any]:
    damage = checkpoint.verify(path, hashes=action != "ls")
    manifest = {"files": {}} if damage and not (path / "manifest.json").is_file() else files.read_json(path / "manifest.json")
    return {"checkpoint": str(path), "step": manifest.get("step"), "damage": damage,
            "bytes": sum(f["bytes"] for f in manifest["files"].values()), "weights": _weights(path)}


def _weights(path: Path) -> str:
    """Return the hash of the weight file; of several, the hash of their hashes."""
    hashes = [files.sha256(p) for p in sorted([*path.glob("model*.safetensors"), *path.glob("adapter_model.safetensors")])]
    return hashes[0] if len(hashes) == 1 else files.digest(hashes)


def _plain(line: dict[str, Any], action: str) -> str:
    if action == "hash":
        return str(line["weights"])
    state = "; ".join(line["damage"]) or (_("whole, by hash") if action == "verify" else _("whole, by size"))
    return f"{line['checkpoint']}  {line['bytes'] / 1e6:.1f} MB  {state}"
