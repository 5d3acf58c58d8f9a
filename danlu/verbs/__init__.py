"""One file for each verb of the command line: options to one call, its result to lines."""

from __future__ import annotations

from pathlib import Path

from danlu.errors import ConfigError
from danlu.words import _


def needed(file: Path | None) -> Path:
    """Return `file`; raise ConfigError if none was given."""
    if file is None:
        raise ConfigError(_("no file is given"), where=_("command line"), fix="danlu VERB file.yaml [a.b=c …]")
    return file
