"""Every hash that a receipt tells, computed anew: what has changed, what that spoils, and what nobody can tell."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from danlu import files
from danlu.data.tokenizer import Tokenizer
from danlu.errors import DanluError
from danlu.export.lineage import Node, Walk, after
from danlu.words import _

State = Literal["whole", "changed", "spoiled", "gone", "not recorded"]


class Found(NamedTuple):
    """What was found of one thing."""

    node: Node
    state: State
    changed: tuple[str, ...]
    untold: tuple[str, ...]                      # what could not be checked, and why
    spoiled_by: tuple[str, ...]                  # paths

    def record(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {"what": self.node.what, "path": str(self.node.path), "sha256": self.node.sha256, "state": self.state,
                "changed": list(self.changed), "not_checked": list(self.untold), "spoiled_by": list(self.spoiled_by),
                **({"facts": self.node.facts} if self.node.facts else {})}


def check(walk: Walk) -> list[Found]:
    """Return what is left of everything in the line, the last made first."""
    nodes, hashes = walk.nodes(), dict[tuple[Path, int | None], str]()
    looked = {id(node): _look(node, hashes) for node in nodes}
    spoilers: dict[int, list[str]] = {id(node): [] for node in nodes}
    for node in nodes:
        if looked[id(node)][0]:
            for one in after(nodes, node):
                spoilers[id(one)].append(str(node.path))
    found = []
    for node in nodes:
        changed, untold, checked = looked[id(node)]
        state: State = ("changed" if changed else "spoiled" if spoilers[id(node)] else "gone" if not node.there else
                        "whole" if checked else "not recorded")
        found.append(Found(node, state, tuple(changed), tuple(untold), tuple(spoilers[id(node)])))
    return found


def _look(node: Node, hashes: dict[tuple[Path, int | None], str]) -> tuple[list[str], list[str], int]:
    """Return what of a thing has changed, what cannot be told, and how many hashes were computed."""
    changed, untold, checked = list(node.changed), list[str](), 0
    if not node.there:
        return changed, [*untold, _("it is not there any more")], 0
    for told in node.told:
        for name, sha256 in told.sha256.items():
            path, size = node.path / name if name else node.path, told.bytes.get(name)
            shown = name or node.path.name
            if sha256 is None:
                if not _same_rules(node, untold, shown):
                    changed.append(_("{file}: its content has changed (SHA-256)").format(file=shown))
                continue
            if not path.is_file():
                line = _("{file}: missing or unreadable").format(file=shown)
            elif _hash(path, size, hashes) != sha256:
                line = _("{file}: its content has changed (SHA-256)").format(file=shown)
            else:
                checked += 1
                continue
            if line not in changed:
                changed.append(line)
    untold += _unlisted(node)
    if not checked and not changed and node.what != "config":
        untold.append(_("no receipt tells its hash"))
    return changed, untold, checked + (node.what == "config" and "digest" in node.facts)


def _same_rules(node: Node, untold: list[str], name: str) -> bool:
    """Return whether a tokenizer of which only the hash of its rules is known still has them; of others nothing is known."""
    known = node.facts.get("sha256")
    if node.what == "tokenizer" and known:
        try:
            same = Tokenizer.load(node.path).sha256 == known
        except DanluError:
            return False
        untold.append(_("{file}: only the hash of its rules is recorded, not that of the file").format(file=name))
        return same
    untold.append(_("{file}: no hash was recorded").format(file=name))
    return True


def _unlisted(node: Node) -> list[str]:
    """Return files of an artefact or a checkpoint that its receipt does not know."""
    if node.what not in ("artefact", "checkpoint", "adapter") or not node.told:
        return []
    known = {name for told in node.told for name in told.sha256} | {"manifest.json", "parity.json"}
    if not any(told.by in ("manifest.json", "parity.json") for told in node.told):
        return []
    return [_("{file}: no receipt knows it").format(file=name) for name in sorted(
        p.relative_to(node.path).as_posix() for p in node.path.rglob("*") if p.is_file()) if name not in known]


def _hash(path: Path, size: int | None, hashes: dict[tuple[Path, int | None], str]) -> str:
    """Return the hash of a file, or of its first `size` bytes, which is what was read of it."""
    key = (path.resolve(), size)
    if key not in hashes:
        hashes[key] = files.sha256(path) if size is None else _beginning(path, size)
    return hashes[key]


def _beginning(path: Path, size: int) -> str:
    digest, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, files.CHUNK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
