"""From text to a served model, each hand-off compared: pretraining, conversations, LoRA, merge, few bits, ONNX, GGUF, server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli import Ended, danlu, environment

from danlu.data import chat
from danlu.data.example import Turn
from danlu.evaluate.subject import open_subject
from danlu.generate import endings, generate

openai = pytest.importorskip("openai")
pytest.importorskip("onnxruntime")
pytest.importorskip("gguf")

ASKED = {
    "what is the furnace?": "the furnace is a tool that learns from text.",
    "who keeps the fire?": "the old smith keeps the fire.",
    "where is the sea?": "the sea is near the hill.", "what burns?": "the coal burns.",
}
MODEL = "{kind: decoder, family: llama, width: 64, layers: 2, heads: 4, context: 256}"


def done(*words: object) -> Ended:
    ended = danlu(*words, timeout=600).clean()
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything up to the merged model."""
    folder = tmp_path_factory.mktemp("chain")
    lines = [f"{question} {answer}" for question, answer in ASKED.items()] * 40
    (folder / "text.txt").write_text("\n".join(f"{line} {n}" for n, line in enumerate(lines)) + "\n", encoding="utf-8")
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ASKED.items()] * 12
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    (folder / "corpus.yaml").write_text(
        f"out: {folder / 'corpus'}\ninputs: {folder / 'text.txt'}\nsplit: {{val: 0.1}}\n"
        "tokenizer: {kind: bpe, vocab: 420, cut: gpt2, special: ['<|im_start|>', '<|im_end|>']}\n", encoding="utf-8")
    common = ("threads=1", "precision=fp32", "schedule=constant", "optim={kind: adamw, lr: 3e-3}", "guard.overlap=1.0",
              "audit.near_overlap=1.0", "audit.duplicates=1.0", "audit.contradictions=1.0")
    for name, words in {
        "base.yaml": f"model: {MODEL}\ndata: [{{path: {folder / 'corpus'}}}]\nobjective: causal_lm\nsteps: 120\nrows: 8\n"
                     "length: 64\noverlong: split\noptim: {kind: adamw, lr: 3e-3}\nschedule: constant\nout: base\n",
        "sft.yaml": f"start: base\ndata: {folder / 'chats.jsonl'}\nobjective: causal_lm\nsteps: 120\nrows: 8\nlength: 96\n"
                    "optim: {kind: adamw, lr: 3e-3}\nschedule: constant\nout: sft\n"}.items():
        (folder / name).write_text(words, encoding="utf-8")
    done("prepare", folder / "corpus.yaml")
    done("train", folder / "base.yaml", "--out", folder / "base", *common)
    done("train", folder / "sft.yaml", "--out", folder / "sft", f"start={folder / 'base'}", *common)
    done("train", folder / "sft.yaml", "--out", folder / "lora", f"start={folder / 'sft'}", "adapt=lora", "adapt.rank=4", *common,
         "steps=30")
    done("merge", folder / "lora", "--out", folder / "merged")
    return folder


def green(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    assert report["green"], report
    return report


def greedy(folder: Path, question: str) -> str:
    told = done("generate", folder, "--prompt", question, "--temperature", 0, "--max-new-tokens", 24, "--json")
    return str(json.loads(told.out)["text"])


def written(folder: Path, question: str) -> str:
    """The greedy answer to a question, without the server."""
    subject = open_subject(folder)
    template = chat.Template.load(subject.tokenizer, folder)
    ids, _weights = chat.encode(chat.render(template, (Turn("user", question),), generate=True), subject.tokenizer)
    answer = generate(subject.model.eval(), ids.tolist(), max_new_tokens=24, temperature=0,
                      eos=endings(template, subject.tokenizer))
    return subject.tokenizer.decode(list(answer))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_hand_off_is_the_same_model(work: Path) -> None:
    assert {check["name"]: check["state"] for check in green(work / "merged")["checks"]}["greedy"] == "green"
    for kind in ("hf", "onnx", "gguf", "torch-export"):
        done("export", work / "merged", "--to", kind, "--out", work / kind)
        green(work / kind)
    for bits in (8, 4):
        done("quantize", work / "merged", "--bits", bits, "--group", 32, "--data", work / "chats.jsonl",
             "--out", work / f"int{bits}")
    assert danlu("parity", work / "merged", work / "int8", "--data", work / "chats.jsonl").clean().code == 0
    for question in ASKED:
        assert greedy(work / "merged", question) == greedy(work / "hf", question) == greedy(work / "int8", question)
    assert danlu("verify", work / "onnx").clean().code == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_official_client_streams_what_the_model_writes(work: Path) -> None:
    command = [sys.executable, "-m", "danlu", "serve", str(work / "merged"), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as running:
        try:
            assert running.stdout is not None
            told = json.loads(running.stdout.readline())
            client = openai.OpenAI(base_url=told["url"], api_key="none")
            model = client.models.list().data[0].id
            for question in ASKED:
                stream = client.chat.completions.create(model=model, temperature=0, max_tokens=24, stream=True,
                                                        messages=[{"role": "user", "content": question}])
                said = "".join(piece.choices[0].delta.content or "" for piece in stream if piece.choices)
                assert said == written(work / "merged", question) and said in ASKED.values()
        finally:
            running.kill()
