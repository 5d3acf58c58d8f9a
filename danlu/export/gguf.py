"""GGUF: one file that llama.cpp and Ollama run, with the tokenizer in it, and Ollama's Modelfile beside it (extra `gguf`).

T tokens, D width, H query heads, G key heads, K head width, F hidden width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from danlu import files
from danlu.adapt.merge import DTYPES
from danlu.data import chat
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError, IncompatibleError
from danlu.evaluate.subject import Subject
from danlu.export import source
from danlu.export.gguf_vocabulary import Vocabulary, vocabulary_of
from danlu.log import say
from danlu.models import weights
from danlu.models.build import Network
from danlu.models.decoder import Decoder, DecoderModel
from danlu.nn import position
from danlu.words import _

if TYPE_CHECKING:
    from danlu.export.table import Options

Kind = Literal["f32", "f16", "bf16", "q8_0"]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
TURNED = ("llama",)                      # architectures whose rotary pairs stand beside each other, not half a head apart
BLOCK = 32                               # numbers that share a scale in Q8_0
LARGE = 1 << 31                          # bytes of weights above which they wait on disk to be written, not in memory
CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""

# Our names in a block and llama.cpp's; GPT-2's q, k and v are one tensor there.
NAMES = {"norm1": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
         "attention.o": "attn_output", "norm2": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}
OUTSIDE = {"embed.weight": "token_embd.weight", "position.weight": "position_embd.weight", "norm.weight": "output_norm.weight",
           "norm.bias": "output_norm.bias", "head.weight": "output.weight"}


def require() -> None:
    """Raise ConfigError unless the library is there."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(_("GGUF needs the package gguf, which is not installed"), where="--to gguf",
                          fix='pip install "danlu[gguf]"')


def export(subject: Subject, folder: Path, options: Options) -> None:
    """Write a subject into an existing, empty `folder`: the GGUF, the Modelfile, and config.json, which says what it was."""
    require()
    kinds: dict[str | None, Kind] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "q8_0", "q8_0": "q8_0"}
    dtype = options.dtype or source.dtype_of(subject)
    if options.quantize not in (None, "int8", "q8_0") or (options.quantize and options.dtype):
        raise ConfigError(_("GGUF is written with --dtype fp32, fp16 or bf16, or with --quantize q8_0"), where="--to gguf")
    model = source.merged(subject)
    write(folder, model, tokenizer=subject.tokenizer, template=source.template(subject), kind=kinds[options.quantize or dtype],
          name=subject.folder.resolve().parent.name if subject.run is not None else subject.folder.resolve().name)
    weights.write_config(folder, model.cfg, dtype=DTYPES[dtype])


def holds(path: Path) -> bool:
    """Return whether `path` is a GGUF, or a folder with one."""
    return path.suffix == ".gguf" or next(path.glob("*.gguf"), None) is not None


def write(folder: Path, model: Network, *, tokenizer: Tokenizer, template: chat.Template | None = None, kind: Kind = "f16",
          name: str = "model") -> Path:
    """Write `model` with its tokenizer as `folder`/NAME-KIND.gguf and a Modelfile; return the path.

    template: of a model that chats.  kind: of matrices; what has one dimension, and GPT-2's positions, stay float32.  Q8_0
    keeps rows that are no multiple of 32 in float16.  Raises IncompatibleError for what llama.cpp computes otherwise.
    """
    require()
    from gguf import GGUFWriter

    cfg = _checked(model)
    assert isinstance(model, DecoderModel) and cfg.vocab is not None
    words = vocabulary_of(tokenizer, template, cfg.vocab)
    path = folder / f"{name}-{kind}.gguf"
    large = sum(p.nbytes for p in model.parameters()) > LARGE
    writer = GGUFWriter(path, ARCHITECTURES[cfg.family], use_temp_file=large)
    _describe(writer, cfg, kind, name)
    _tell(writer, words)
    for each, tensor in tensors(model):
        _put(writer, each, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files.flush(path)
    files.write_text(folder / "Modelfile", modelfile(path.name, words, _context(cfg)))
    if tokenizer.raw.normalizer is not None:
        say(_("llama.cpp does not bring text into normal form (NFC) as this tokenizer does: give it such text"))
    return path


def _checked(model: Network) -> Decoder:
    """Return the config of a decoder that llama.cpp has.  Raises IncompatibleError."""
    cfg = model.cfg
    if not isinstance(model, DecoderModel) or not isinstance(cfg, Decoder) or not cfg.lm or cfg.family not in ARCHITECTURES:
        raise IncompatibleError(_("only decoders that write, of the families {names}, are written as GGUF").format(
            names=", ".join(ARCHITECTURES)), fix=_("export to ONNX"))
    gelu = cfg.family == "gpt2"
    told = None if cfg.scaling is None or isinstance(cfg.scaling, position.Linear) else cfg.scaling.kind
    wrong = [
        (cfg.activation != ("gelu_tanh" if gelu else "silu"), f"activation={cfg.activation}"),
        (told is not None and (ARCHITECTURES[cfg.family] != "llama" or model.sharpen != 1.0), f"scaling.kind={told}"),
        (ARCHITECTURES[cfg.family] == "qwen2" and cfg.head_width != cfg.width // cfg.heads, f"head_width={cfg.head_width}"),
        (model.ahead.prompt is not None or model.ahead.keys, "adapt"),
    ]
    if unlike := [what for bad, what in wrong if bad]:
        raise IncompatibleError(_("llama.cpp computes a {family} otherwise than this model: {what}").format(
            family=cfg.family, what=", ".join(unlike)), fix=_("export to ONNX"))
    return cfg


def _context(cfg: Decoder) -> int:
    """Return the context that llama.cpp may use: it knows no window here, and within one a window changes nothing."""
    return cfg.context if cfg.window is None else min(cfg.context, cfg.window)


def _describe(writer: Any, cfg: Decoder, kind: Kind, name: str) -> None:
    """Write what the model is."""
    from gguf import LlamaFileType, RopeScalingType

    writer.add_name(name)
    writer.add_quantization_version(2)
    writer.add_file_type({"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16,
                          "bf16": LlamaFileType.MOSTLY_BF16, "q8_0": LlamaFileType.MOSTLY_Q8_0}[kind])
    writer.add_vocab_size(cfg.vocab)
    writer.add_context_length(cfg.context if cfg.position == "learned" else _context(cfg))
    writer.add_embedding_length(cfg.width)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.hidden)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads)
    if cfg.family == "gpt2":
        writer.add_layer_norm_eps(cfg.eps)
        return
    writer.add_layer_norm_rms_eps(cfg.eps)
    writer.add_rope_dimension_count(cfg.head_width)
    writer.add_key_length(cfg.head_width)
    writer.add_value_length(cfg.head_width)
    writer.add_rope_freq_base(cfg.rope_theta)
    if isinstance(cfg.scaling, position.Linear):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(cfg.scaling.factor)


