"""Errors a user can act on: what happened, where, how to mend it, and a stable exit code.

0 ok · 2 usage or configuration · 3 data · 4 artefacts that do not fit together · 5 memory or disk · 6 numbers gone bad ·
7 refused for safety · 75 temporary, start again · 130 interrupted · 143 terminated.
"""

from __future__ import annotations

from danlu.words import _


class DanluError(Exception):
    """A problem that the user can mend; shown without a traceback."""

    code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return _("{problem}. To mend it: {fix}").format(problem=text, fix=self.fix) if self.fix else text

    def record(self) -> dict[str, object]:
        """Return the error as JSON-ready values, for programs."""
        return {"error": type(self).__name__, "code": self.code, "what": self.what, "where": self.where, "fix": self.fix}


class ConfigError(DanluError):
    """The configuration or the command line is wrong; nothing was started."""

    code = 2


class DataError(DanluError):
    """The data cannot be read, or is not what it claims to be."""

    code = 3


class IncompatibleError(DanluError):
    """Two artefacts do not belong together: tokenizer and model, checkpoint and recipe."""

    code = 4


class ResourceError(DanluError):
    """Memory or disk ran out, or would."""

    code = 5


class OutOfMemory(ResourceError):
    """A step did not fit; with these settings the same rows may, in smaller micro-batches."""

    def __init__(self, what: str, *, settings: tuple[str, ...]) -> None:
        super().__init__(what, fix=_("set {settings}").format(settings=" ".join(settings)))
        self.settings = settings


def short_of_memory(error: BaseException) -> bool:
    """Return whether an error of the system, or of one of PyTorch's allocators, means that memory has run out."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "out of memory", "can't allocate memory")))


class NumericError(DanluError):
    """A loss, gradient or parameter is not a number one can learn from."""

    code = 6


class SecurityError(DanluError):
    """Refused: the input could run code, escape its folder or exhaust the machine."""

    code = 7


class TemporaryError(DanluError):
    """The run stopped for a reason that a restart may cure."""

    code = 75


class Stopped(DanluError):
    """A signal asked the run to stop; it saved what it had."""

    def __init__(self, what: str, *, signal: int) -> None:
        super().__init__(what)
        self.code = 128 + signal
