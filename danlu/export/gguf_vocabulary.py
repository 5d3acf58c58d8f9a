"""A tokenizer as llama.cpp has it: tokens, their kinds, merges, and the name of the rule that cuts text into words.

llama.cpp knows such rules by name alone.  A tokenizer whose rule has no name there is refused: its text would be cut
otherwise, and the model would be asked what it never learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import pre_tokenizers

from danlu.data import chat
from danlu.data.kinds import CUTS
from danlu.data.tokenizer import Tokenizer
from danlu.errors import IncompatibleError
from danlu.export.beside import stops
from danlu.words import _

NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5         # llama.cpp's kinds of tokens
CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"      # how some spell (?i:'s|'t|…)

# Name of a rule in llama.cpp -> its regular expression, and whether a word that is a token is taken whole (src/llama-vocab.cpp).
RULES: dict[str, tuple[str, bool]] = {
    "gpt-2": (CUTS["gpt2"], False), "llama-bpe": (CUTS["llama3"], True), "dbrx": (CUTS["llama3"], False),
    "qwen2": (CUTS["qwen2"], False)}


class Vocabulary(NamedTuple):
    """What a GGUF says of text."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special: dict[str, int]              # bos, eos, eot, pad, unk
    add_bos: bool
    template: str | None                 # Jinja
    chatml: bool                         # … and it is ChatML


def vocabulary_of(tokenizer: Tokenizer, template: chat.Template | None, size: int) -> Vocabulary:
    """Return what llama.cpp needs to read text exactly as `tokenizer` does, for a model of `size` ids; template: if it chats.

    Raises IncompatibleError that says why it cannot.
    """
    content = json.loads(tokenizer.raw.to_str())
    pre = _rule(content)
    model = content["model"]
    spelt = {i: t for t, i in tokenizer.raw.get_vocab(with_added_tokens=True).items()}
    control = {tokenizer.id(token) for token in tokenizer.controls}
    unknown = tokenizer.special.unk
    added = {one["id"] for one in content["added_tokens"]}
    tokens, kinds = [], []
    for i in range(max(size, tokenizer.size)):
        tokens.append(spelt.get(i, f"[PAD{i}]"))
        kinds.append(UNUSED if i not in spelt else CONTROL if i in control else UNKNOWN if i == unknown
                     else USER if i in added else NORMAL)
    if len(tokens) > size:
        raise IncompatibleError(_("the tokenizer has {n} ids and the model {size}").format(n=len(tokens), size=size))
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    jinja, chatml = (None, False) if template is None else _written(template)
    return Vocabulary(pre, tokens, kinds, merges, _special(tokenizer, template), tokenizer.add_bos, jinja, chatml)


def _rule(content: Mapping[str, Any]) -> str:
    """Return the name of the rule by which the tokenizer cuts text.  Raises IncompatibleError if it has none."""
    model, normal, pre = content["model"], content["normalizer"], content["pre_tokenizer"]
    fix = _("train the tokenizer with cut: gpt2 (llama3, qwen2), or export to ONNX or hf, which keep any tokenizer")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    if model["type"] != "BPE" or odd:
        raise IncompatibleError(_("only byte-level BPE is written as GGUF, and this tokenizer is {kind}").format(
            kind=" ".join([model["type"], *odd])), where="tokenizer.json", fix=fix)
    if normal is not None and normal["type"] != "NFC":
        raise IncompatibleError(_("the tokenizer changes text first ({kind}), and llama.cpp would not").format(
            kind=normal["type"]), where="tokenizer.json", fix=fix)
    steps = pre["pretokenizers"] if pre is not None and pre["type"] == "Sequence" else [pre]
    last = steps[-1] or {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and all(
            c in model["vocab"] for c in pre_tokenizers.ByteLevel.alphabet()):
        pattern = CUTS["gpt2"] if last.get("use_regex", True) and len(steps) == 1 else None
        if len(steps) == 2 and steps[0]["type"] == "Split" and not last.get("use_regex", True) and _isolates(steps[0]):
            pattern = steps[0]["pattern"].get("Regex", "").replace(CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
        whole = bool(model.get("ignore_merges"))
        for name, rule in RULES.items():
            if rule == (pattern, whole):
                return name
    raise IncompatibleError(_("llama.cpp has no name for the rule by which this tokenizer cuts text, and would cut it otherwise"),
                            where="tokenizer.json", fix=fix)


def _isolates(split: Mapping[str, Any]) -> bool:
    return (split["behavior"] == "Isolated" and not split["invert"]) or (split["behavior"] == "Removed" and bool(split["invert"]))


def _special(tokenizer: Tokenizer, template: chat.Template | None) -> dict[str, int]:
    """Return the ids of roles.  llama.cpp takes id 11 for eos and bos where it is told none, so eos must be there."""
    special = tokenizer.special
    if special.eos is None:
        raise IncompatibleError(_("the tokenizer has no eos token, and llama.cpp would take another for it"),
                                where="tokenizer.json")
    found = {"eos": special.eos, "bos": special.eos if special.bos is None else special.bos}
    found |= {role: i for role, i in (("pad", special.pad), ("unk", special.unk)) if i is not None}
    first = stops(template or chat.Template.load(tokenizer), tokenizer)[0]
    return found | ({} if first == special.eos else {"eot": first})


def _written(template: chat.Template) -> tuple[str, bool]:
    """Return a chat template as Jinja, and whether it is ChatML with tokens of its own."""
    own = chat.START in template.controls and chat.END in template.controls
    chatml = chat.written(template)
    return template.source or chatml, own and (template.source or chatml).strip() == chatml.strip()
