"""A case that advice is asked for: a task, its data, a machine; and which model and method fit it."""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple

from danlu.errors import ConfigError
from danlu.planner import amounts
from danlu.planner.hardware import Machine
from danlu.planner.public import Public, flops, parameters, public
from danlu.words import _

Method = Literal["full", "lora", "qlora", "scratch", "none"]
ROOM = 0.7                                               # share of the memory for weights and optimizer; the rest: activations
FULL = 16.0                                              # bytes a parameter: weights, gradients, two averages of AdamW, in fp32
FROZEN = 4.0                                             # … that is not trained
NF4 = 0.5 + 4 / 64                                       # … in 4 bits, with a scale in fp32 for 64 of them
THIN = 0.01                                              # share of parameters that LoRA trains, about
LENGTHS = {"rows": 128, "answers": 1024, "text": 2048}   # tokens of a row where nothing else is known

# task -> what it learns from, objective of the recipe, kind of model
TASKS: dict[str, tuple[str, str, str]] = {
    "classification": ("rows", "classify", "encoder"), "regression": ("rows", "regress", "encoder"),
    "tagging": ("rows", "tag", "encoder"), "questions": ("rows", "answer", "encoder"), "choice": ("rows", "choose", "encoder"),
    "embedding": ("rows", "embed", "encoder"), "chat": ("answers", "causal_lm", "decoder"),
    "instructions": ("answers", "causal_lm", "decoder"), "summarization": ("answers", "causal_lm", "decoder"),
    "domain": ("text", "causal_lm", "decoder"), "pretraining": ("text", "causal_lm", "decoder"),
}
OTHERS = {"classify": "classification", "sentiment": "classification", "ner": "tagging", "qa": "questions",
          "sft": "instructions",
          "similarity": "embedding", "retrieval": "embedding", "generation": "instructions", "continue": "domain",
          "pretrain": "pretraining", "分类": "classification", "情感": "classification", "命名实体识别": "tagging",
          "问答": "questions", "摘要": "summarization", "对话": "chat", "预训练": "pretraining"}
ENCODERS = {"zh": "bert-base-chinese", "en": "bert-base"}
DECODERS = ("qwen2.5-72b", "qwen2.5-32b", "qwen2.5-14b", "qwen2.5-7b", "qwen2.5-1.5b", "qwen2.5-0.5b")
SLOW = 5                                                 # … on a CPU, where larger ones take weeks
START = {"best": 0, "good": 3, "draft": 4}               # in DECODERS: where the choice begins


class Case(NamedTuple):
    """What is asked, and the model and method that follow."""

    task: str
    rows: float | None
    tokens: float | None
    language: str
    machine: Machine
    quality: str
    latency: float | None                                # seconds
    model: Public | None                                 # None: trained from random weights, of `size` parameters
    method: Method
    size: float                                          # parameters
    length: int

    @property
    def kind(self) -> str:
        return TASKS[self.task][2]

    @property
    def learns(self) -> str:
        return TASKS[self.task][0]

    @property
    def seen(self) -> float | None:
        """Tokens of one pass over the data."""
        return self.tokens if self.tokens is not None else None if self.rows is None else self.rows * self.length

    @property
    def state(self) -> float:
        """Bytes of weights, gradients and optimizer."""
        return held(self.size, self.method)

    def seconds(self, epochs: float) -> float | None:
        """Return about how long so many passes over the data take."""
        if self.seen is None:
            return None
        machine = self.machine
        rate = max(machine.rate(name) for name in machine.device.flops if name in ("fp32", "bf16", "fp16")) * machine.count
        each = 6 * self.size if self.model is None else flops(self.model.config, self.length)
        return epochs * self.seen * each * (2 / 3 if self.method in ("lora", "qlora") else 1) / rate


def held(size: float, method: Method) -> float:
    """Return the bytes of weights, gradients and optimizer of a model of so many parameters."""
    frozen = {"full": 0.0, "scratch": 0.0, "lora": FROZEN, "qlora": NF4, "none": FROZEN}[method]
    trained = {"full": 1.0, "scratch": 1.0, "lora": THIN, "qlora": THIN, "none": 0.0}[method]
    return size * (frozen + trained * FULL)


