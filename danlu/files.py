"""Files that are whole or absent: atomic writes, content hashes, folders that appear complete."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from danlu.errors import ConfigError, ResourceError, SecurityError
from danlu.words import _

CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def canonical(value: Any) -> bytes:
    """Return the one JSON spelling of `value`: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-ready value, whatever the order of its keys."""
    return hashlib.sha256(canonical(value)).hexdigest()


def fsync_dir(path: Path) -> None:
    """Make renames inside the folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Make a file written by somebody else durable, and readable as the umask allows (safetensors leaves 0600)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`, atomically and durably."""
    with text_growing(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Replace the file at `path` by `value` as JSON, atomically; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line with a single write, so that no reader sees half of it."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of a file; a torn last line (the writer was killed) is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


def rewrite_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replace a file of JSON lines, atomically."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


@contextmanager
def growing(path: Path) -> Iterator[Callable[[Any], None]]:
    """Yield a function that writes a value as a JSON line; the file is `path` when the block ends well, and else never."""
    with text_growing(path) as file:
        yield lambda value: print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=file)


@contextmanager
def text_growing(path: Path) -> Iterator[TextIO]:
    """Yield a file to write to, which is `path` when the block ends well, and else never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        fsync_dir(temporary)
        temporary.rename(path)
        fsync_dir(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_writable(folder: Path) -> None:
    """Create `folder` and prove that a file can be written in it; raises ConfigError at once if not."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            _("the folder cannot be written: {why}").format(why=error.strerror or error), where=str(folder),
            fix=_("choose another `out`, or change its permissions"),
        ) from None


def check_space(folder: Path, needed: int) -> None:
    """Raise ResourceError unless `needed` bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            _("{needed:.1f} MB are needed and {free:.1f} MB are free").format(needed=needed / 1e6, free=free / 1e6),
            where=str(folder), fix=_("free some space, or choose another `out`"),
        )


def inside(root: Path, name: str) -> Path:
    """Return root/name, refusing a name that would leave `root`."""
    path = root if "\0" in name else (root / name).resolve()
    if "\0" in name or not path.is_relative_to(root.resolve()):
        raise SecurityError(_("the name {name!r} leaves its folder").format(name=name), where=str(root))
    return path
