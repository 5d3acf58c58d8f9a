"""The recipe: one frozen, typed object, one YAML file.  These keys are the product's public names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from danlu.adapt import QAT, Adapters
from danlu.config import Model
from danlu.layout import Layout
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.models.foreign_config import Foreign
from danlu.objectives import Embed, Objectives
from danlu.objectives.tasks import check_sources
from danlu.optim import Optimizers
from danlu.schedule import Schedules
from danlu.train.continual import Continual, Teach
from danlu.train.sources import Source, listed
from danlu.train.sparsify import KeepZeros, Sparsify
from danlu.words import _

Models = Annotated[Decoder | Encoder, Field(discriminator="kind")]


class Chats(Model):
    """How conversations become text, and which of it is learned."""

    template: Path | None = Field(
        None, description="Jinja file of the chat template; empty: that of the tokenizer's folder, else ChatML.")
    learn: Literal["answers", "last", "all"] = Field(
        "answers", description="Turns that carry loss: the assistant's, its last one, or everything.")


class Every(Model):
    """How often things happen, in steps; 0 means never (for `save`: only at the end)."""

    log: int = Field(10, ge=1, description="Write a line of metrics.")
    evaluate: int = Field(0, ge=0, description="Measure the loss on `eval`; also done at the start and the end.")
    save: int = Field(0, ge=0, description="Write a checkpoint; also done at the end.")
    sample: int = Field(0, ge=0, description="Show a text the model writes.")
    best: bool = Field(True, description="Also write a checkpoint when an evaluation is the best so far.")
    keep: int = Field(2, ge=2, description="Checkpoints kept; the best and the last two verified ones always stay.")


class Stop(Model):
    """Early stopping: end when `metric` of the recipe has not become better for `patience` evaluations."""

    patience: int = Field(ge=1, description="Evaluations without improvement before the run ends.")
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False, description="A smaller improvement is none.")


class Guard(Model):
    """What is done when a run goes wrong silently.  Every check is on in every run; these are its thresholds."""

    max_skips: int = Field(3, ge=0, description="Updates in a row that may be skipped for bad numbers before the run stops.")
    spike: float = Field(6.0, gt=0, description="Skip an update whose loss lies this many deviations above its history.")
    rejects: float = Field(0.0, ge=0, le=1, description="Share of the rows of a file that may be unusable and left out.")
    overlap: float = Field(0.0, ge=0, le=1, description="Share of evaluation documents that may stand in the training data.")
    hang: float = Field(600.0, ge=0, allow_inf_nan=False, description="Seconds without a step after which a run counts as hung: "
                        "stacks are written down, and it ends with exit code 75; 0 = never.")
    reload: bool = Field(True, description="Save, reload and compare before the first step.")


class Audit(Model):
    """What the audit allows, as shares of the rows.  What lies above stops the run if `stop` names it, and is told else."""

    stop: tuple[Literal["near_overlap", "masked", "unended", "double_bos", "no_bos", "empty_answer", "duplicates",
                        "near_duplicates", "contradictions", "cut", "unknown", "garbled", "markup", "rarest", "constant",
                        "same_text", "alike_labels", "long", "padding"], ...] = Field(
        ("masked", "unended", "double_bos", "empty_answer"),
        description="Findings that stop the run; evaluation rows in the training data (guard.overlap) and unusable rows "
        "(guard.rejects) always do.")
    rows: int = Field(100_000, ge=1, description="Rows of a source that are looked at token by token, evenly spaced.")
    masked: float = Field(0.0, ge=0, le=1, description="Rows without a token that carries loss.")
    unended: float = Field(0.0, ge=0, le=1, description="Answers whose last learned token does not end them.")
    double_bos: float = Field(0.0, ge=0, le=1, description="Rows that begin with bos twice.")
    empty_answer: float = Field(0.0, ge=0, le=1, description="Answers of which only the end is learned.")
    near_overlap: float = Field(0.0, ge=0, le=1, description="Evaluation rows that stand nearly so in the training data: "
                                "the neighbouring pairs of their tokens have a Jaccard index of 0.8 or more.")
    duplicates: float = Field(0.05, ge=0, le=1, description="Rows that stand there already, the same or nearly so.")
    contradictions: float = Field(0.0, ge=0, le=1, description="Rows that stand there already with another class.")
    cut: float = Field(0.05, ge=0, le=1, description="Documents that are cut, split or dropped because they are too long.")
    unknown: float = Field(0.01, ge=0, le=1, description="Tokens that are unknown to the tokenizer.")
    garbled: float = Field(0.0, ge=0, le=1, description="Texts with characters that another encoding has lost.")
    markup: float = Field(0.05, ge=0, le=1, description="Texts that hold HTML.")
    rarest: float = Field(0.02, ge=0, le=1, description="Share of the rarest class; less is told.")
    padding: float = Field(0.5, ge=0, le=1, description="Places of batches that are padding.")


def _metric(name: Any) -> Any:
    """Return the name of a metric as a run writes it: accuracy and eval_accuracy are eval/accuracy."""
    return f"eval/{name.removeprefix('eval_').removeprefix('eval/')}" if isinstance(name, str) else name


class Run(Model):
    """Whatever is needed to repeat a training run."""

    out: Path = Field(description="Run folder.")
    model: SerializeAsAny[Models] | None = Field(None, description="A model with random weights …")
    start: Path | None = Field(None, description="… or a checkpoint or Hugging Face folder to start from.")
    data: tuple[Source, ...] = Field(min_length=1,
                                     description="What is learned from: prepared folders or files of rows, with weights.")
    eval: tuple[Source, ...] = Field((), description="Held-out data; by default the `val` part of `data`.")
    held_out: float = Field(0.1, ge=0, lt=1, allow_inf_nan=False, description="Share of the rows of unprepared `data` that is "
                            "held out where `eval` is empty, of each class.")
    tokenizer: Path | None = Field(None, description="Folder of the tokenizer for unprepared data; empty: that of `start`.")
    chat: Chats = Chats()
    continual: Continual | None = Field(None, description="Going on from `start` without forgetting.")
    frozen: dict[str, Path] = Field({}, description="Models that are asked and do not learn: teacher: a run, checkpoint or "
                                    "Hugging Face folder; several under names of your own teach together.")
    distil: Teach | None = Field(None, description="How the models under `frozen` teach; empty: the defaults.")
    adapt: Adapters | None = Field(None, description="What is trained in place of all weights of `start`.")
    sparsify: Sparsify | None = Field(None, discriminator="kind", description="Weights that are 0: what is 0 stays so, or more "
                                      "becomes so on the way.")
    objective: Objectives = Field(description="What is learned.")
    optim: Optimizers = Field(description="How parameters follow gradients.")
    schedule: Schedules = Field(description="How the learning rate moves.")
    layout: Layout = Layout()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Arithmetic of the forward pass; weights stay in fp32. auto = the fastest measured on this device.")
    paths: Literal["rule", "measure"] = Field(
        "rule", description="Which of several equal computations runs: by a fixed rule, or by a measurement at the start.")
    compile: bool = Field(False, description="Compile one block with torch.compile and reuse it.")
    recompute: Literal["none", "full"] | Annotated[int, Field(ge=1)] = Field(
        "none", description="Recompute activations in the backward pass: none, full, or every k-th block.")
    steps: int | None = Field(None, gt=0, description="Updates …")
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False, description="… or passes over the data.")
    rows: int | None = Field(None, gt=0, description="Rows per step, over all micro-batches …")
    tokens: int | None = Field(None, gt=0, description="… or tokens per step.")
    micro_rows: int | None = Field(None, gt=0, description="… or rows per micro-batch of one process, "
                                   "times layout.micro and layout.dp.")
    length: int = Field(gt=0, description="Tokens in a row.")
    pack: bool = Field(True, description="Fill rows with several documents, isolated from each other.")
    overlong: Literal["error", "split", "drop", "cut"] = Field(
        "error", description="What to do with a document longer than a row.")
    group_by_length: bool = Field(
        False, description="Without packing: rows of like length come in one step, in random order of steps.  It is faster "
                           "where attention is costly, but such steps are less alike, which can cost accuracy.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of weights, data order, masks and dropout.")
    clip: float | None = Field(1.0, gt=0, allow_inf_nan=False, description="Largest norm of the gradient.")
    ema: float | None = Field(None, gt=0, lt=1, description="Decay of an average of the weights, saved beside them.")
    every: Every = Every()
    metric: Annotated[str, BeforeValidator(_metric)] = Field(
        "eval/loss", description="What the best checkpoint and early stopping go by.")
    stop: Stop | None = None
    guard: Guard = Guard()
    audit: Audit = Audit()
    workers: int = Field(0, ge=0, description="Processes that make batches; 0 = this one.")
    threads: int | None = Field(
        None, gt=0, description="CPU threads; by default all cores. Part of what makes a run repeat to the bit.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model lives.")
    allocator: Literal["keep", "return"] = Field(
        "keep", description="What becomes of freed memory on a CPU: keep = it stays with the process, which is fastest; return = "
                            "large blocks go back at once, so that the process needs what the plan says, and takes longer.")
    verify: Literal["full", "size"] = Field("full", description="Hash prepared data before use, or compare sizes only.")
    trackers: tuple[Literal["tensorboard"], ...] = Field((), description="Where else metrics go.")
    report: bool = Field(False, description="Write report.html with curves at the end (extra: report).")
    resume: bool = Field(True, description="Go on from the newest good checkpoint in `out`.")

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        problems = []
        if (self.model is None) == (self.start is None):
            problems.append(_("give either `model` (random weights) or `start` (weights to begin from)"))
        if self.steps is not None and self.epochs is not None:
            problems.append(_("steps={steps} and epochs={epochs} are both given; take one back, by steps=null or epochs=null")
                            .format(steps=self.steps, epochs=self.epochs))
        if self.steps is None and self.epochs is None:
            problems.append(_("give either `steps` or `epochs`"))
        if sum(v is not None for v in (self.rows, self.tokens, self.micro_rows)) != 1:
            problems.append(_("give one of `rows`, `tokens` (per step) and `micro_rows` (per micro-batch)"))
        if self.tokens is not None and self.tokens < self.length:
            problems.append(_("tokens={tokens} is less than one row of length={length}").format(
                tokens=self.tokens, length=self.length))
        if self.stop is not None and not self.every.evaluate:
            problems.append(_("stop needs every.evaluate > 0, or nothing would ever stop the run"))
        if self.model is not None and "lm" in self.objective.heads and self.model.kind != "decoder":
            problems.append(_("objective {kind} needs a decoder; set model.kind=decoder").format(kind=self.objective.kind))
        if self.model is not None and "mlm" in self.objective.heads and self.model.kind != "encoder":
            problems.append(_("objective {kind} needs an encoder; set model.kind=encoder").format(kind=self.objective.kind))
        problems += [*self._continual(), *self._taught()]
        problems += check_sources(self.objective, {key: [s.task for s in sources] for key, sources in self.named.items()})
        if self.pack and self.objective.partner:
            problems.append(_("sentence pairs fill their rows themselves; set pack=false"))
        if isinstance(self.objective, Embed) and self.objective.across and (self.layout.dp > 1 or self.layout.micro > 1):
            problems.append(_("the contrastive loss compares all rows of a step, which layout.dp and layout.micro deal out; set "
                              "both to 1, or objective.loss=cosine"))
        if self.model is not None and self.length > self.model.context:
            problems.append(_("length={length} is more than model.context={context}; raise model.context or lower length")
                            .format(length=self.length, context=self.model.context))
        problems += [*self._of_adapter(), *self._sparse()]
        layout = self.layout
        if layout.pp > 1 and self.objective.tasks() and self.metric != "eval/loss":
            problems.append(_("under layout.pp the loss of a task is measured, and no figure of it; set metric=loss, or "
                              "layout.pp=1"))
        if self.every.sample and (layout.pp > 1 or layout.cp > 1 or layout.sequence):
            problems.append(_("samples are written by processes that see whole rows through all blocks; set every.sample=0 with "
                              "layout.pp, layout.cp or layout.sequence"))
        if self.compile and (layout.tp > 1 or layout.cp > 1):
            problems.append(_("compile cannot follow what layout.tp and layout.cp exchange inside a block; set compile=false"))
        if layout.local is not None:
            if self.ema is not None:
                problems.append(_("ema averages one model, and layout.local trains several; leave one of them out"))
            wrong = [name for name in ("evaluate", "save") if getattr(self.every, name) % layout.local.steps]
            if wrong:
                problems.append(_("replicas are equal only every layout.local.steps={n} steps; make every.{name} a multiple")
                                .format(n=layout.local.steps, name=wrong[0]))
        if not problems:
            try:
                layout.check(self.step_rows, length=self.length, optimizer=self.optim.kind,
                             model=None if self.model is None else self.model.model_dump())
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _continual(self) -> list[str]:
        """Return what is wrong with the section `continual`."""
        given = self.continual
        if given is None:
            return []
        problems = []
        if self.start is None:
            problems.append(_("continual keeps what a model knows; name it under `start`"))
        if given.ewc is not None and not given.ewc.data and given.replay is None:
            problems.append(_("continual.ewc needs old data; name it under continual.ewc.data"))
        if given.average is not None and given.average.last > self.every.keep:
            problems.append(_("continual.average.last={n} checkpoints are averaged, and every.keep={m} are kept").format(
                n=given.average.last, m=self.every.keep))
        return problems

    def _taught(self) -> list[str]:
        """Return what is wrong with the sections `frozen` and `distil`."""
        problems = []
        if self.distil is not None and not self.frozen:
            problems.append(_("distil learns from a teacher; name it: frozen.teacher=runs/x"))
        inside = self.distil is not None and (self.distil.hidden or self.distil.relations)
        if inside and self.layout.pp > 1:
            problems.append(_("distil.hidden and distil.relations look inside all blocks, which no process has under layout.pp; "
                              "leave them out, or set layout.pp=1"))
        if inside and self.compile and self.distil.relations:                # type: ignore[union-attr]
            problems.append(_("distil.relations looks inside a block, where compile lets nobody look; set compile=false"))
        if inside and self.layout.cp > 1 and self.distil.relations:          # type: ignore[union-attr]
            problems.append(_("distil.relations compares all tokens of a row, which layout.cp cuts; set layout.cp=1"))
        if self.frozen and self.continual is not None and self.continual.distil is not None:
            problems.append(_("frozen and continual.distil both name models to learn from; give one of them"))
        return problems

    @property
    def named(self) -> dict[str, tuple[Source, ...]]:
        """The sources, by the key of the recipe that names them."""
        old = self.continual or Continual()
        return {"data": self.data, "eval": self.eval, "continual.replay.data": old.replay.data if old.replay else (),
                "continual.ewc.data": old.ewc.data if old.ewc else (), "continual.old": old.old}

    @property
    def learned(self) -> tuple[Source, ...]:
        """The sources that rows are learned from, those of replay after the others."""
        return (*self.data, *self.named["continual.replay.data"])

    def naming(self, sources: Mapping[str, tuple[Source, ...]]) -> Run:
        """Return the recipe with other sources under the keys of `named`."""
        changes: dict[str, Any] = {"data": sources["data"], "eval": sources["eval"]}
        if self.continual is not None:
            inner: dict[str, Any] = {"old": sources["continual.old"]}
            for name in ("replay", "ewc"):
                part = getattr(self.continual, name)
                if part is not None:
                    inner[name] = part.model_copy(update={"data": sources[f"continual.{name}.data"]})
            changes["continual"] = self.continual.model_copy(update=inner)
        return self.model_copy(update=changes)

    def _of_adapter(self) -> list[str]:
        if self.adapt is None:
            return []
        if self.model is not None and not isinstance(self.adapt, QAT):
            return [_("adapt changes a model that is there: give `start`, not `model`")]
        return self.adapt.check(self.layout, length=self.length, context=None, pack=self.packed)

    def _sparse(self) -> list[str]:
        """Return what is wrong with the section `sparsify`."""
        if self.sparsify is None:
            return []
        problems, keeps = [], isinstance(self.sparsify, KeepZeros)
        if self.adapt is not None and not isinstance(self.adapt, QAT):
            problems.append(_("sparsify needs weights that learn, and adapt={kind} leaves them as they are; leave one of them "
                              "out").format(kind=self.adapt.kind))
        if isinstance(self.adapt, QAT) and self.adapt.bits == 4:
            problems.append(_("in 4 bits with an offset a zero is no zero any more; set adapt.bits=8, or leave sparsify out"))
        if keeps and self.start is None:
            problems.append(_("sparsify=keep keeps the zeros of a model that is there; name it under `start`"))
        if not keeps and self.layout.local is not None:
            problems.append(_("replicas under layout.local would each choose zeros of their own; leave it out, or sparsify=keep"))
        if not keeps and self.continual is not None and self.continual.average is not None:
            problems.append(_("continual.average would fill the zeros of sparsify={kind} with weights of before; leave one of "
                              "them out").format(kind=self.sparsify.kind))
        return problems

    @property
    def network(self) -> Decoder | Encoder | Foreign:
        """The model's config, once it is settled."""
        assert self.model is not None, "settled before it is asked for"
        return self.model

    @property
    def step_rows(self) -> int:
        """Rows per step."""
        if self.micro_rows is not None:
            return self.micro_rows * self.layout.micro * self.layout.dp
        return self.rows if self.rows is not None else max(1, (self.tokens or 0) // self.length)

    @property
    def part_rows(self) -> int:
        """Rows of a micro-batch of one process."""
        return max(1, self.step_rows // self.layout.dp // self.layout.micro)

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents."""
        return self.pack and self.objective.packs

    @property
    def tight(self) -> bool:
        """Whether a batch is as long as its longest row; pipelines, cut rows and compiled blocks want one length."""
        layout = self.layout
        return not (self.packed or layout.pp > 1 or layout.cp > 1 or layout.sequence or self.compile)

    ALIASES: ClassVar[Mapping[str, str | Callable[[Any], dict[str, Any]]]] = {}


_SCHEDULES = {"constant_with_warmup": "constant", "inverse_sqrt": "inverse_sqrt", "warmup_stable_decay": "wsd"}
_OPTIMS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adafactor": "adafactor"}


def _optim(value: Any) -> dict[str, Any]:
    return {"optim": _OPTIMS.get(value, value) if isinstance(value, str) else value}


_ADAPTERS: dict[Any, dict[str, Any]] = {"full": {}, "none": {}, None: {}, "qlora": {"adapt": "lora", "adapt.base": "nf4"}}


def _adapter(value: Any) -> dict[str, Any]:
    return _ADAPTERS[value] if isinstance(value, str | None) and value in _ADAPTERS else {"adapt": value}


Run.ALIASES = {
    "finetuning_type": _adapter, "tuner_type": _adapter, "adapter": _adapter, "adapter_name_or_path": "adapt.start",
    "lora_model_dir": "adapt.start", "lora_rank": "adapt.rank", "lora_r": "adapt.rank", "lora_alpha": "adapt.alpha",
    "lora_dropout": "adapt.dropout", "lora_target": "adapt.target", "lora_target_modules": "adapt.target",
    "target_modules": "adapt.target", "use_rslora": "adapt.rslora", "use_dora": "adapt.dora", "peft_use_dora": "adapt.dora",
    "peft_use_rslora": "adapt.rslora", "loraplus_lr_ratio": "adapt.rate_ratio", "modules_to_save": "adapt.modules_to_save",
    "additional_target": "adapt.modules_to_save", "lora_modules_to_save": "adapt.modules_to_save",
    "freeze_trainable_layers": "adapt.last",
    "model_name_or_path": "start", "base_model": "start", "output_dir": "out",
    "dataset": lambda v: {"data": listed(v)}, "eval_dataset": lambda v: {"eval": listed(v)},
    "data": lambda v: {"data": listed(v)}, "eval": lambda v: {"eval": listed(v)},
    "cutoff_len": "length", "sequence_len": "length", "max_length": "length", "max_seq_length": "length",
    "packing": "pack", "sample_packing": "pack", "neat_packing": "pack",
    "logging_steps": "every.log", "save_steps": "every.save", "save_total_limit": "every.keep",
    "eval_steps": "every.evaluate", "early_stopping_steps": "stop.patience", "metric_for_best_model": "metric",
    "val_size": "held_out", "val_set_size": "held_out", "split_dataset_ratio": "held_out",
    "template": "chat.template", "chat_template": "chat.template",
    "mask_history": lambda v: {"chat.learn": "last"} if v else {},
    "train_on_prompt": lambda v: {"chat.learn": "all"} if v else {},
    "train_on_inputs": lambda v: {"chat.learn": "all"} if v else {},
    "per_device_train_batch_size": "micro_rows", "micro_batch_size": "micro_rows",
    "global_batch_size": "rows", "gradient_accumulation_steps": "layout.micro",
    "learning_rate": "optim.lr", "weight_decay": "optim.weight_decay", "max_grad_norm": "clip",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps",
    "lr_scheduler_type": lambda v: {"schedule.kind": _SCHEDULES.get(v, v)},
    "lr_scheduler": lambda v: {"schedule.kind": _SCHEDULES.get(v, v)},
    "warmup_ratio": "schedule.warmup", "warmup_steps": "schedule.warmup",
    "optimizer": _optim, "optim": _optim,
    "bf16": lambda v: {"precision": "bf16"} if v else {}, "fp16": lambda v: {"precision": "fp16"} if v else {},
    "gradient_checkpointing": lambda v: {"recompute": "full" if v else "none"},
    "report_to": lambda v: {"trackers": [] if v in ("none", None) else v if isinstance(v, list) else [v]},
    "plot_loss": "report", "dataloader_num_workers": "workers",
    "resume_from_checkpoint": lambda v: {"resume": v not in (False, None, "false")},
}
