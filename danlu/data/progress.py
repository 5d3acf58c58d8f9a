"""What an unfinished preparation has done, so that another process goes on from there; and which folder is whose.

progress.json is written atomically, last, at each commit.  It names, under `.unfinished/`, the rows that are in no
shard yet, and how much of the append-only files counts; what was written after a commit is cut off by the one that
resumes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from danlu import files
from danlu.data import mapped
from danlu.data.blocks import Reject
from danlu.data.dedup import Digests, Seen
from danlu.data.inputs import File
from danlu.data.shards import Entry, read_manifest
from danlu.data.shelf import Shelf
from danlu.data.split import NAMES
from danlu.errors import ConfigError, DataError
from danlu.words import _

HIDDEN = ".unfinished"
HALF = re.compile(r"\.(\d{5,}\.safetensors|(manifest|report|progress)\.json|rejects\.jsonl)\.[0-9a-f]{8}")      # of files.py
SEEN = np.dtype([("key", "<u8", 2), ("note", "u1")])            # one line of seen.bin: 17 bytes
FREE = ("rejects", "split.strict")                              # settings that change no row of the result


@contextmanager
def alone(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder for this process.  Raises ConfigError when another one prepares it, unless it may `wait`."""
    with (out / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(_("another process prepares this folder"), where=str(out),
                              fix=_("wait for it, or choose another `out`")) from None
        yield


def differences(old: Mapping[str, Any], new: Mapping[str, Any], under: str = "") -> list[str]:
    """Return the dotted keys whose values differ, those aside that change no row."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, before, after = f"{under}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        elif before != after and name not in FREE:
            found.append(name)
    return found


def sizes(found: Sequence[File]) -> list[dict[str, Any]]:
    """Return what tells one state of the inputs from another without reading them."""
    return [{"path": file.path, "bytes": file.size} for file in found]


def finished(out: Path, config: Mapping[str, Any], found: Sequence[File]) -> bool:
    """Say whether the folder holds just this preparation.  Raises ConfigError when it holds another."""
    if not (out / "manifest.json").exists():
        return False
    manifest = read_manifest(out)
    _same(out, manifest["config"], config)
    known, now = manifest["inputs"], sizes(found)
    if [one["path"] for one in known] != [one["path"] for one in now]:
        raise ConfigError(_("the folder was prepared from other files"), where=str(out), fix=_redo())
    for before, after in zip(known, now, strict=True):
        if after["bytes"] not in (None, before["bytes"]):
            raise ConfigError(_("{path} has changed since the folder was prepared").format(path=after["path"]),
                              where=str(out), fix=_redo())
    return True


def _same(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if keys := differences(old, new):
        raise ConfigError(_("the folder was prepared with another configuration: {keys} differ").format(
            keys=", ".join(keys)), where=str(out), fix=_redo())


def _redo() -> str:
    return _("choose another `out`, or set overwrite: true to do it again")


def clear(out: Path) -> None:
    """Remove what a preparation writes, and nothing else; the manifest first, so that no half of it looks whole."""
    for name in ("manifest.json", "report.json", "rejects.jsonl"):
        (out / name).unlink(missing_ok=True)
    files.fsync_dir(out)
    shutil.rmtree(out / HIDDEN, ignore_errors=True)
    for split in NAMES:
        prune(out, split, keep=0)
    (out / "progress.json").unlink(missing_ok=True)


def prune(out: Path, split: str, *, keep: int) -> None:
    """Remove the shards of a split from number `keep` on, and the folder if nothing is left."""
    folder = out / split
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        if re.fullmatch(r"\d{5,}", path.stem) and int(path.stem) >= keep:
            path.unlink()
    sweep(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def sweep(folder: Path) -> None:
    """Remove what a process that was killed had half written; only who holds `alone` may."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        if HALF.fullmatch(path.name):
            path.unlink()


def _refuse_strangers(out: Path) -> None:
    """Raise ConfigError when the folder holds shards of which nothing says what they are."""
    for split in NAMES:
        if any((out / split).glob("[0-9]*.safetensors")):
            raise ConfigError(_("the folder holds shards, but no manifest says what they are"), where=str(out / split),
                              fix=_redo())


class Progress:
    """The state of an unfinished preparation in `out`; `state` is what progress.json holds."""

    def __init__(self, out: Path, config: Mapping[str, Any], found: Sequence[File], *, overwrite: bool) -> None:
        self.out, self.hidden = out, out / HIDDEN
        inputs = [one | {"time": file.mtime} for one, file in zip(sizes(found), found, strict=True)]
        path = out / "progress.json"
        old = files.read_json(path) if path.exists() else {}
        if old.get("commit") and not overwrite:
            _same(out, old["config"], config)
            if old["inputs"] != inputs:
                raise ConfigError(_("the inputs have changed since this preparation was interrupted"), where=str(out),
                                  fix=_redo())
        if not old and not overwrite:
            _refuse_strangers(out)
        if not old or differences(old["config"], config) or old["inputs"] != inputs:
            clear(out)
            old = {"config": config, "inputs": inputs}
        self.state: dict[str, Any] = old
        self.hidden.mkdir(exist_ok=True)
        self.save()
        self._logs: dict[str, BinaryIO] = {}

    def save(self, **more: Any) -> None:
        """Write progress.json with `more` in it."""
        self.state |= more
        files.write_json(self.out / "progress.json", self.state)

    def open_logs(self) -> None:
        """Open rejects.jsonl and seen.bin where the last commit left them."""
        lengths = self.state.get("commit", {}).get("logs", {})
        for name, path in ("rejects", self.out / "rejects.jsonl"), ("seen", self.hidden / "seen.bin"):
            file = path.open("ab")
            file.truncate(lengths.get(name, 0))
            file.seek(0, os.SEEK_END)
            self._logs[name] = file

    def log(self, rejects: Sequence[Reject], name: str, keys: Digests, notes: NDArray[np.uint8]) -> None:
        """Append rejects of the file `name`, and fingerprints that are new."""
        for reject in rejects:
            line = {"file": name, "line": reject.line, "reason": reject.reason, "detail": reject.detail}
            text = json.dumps(line, ensure_ascii=False) + "\n"
            self._logs["rejects"].write(text.encode("utf-8", "backslashreplace"))
        if len(keys):
            lines = np.empty(len(keys), SEEN)
            lines["key"], lines["note"] = keys, notes
            self._logs["seen"].write(lines.tobytes())

    def commit(self, shelves: Mapping[str, Shelf], **more: Any) -> None:
        """Make everything so far durable, in an order in which a kill at any point leaves a whole state."""
        number = self.state.get("commit", {}).get("number", 0) + 1
        held = {}
        for split, shelf in shelves.items():
            name = f"held-{split}-{number}.safetensors"
            size, _sha256 = mapped.write(self.hidden / name, shelf.held())
            held[split] = {"file": name, "bytes": size, "entries": [entry._asdict() for entry in shelf.entries]}
        logs = {}
        for name, file in self._logs.items():
            file.flush()
            os.fsync(file.fileno())
            logs[name] = file.tell()
        self.save(commit={"number": number, "held": held, "logs": logs, **more})
        for path in self.hidden.glob("held-*.safetensors"):
            if path.name not in {one["file"] for one in held.values()}:
                path.unlink()

    def restore(self, shelves: Mapping[str, Shelf], seen: Seen | None) -> None:
        """Bring shelves and fingerprints to the last commit; drop shards written after it."""
        commit = self.state.get("commit")
        for split, shelf in shelves.items():
            if commit:
                one = commit["held"][split]
                entries = [Entry(**entry) for entry in one["entries"]]
                self._check(entries)
                shelf.restore(entries, mapped.read(self.hidden / one["file"], one["bytes"]))
            prune(self.out, split, keep=len(shelf.entries))
        sweep(self.out)
        if commit and seen is not None:
            left = commit["logs"]["seen"]                       # what lies beyond was written after the commit
            with (self.hidden / "seen.bin").open("rb") as file:
                while data := file.read(min(left, SEEN.itemsize << 16)):
                    left -= len(data)
                    lines = np.frombuffer(data, SEEN)
                    seen.add(np.ascontiguousarray(lines["key"]), np.ascontiguousarray(lines["note"]))

    def _check(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            path = self.out / entry.file
            if not path.exists() or path.stat().st_size != entry.bytes:
                raise DataError(_("a shard that was written before is gone or changed"), where=str(path),
                                fix=_("set overwrite: true to do it again"))

    def close(self) -> None:
        """Close the logs; what they hold is durable."""
        for file in self._logs.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._logs.clear()

    def done(self) -> None:
        """Remove every trace of being unfinished, once the manifest stands."""
        (self.out / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(self.hidden, ignore_errors=True)
        files.fsync_dir(self.out)