def _tell(writer: Any, words: Vocabulary) -> None:
    """Write how text is read."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    for role, i in words.special.items():
        getattr(writer, f"add_{role}_token_id")(i)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(False)
    if words.template is not None:
        writer.add_chat_template(words.template)


def _put(writer: Any, name: str, tensor: Tensor, kind: Kind) -> None:
    from gguf import GGMLQuantizationType, quants

    data = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if data.ndim == 1 or kind == "f32" or name.startswith("position_embd"):
        writer.add_tensor(name, data)
    elif kind == "q8_0" and data.shape[-1] % BLOCK == 0:
        writer.add_tensor(name, quants.quantize(data, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    elif kind == "bf16":
        writer.add_tensor(name, quants.quantize(data, GGMLQuantizationType.BF16), raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, data.astype(np.float16))


def tensors(model: DecoderModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under llama.cpp's name and as it wants it: rotary pairs beside each other, GPT-2's q, k and v in one."""
    cfg, state = model.cfg, model.state_dict()
    yield from ((theirs, state[ours]) for ours, theirs in OUTSIDE.items() if ours in state)
    if cfg.norm == "layer" and "norm.bias" not in state:
        yield "output_norm.bias", torch.zeros(cfg.width)
    if cfg.scaling is not None and not isinstance(cfg.scaling, position.Linear):
        plain, _one = position.frequencies(cfg.head_width, cfg.rope_theta)
        yield "rope_freqs.weight", plain / model.angles
    for i in range(cfg.layers):
        yield from _block(cfg, {ours: state.get(f"blocks.{i}.{ours}") for ours in _parts()}, f"blk.{i}")


def _parts() -> Iterator[str]:
    for ours in NAMES:
        yield from (f"{ours}.weight", f"{ours}.bias")


def _block(cfg: Decoder, held: dict[str, Tensor | None], at: str) -> Iterator[tuple[str, Tensor]]:
    turned = ARCHITECTURES[cfg.family] in TURNED
    for ours, theirs in NAMES.items():
        for part in ("weight", "bias"):
            tensor = held[f"{ours}.{part}"]
            if cfg.family == "gpt2" and theirs in ("attn_k", "attn_v"):
                continue
            if cfg.family == "gpt2" and theirs == "attn_q":
                found = [held[f"attention.{x}.{part}"] for x in "qkv"]
                whole = [torch.zeros(cfg.width) if x is None else x for x in found]
                yield f"{at}.attn_qkv.{part}", torch.cat(whole)
            elif tensor is not None and turned and theirs in ("attn_q", "attn_k"):
                yield f"{at}.{theirs}.{part}", interleave(tensor, cfg.heads if theirs == "attn_q" else cfg.kv_heads)
            elif tensor is not None:
                yield f"{at}.{theirs}.{part}", tensor
            elif cfg.family == "gpt2" and part == "bias" and theirs != "ffn_gate":      # which GPT-2 has everywhere
                yield f"{at}.{theirs}.{part}", torch.zeros(cfg.hidden if theirs == "ffn_up" else cfg.width)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Return rows [heads·K, …] with those of a rotary pair, i and i + K/2 of a head, beside each other."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halve(tensor: Tensor, heads: int) -> Tensor:
    """Return what `interleave` was given."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def modelfile(file: str, words: Vocabulary, context: int) -> str:
    """Return Ollama's Modelfile.  Of a template that is not ChatML it finds its own among those it knows, by the GGUF's."""
    lines = [f"FROM ./{file}"]
    if words.chatml:
        lines.append(f'TEMPLATE """{CHATML}"""')
    elif words.template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    ends = dict.fromkeys(words.special[role] for role in ("eot", "eos") if role in words.special)
    lines += [f"PARAMETER stop {_quoted(words.tokens[i])}" for i in ends]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", ""])


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
