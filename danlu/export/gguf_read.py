"""A GGUF read again, by nothing but what is in it: the model, the tokenizer, the template.  llama.cpp is not needed.

What this says is what the file holds; that llama.cpp computes the same is what `danlu.export.llama_cpp` asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Raw
from torch import Tensor

from danlu.data import chat
from danlu.data.example import Turn
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.export import gguf, llama_cpp
from danlu.export.gguf_vocabulary import CONTROL, NORMAL, RULES
from danlu.export.protocol import Artefact
from danlu.log import say
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.words import _


def opened(path: Path) -> Artefact:
    """Return a GGUF, or that of a folder, in llama.cpp; as it is read again, saying so, where that is not installed."""
    found = path if path.suffix == ".gguf" else next(iter(sorted(path.glob("*.gguf"))), path / "model.gguf")
    if not found.is_file():
        raise ConfigError(_("there is no such file"), where=str(found))
    if llama_cpp.available():
        return llama_cpp.LlamaCpp(found)
    say(_("llama-cpp-python is not installed: {file} is read again by Danlu and not run by llama.cpp").format(file=found.name))
    return Gguf(found)


def kind_of(file_type: int | None) -> str:
    """Return the kind of an artefact whose file is of that type: 0 float32, 1 float16, 32 bfloat16, others in few bits."""
    return "gguf" if file_type in (0, 1, 32) else "quantized"


class Gguf:
    """A GGUF that was read into a model of ours: every weight rounded as the file has it."""

    def __init__(self, path: Path) -> None:
        """Read the file.  Raises DataError if it is damaged, IncompatibleError for another architecture."""
        gguf.require()
        from gguf import GGUFReader, quants

        try:
            reader = GGUFReader(path)
            self.told: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
            self.tensors = {one.name: torch.from_numpy(np.array(quants.dequantize(one.data, one.tensor_type), np.float32))
                            for one in reader.tensors}
        except (ValueError, KeyError, IndexError, OSError, TypeError) as error:
            raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path)) from None
        self.path, self.name = path, f"{path.name} (read again, not run by llama.cpp)"
        self.architecture = str(self.told["general.architecture"])
        if self.architecture not in gguf.ARCHITECTURES.values():
            raise IncompatibleError(_("the architecture {kind!r} is not known").format(kind=self.architecture), where=str(path))
        self.kind = kind_of(self.told.get("general.file_type"))

    def of(self, key: str, default: Any = None) -> Any:
        """Return a value of the architecture."""
        return self.told.get(f"{self.architecture}.{key}", default)

    @cached_property
    def cfg(self) -> Decoder:
        """The shape of the model, by what the file says."""
        said, there = self.of, self.tensors
        rotary = self.architecture != "gpt2"
        given: dict[str, Any] = {
            "family": self.architecture, "vocab": len(self.told["tokenizer.ggml.tokens"]), "width": said("embedding_length"),
            "layers": said("block_count"), "heads": said("attention.head_count"), "kv_heads": said("attention.head_count_kv"),
            "hidden": said("feed_forward_length"), "context": said("context_length"), "tied": "output.weight" not in there,
            "eps": said("attention.layer_norm_rms_epsilon" if rotary else "attention.layer_norm_epsilon")}
        if rotary:
            given |= {"rope_theta": said("rope.freq_base"), "head_width": said("attention.key_length"),
                      "qkv_bias": "blk.0.attn_q.bias" in there, "out_bias": "blk.0.attn_output.bias" in there,
                      "mlp_bias": "blk.0.ffn_up.bias" in there}
        if said("rope.scaling.type") == "linear":
            given["scaling"] = {"kind": "linear", "factor": said("rope.scaling.factor")}
        return Decoder.model_validate(given)

    def state(self) -> dict[str, Tensor]:
        """Return the weights under our names, rotary pairs half a head apart again."""
        cfg, found = self.cfg, dict[str, Tensor]()
        names = {theirs: ours for ours, theirs in gguf.OUTSIDE.items()}
        inside = {theirs: ours for ours, theirs in gguf.NAMES.items()}
        for theirs, tensor in self.tensors.items():
            if theirs in names:
                found[names[theirs]] = tensor
            elif theirs.startswith("blk."):
                _blk, i, part, kind = theirs.split(".")
                if part == "attn_qkv":
                    for x, piece in zip("qkv", tensor.chunk(3), strict=True):
                        found[f"blocks.{i}.attention.{x}.{kind}"] = piece
                    continue
                if part in ("attn_q", "attn_k") and self.architecture in gguf.TURNED:
                    tensor = gguf.halve(tensor, cfg.heads if part == "attn_q" else cfg.kv_heads)  # noqa: PLW2901
                found[f"blocks.{i}.{inside[part]}.{kind}"] = tensor
        return found

    @cached_property
    def model(self) -> Any:
        """The model."""
        model: Any = build(self.cfg)
        model.load_state_dict({name: t.contiguous() for name, t in self.state().items()}, strict=True, assign=True)
        if "rope_freqs.weight" in self.tensors:
            model.angles = model.angles / self.tensors["rope_freqs.weight"]
        return model.eval()

    @cached_property
    def raw(self) -> Raw:
        """The tokenizer without special tokens."""
        tokens, kinds = self.told["tokenizer.ggml.tokens"], self.told["tokenizer.ggml.token_type"]
        pattern, whole = RULES[self.told["tokenizer.ggml.pre"]]
        vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
        merges = [tuple(one.split(" ")) for one in self.told["tokenizer.ggml.merges"]]
        raw = Raw(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        return raw

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits [T, V] of one row."""
        return self.model(torch.tensor([list(ids)]))["logits"][0].double().numpy()      # type: ignore[no-any-return]

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of `text` without special ones."""
        return list(self.raw.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of `ids`, special tokens spelt out."""
        return "".join(self._spelt(list(run), plain=plain) for plain, run in groupby(
            ids, key=lambda i: self.told["tokenizer.ggml.token_type"][i] == NORMAL))

    def _spelt(self, ids: list[int], *, plain: bool) -> str:
        tokens = [self.told["tokenizer.ggml.tokens"][i] for i in ids]
        return str(decoders.ByteLevel().decode(tokens)) if plain else "".join(tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return a conversation as the file's template writes it; None if it has none."""
        source = self.told.get("tokenizer.chat_template")
        if source is None:
            return None
        tokens, kinds = self.told["tokenizer.ggml.tokens"], self.told["tokenizer.ggml.token_type"]
        controls = tuple(t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL)
        named = {role: tokens[self.told[f"tokenizer.ggml.{role}_token_id"]] for role in ("bos", "eos")}
        turns = [Turn(one["role"], one["content"]) for one in messages]
        pieces = chat.render(chat.Template(source, None, controls, named), turns, generate=True)
        return "".join(piece.text for piece in pieces)

    def ends(self) -> frozenset[int] | None:
        """Return the ids that end an answer."""
        keys = [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot")]
        return frozenset(self.told[key] for key in keys if key in self.told)
