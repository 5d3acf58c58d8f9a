"""config.json of encoder families: read by closed tables into an Encoder, and written so that transformers opens it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from danlu.errors import IncompatibleError
from danlu.models import tasks
from danlu.models.decoder_config import HARMLESS
from danlu.models.encoder import Encoder
from danlu.nn.tasks import Kind
from danlu.words import _

# The classes of transformers: the heads they have, and whether there is a pooler.
ARCHITECTURES: dict[str, dict[str, tuple[tuple[str, ...], bool]]] = {
    "bert": {"BertForPreTraining": (("mlm", "nsp"), True), "BertForMaskedLM": (("mlm",), False),
             "BertForNextSentencePrediction": (("nsp",), True), "BertModel": ((), True)},
    "roberta": {"RobertaForMaskedLM": (("mlm",), False), "RobertaModel": ((), True)},
}

# The classes that have one head of a task, by its kind, and whether BERT's and RoBERTa's have a pooler.
TASKS: dict[str, dict[str, tuple[Kind, bool]]] = {
    "bert": {"BertForSequenceClassification": ("classify", True), "BertForTokenClassification": ("tag", False),
             "BertForQuestionAnswering": ("answer", False), "BertForMultipleChoice": ("choose", True)},
    "roberta": {"RobertaForSequenceClassification": ("classify", False), "RobertaForTokenClassification": ("tag", False),
                "RobertaForQuestionAnswering": ("answer", False), "RobertaForMultipleChoice": ("choose", True)},
}

FIELDS = {                                      # their key -> our field
    "vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "hidden", "max_position_embeddings": "context", "type_vocab_size": "types",
    "pad_token_id": "pad", "layer_norm_eps": "eps", "hidden_act": "activation", "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout", "initializer_range": "init_std",
}

# What their classes assume where config.json is silent.
_BERT = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
}
DEFAULTS: dict[str, dict[str, Any]] = {"bert": _BERT, "roberta": _BERT | {"vocab_size": 50265, "pad_token_id": 1}}

# Keys that must say this, because the model computes nothing else.
FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None), "tie_word_embeddings": (True,), "is_decoder": (False,),
    "add_cross_attention": (False,), "is_encoder_decoder": (False,), "pruned_heads": ({}, None),
    "quantization_config": (None,), "auto_map": (None,),
}
_OWN = frozenset({"outputs", "pooler", "tasks"})         # ours that their config.json has no word for
_OTHER = frozenset({"classifier_dropout", "gradient_checkpointing"})
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu",
                "relu": "relu", "relu2": "relu2"}


def read(data: Mapping[str, Any], *, where: str) -> Encoder:
    """Return the Encoder that `data` (a config.json) describes.  Raises IncompatibleError for what it does not know."""
    family = data["model_type"]
    _check_keys(family, data, where)
    told = DEFAULTS[family] | {k: v for k, v in data.items() if v is not None}
    fields = {ours: told[theirs] for theirs, ours in FIELDS.items()}
    if fields["activation"] not in _ACTIVATIONS:
        raise IncompatibleError(
            _("the activation {name!r} is not known").format(name=fields["activation"]), where=where)
    fields |= {"family": family, "activation": _ACTIVATIONS[fields["activation"]]}
    if family == "roberta":
        fields["context"] -= fields["pad"] + 1          # the rows of the table before the first position
    architecture = next(iter(data.get("architectures") or ()), None)
    known = ARCHITECTURES[family] | TASKS[family]
    if architecture is not None and architecture not in known:
        raise IncompatibleError(
            _("the architecture {name} is not known; known are {names}").format(
                name=architecture, names=", ".join(known)), where=where)
    if architecture in TASKS[family]:
        kind, fields["pooler"] = TASKS[family][architecture]
        fields |= {"outputs": (), "tasks": (tasks.read(kind, data, where=where),)}
    else:
        fields["outputs"], fields["pooler"] = ((), True) if architecture is None else ARCHITECTURES[family][architecture]
    try:
        return Encoder.model_validate(fields | dict(data.get("danlu", {})))
    except ValidationError as error:
        raise IncompatibleError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()),
                                where=where) from None


def write(cfg: Encoder) -> dict[str, Any]:
    """Return the config.json of `cfg`."""
    assert cfg.outputs is not None, "heads are filled in before a model is written"
    theirs = tuple(dict.fromkeys("nsp" if name == "sop" else name for name in cfg.outputs))     # sop takes nsp's place
    if len(cfg.tasks) == 1 and not theirs and cfg.tasks[0].kind != "embed":
        architecture, (_kind, pooler) = next(
            (name, has) for name, has in TASKS[cfg.family].items() if has[0] == cfg.tasks[0].kind)
        outputs: tuple[str, ...] = ()
    else:
        classes = ARCHITECTURES[cfg.family].items()
        architecture, (outputs, pooler) = next((name, has) for name, has in classes if has[0] == theirs)
    data: dict[str, Any] = {"architectures": [architecture], "model_type": cfg.family}
    data |= {name: getattr(cfg, ours) for name, ours in FIELDS.items()}
    data["hidden_act"] = next(name for name, ours in _ACTIVATIONS.items() if ours == cfg.activation)
    data |= {"position_embedding_type": "absolute", "tie_word_embeddings": True}
    if cfg.family == "roberta":
        data["max_position_embeddings"] += cfg.pad + 1
    own: dict[str, Any] = {"outputs": list(cfg.outputs)} if cfg.outputs != outputs else {}
    own |= {"pooler": cfg.pooler} if cfg.pooler != pooler else {}
    told, kept = tasks.write(cfg.tasks)
    data |= told
    own |= {"tasks": kept} if kept else {}
    return data | ({"danlu": own} if own else {})


def check_pad(cfg: Encoder, pad: int | None) -> None:
    """Raise IncompatibleError if transformers would count the positions of `cfg` from another number than we do."""
    if cfg.family == "roberta" and pad != cfg.pad:
        raise IncompatibleError(
            _("RoBERTa counts positions from the padding id: the model's is {ours}, the tokenizer's {theirs}").format(
                ours=cfg.pad, theirs=pad), fix=_("leave model.pad empty, and use a tokenizer with a padding token"))


def _check_keys(family: str, data: Mapping[str, Any], where: str) -> None:
    for key, value in data.items():
        if key in FIXED and value not in FIXED[key]:
            raise IncompatibleError(_("{key}={value} is not supported").format(key=key, value=value), where=where)
        if key not in HARMLESS | _OTHER | FIXED.keys() | FIELDS.keys() | {"danlu"}:
            raise IncompatibleError(
                _("the setting {key} of a {family} model is not known").format(key=key, family=family), where=where,
                fix=_("remove it if it does not change what the model computes"))
    strange = set(data.get("danlu", {})) - _OWN
    if strange:
        raise IncompatibleError(_("the setting {key} of a {family} model is not known").format(
            key=f"danlu.{min(strange)}", family=family), where=where)
