"""What fine-tuning reaches on real data, task by task, beside a baseline that needs no neural network.

    python -m bench.tasks --model MODEL --data DIR [--only chnsenticorp stsb-en …]        # an hour for all on 2 cores

MODEL is a folder of an English sentence encoder (all-MiniLM-L6-v2); DIR holds chnsenticorp, stsb, wikiann, xquad and gsm8k as
the recipes name them.  Every figure is of rows that no training has seen.  For Chinese and for arithmetic the start is a small
model that is pretrained here, in a few minutes, on the training texts alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RECIPES = Path(__file__).parents[1] / "recipes"


class Baseline(NamedTuple):
    """What is reached without a neural network."""

    how: str
    value: float


class Job(NamedTuple):
    """One task: its recipe, what it starts from, what is set beside, what it is judged on and by, and its baseline."""

    recipe: str
    start: str                                           # english, chinese or arithmetic
    settings: tuple[str, ...]
    test: str
    figure: str
    baseline: Callable[[Path], Baseline]
    judged: tuple[str, ...] = ()                         # words of `danlu eval`


# what needs no neural network


def _rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def tfidf_classes(data: Path) -> Baseline:
    """Characters in runs of one to three, weighed by TF-IDF, and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def read(part: str) -> tuple[list[str], list[str]]:
        lines = (data / f"chnsenticorp/{part}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        pairs = [line.partition("\t") for line in lines if line]
        return [text for _label, _tab, text in pairs], [label for label, _tab, _text in pairs]

    seen = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    texts, labels = read("train")
    fitted = LogisticRegression(max_iter=1000, C=10).fit(seen.fit_transform(texts), labels)
    known = set(texts)
    texts, labels = zip(*((text, label) for text, label in zip(*read("test"), strict=True) if text not in known), strict=True)
    return Baseline("TF-IDF of characters, logistic regression", float(fitted.score(seen.transform(texts), labels)))


def tfidf_alike(language: str) -> Callable[[Path], Baseline]:
    """How alike two sentences are by TF-IDF: the cosine."""

    def measure(data: Path) -> Baseline:
        import numpy as np
        from scipy.stats import spearmanr
        from sklearn.feature_extraction.text import TfidfVectorizer

        seen = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3))
        seen.fit([text for row in _rows(data / f"stsb/{language}-train.csv") for text in row[:2]])
        test = _rows(data / f"stsb/{language}-test.csv")
        a, b = (seen.transform([row[column] for row in test]) for column in (0, 1))
        cosine = np.asarray(a.multiply(b).sum(axis=1)).ravel()
        return Baseline("cosine of TF-IDF of characters", float(spearmanr(cosine, [float(row[2]) for row in test]).statistic))

    return measure


def frequent_tags(data: Path) -> Baseline:
    """Each word with the tag that it has most often in training, O for a new one."""
    from seqeval.metrics import f1_score

    def read(part: str) -> list[list[tuple[str, str]]]:
        blocks = (data / f"wikiann/{part}.tsv").read_text(encoding="utf-8").strip().split("\n\n")
        return [[tuple(line.rsplit("\t", 1)) for line in block.splitlines()] for block in blocks]       # type: ignore[misc]

    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sentence in read("train"):
        for word, tag in sentence:
            counts[word][tag] += 1
    test = read("test")
    said = [[counts[word].most_common(1)[0][0] if word in counts else "O" for word, _tag in sentence] for sentence in test]
    return Baseline("each word's most frequent tag", float(f1_score([[tag for _word, tag in s] for s in test], said)))


def nearest_sentence(data: Path) -> Baseline:
    """The sentence of the text that shares most words with the question (Rajpurkar et al., 2016, compare with such)."""

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    scores = []
    for paragraph in (p for a in json.loads((data / "xquad/en.json").read_text())["data"][-5:] for p in a["paragraphs"]):
        sentences = re.split(r"(?<=[.!?])\s+", paragraph["context"])
        for asked in paragraph["qas"]:
            wanted = set(words(asked["question"]))
            best = Counter(words(max(sentences, key=lambda one: len(wanted & set(words(one))))))
            gold = Counter(words(asked["answers"][0]["text"]))
            same = sum((best & gold).values())
            scores.append(2 * same / (sum(best.values()) + sum(gold.values())) if same else 0.0)
    return Baseline("the sentence nearest to the question", sum(scores) / len(scores))


# what is trained here before fine-tuning

PRETRAINED = {
    "chinese": ("corpus-bert", "pretrain-bert", ("chnsenticorp/train.tsv", "stsb/zh-train.csv"),
                ("tokenizer.vocab=6000", "clean.min_chars=5"),
                ("model={kind: encoder, preset: bert-mini, context: 192}", "objective=masked_lm", "rows=32", "length=128",
                 "pack=true", "steps=1000", "optim.lr=1e-3")),
    "arithmetic": ("corpus", "pretrain-gpt", ("gsm8k/train.jsonl",), ("tokenizer.vocab=4096",),
                   ("model={kind: decoder, preset: llama-mini, context: 512}", "steps=150", "stop=null")),
}


def texts(file: Path) -> list[str]:
    """Return the texts of a file of rows, without labels."""
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [f"{row['question']}\n{row['answer']}" for row in rows]
    if file.suffix == ".csv":
        return [text for row in _rows(file) for text in row[:2]]
    return [line.partition("\t")[2] for line in file.read_text(encoding="utf-8").splitlines()[1:] if line]


