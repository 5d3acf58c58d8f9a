"""What came from what: artefact → checkpoint → base → data → raw files, by the hashes that each receipt tells of the one before.

parity.json   an artefact's files, and those of what it was made from
manifest.json of a checkpoint   its files, the recipe, the data's fingerprint, the files of `start`
danlu_adapter.json   the weights of an adapter's base
manifest.json of prepared data   its shards, its tokenizer's files, the raw files that it was read from
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from danlu import files
from danlu.adapt import folder as adapters
from danlu.data.inputs import HUB
from danlu.data.shards import TEXTS
from danlu.errors import ConfigError, DanluError
from danlu.export.parity import FILE
from danlu.train import checkpoint, receipt
from danlu.words import _

What = Literal["artefact", "checkpoint", "adapter", "model", "config", "data", "tokenizer", "raw file"]
MANIFEST, RUN = "manifest.json", "run.json"


@dataclass
class Told:
    """What one receipt says of a thing's files."""

    by: str                                      # whose receipt
    sha256: dict[str, str | None]                # of each file, by its path inside; None: the receipt has no hash of it
    bytes: dict[str, int] = field(default_factory=dict)      # of files of which only so much was read


@dataclass
class Node:
    """One thing in the line, with what receipts tell of it."""

    what: What
    path: Path
    told: list[Told] = field(default_factory=list)
    made_from: list[Node] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)         # seen while walking, such as a manifest that was edited
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def there(self) -> bool:
        """Whether it is still where it was."""
        return self.path.exists()

    @property
    def sha256(self) -> str | None:
        """The hash that stands for it: its file's, or that of its files' hashes; None where nothing is recorded."""
        known = {name: sha for told in self.told for name, sha in told.sha256.items() if sha is not None}
        return None if not known else next(iter(known.values())) if list(known) == [""] else files.digest(known)


