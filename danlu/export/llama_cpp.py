"""A GGUF in llama.cpp itself, through `llama-cpp-python`, which is built from source where it is installed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from danlu.errors import ConfigError, DataError
from danlu.words import _

FLOAT = 0                                        # GGML_TYPE_F32: keys and values are not rounded, so that only weights are


def available() -> bool:
    """Return whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """A GGUF that llama.cpp runs on the CPU."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Load it.  Raises ConfigError without the library, DataError if llama.cpp refuses the file."""
        if not available():
            raise ConfigError(_("llama.cpp needs the package llama-cpp-python, which is not installed"), where=str(path),
                              fix="pip install llama-cpp-python")
        import llama_cpp

        self.library: Any = llama_cpp
        try:
            self.llama = llama_cpp.Llama(str(path), n_ctx=0, n_threads=threads, n_gpu_layers=0, logits_all=True,
                                         type_k=FLOAT, type_v=FLOAT, verbose=False)
        except (ValueError, RuntimeError) as error:
            raise DataError(_("the file is damaged or cannot be read: {why}").format(why=error), where=str(path)) from None
        few = self.llama.metadata.get("general.file_type") not in ("0", "1", "32")
        self.name, self.kind = f"{path.name} (llama.cpp)", "quantized" if few else "gguf"

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits [T, V] of one row."""
        self.llama.reset()
        self.llama.eval(list(ids))
        return np.array(self.llama.scores[: len(ids)], np.float64)

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of `text`, in which no special token is looked for."""
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=False)) if text else []

    def decode(self, ids: Sequence[int]) -> str | None:
        """Return the text of `ids`, special tokens spelt out."""
        vocab = self.library.llama_model_get_vocab(self.llama.model)
        room = ctypes.create_string_buffer(64)
        pieces = list[bytes]()
        for i in ids:
            size = self.library.llama_token_to_piece(vocab, i, room, len(room), 0, True)
            if size < 0:                             # longer than the room
                room = ctypes.create_string_buffer(-size)
                size = self.library.llama_token_to_piece(vocab, i, room, len(room), 0, True)
            pieces.append(room.raw[:size])
        return b"".join(pieces).decode(errors="replace")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return a conversation as llama-cpp-python writes it by the file's template; None if there is none."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.llama.metadata.get("tokenizer.chat_template")
        if template is None:
            return None
        eos, bos = (self._spelt(i) for i in (self.llama.token_eos(), self.llama.token_bos()))
        return str(Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)(messages=list(messages)).prompt)

    def _spelt(self, token: int) -> str:
        return str(self.library.llama_vocab_get_text(self.library.llama_model_get_vocab(self.llama.model), token).decode())

    def ends(self) -> frozenset[int] | None:
        """Return the ids at which llama.cpp stops; beside eos those whose names it knows, such as <|im_end|>."""
        vocab = self.library.llama_model_get_vocab(self.llama.model)
        return frozenset(i for i in range(self.llama.n_vocab()) if self.library.llama_vocab_is_eog(vocab, i))
