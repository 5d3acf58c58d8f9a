"""`danlu lineage runs/x`: what a run, a checkpoint or an artefact came from, back to the raw files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from danlu.export.lineage import Node, walk
from danlu.words import _

WIDE = 10_000                                            # a file or a pipe gets each line whole


def main(path: Path, *, as_json: bool) -> int:
    """Print everything that `path` came from, with hashes as receipts tell them; `danlu verify` computes them anew."""
    nodes = walk(path).nodes()
    if as_json:
        numbers = {id(node): n for n, node in enumerate(nodes)}
        print(json.dumps([{
            "number": n, "what": node.what, "path": str(node.path), "sha256": node.sha256, "there": node.there,
            "made_from": [numbers[id(parent)] for parent in node.made_from], "facts": node.facts,
            "files": {name: sha for told in node.told for name, sha in told.sha256.items() if name}}
            for n, node in enumerate(nodes)], ensure_ascii=False))
        return 0
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDE)
    parents = {id(parent) for node in nodes for parent in node.made_from}
    for node in nodes:
        if id(node) not in parents:
            console.print(_grown(node, None))
    return 0


def _grown(node: Node, tree: Tree | None) -> Tree:
    """Return the tree with a node, and all that it came from below."""
    here = Tree(Text(said(node))) if tree is None else tree.add(Text(said(node)))
    for parent in node.made_from:
        _grown(parent, here)
    return here if tree is None else tree


def said(node: Node) -> str:
    """Return the line of one thing: what and where it is, and the beginning of its hash."""
    known = node.sha256 or node.facts.get("digest") or node.facts.get("fingerprint")
    mark = _("no hash recorded") if known is None else str(known)[:12]
    gone = "" if node.there else _(", not there any more")
    return _("{what}  {path}  {mark}{gone}").format(what=node.what, path=node.path, mark=mark, gone=gone)
