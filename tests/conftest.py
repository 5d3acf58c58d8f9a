"""What all tests share: the folder of helpers on the path, real data if there is any."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")    # a machine's own name need not lead anywhere

from cli import danlu

settings.register_profile("repeatable", derandomize=True)      # equal code, equal examples; HYPOTHESIS_PROFILE=default for others
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The public data sets; skips, saying so, where DANLU_REALDATA does not point to them."""
    folder = os.environ.get("DANLU_REALDATA")
    if not folder:
        pytest.skip("DANLU_REALDATA is not set: no real data here")
    return Path(folder)


WORDS = ("the", "furnace", "learns", "from", "text", "and", "keeps", "what", "it", "reads",
         "丹炉", "炼", "模型", "数据", "never", "lies")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of nonsense, prepared: a byte-level BPE of 320 ids, a tenth held out."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for number in range(300):
            text = f"{number}. " + " ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + "."
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    (folder / "corpus.yaml").write_text(
        f"out: {folder}/data\ninputs: [{folder}/text.jsonl]\ntokenizer: {{kind: bpe, vocab: 320}}\n"
        "split: {val: 0.1}\nworkers: 0\n", encoding="utf-8")
    ended = danlu("prepare", folder / "corpus.yaml")
    assert ended.code == 0, ended.err
    return folder / "data"
