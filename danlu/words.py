"""The language the user reads: English in place, Chinese from the catalogue in `locale/`."""

from __future__ import annotations

import gettext
from pathlib import Path

DOMAIN = "danlu"
LOCALE = Path(__file__).parent / "locale"

gettext.bindtextdomain(DOMAIN, LOCALE)


def _(text: str) -> str:
    """Return `text` in the user's language (LANGUAGE, LC_ALL, LC_MESSAGES, LANG), or as it is.

    Pass whole sentences with named holes and format afterwards: `_("{n} rows").format(n=n)`; never an f-string.
    """
    return gettext.dgettext(DOMAIN, text) if text else ""
