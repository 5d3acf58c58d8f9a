"""What a run says: metrics as JSON lines, TensorBoard files if asked for, one live line on the terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from danlu import files
from danlu.errors import ConfigError
from danlu.words import _

Values = Mapping[str, float | int | str]


_silent = False                                          # one of several processes that all would say the same


def silence(silent: bool = True) -> None:
    """Let this process say nothing from now on; its errors are still told."""
    global _silent                                       # noqa: PLW0603
    _silent = silent


def say(text: str, *, to: TextIO | None = None) -> None:
    """Print one line for the user, above the live line if there is one."""
    if _silent:
        return
    stream = to or sys.stderr
    print(("\r\x1b[2K" if stream.isatty() else "") + text, file=stream, flush=True)


class Metrics:
    """Appends to `metrics.jsonl` and to trackers; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, folder: Path, *, trackers: tuple[str, ...] = (), writes: bool = True) -> None:
        self.path, self.writes = folder / "metrics.jsonl", writes
        self.failed = False
        self.board = _tensorboard(folder) if "tensorboard" in trackers and writes else None

    def rewind(self, step: int, *, micro: int | None = None) -> dict[int, str]:
        """Drop lines after `step`, so that no step stands twice; return the exact training losses they recorded.

        micro: what memory has left of the micro-batches; steps in other ones may round otherwise, and are left out.
        """
        if not self.writes or not self.path.exists():
            return {}
        lines = list(files.read_lines(self.path))
        files.rewrite_lines(self.path, [line for line in lines if line["step"] <= step])
        return {line["step"]: line["train/loss_hex"] for line in lines
                if line["step"] > step and "train/loss_hex" in line and line.get("micro") == micro}

    def write(self, step: int, values: Values) -> None:
        """Append one line; NaN and infinity are written as text, never hidden; losses also exactly (hexadecimal)."""
        if not self.writes:
            return
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            exact = isinstance(value, float) and not math.isfinite(value)
            line[name] = str(value) if exact else value
            if name.endswith("loss") and isinstance(value, float):
                line[f"{name}_hex"] = value.hex()
            if self.board is not None and not isinstance(value, str):
                self.board.add_scalar(name, value, step)
        try:
            files.append_line(self.path, line)
        except OSError as error:                       # a full disk must not kill the run; it is told once
            if not self.failed:
                say(_("warning: metrics cannot be written: {why}").format(why=error.strerror))
            self.failed = True

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # the only module that needs the extra
    except ImportError:
        raise ConfigError(
            _("trackers: tensorboard is not installed"), fix='pip install "danlu[tensorboard]"'
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


class LiveLine:
    """One line that is rewritten in place on a terminal, and printed now and then elsewhere."""

    def __init__(self, *, every: float = 0.2, elsewhere: float = 10.0, to: TextIO | None = None) -> None:
        self.stream = to or sys.stderr
        self.every = every if self.stream.isatty() else elsewhere
        self.last = -math.inf

    def show(self, text: str, *, force: bool = False) -> None:
        """Show `text` unless the last line is younger than the period."""
        now = time.monotonic()
        if _silent or (not force and now - self.last < self.every):
            return
        self.last = now
        if self.stream.isatty():
            self.stream.write("\r\x1b[2K" + text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def end(self) -> None:
        if self.stream.isatty() and not _silent:
            self.stream.write("\n")
            self.stream.flush()


def duration(seconds: float) -> str:
    """Return 75 as '1m15s'."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def count(number: float) -> str:
    """Return 1234567 as '1.23M', 418.96 as '419'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}" if abs(number) >= 10 else f"{number:.3g}"
