"""The command `danlu`: environment in, exit code out."""

from __future__ import annotations

import os
import sys

from danlu import cli, fault


def main() -> None:
    """Run the command line of this process and exit with its code."""
    fault.arm(os.environ.get("DANLU_FAULT", ""))
    arguments, language = cli.language(sys.argv[1:])
    if language:
        os.environ["LANGUAGE"] = language
        if os.environ.get("LC_ALL", os.environ.get("LANG", "C")) in ("C", "POSIX", ""):
            os.environ["LC_ALL"] = "C.UTF-8"             # gettext ignores LANGUAGE in the C locale
    sys.exit(cli.main(arguments))


if __name__ == "__main__":
    main()