class Walk:
    """Goes back from one thing to all that it came from; each is met once."""

    def __init__(self, start: Path) -> None:
        self.known: dict[Path, Node] = {}
        self.roots: list[Path] = [Path()]        # of relative paths in receipts: here, and where the run was started
        self.start = start

    def nodes(self) -> list[Node]:
        """Return everything met, each after what was made from it."""
        return list(self.known.values())

    def place(self, told: str, near: Path | None = None) -> Path:
        """Return where a path of a receipt leads now; near: a folder that may have been moved together with it."""
        tried = [root / told for root in self.roots]
        tried += [near / "data" / Path(told).name, near / Path(told).name] if near is not None else []
        return next((p for p in tried if p.exists()), Path(told))

    def node(self, path: Path, *, told: Told | None = None, what: What = "model") -> Node:
        """Return what is at `path`, with everything that it came from.  told: what the thing after it says of it."""
        key = path.resolve()
        if key not in self.known:
            self.known[key] = Node(what, path)               # before what it came from: nothing is walked twice
            self._understand(self.known[key])
        found = self.known[key]
        if told is not None:
            found.told.append(told)
        return found

    def _understand(self, node: Node) -> None:
        path = node.path
        if (path / FILE).is_file():
            self._artefact(node)
        elif _is(path / MANIFEST, "step") or (checkpoint.NAME.match(path.name) and (path / MANIFEST).is_file()):
            self._checkpoint(node)
        elif path.name in ("ema", "averaged") and _is(path.parent / MANIFEST, "step"):
            node.made_from.append(self.node(path.parent))
        elif (node.what == "data" and path.exists()) or _is(path / MANIFEST, "splits"):
            self._data(node)
        elif adapters.is_adapter(path):
            self._adapter(node)

    def _artefact(self, node: Node) -> None:
        told = _read(node, FILE)
        node.what = "artefact"
        if files.digest({key: value for key, value in told.items() if key != "fingerprint"}) != told.get("fingerprint"):
            node.changed.append(_("{file}: it was changed, its fingerprint does not fit").format(file=FILE))
        node.told.append(Told(FILE, dict(told.get("files", {}))))
        node.facts["green"] = told.get("green")
        source = told.get("source")
        if source:
            node.made_from.append(self.node(self.place(source["path"], node.path.parent), told=Told(
                f"{node.path.name}/{FILE}", dict(source["sha256"]))))
        elif adapters.is_adapter(node.path):
            self._adapter(node)

    def _adapter(self, node: Node) -> None:
        node.what = "adapter" if node.what == "model" else node.what
        told = _read(node, adapters.OURS) if (node.path / adapters.OURS).is_file() else {}
        base = (told.get("base") or {}).get("path") or _read(node, adapters.CONFIG).get("base_model_name_or_path")
        if base:
            hashes = dict((told.get("base") or {}).get("sha256") or {})
            node.made_from.append(self.node(self.place(str(base)), told=Told(
                f"{node.path.name}/{adapters.OURS}", hashes) if hashes else None))

    def _checkpoint(self, node: Node) -> None:
        """A checkpoint came from its recipe, what it started from, and its data."""
        told, run_folder = _read(node, MANIFEST), node.path.parent
        node.what = "adapter" if adapters.is_adapter(node.path) else "checkpoint"
        node.told.append(Told(MANIFEST, {name: one["sha256"] for name, one in told.get("files", {}).items()}))
        run = told.get("run") or {}
        self._root(run_folder, str(run.get("out") or ""))
        node.facts |= {"step": told.get("step"), "danlu": told.get("danlu"), "code": told.get("code"),
                       "code_here": told.get("code") == receipt.code()}
        node.made_from.append(self._config(run_folder, run))
        start = told.get("start")
        if start:
            node.made_from.append(self.node(self.place(start["path"]), told=Told(
                f"{node.path.name}/{MANIFEST}", dict(start["sha256"]))))
        elif adapters.is_adapter(node.path):
            self._adapter(node)
        elif run.get("start"):                               # of a run before receipts told its hashes
            node.made_from.append(self.node(self.place(str(run["start"]))))
        if told.get("adapter"):                              # that went on learning
            node.made_from.append(self.node(self.place(told["adapter"]["path"]), told=Told(
                f"{node.path.name}/{MANIFEST}", dict(told["adapter"]["sha256"]))))
        recorded = _read(node, RUN, run_folder).get("data", []) if (run_folder / RUN).is_file() else []
        prints = {(Path(one["path"]).name, one["split"]): one["fingerprint"] for one in recorded}
        now = list[str | None]()
        for number, source in enumerate(_sources(run)):
            place = self.place(str(source.get("prepared") or source["path"]), run_folder)
            data = self.node(place, what="data")
            if data not in node.made_from:
                node.made_from.append(data)
            own = data.facts.get("fingerprint")
            here = None if own is None else files.digest([own, source.get("split", "train")])
            then = prints.get((place.name, source.get("split", "train")))
            if here is not None and then is not None and here != then:
                data.changed.append(_("{file}: not the data that {run} was trained on (fingerprint)").format(
                    file=MANIFEST, run=run_folder.name))
            if number < len(_sources(run, eval_too=False)):
                now.append(here)
        if None not in now and told.get("data") and files.digest(now) != told["data"] and not any(
                n.changed for n in node.made_from):
            node.made_from[-1].changed.append(_("{file}: not the data that {run} was trained on (fingerprint)").format(
                file=MANIFEST, run=run_folder.name))

    def _config(self, run_folder: Path, run: Mapping[str, Any]) -> Node:
        """The recipe as it was resolved: the checkpoint's own copy, and run.json's."""
        file = run_folder / RUN
        key = file.resolve()
        if key not in self.known:
            self.known[key] = Node("config", file)
        node = self.known[key]
        node.told = [Told(MANIFEST, {})]
        node.facts["digest"] = files.digest(run)
        if file.is_file():
            for one in receipt.differences(dict(run), _read(node, RUN, run_folder).get("run") or {}):
                if one not in node.changed:
                    node.changed.append(one)
        return node

    def _data(self, node: Node) -> None:
        """Prepared data came from its tokenizer and from raw files."""
        node.what = "data"
        told = _read(node, MANIFEST)
        own = files.digest({key: value for key, value in told.items() if key != "fingerprint"})
        if own != told.get("fingerprint"):
            node.changed.append(_("{file}: it was changed, its fingerprint does not fit").format(file=MANIFEST))
        node.facts["fingerprint"] = told.get("fingerprint")
        hashes: dict[str, str | None] = {e["file"]: e["sha256"] for part in told.get("splits", {}).values() for e in part}
        hashes |= {TEXTS.format(split=split): sha for split, sha in told.get("texts", {}).items()}
        node.told.append(Told(MANIFEST, hashes))
        place = node.path / "tokenizer"
        tokenizer = self.known.setdefault(place.resolve(), Node("tokenizer", place))
        tokenizer.facts["sha256"] = told.get("tokenizer")
        tokenizer.told.append(Told(MANIFEST, dict(told.get("tokenizer_files") or {"tokenizer.json": None})))
        node.made_from.append(tokenizer)
        inputs = told.get("inputs") or [{"path": path} for path in told.get("files", [])]
        for one in inputs:
            node.made_from.append(self._raw(str(one["path"]), one.get("sha256"), one.get("bytes")))

    def _raw(self, told: str, sha256: str | None, size: int | None) -> Node:
        path = Path(told) if told.startswith(HUB) or told == "-" else self.place(told)
        node = self.known.setdefault(path.resolve(), Node("raw file", path))
        node.told.append(Told(MANIFEST, {"": sha256}, {"": size} if size is not None else {}))
        return node

    def _root(self, folder: Path, out: str) -> None:
        """Find out where the run was started, by what it calls its own folder, so that its relative paths lead somewhere."""
        here, parts = folder.resolve(), Path(out).parts
        if out and not Path(out).is_absolute() and here.parts[-len(parts):] == parts:
            root = Path(*here.parts[: -len(parts)])
            if root not in self.roots:
                self.roots.append(root)