def danlu(*words: object) -> str:
    """Run a command of Danlu, which tells on stderr what it does; return what it printed."""
    done = subprocess.run([sys.executable, "-m", "danlu", *map(str, words)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"danlu {' '.join(map(str, words))}: exit code {done.returncode}")
    return done.stdout


def pretrained(name: str, data: Path, out: Path) -> Path:
    """Return the run of a small model that has read the training texts."""
    corpus, recipe, files, preparing, training = PRETRAINED[name]
    source = out / f"{name}.jsonl"
    lines = {"".join(text.split()): text for file in files for text in texts(data / file)}.values()      # each once
    source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in lines), encoding="utf-8")
    danlu("prepare", RECIPES / f"{corpus}.yaml", "--out", out / f"{name}-corpus", f"inputs={source}", *preparing)
    danlu("train", RECIPES / f"{recipe}.yaml", "--out", out / name, f"data={out / f'{name}-corpus'}", "every.sample=0"
          if recipe == "pretrain-gpt" else "every.log=50", *training)
    return out / name


def parts(data: Path, out: Path) -> None:
    """Write XQuAD's articles as 40 to learn from, 3 by which the best checkpoint is chosen, and 5 to be judged on."""
    articles = json.loads((data / "xquad/en.json").read_text(encoding="utf-8"))["data"]
    for name, part in (("train", articles[:-8]), ("dev", articles[-8:-5]), ("test", articles[-5:])):
        (out / f"xquad-{name}.json").write_text(json.dumps({"version": "1.1", "data": part}), encoding="utf-8")


def unseen(data: Path, out: Path) -> None:
    """Write the test reviews that do not stand in the training file: as published, 331 of 1,200 do."""
    known = set((data / "chnsenticorp/train.tsv").read_text(encoding="utf-8").splitlines()[1:])
    texts = {line.partition("\t")[2] for line in known}
    head, *lines = (data / "chnsenticorp/test.tsv").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("\t")[2] not in texts]
    (out / "chnsenticorp-unseen.tsv").write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")


def measured(job: Job, start: Path, data: Path, out: Path) -> tuple[float, tuple[float, float], float]:
    """Return the figure of the rows to be judged on, its 95 % interval, and the minutes of training."""
    began = time.perf_counter()
    run = out / f"{job.recipe}-{Path(job.test).stem}"
    danlu("train", RECIPES / f"{job.recipe}.yaml", "--out", run, f"start={start}",
          *(one.format(data=data, out=out) for one in job.settings))
    minutes = (time.perf_counter() - began) / 60
    return *figure(run, job, data, out), minutes


def figure(model: Path, job: Job, data: Path, out: Path) -> tuple[float, tuple[float, float]]:
    """Return the figure of a model and its interval."""
    result = out / "result.json"
    danlu("eval", model, "--data", job.test.format(data=data, out=out), "--out", result, *job.judged)
    told: dict[str, Any] = json.loads(result.read_text())
    (name,) = told["results"]
    low, high = told["intervals"][name][job.figure]
    return told["results"][name][f"{job.figure},none"], (low, high)


def unlike(_data: Path) -> Baseline:
    """Stand for a baseline that is the start itself, measured as the run is."""
    return Baseline("the start before fine-tuning", float("nan"))


JOBS = {
    "chnsenticorp": Job("chnsenticorp", "chinese", ("data={data}/chnsenticorp/train.tsv", "eval={data}/chnsenticorp/dev.tsv",
                                                     "ema=0.99"),
                        "{out}/chnsenticorp-unseen.tsv", "accuracy", tfidf_classes),
    "stsb-en": Job("stsb", "english", ("data={data}/stsb/en-train.csv", "eval={data}/stsb/en-dev.csv",
                                              "every.evaluate=180", "epochs=1"), "{data}/stsb/en-test.csv", "spearman",
                   tfidf_alike("en")),
    "stsb-zh": Job("embed-stsb", "chinese",             # as vectors: a pair read together, from so small a start, reached 0.122
                   ("data={data}/stsb/zh-train.csv", "eval={data}/stsb/zh-dev.csv", "length=192", "optim.lr=5e-4",
                    "guard.overlap=0.1"), "{data}/stsb/zh-test.csv", "spearman", tfidf_alike("zh")),
    "wikiann": Job("ner-wikiann", "english", ("data={data}/wikiann/train.tsv", "eval={data}/wikiann/dev.tsv#2000", "epochs=1"),
                   "{data}/wikiann/test.tsv", "f1", frequent_tags),
    "xquad": Job("qa-xquad", "english", ("data={out}/xquad-train.json", "eval={out}/xquad-dev.json", "epochs=4"),
                 "{out}/xquad-test.json", "f1", nearest_sentence),
    "gsm8k": Job("gsm8k-sft", "arithmetic", ("data={data}/gsm8k/train.jsonl", "epochs=1"),
                 "{data}/gsm8k/test.jsonl", "perplexity", unlike, ("--task", "chat", "--overlong", "drop")),
}


def main() -> None:
    """Train, judge and print a row for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-tasks"))
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    parts(data, out)
    unseen(data, out)
    starts = {"english": arguments.model}
    lines = []
    for name in arguments.only:
        job = JOBS[name]
        if job.start not in starts:
            starts[job.start] = pretrained(job.start, data, out)
        value, (low, high), minutes = measured(job, starts[job.start], data, out)
        base = job.baseline(data)
        if job.baseline is unlike:
            base = base._replace(value=figure(starts[job.start], job, data, out)[0])
        lines.append(f"| {name} | {job.figure} | {value:.3f} ({low:.3f}-{high:.3f}) | {base.value:.3f} | {base.how} | "
                     f"{minutes:.1f} |")
        print(lines[-1], flush=True)
    print("\n| data | figure on the test rows | Danlu (95 % interval) | baseline | what it is | minutes |",
          "|---|---|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
