"""Rules of advice, as data: what is said, when, why, and who found it out.  The first of a topic that applies is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from danlu.planner.case import Case
from danlu.words import _


class Source(NamedTuple):
    """Who found it out, and where it can be read."""

    authors: str
    year: int
    where: str                                           # arXiv number, or the page


class Rule(NamedTuple):
    """One piece of advice.  `say` may name values of the case in braces; `lines` are keys of a recipe."""

    topic: str
    when: Callable[[Case], bool]
    say: str
    why: str
    source: Source
    lines: tuple[str, ...] = ()


BERT = Source("Devlin et al.", 2019, "arXiv 1810.04805")
ROBERTA = Source("Liu et al.", 2019, "arXiv 1907.11692")
WWM = Source("Cui et al.", 2021, "arXiv 1906.08101")
SBERT = Source("Reimers and Gurevych", 2019, "arXiv 1908.10084")
QWEN = Source("Qwen team", 2024, "arXiv 2412.15115")
XLMR = Source("Conneau et al.", 2020, "arXiv 1911.02116")
SETFIT = Source("Tunstall et al.", 2022, "arXiv 2209.11055")
FEW = Source("Brown et al.", 2020, "arXiv 2005.14165")
LORA = Source("Hu et al.", 2021, "arXiv 2106.09685")
QLORA = Source("Dettmers et al.", 2023, "arXiv 2305.14314")
LESS = Source("Biderman et al.", 2024, "arXiv 2405.09673")
DONT = Source("Gururangan et al.", 2020, "arXiv 2004.10964")
ZERO = Source("Rajbhandari et al.", 2020, "arXiv 1910.02054")
ADAMW = Source("Loshchilov and Hutter", 2019, "arXiv 1711.05101")
STABLE = Source("Mosbach et al.", 2021, "arXiv 2006.04884")
CHINCHILLA = Source("Hoffmann et al.", 2022, "arXiv 2203.15556")
REPEAT = Source("Muennighoff et al.", 2023, "arXiv 2305.16264")
LLAMA2 = Source("Touvron et al.", 2023, "arXiv 2307.09288")
LIMA = Source("Zhou et al.", 2023, "arXiv 2305.11206")
NOISE = Source("McCandlish et al.", 2018, "arXiv 1812.06162")
KAPLAN = Source("Kaplan et al.", 2020, "arXiv 2001.08361")
MINICPM = Source("Hu et al.", 2024, "arXiv 2404.06395")
DISTIL = Source("Sanh et al.", 2019, "arXiv 1910.01108")
Q8BERT = Source("Zafrir et al.", 2019, "arXiv 1910.06188")
BITS = Source("Dettmers and Zettlemoyer", 2023, "arXiv 2212.09720")
AWQ = Source("Lin et al.", 2024, "arXiv 2306.00978")
REPLAY = Source("Ibrahim et al.", 2024, "arXiv 2403.08763")
SEEDS = Source("Dodge et al.", 2020, "arXiv 2002.06305")
HEADS = Source("Michel et al.", 2019, "arXiv 1905.10650")


def _fine(case: Case) -> bool:
    return case.method in ("full", "lora", "qlora")


def _rows(case: Case, low: float, high: float = float("inf")) -> bool:
    return case.rows is not None and low <= case.rows < high


def rules() -> tuple[Rule, ...]:
    """Return all rules, in the language of the user."""
    return (*_models(), *_methods(), *_training(), *_amounts(), *_after())


def _models() -> tuple[Rule, ...]:
    return (
        Rule("model", lambda c: c.task == "pretraining", _("a decoder of about {size} parameters, from random weights"),
             _("{share}: compute is best spent near 20 tokens a parameter"), CHINCHILLA),
        Rule("model", lambda c: c.task == "embedding", _("an encoder such as {model}, trained on pairs of texts"),
             _("mean vectors of a plain encoder say little of a sentence's meaning until pairs have taught them"), SBERT),
        Rule("model", lambda c: c.kind == "encoder" and c.language == "zh",
             _("an encoder: {model}, or a Chinese BERT or RoBERTa of the same shape with whole words masked"),
             _("reads both directions with a hundredth of a large decoder's parameters; whole-word masking suits Chinese"), WWM),
        Rule("model", lambda c: c.kind == "encoder" and c.language == "en",
             _("an encoder: {model}, or RoBERTa of the same shape"),
             _("the same shape, trained for longer on more text, is better in every task of GLUE, SQuAD and RACE"), ROBERTA),
        Rule("model", lambda c: c.kind == "encoder", _("an encoder that was trained on many languages, of the size of {model}"),
             _("one that was trained on a hundred languages carries over to those with little text"), XLMR),
        Rule("model", lambda c: c.model is None, _("a decoder of {size} parameters that is trained already, as you ask"),
             _("a large model that was trained on text learns a task from few examples"), FEW),
        Rule("model", lambda c: True, _("a decoder that is trained already: {model}"),
             _("of a size that this machine can train; its family was trained on Chinese and English alike"), QWEN),
    )


def _methods() -> tuple[Rule, ...]:
    return (
        Rule("method", lambda c: c.method == "none" and c.learns == "rows" and _rows(c, 0, 50),
             _("do not train all of it yet: show the few rows to a large model in its prompt, or learn sentence vectors from "
               "pairs"),
             _("with eight rows a class, vectors learned from pairs come near to training on thousands of rows"), SETFIT),
        Rule("method", lambda c: c.method == "none",
             _("none: {size} parameters do not fit into {count} × {device}, not even in 4 bits"),
             _("4 bits a parameter of the frozen model are the least that fine-tuning has been shown to stand"), QLORA),
        Rule("method", lambda c: c.task == "pretraining",
             _("all parameters from random weights: {state} of weights and optimizer"),
             _("16 bytes a parameter for mixed precision with Adam, cut over the devices where they do not fit into one"), ZERO),
        Rule("method", lambda c: c.task == "domain" and c.method == "full",
             _("go on training all parameters on your text, then fine-tune"),
             _("going on with text of the domain helps in the tasks of it, with much and with little labelled data"), DONT),
        Rule("method", lambda c: c.task == "domain",
             _("{method} on your text, since all parameters do not fit; expect less of it"),
             _("in continued pretraining, LoRA learns clearly less than all parameters do, and forgets less"), LESS,
             ("adapt=lora", "adapt.rank=64", "adapt.base={base}")),
        Rule("method", lambda c: c.method == "full" and c.kind == "encoder",
             _("all parameters: {state} of weights and optimizer"),
             _("one layer on top, and a few passes through the whole encoder, did best in eleven tasks"), BERT),
        Rule("method", lambda c: c.method == "full", _("all parameters: {state} of weights and optimizer fit"),
             _("with much data, all parameters learn more than LoRA"), LESS),
        Rule("method", lambda c: c.method == "lora", _("LoRA on all linear layers: {state} in place of {full}"),
             _("frozen weights need neither gradients nor optimizer; on par with training all in the tasks compared"), LORA,
             ("adapt=lora", "adapt.rank=16", "adapt.target=all")),
        Rule("method", lambda c: c.method == "qlora", _("QLoRA: the frozen weights in 4 bits, {state} in place of {full}"),
             _("65 billion parameters were tuned in 48 GB without loss against 16 bits; adapters at every linear layer matter"),
             QLORA, ("adapt=lora", "adapt.base=nf4", "adapt.rank=16", "adapt.target=all")),
    )


def _training() -> tuple[Rule, ...]:
    return (
        Rule("optimizer", lambda c: c.task == "pretraining", _("AdamW, betas 0.9 and 0.95, weight decay 0.1"),
             _("as GPT-3 and Llama were trained"), FEW, ("optim=adamw", "optim.betas=[0.9,0.95]", "optim.weight_decay=0.1")),
        Rule("optimizer", lambda c: c.method == "qlora" or (c.method == "lora" and c.size > 2e10),
             _("AdamW, lr {qlora}"), _("2e-4 up to 13 billion parameters and 1e-4 above worked in all their runs"), QLORA,
             ("optim=adamw", "optim.lr={qlora}")),
        Rule("optimizer", lambda c: c.method == "lora", _("AdamW, lr 2e-4"),
             _("GPT-3 was tuned at this rate with LoRA; rates for LoRA lie far above those for all weights"),
             LORA, ("optim=adamw", "optim.lr=2e-4")),
        Rule("optimizer", lambda c: c.kind == "encoder" and _rows(c, 0, 10_000),
             _("AdamW with bias correction, lr 2e-5, weight decay 0.01"),
             _("few rows make fine-tuning unstable; a small rate with warmup and bias correction cures most of it"), STABLE,
             ("optim=adamw", "optim.lr=2e-5", "optim.weight_decay=0.01")),
        Rule("optimizer", lambda c: c.kind == "encoder", _("AdamW, lr 2e-5 to 5e-5"),
             _("rates in this range worked well across all their tasks"),
             BERT, ("optim=adamw", "optim.lr=3e-5", "optim.weight_decay=0.01")),
        Rule("optimizer", _fine, _("AdamW, lr 2e-5, weight decay 0.1"), _("as Llama 2 learned its answers"), LLAMA2,
             ("optim=adamw", "optim.lr=2e-5", "optim.weight_decay=0.1")),
        Rule("optimizer", lambda c: True, _("AdamW, when you train"),
             _("decay apart from the gradient generalises better than Adam's"), ADAMW),
        Rule("schedule", lambda c: c.task == "pretraining" and c.tokens is None,
             _("warm up, stay, decay at the end: the length need not be known ahead"),
             _("as good as a cosine, and any checkpoint of the level part can be decayed or gone on from"), MINICPM,
             ("schedule=wsd",)),
        Rule("schedule", lambda c: c.learns == "text", _("cosine down to a tenth, exactly as long as the run"),
             _("a cosine that is longer than the run by a quarter or more costs loss"), CHINCHILLA,
             ("schedule=cosine", "schedule.floor=0.1")),
        Rule("schedule", lambda c: c.kind == "encoder", _("linear, with a tenth of it for warmup"),
             _("without warmup, many runs on small data fail"), STABLE, ("schedule=linear", "schedule.warmup=0.1")),
        Rule("schedule", lambda c: True, _("cosine"), _("as Llama 2 learned its answers"), LLAMA2, ("schedule=cosine",)),
        Rule("batch", lambda c: c.task == "pretraining",
             _("begin near {batch} tokens a step; measure the gradient's noise before making it larger"),
             _("the critical batch grows as the loss falls, about 2e8 ÷ loss^4.8 tokens; above it, more rows bring little"),
             KAPLAN),
        Rule("batch", lambda c: c.learns == "text", _("raise it only up to the gradient's noise scale"),
             _("below the noise scale twice the batch halves the steps; above it the data are wasted"), NOISE),
        Rule("batch", lambda c: c.kind == "encoder", _("16 or 32 rows a step"), _("both worked well across all their tasks"),
             BERT, ("rows=32",)),
        Rule("batch", lambda c: _rows(c, 0, 5000), _("16 to 32 rows a step"),
             _("a thousand good answers were learned in steps of 32 rows"),
             LIMA, ("rows=32",)),
        Rule("batch", lambda c: True, _("64 rows a step"), _("as Llama 2 learned its answers"), LLAMA2, ("rows=64",)),
    )


def _amounts() -> tuple[Rule, ...]:
    return (
        Rule("epochs", lambda c: c.learns == "text", _("up to 4 passes over the text; past 16 they bring next to nothing"),
             _("up to four epochs repeated tokens are nearly worth new ones, then their value falls fast"), REPEAT),
        Rule("epochs", lambda c: c.kind == "encoder" and _rows(c, 0, 1000), _("20 passes, stopping early"),
             _("with few rows the steps, not the passes, are what lacks"), STABLE,
             ("epochs=20", "stop.patience=3", "every.evaluate=20")),
        Rule("epochs", lambda c: c.kind == "encoder", _("2 to 4 passes"), _("so many worked well across all their tasks"), BERT,
             ("epochs=3",)),
        Rule("epochs", lambda c: _rows(c, 0, 5000), _("5 to 15 passes; watch answers, not only the loss"),
             _("fifteen passes over a thousand answers: the loss on held-out rows rises while answers still become better"), LIMA,
             ("epochs=5",)),
        Rule("epochs", lambda c: True, _("2 passes"), _("as Llama 2 learned its answers"), LLAMA2, ("epochs=2",)),
        Rule("data", lambda c: c.task == "pretraining" and c.tokens is not None,
             _("{tokens} tokens ÷ {size} parameters = {ratio} a parameter; 20 a parameter would be {twenty} tokens"),
             _("with a given amount of compute, parameters and tokens should grow alike, about 20 tokens for each parameter"),
             CHINCHILLA),
        Rule("data", lambda c: c.task == "domain" and c.tokens is not None,
             _("{tokens} tokens; mix old text in, or what the model knew will fade"),
             _("warming up again, decaying again and replaying old text matched training from the beginning on all of it"),
             REPLAY),
        Rule("data", lambda c: c.learns == "answers" and _rows(c, 0, 1000), _("fewer than 1,000 answers: choose each with care"),
             _("a model that learned a thousand chosen answers was preferred to one that learned 52,000 plain ones"), LIMA),
        Rule("data", lambda c: c.kind == "encoder" and _rows(c, 0, 10_000), _("train with 3 seeds or more and compare"),
             _("on small data the seed alone moves results by points"), SEEDS),
    )


def _after() -> tuple[Rule, ...]:
    return (
        Rule("compression", lambda c: c.kind == "encoder" and c.latency is not None and c.latency < 0.02,
             _("distil into 6 layers, then 8 bits"), _("40 % smaller and 60 % faster with 97 % of what it could"), DISTIL),
        Rule("compression", lambda c: c.kind == "encoder" and c.machine.device.kind == "cpu",
             _("8 bits for weights and activations"),
             _("BERT loses about one per cent or less in 8 bits, at a quarter of its size"), Q8BERT),
        Rule("compression", lambda c: c.kind == "encoder", _("none needed; if it must be faster, take heads out"),
             _("many heads of a trained model can go without a loss that one can measure"), HEADS),
        Rule("compression", lambda c: c.size >= 1e9, _("4 bits for weights, scaled by the activations"),
             _("weights that meet large activations matter most; keeping those exact keeps the model"), AWQ),
        Rule("compression", lambda c: True, _("8 bits; 4 bits only if memory asks for it"),
             _("at the same number of bits in all, more parameters of 4 bits are best; small models lose more"), BITS),
    )
