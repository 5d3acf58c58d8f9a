"""A Hugging Face folder as `transformers` opens it (extra `transformers`), and an adapter's as `peft` does.

T tokens of a row, K classes, V vocabulary, D width.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from danlu.adapt import folder as adapters
from danlu.adapt.peft import TYPES
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.export.protocol import Says
from danlu.log import say
from danlu.models import weights
from danlu.words import _

CLASSES = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM", "ForMaskedLM": "AutoModelForMaskedLM",
           "ForSequenceClassification": "AutoModelForSequenceClassification", "ForPreTraining": "AutoModelForPreTraining",
           "ForTokenClassification": "AutoModelForTokenClassification", "ForMultipleChoice": "AutoModelForMultipleChoice",
           "ForQuestionAnswering": "AutoModelForQuestionAnswering", "Model": "AutoModel",
           "ForNextSentencePrediction": "AutoModelForNextSentencePrediction"}
GENERATION = "generation_config.json"
TASKS = {"classify": "AutoModelForSequenceClassification", "tag": "AutoModelForTokenClassification",
         "answer": "AutoModelForQuestionAnswering", "choose": "AutoModelForMultipleChoice", "embed": "AutoModel"}


def installed(*names: str) -> bool:
    """Return whether all these packages are there, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in names)


def require(*names: str) -> None:
    """Raise ConfigError that names the extra unless the packages are there."""
    missing = [name for name in names if not installed(name)]
    if missing:
        raise ConfigError(_("this needs {names}, which is not installed").format(names=", ".join(missing)),
                          fix='pip install "danlu[transformers]" peft')


