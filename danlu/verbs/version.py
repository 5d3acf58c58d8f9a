"""`danlu version`."""

from __future__ import annotations

import json

import danlu


def main(*, as_json: bool) -> int:
    """Print the version."""
    print(json.dumps({"danlu": danlu.__version__}) if as_json else f"danlu {danlu.__version__}")
    return 0