def walk(path: Path) -> Walk:
    """Return everything that `path` came from: a run (all its checkpoints and what was made in its folder), or a folder."""
    if not path.is_dir():
        raise ConfigError(_("there is no such folder"), where=str(path), fix=_("give a run, a checkpoint, or an exported folder"))
    found = Walk(path)
    starts = [path]
    if not _is(path / MANIFEST, "step", "splits") and not (path / FILE).is_file() and checkpoint.listing(path):
        made = sorted(p.parent for p in path.glob(f"*/{FILE}"))
        mean = path / "averaged"
        starts = [*made, *([mean] if _is(mean / MANIFEST, "step") else []), *reversed(checkpoint.listing(path))]
    elif not (path / "config.json").is_file() and not adapters.is_adapter(path) and not (path / FILE).is_file() and not _is(
            path / MANIFEST, "step", "splits"):
        raise ConfigError(_("no run, no model and no prepared data is there"), where=str(path))
    for one in starts:
        found.node(one)
    return found


def after(nodes: Sequence[Node], changed: Node) -> Iterator[Node]:
    """Yield what was made from `changed`, nearest first."""
    spoiled, near = [changed], [changed]
    while near:
        near = [n for n in nodes if n not in spoiled and any(parent in near for parent in n.made_from)]
        spoiled += near
        yield from near


def _sources(run: Mapping[str, Any], *, eval_too: bool = True) -> list[dict[str, Any]]:
    """Return what a recipe names as data, in the order of its fingerprint, then what it was judged on."""
    continual = run.get("continual") or {}
    learned = [*run.get("data", []), *((continual.get("replay") or {}).get("data") or [])]
    return [*learned, *(run.get("eval") or [])] if eval_too else learned


def _is(file: Path, *keys: str) -> bool:
    """Return whether a file holds JSON with one of these keys."""
    try:
        told = files.read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and any(key in told for key in keys)


def _read(node: Node, name: str, folder: Path | None = None) -> dict[str, Any]:
    """Return what a receipt says; one that cannot be read is a change."""
    try:
        told = files.read_json((folder or node.path) / name)
    except (OSError, ValueError, DanluError):
        node.changed.append(_("{file}: missing or unreadable").format(file=name))
        return {}
    return told if isinstance(told, dict) else {}