def task(name: str) -> str:
    """Return the name of a task.  Raises ConfigError with what was meant."""
    known = {**{one: one for one in TASKS}, **OTHERS}
    if name.lower() in known:
        return known[name.lower()]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    raise ConfigError(_("unknown task {name!r}").format(name=name) + (
        _(" — did you mean {name!r}?").format(name=known[close[0]]) if close else ""), where="--task",
        fix=_("known: {names}").format(names=", ".join(TASKS)))


def fits(size: float, method: Method, machine: Machine) -> bool:
    """Return whether a method's weights and optimizer fit; what is whole is cut over all devices, a quantized base is not."""
    return held(size, method) <= ROOM * room(machine, 1 if method == "qlora" else machine.count)


def room(machine: Machine, count: int | None = None) -> int:
    """Return the bytes that so many devices, by default all, have for tensors."""
    return (machine.count if count is None else count) * max(0, machine.device.memory - machine.base)


def case(*, name: str, rows: float | None, tokens: float | None, language: str, machine: Machine, size: float | None,
         quality: str, latency: float | None) -> Case:
    """Return the case, with a model and a method that fit the machine.  Raises ConfigError if no model does."""
    learns, _objective, kind = TASKS[name]
    if learns == "text" and rows is not None and tokens is None:
        raise ConfigError(_("{task} learns from plain text").format(task=name), where="--rows", fix=_("give --tokens"))
    length = LENGTHS[learns]
    made = Case(name, rows, tokens, language, machine, quality, latency, None, "scratch", size or 0.0, length)
    if name == "pretraining" and size is None and tokens is None:
        raise ConfigError(_("how much text there is decides how large a model it can fill"), where="--tokens",
                          fix=_("give --tokens 1B, or --model-size 50M"))
    if name == "pretraining":
        size = size if size is not None else max(1e5, (tokens or 0) / 20)
        if not fits(size, "scratch", machine):
            most = size * ROOM * room(machine) / held(size, "scratch")
            raise ConfigError(
                _("{size} parameters with gradients and optimizer are {need}; {count} × {device} have room for {most}").format(
                    size=amounts.told(size), need=amounts.size(held(size, "scratch")), count=machine.count,
                    device=machine.device.name, most=amounts.told(most)),
                where="--hardware",
                fix=_("give a larger machine, or --model-size {size} at most").format(size=amounts.told(most)))
        return made._replace(size=size)
    if kind == "encoder" and size is None:
        chosen = public("bert-large" if quality == "best" and language == "en" else ENCODERS.get(language, "bert-base"))
        return made._replace(model=chosen, size=float(parameters(chosen.config)), method=method(made, parameters(chosen.config)))
    if size is not None:
        return made._replace(size=size, method=method(made, size))
    for each in DECODERS[SLOW if machine.device.kind == "cpu" else START[quality]:]:
        chosen = public(each)
        count = float(parameters(chosen.config))
        how = method(made, count)
        if how != "none":
            return made._replace(model=chosen, size=count, method=how)
    raise ConfigError(_("no model of the table can be trained on {count} × {name}").format(
        count=machine.count, name=machine.device.name), where="--hardware",
        fix=_("give a larger machine, or --task classification"))


def method(one: Case, size: float) -> Method:
    """Return how a model of so many parameters is fine-tuned: what the data asks for, if it fits, else what does."""
    few = one.rows is not None and one.rows < 50
    if few and one.learns == "rows" and one.task != "embedding":
        return "none"
    small = size < 1e9
    wanted: tuple[Method, ...] = ("full", "lora", "qlora") if small or one.learns == "text" or (
        one.quality == "best" and (one.rows or 0) >= 100_000) else ("lora", "qlora")
    return next((each for each in wanted if fits(size, each, one.machine)), "none")
