"""Answers that a model writes: judged by `danlu eval --generate`, and talked with by `danlu chat`, against transformers."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import command, environment

from danlu import cli
from danlu.data import chat
from danlu.data.example import Turn
from danlu.evaluate.subject import open_subject
from danlu.evaluate.written import final, template_of
from danlu.generate import endings
from danlu.verbs.chat import Talk

from . import small

transformers = pytest.importorskip("transformers")
SUMS = [(f"what is {a} and {b}?", f"it is {a}! 是的 #### {a + b}") for a in range(4) for b in range(4)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "seed": 0}


def rows(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
                                       ensure_ascii=False) + "\n" for q, a in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder that has learned some answers, in ChatML whose marks are plain text to its tokenizer."""
    folder = tmp_path_factory.mktemp("talk")
    start = small.decoder(folder, [f"user\n{q}assistant\n{a}" for q, a in SUMS] * 2, context=160)
    return small.trained(folder, start, str(rows(folder / "sums.jsonl", SUMS)), objective="causal_lm", steps=100, length=112,
                         held_out=0.2, rows=8)


def chatml(turns: list[tuple[str, str]]) -> str:
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"


def theirs(folder: Path, prompt: str, most: int) -> str:
    """What transformers writes, the likeliest token at each place."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))


def talk(run: Path, *lines: str, words: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("chat", run, "--temperature", "0", "--max-new-tokens", "24", *words), check=True, text=True,
                          input="\n".join(lines) + "\n", capture_output=True, env=environment(), timeout=120, encoding="utf-8")


def test_answers_are_judged(run: Path, tmp_path: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    data, out = rows(tmp_path / "sums.jsonl", SUMS), tmp_path / "result.json"
    assert cli.main(["eval", str(run), "--generate", "--data", str(data), "--answer-after", "####", "--max-new-tokens", "24",
                     "--out", str(out)]) == 0
    told = [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["text"], one["label"]) for one in told] == SUMS
    folder = open_subject(run).folder
    for one in told[:4]:
        assert one["predicted"] == theirs(folder, chatml([("user", one["text"])]), 24)
    figures = json.loads(out.read_text())["results"]["sums"]
    right = [one["predicted"].rpartition("#### ")[2].strip() == one["label"].rpartition("#### ")[2] for one in told]
    assert figures["exact_match,none"] == pytest.approx(sum(right) / len(right)) and sum(right) > 0
    assert figures["bleu,none"] == pytest.approx(
        sacrebleu.corpus_bleu([one["predicted"] for one in told], [[one["label"] for one in told]], tokenize="zh").score)


def test_the_loss_of_conversations_is_that_of_the_answers(run: Path, tmp_path: Path) -> None:
    """Seen from the rows, without a word on the command line."""
    data, out = rows(tmp_path / "sums.jsonl", SUMS[:5]), tmp_path / "result.json"
    assert cli.main(["eval", str(run), "--data", str(data), "--out", str(out)]) == 0
    folder = open_subject(run).folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for question, answer in SUMS[:5]:
        before = tokenizer(chatml([("user", question)]), add_special_tokens=False)["input_ids"]
        learned = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        whole = tokenizer(chatml([("user", question)]) + answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert whole == before + learned
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
        total -= sum(float(logp[i - 1, whole[i]]) for i in range(len(before), len(whole)))
        count += len(learned)
    found = json.loads(out.read_text())
    assert found["results"]["sums"]["loss,none"] == pytest.approx(total / count, rel=1e-5)


def test_a_pipe_talks_line_by_line(run: Path, tmp_path: Path) -> None:
    folder, kept = open_subject(run).folder, tmp_path / "talk.jsonl"
    ended = talk(run, "what is 1 and 2?", "", "/nonsense", "/reset", "/system brief", "what is 3 and 0?", f"/save {kept}",
                 "/exit", "never")
    first = theirs(folder, chatml([("user", "what is 1 and 2?")]), 24)
    second = theirs(folder, chatml([("system", "brief"), ("user", "what is 3 and 0?")]), 24)
    assert ended.stdout == f"{first}\n{second}\n" and "/save FILE" in ended.stderr
    assert json.loads(kept.read_text(encoding="utf-8")) == {"messages": [
        {"role": "system", "content": "brief"}, {"role": "user", "content": "what is 3 and 0?"},
        {"role": "assistant", "content": second}]}


def test_json_lines_and_history(run: Path) -> None:
    folder = open_subject(run).folder
    told = [json.loads(line) for line in talk(run, "what is 1 and 2?", "hm?", words=("--json",)).stdout.splitlines()]
    assert [one["role"] for one in told] == ["assistant", "assistant"]
    said = [("user", "what is 1 and 2?"), ("assistant", told[0]["content"]), ("user", "hm?")]
    prompt = chatml(said[:2]).removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    assert told[0]["finish_reason"] == "stop" and told[0]["content"] == theirs(folder, chatml(said[:1]), 24)
    template, tokenizer = template_of(open_subject(run)), open_subject(run).tokenizer
    ids, _weights = chat.encode(chat.render(template, [Turn(*one) for one in said], generate=True), tokenizer)
    assert told[1]["prompt_tokens"] == len(ids)
    assert tokenizer.decode(ids).startswith(prompt)


def test_the_oldest_turns_make_room(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = open_subject(run)
    subject.model.eval()
    one = Talk(subject.model, subject.tokenizer, template_of(subject), 24, GREEDY, "brief")     # type: ignore[arg-type]
    for n in range(8):
        "".join(one.answer(f"what is {n % 4} and 1?"))
        assert one.last is not None and one.last.prompt_tokens + one.last.completion_tokens <= 160
    assert "oldest exchanges" in capsys.readouterr().err
    assert one.turns[0].role == "user" and one.turns[-2].content == "what is 3 and 1?" and one.whole[0].role == "system"
    assert list(one.answer("why? " * 200)) == [] and one.last is None
    assert "does not fit" in capsys.readouterr().err and one.turns[-1].role == "assistant"
    one.turns.clear()
    "".join(one.answer("what is 2 and 2?"))
    fresh = Talk(subject.model, subject.tokenizer, template_of(subject), 24, GREEDY, "brief")   # type: ignore[arg-type]
    "".join(fresh.answer("what is 2 and 2?"))
    assert one.last == fresh.last


def test_what_an_adapter_puts_before_a_conversation_has_its_place(run: Path) -> None:
    subject = open_subject(run)
    one = Talk(subject.model, subject.tokenizer, template_of(subject), 24, GREEDY)              # type: ignore[arg-type]
    for n in range(8):
        one.turns += [Turn("user", f"what is {n} and 1?"), Turn("assistant", "it is 1!")]
    one.turns.append(Turn("user", "so?"))
    subject.model.ahead.tokens = 60
    assert 0 < len(one.fitted()) <= 160 - 60 - 24 and one.turns[-1].content == "so?"


def test_pieces_are_whole_characters(run: Path) -> None:
    subject = open_subject(run)
    subject.model.eval()
    one = Talk(subject.model, subject.tokenizer, template_of(subject), 24, GREEDY)              # type: ignore[arg-type]
    pieces = list(one.answer("what is 0 and 3?"))
    assert one.last is not None and len(pieces) > 1 and "".join(pieces) == one.last.content
    assert "是的" in one.last.content and not any("\ufffd" in piece for piece in pieces)


def test_answers_end_where_the_template_says(tmp_path: Path) -> None:
    folder = small.decoder(tmp_path, ["user\nhello assistant\nyes"] * 9, special=["<|im_start|>", "<|im_end|>"])
    subject = open_subject(folder)
    ends = endings(template_of(subject), subject.tokenizer)
    assert ends == (subject.tokenizer.id("<|im_end|>"), subject.tokenizer.special.eos)


def test_the_final_answer_of_a_text() -> None:

    pattern = re.compile("####")
    assert final("so 2\n#### 1,234.\nthe end", pattern) == "1234"
    assert final("#### 1 no, #### 2", pattern) == "2"
    assert final("none", pattern) is None


def test_refusals(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
                    '{"messages": [{"role": "user", "content": "a"}]}\n')
    assert cli.main(["eval", str(run), "--generate", "--data", str(data)]) == 3
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert cli.main(["eval", str(run), "--generate"]) == 2
    encoder = small.encoder(tmp_path)
    assert cli.main(["chat", str(encoder)]) == 2
