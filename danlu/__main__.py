"""The command `danlu`: environment in, exit code out."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

from danlu import cli, fault
from danlu.train.launch import follow


def main() -> None:
    """Run the command line of this process and exit with its code."""
    rank = int(os.environ["RANK"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else None
    supervisor, told = os.environ.pop("DANLU_SUPERVISOR", ""), os.environ.pop("DANLU_TOLD", "")
    if supervisor:                                       # taken out: what this process starts has another parent
        follow(int(supervisor))
    fault.arm(os.environ.get("DANLU_FAULT", ""), rank=int(os.environ.get("RANK", "0")))
    arguments, language = cli.language(sys.argv[1:])
    if language:
        os.environ["LANGUAGE"] = language
        if os.environ.get("LC_ALL", os.environ.get("LANG", "C")) in ("C", "POSIX", ""):
            os.environ["LC_ALL"] = "C.UTF-8"             # gettext ignores LANGUAGE in the C locale
    code = cli.main(arguments, rank=rank, told=Path(told) if told else None)
    if rank is not None:                                 # an orderly end might wait for processes and threads that never answer
        if not code:
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
