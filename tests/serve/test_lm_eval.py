"""Slow: lm-eval's local-completions asks a server about a local task, and agrees with Danlu's own figures of the same rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from cli import danlu

from danlu.adapt import folder as adapters
from danlu.data.tokenizer import Tokenizer
from tests.evaluate import small
from tests.serve.at import serving

for needed in ("lm_eval", "tenacity", "datasets"):
    pytest.importorskip(needed, reason="lm-eval[api] is not installed")
pytestmark = pytest.mark.slow
SAID = ["the furnace learns from text", "丹炉 keeps what it reads"] * 20
TEXTS = ["the furnace learns", "from text it keeps what it reads", "丹炉 keeps the text", "what it learns it keeps"]
ROWS = [("the furnace", [" learns", " keeps", " reads"], 0), ("丹炉 keeps", [" what it reads", " text"], 1),
        ("what it", [" reads", " learns from"], 0)]
CHOICE = """task: furnace_choice
dataset_path: json
dataset_kwargs: {data_files: {test: CHOICE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """task: furnace_text
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def scores(folder: Path, ids: list[int], first: int) -> float:
    """Log-likelihood of ids[first:] given those before, by the model itself and a log-softmax in double precision."""
    model = adapters.load(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids]))["logits"]
    chances = logits[0].double().log_softmax(-1)
    return sum(float(chances[place - 1, ids[place]]) for place in range(first, len(ids)))


def test_lm_eval_agrees(tmp_path: Path) -> None:
    folder = small.decoder(tmp_path, SAID)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "choice.jsonl").write_text("".join(
        json.dumps({"context": context, "choices": choices, "answer": answer}) + "\n" for context, choices, answer in ROWS))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tasks / "choice.yaml").write_text(CHOICE.replace("CHOICE", str(tmp_path / "choice.jsonl")))
    (tasks / "text.yaml").write_text(ROLLING.replace("TEXTS", str(tmp_path / "texts.jsonl")))
    with serving(folder, name="tiny") as at:
        assert httpx.get(f"{at.url}/ready").status_code == 200
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
                   f"model=tiny,base_url={at.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={folder},"
                   "max_length=128,num_concurrent=2,max_retries=1",
                   "--include_path", str(tasks), "--tasks", "furnace_choice,furnace_text", "--output_path", str(tmp_path / "out")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=offline(tmp_path))
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    found = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]
    tokenizer = Tokenizer.load(folder)

    right = 0
    for context, choices, answer in ROWS:
        start = tokenizer.encode(context).tolist()
        each = [scores(folder, tokenizer.encode(context + choice).tolist(), len(start)) for choice in choices]
        right += max(range(len(each)), key=each.__getitem__) == answer
    assert found["furnace_choice"]["acc,none"] == pytest.approx(right / len(ROWS), abs=1e-12)     # a count

    total, special = 0.0, tokenizer.special
    for text in TEXTS:                                   # lm-eval begins a text with the tokenizer's bos or eos
        total += scores(folder, [special.bos if special.bos is not None else special.eos, *tokenizer.encode(text).tolist()], 1)
    mine = -total / sum(len(text.encode()) for text in TEXTS) / math.log(2)
    # both are the same sum of float32 logits; the server adds them over a cache, in another order
    assert found["furnace_text"]["bits_per_byte,none"] == pytest.approx(mine, rel=1e-5)


def test_danlu_eval_finds_the_same(tmp_path: Path) -> None:
    """Where the tokenizer begins texts with bos and ends them with nothing, both predict the same tokens; batches of four."""
    folder = small.decoder(tmp_path, SAID, bos="<s>", add_bos=True, add_eos=False)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "text.yaml").write_text(ROLLING.replace("TEXTS", str(texts)))
    ours = danlu("eval", folder, "--data", texts, "--json")
    assert ours.code == 0, ours.err
    with serving(folder, name="tiny") as at:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
                   f"model=tiny,base_url={at.url}/v1/completions,tokenizer={folder},max_length=128", "--batch_size", "4",
                   "--include_path", str(tmp_path / "tasks"), "--tasks", "furnace_text", "--output_path", str(tmp_path / "out")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=offline(tmp_path))
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    found = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["furnace_text"]
    mine = next(iter(json.loads(ours.out)["results"].values()))
    assert found["bits_per_byte,none"] == pytest.approx(mine["bits_per_byte,none"], rel=1e-5)     # float32, in another order


def offline(folder: Path) -> dict[str, str]:
    """The environment without network for the hub's libraries, and with caches of its own."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "HF_HOME": str(folder / "cache"), "OPENAI_API_KEY": "none", "TOKENIZERS_PARALLELISM": "false"}
