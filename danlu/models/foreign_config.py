"""config.json of models of `transformers` that are no family of ours: read by the installed library (extra: transformers).

What a model brings along is never run, and nothing here imports the library before a folder of such a model is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from danlu.config import Model
from danlu.errors import ConfigError, IncompatibleError, SecurityError
from danlu.layout import Layout
from danlu.models import tasks as heads_of_tasks
from danlu.nn.tasks import Head, Heads
from danlu.words import _

# The head that a model has, the class of transformers that has it, and where that lists its classes by model type.
CLASSES = {"lm": ("AutoModelForCausalLM", "CAUSAL_LM"), "mlm": ("AutoModelForMaskedLM", "MASKED_LM"),
           "classify": ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
           "tag": ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),
           "answer": ("AutoModelForQuestionAnswering", "QUESTION_ANSWERING")}

# Keys of config.json that say nothing of the shape: of files, of tokens, of the heads (which `tasks` tells), of who computes.
_ELSEWHERE = frozenset({"architectures", "torch_dtype", "dtype", "transformers_version", "pad_token_id", "id2label", "label2id",
                        "num_labels", "problem_type", "danlu", "attn_implementation", "experts_implementation", "use_cache",
                        "output_attentions", "output_hidden_states", "return_dict"})
_PAD_FIRST = frozenset({"camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta-prelayernorm", "xlm-roberta",
                        "xlm-roberta-xl", "xmod"})       # positions are counted from the number after the padding id
_UNLIMITED = 2**20                                       # tokens of a model whose config.json names no most


class Foreign(Model):
    """The shape of a model of transformers.  It is read from a folder, never written in a recipe."""

    kind: Literal["foreign"] = "foreign"
    family: str = Field(description="`model_type` of config.json.")
    content: dict[str, Any] = Field(description="config.json, as far as it tells the shape.")
    vocab: int = Field(gt=0, description="Number of token ids.")
    width: int = Field(gt=0, description="Width of the residual stream.")
    layers: int = Field(gt=0, description="Number of blocks.")
    heads: int = Field(1, gt=0, description="Attention heads.")
    context: int = Field(gt=0, description="Most tokens that the model reads at once.")
    pad: int | None = Field(None, description="Id of the padding token.")
    causal: bool = Field(description="Whether a token sees only those before it.")
    outputs: tuple[Literal["lm", "mlm"], ...] = Field((), description="The head of the vocabulary, where there is no task.")
    tasks: Heads = Field((), description="The head of a task, which stands in the place of the vocabulary's.")

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def head(self) -> str:
        """The one head that the model has, as CLASSES calls it."""
        return self.tasks[0].kind if self.tasks else self.outputs[0]

    def filled(self, *, vocab: int, heads: Sequence[str] = (), pad: int | None = None) -> Foreign:
        """Return the config with the padding id, where it was left open."""
        return self if self.pad is not None else self.model_copy(update={"pad": pad})

    def with_heads(self, heads: Sequence[str]) -> Foreign:
        """Return the config with `heads` alone, of those there are.  Raises IncompatibleError for others."""
        held = [*self.outputs, *(t.name for t in self.tasks)]
        if list(heads) != held:
            raise IncompatibleError(_("the model has no head {name}; it has {heads}").format(
                name=", ".join(sorted(set(heads) - set(held))), heads=", ".join(held)))
        return self

    def with_tasks(self, tasks: Sequence[Head], *, outputs: Sequence[str] = ()) -> Foreign:
        """Return the config with the head of this task, which is that of the class of transformers for it."""
        if len(tasks) != 1 or outputs:
            raise IncompatibleError(_("{family} is a model of transformers: it has one head, not {heads}").format(
                family=self.family, heads=", ".join([*outputs, *(t.name for t in tasks)])), fix=_("use one objective"))
        made = self.model_copy(update={"tasks": tuple(tasks), "outputs": ()})
        architecture(made)
        return made


def refuse(cfg: Foreign, layout: Layout, others: Mapping[str, bool]) -> None:
    """Raise ConfigError that names every setting of a run that such a model cannot follow.

    others: settings beside the layout that would do, and whether the run has another one.
    """
    wanted = {"layout.tp=1": layout.tp > 1, "layout.pp=1": layout.pp > 1, "layout.cp=1": layout.cp > 1,
              "layout.shard=none": layout.shard != "none", **others}
    if any(wanted.values()):
        raise ConfigError(_("{family} is a model of transformers: one process or data parallel, one document a row, computed as "
                            "transformers does").format(family=cfg.family),
                          fix=_("set {settings}").format(settings=", ".join(key for key, wrong in wanted.items() if wrong)))


def library() -> Any:
    """Return transformers.  Raises ConfigError where the extra is not there."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(_("models that are no family of Danlu's are computed by an extra"), where="start",
                          fix='pip install "danlu[transformers]"') from None
    return transformers