class Transformers:
    """A folder in transformers, with the tokenizer that AutoTokenizer makes of it."""

    def __init__(self, folder: Path, *, model: Any = None, tokenizer: Path | None = None, kind: str = "hf",
                 vectors: bool | None = None) -> None:
        """Open `folder`; model: in place of what it holds; vectors: whether it makes vectors of texts.

        Raises IncompatibleError if a tensor is missing.
        """
        require("transformers")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        told = weights.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        self.folder, self.name = folder, f"{folder.name} (transformers {transformers.__version__})"
        self.kind = "quantized" if "quantization_config" in told else kind
        self.embeds = embeds(told) if vectors is None else vectors
        self.model = model or (loaded(folder, "AutoModel") if self.embeds else _model(folder, told))
        self.model.eval()
        self.writes = bool(self.model.can_generate())
        home = tokenizer or folder
        self.tokenizer: Any = None
        if (home / "tokenizer.json").is_file():
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(home, local_files_only=True, trust_remote_code=False)
            self._tell_class(home)

    def _tell_class(self, home: Path) -> None:
        """Say where transformers puts the rules of a model type around a vocabulary that declares none."""
        file, made = home / "tokenizer_config.json", type(self.tokenizer).__name__
        declared = weights.read_json(file).get("tokenizer_class") if file.is_file() else None
        if declared == "PreTrainedTokenizerFast" and made not in ("TokenizersBackend", declared):
            say(_("AutoTokenizer makes a {made} of {folder}, for its model type alone, though it declares {declared}: ids may "
                  "differ; PreTrainedTokenizerFast.from_pretrained opens it as it is").format(
                made=made, folder=home.name, declared=declared))
            self.name = f"{self.name[:-1]}, {made})"

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return what is said of one row: [T, V], [K], [T, K], [T, 2] of an answer, [D] of a text's vector, of length 1."""
        row = torch.tensor([list(ids)])
        given = row[:, None] if type(self.model).__name__.endswith("ForMultipleChoice") else row
        out = self.model(input_ids=given, attention_mask=torch.ones_like(given))
        if "start_logits" in out:
            said = torch.stack([out["start_logits"][0], out["end_logits"][0]], -1)
        elif self.embeds:
            said = torch.nn.functional.normalize(out["last_hidden_state"][0].mean(0), dim=-1)
        else:
            said = next(out[name] for name in ("logits", "prediction_logits", "last_hidden_state") if name in out)[0]
        said = said[-len(row[0]):] if said.ndim == 2 and len(said) > len(row[0]) else said       # PEFT's virtual tokens
        return np.asarray(said.double())

    def says(self) -> Says:
        """Return what the numbers of `logits` are."""
        name = type(self.model).__name__
        bare = name.endswith("Model") and not name.endswith("LMHeadModel") and not name.startswith("Peft")
        return "places" if name.endswith("ForQuestionAnswering") else "vector" if self.embeds or bare else "classes"

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of `text`; what looks like a special token stays text."""
        if self.tokenizer is None:
            return None
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of `ids`."""
        if self.tokenizer is None:
            return None
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return a conversation as `apply_chat_template` writes it."""
        if self.tokenizer is None or not self.writes or not self.tokenizer.chat_template:
            return None
        said = [dict(one) for one in messages]
        try:
            return str(self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
        except Exception as error:                           # a template may raise what it likes
            raise DataError(str(error), where=str(self.folder)) from None

    def ends(self) -> frozenset[int] | None:
        """Return the ids at which `generate` stops."""
        if not self.writes:
            return None
        told = self.model.generation_config.eos_token_id
        return frozenset([] if told is None else [told] if isinstance(told, int) else told)

    def labels(self) -> tuple[str, ...] | None:
        """Return the names of the classes, of a model that has some."""
        if not type(self.model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")):
            return None
        named = self.model.config.id2label
        return tuple(str(named[i]) for i in range(len(named)))


def embeds(told: Mapping[str, Any]) -> bool:
    """Return whether a config.json is of a model whose only head makes vectors of texts: means of its tokens."""
    return [task.get("kind") for task in told.get("danlu", {}).get("tasks", [])] == ["embed"]


def _model(folder: Path, told: Mapping[str, Any]) -> Any:
    """Return the model of a folder in transformers, in float32."""

    architecture = next(iter(told.get("architectures") or ()), "")
    auto = next((name for end, name in CLASSES.items() if str(architecture).endswith(end)), None)
    if auto is None:
        raise IncompatibleError(_("transformers has no class for the architecture {name!r}").format(name=architecture),
                                where=str(folder / "config.json"))
    return loaded(folder, auto)


def loaded(folder: Path, auto: str, *, complete: bool = True, **more: Any) -> Any:
    """Return the model that the class `auto` of transformers makes of a folder.

    complete: whether every tensor must be there, and no other; IncompatibleError if not, and for what it cannot open.
    """
    import transformers

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, found = getattr(transformers, auto).from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True, **more)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise IncompatibleError(_("transformers cannot open it: {why}").format(why=str(error).splitlines()[0]),
                                where=str(folder)) from None
    lost = sorted(found["missing_keys"]) if complete else []
    lost = [name for name in lost if auto != "AutoModel" or "pooler" not in name]      # which nothing here reads
    if lost:
        raise IncompatibleError(_("transformers finds no tensor for {names}").format(names=", ".join(lost[:3])),
                                where=str(folder))
    return model


def with_adapter(folder: Path) -> Transformers:
    """Return the adapter in `folder` on its base, as `peft` puts it there.  ConfigError for a kind that PEFT has not."""
    require("transformers", "peft")
    import peft
    import transformers

    opened = adapters.describe(folder)
    if opened.adapt.kind not in TYPES:
        raise ConfigError(_("PEFT has no adapter of kind {kind}").format(kind=opened.adapt.kind), where=str(folder))
    tasks = opened.cfg.tasks
    told = weights.read_json(opened.base / "config.json")
    if tasks:
        base = loaded(opened.base, TASKS[tasks[0].kind], complete=False, **({"num_labels": tasks[0].size}
                                                                            if tasks[0].kind in ("classify", "tag") else {}))
    else:
        base = _model(opened.base, told)
    model: Any = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    found = Transformers(folder, model=model, tokenizer=adapters.tokenizer_in(folder), kind="peft",
                         vectors=bool(tasks) and tasks[0].kind == "embed")
    found.writes = not tasks and bool(base.can_generate())
    if (folder / GENERATION).is_file():                      # PEFT has no place for it: whoever generates passes it on
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    found.name = f"{folder.name} (peft {peft.__version__})"
    return found
