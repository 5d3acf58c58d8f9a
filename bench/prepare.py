"""Reading and tokenising beside `datasets.map`, with the same files and tokenizer: MB/s.

    python -m bench.prepare --mb 40
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

from bench.peers import datasets_map
from danlu import config, files
from danlu.data.prepare import Prepare, prepare


def corpus(folder: Path, size: int) -> Path:
    """Write about `size` bytes of the standard library's sources as JSON lines, one file a row; repeated rows differ."""
    path, written = folder / "text.jsonl", 0
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    with path.open("w", encoding="utf-8") as out:
        for turn in range(1000):
            for source in sources:
                try:
                    text = source.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                row = json.dumps({"text": f"# {turn}\n{text}"}, ensure_ascii=False) + "\n"
                out.write(row)
                written += len(row.encode())
                if written >= size:
                    return path
    return path


def main() -> None:
    """Take turns and print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    text = corpus(folder, int(arguments.mb * 1e6))
    size = text.stat().st_size
    base = {"inputs": [{"path": str(text)}], "split": {"val": 0.0}, "max_row_bytes": 1 << 26,
            "clean": {"max_repeat": 1.0, "normalize": "none"}}
    first = config.validate(Prepare, base | {"out": str(folder / "first"), "tokenizer": {"kind": "bpe", "vocab": 8192}})
    tokenizer = prepare(first, say=lambda line: None) / "tokenizer" / "tokenizer.json"
    ours, theirs = [], []
    for number in range(arguments.rounds):
        measured = datasets_map([text], tokenizer)
        theirs.append(measured["read_s"] + measured["map_s"])
        again = {"out": str(folder / f"run{number}"), "tokenizer": {"kind": "loaded", "path": str(tokenizer)}}
        cfg = config.validate(Prepare, base | again)
        began = time.perf_counter()
        out = prepare(cfg, say=lambda line: None)
        ours.append(time.perf_counter() - began)
    tokens = sum(entry["tokens"] for entry in files.read_json(out / "manifest.json")["splits"]["train"])
    print(f"{size / 1e6:.1f} MB, {tokens} tokens (cleaning, exact deduplication, hashing and shards included in ours)")
    for name, values in (("datasets.map", theirs), ("danlu prepare", ours)):
        median = statistics.median(values)
        print(f"{name:14} {median:6.2f} s  {size / median / 1e6:6.2f} MB/s")
    print(f"ratio: {statistics.median(theirs) / statistics.median(ours):.2f}x")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