def _classes(name: str) -> dict[str, Any]:
    """Return the names of classes by model type for a head."""
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, f"MODEL_FOR_{CLASSES[name][1]}_MAPPING_NAMES"))


def architecture(cfg: Foreign) -> str:
    """Return the class that has the head of `cfg`.  Raises IncompatibleError where there is none."""
    found = _classes(cfg.head).get(cfg.family) if cfg.head in CLASSES else None
    if found is None or cfg.vocab is None:
        raise IncompatibleError(_("transformers has no {family} with the head {head}").format(family=cfg.family, head=cfg.head),
                                fix=_("use another objective, or another model"))
    return found if isinstance(found, str) else str(found[0])


def read(data: Mapping[str, Any], *, where: str) -> Foreign:
    """Return what `data` (a config.json) describes, if the installed transformers knows it.  Runs no code of a model's."""
    family = str(data.get("model_type"))
    if data.get("auto_map"):
        raise SecurityError(_("the model {family} brings its own code (auto_map), which is not run").format(family=family),
                            where=where, fix=_("use a model whose code is in transformers itself"))
    known = library().CONFIG_MAPPING
    if family not in known:
        raise IncompatibleError(_("the architecture {kind!r} is not known").format(kind=family), where=where,
                                fix=_("use a family of Danlu's, or one that the installed transformers knows"))
    if data.get("quantization_config"):
        raise IncompatibleError(_("{key}={value} is not supported").format(
            key="quantization_config", value=data["quantization_config"]), where=where)
    content = {k: v for k, v in data.items() if k not in _ELSEWHERE and not k.startswith("_")}
    try:
        config = known[family].from_dict(dict(content) | {k: data[k] for k in ("pad_token_id",) if k in data})
    except Exception as error:                           # its classes complain in many ways, each its own
        raise strange(error, where) from None
    named = next(iter(data.get("architectures") or ()), "")
    causal, masked = (family in _classes(name) for name in ("lm", "mlm"))
    if not (causal or masked) or config.is_encoder_decoder or config.get_text_config() is not config:
        raise IncompatibleError(_("{family} is neither a decoder nor an encoder of text, and only those are trained").format(
            family=family), where=where)
    causal = causal and (not masked or bool(getattr(config, "is_decoder", False)))
    offset = int(config.pad_token_id or 0) + 1 if family in _PAD_FIRST else 0
    context = next((n for n in (getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len", "n_positions"))
                    if isinstance(n, int) and n > 0), _UNLIMITED) - offset
    shape = {"vocab": config.vocab_size, "width": config.hidden_size, "layers": config.num_hidden_layers,
             "heads": getattr(config, "num_attention_heads", None) or 1, "context": context, "pad": config.pad_token_id}
    cfg = Foreign.model_validate({"family": family, "content": content, "causal": causal,
                                  "outputs": ("lm",) if causal else ("mlm",), **shape})
    kept = dict(data.get("danlu") or {}).get("tasks")
    kind: Any = next((name for name in ("classify", "tag", "answer") if named and named in _every(name, family)), None)
    if kept or kind:
        held = heads_of_tasks.restore(kept, where=where) if kept else [heads_of_tasks.read(kind, data, where=where)]
        cfg = cfg.with_tasks(held)
    return cfg


def strange(error: Exception, where: str | None = None) -> IncompatibleError:
    """Return what to tell of a config.json that transformers has stumbled over."""
    return IncompatibleError(_("transformers does not understand this config.json: {why}").format(
        why=" ".join(str(error).split())), where=where)


def _every(name: str, family: str) -> tuple[str, ...]:
    found = _classes(name).get(family, ())
    return (found,) if isinstance(found, str) else tuple(found)


def write(cfg: Foreign) -> dict[str, Any]:
    """Return the config.json of `cfg`."""
    told, kept = heads_of_tasks.write(cfg.tasks)
    return {"architectures": [architecture(cfg)], **cfg.content, "model_type": cfg.family, "pad_token_id": cfg.pad, **told,
            **({"danlu": {"tasks": kept}} if kept else {})}
