"""The audit log: JSON lines, each with the hash of the one before, so that no line can be changed or taken out unseen.

No text of a client stands in it.  What a chain cannot show is that its end was cut off: keep the newest hash elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from danlu import files
from danlu.errors import ConfigError, IncompatibleError
from danlu.log import say
from danlu.words import _

FIRST = "0" * 64                                         # what stands before the first line


class Checked(NamedTuple):
    """What was found of a log."""

    lines: int                                           # good ones, from the first on
    last: str                                            # hash of the last good line
    broken: int | None                                   # number of the first line that is not what it was; None: all are
    why: str = ""


def check(path: Path) -> Checked:
    """Return whether every line of a log is what it was, from the first to the last."""
    last, number = FIRST, 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = json.loads(raw)
                own = line.pop("sha256")
                before = line["prev_sha256"]
            except (ValueError, KeyError, TypeError, AttributeError):
                return Checked(number - 1, last, number, _("the line is no record of the log"))
            if before != last:
                return Checked(number - 1, last, number, _("it does not follow the line before it"))
            if files.digest(line) != own:
                return Checked(number - 1, last, number, _("the line was changed"))
            last = own
    return Checked(number, last, None)


class Log:
    """Appends to a log.  Raises IncompatibleError where one is there that was changed."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock, self.failed = path, threading.Lock(), False
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # each line stands for the one before it
        except BlockingIOError:
            os.close(self.file)
            raise ConfigError(_("another server writes this audit log"), where=str(path),
                              fix=_("wait until it has ended, or give each server a log of its own")) from None
        found = check(path)
        if found.broken is not None:
            os.close(self.file)
            raise IncompatibleError(_("the audit log was changed: {why}").format(why=found.why), where=f"{path}:{found.broken}",
                                    fix=_("keep it as it is, and begin another"))
        self.last = found.last

    def write(self, record: dict[str, Any]) -> None:
        """Append a record with the time and the hashes, in one write."""
        with self.lock:
            line = {"time": round(time.time(), 3), **record, "prev_sha256": self.last}
            own = files.digest(line)
            text = (json.dumps(line | {"sha256": own}, ensure_ascii=False, allow_nan=False) + "\n").encode()
            size = os.fstat(self.file).st_size
            try:
                if os.write(self.file, text) < len(text):
                    os.ftruncate(self.file, size)        # half a line would look like a changed one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                if not self.failed:
                    say(_("warning: the audit log cannot be written: {why}").format(why=error.strerror))
                self.failed = True
                return
            self.last = own

    def close(self) -> None:
        """Make the log durable."""
        os.fsync(self.file)
        os.close(self.file)
