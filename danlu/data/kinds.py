"""The kinds of tokenizer one can ask for, and how each is cut and trained.

Text is cut into *pre-tokens* first; no token crosses their borders.  The usual GPT patterns take a whole run of Chinese
as one pre-token, so that almost every sentence is a new "word" and training needs memory without bound.  Here every
pre-token is bounded: runs of Han or kana by `han`, digits by `digits`, anything else by 64 characters (and a border).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Raw

from danlu.config import Model
from danlu.words import _

ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
LONGEST = 64                                            # characters in a pre-token of letters, signs or spaces
HAN = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}ー"   # scripts written without spaces: cut after `han` characters
SOUTH = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"          # these too, with longer words: cut after 16

Bos = Annotated[str | None, Field(description="Token that opens a text; null for none.")]
Eos = Annotated[str | None, Field(description="Token that ends a text; null for none.")]
Pad = Annotated[str | None, Field(description="Token that fills short rows; null for none.")]
Unk = Annotated[str | None, Field(description="Token for what the vocabulary does not hold; null for none.")]
Cls = Annotated[str | None, Field(description="Token that opens a row of a masked language model; null for none.")]
Sep = Annotated[str | None, Field(description="Token that ends each part of such a row; null for none.")]
Mask = Annotated[str | None, Field(description="Token that hides another one; null for none.")]
Masked = Annotated[bool, Field(description="Also make the cls, sep and mask tokens that masked language models need.")]
Extra = Annotated[tuple[str, ...], Field(description="Further special tokens, as <|user|>.")]
Vocab = Annotated[int, Field(ge=16, le=2**31 - 1, description="Most tokens in the vocabulary, special ones included.")]
Seen = Annotated[int, Field(ge=1, description="How often a pair must be seen to become a token.")]
HanRun = Annotated[int, Field(ge=1, le=16, description="Most Han or kana characters in one token.")]
Digits = Annotated[int, Field(ge=1, le=16, description="Most digits in one token.")]
Bytes = Annotated[int, Field(ge=1, description="Most bytes of text that training reads.")]
Alphabet = Annotated[int | None, Field(ge=1, description="Most places for single characters, the frequent ones first; "
                                                         "null: half of the vocabulary.")]
Cut = Annotated[Literal["danlu", "gpt2", "llama3", "qwen2"], Field(
    description="Rule that cuts text into words: danlu (with `han` and `digits`), or another's, which llama.cpp knows by name.")]
AddBos = Annotated[bool, Field(description="Put bos before each document.")]
AddEos = Annotated[bool | None, Field(description="Put eos after each document; null: where there is one, "
                                                  "unless `masked`.")]


class BPE(Model):
    """Byte-pair encoding over bytes (Sennrich et al., 2016; Radford et al., 2019): any text, back without loss."""

    kind: Literal["bpe"] = "bpe"
    vocab: Vocab = 8192
    min_frequency: Seen = 2
    cut: Cut = "danlu"
    han: HanRun = 4
    digits: Digits = 3
    text_bytes: Bytes = 1 << 28
    bos: Bos = None
    eos: Eos = "<|endoftext|>"
    pad: Pad = "<|pad|>"
    cls: Cls = None
    sep: Sep = None
    mask: Mask = None
    masked: Masked = False
    special: Extra = ()
    add_bos: AddBos = False
    add_eos: AddEos = None

    @model_validator(mode="after")
    def _fits(self) -> BPE:
        _check(self, 256)
        return self


class WordPiece(Model):
    """WordPiece as BERT has it (Devlin et al., 2019): each Han character alone, `##` inside words."""

    kind: Literal["wordpiece"] = "wordpiece"
    vocab: Vocab = 8192
    min_frequency: Seen = 2
    lowercase: bool = Field(True, description="Make all letters small and drop their accents.")
    alphabet: Alphabet = None
    text_bytes: Bytes = 1 << 28
    bos: Bos = None
    eos: Eos = None
    pad: Pad = "[PAD]"
    unk: Annotated[str, Field(description="Token for what the vocabulary does not hold.")] = "[UNK]"
    cls: Cls = "[CLS]"
    sep: Sep = "[SEP]"
    mask: Mask = "[MASK]"
    special: Extra = ()
    add_bos: AddBos = False
    add_eos: AddEos = None

    @model_validator(mode="after")
    def _fits(self) -> WordPiece:
        _check(self, self.alphabet or 0)
        return self


class Unigram(Model):
    """The unigram language model over pieces (Kudo, 2018), after NFKC; rare characters become unk."""

    kind: Literal["unigram"] = "unigram"
    vocab: Vocab = 8192
    alphabet: Alphabet = None
    han: HanRun = 4
    digits: Digits = 3
    space: bool = Field(True, description="Put a space before a text, so that its first word looks like any other.")
    text_bytes: Bytes = 1 << 28
    bos: Bos = "<s>"
    eos: Eos = "</s>"
    pad: Pad = "<pad>"
    unk: Annotated[str, Field(description="Token for what the vocabulary does not hold.")] = "<unk>"
    cls: Cls = None
    sep: Sep = None
    mask: Mask = "<mask>"
    masked: Masked = False
    special: Extra = ()
    add_bos: AddBos = False
    add_eos: AddEos = None

    @model_validator(mode="after")
    def _fits(self) -> Unigram:
        _check(self, self.alphabet or 0)
        return self


class Chars(Model):
    """Every character is a token."""

    kind: Literal["chars"] = "chars"
    vocab: Vocab = 32768
    min_frequency: Seen = 1
    text_bytes: Bytes = 1 << 28
    bos: Bos = None
    eos: Eos = "<eos>"
    pad: Pad = "<pad>"
    unk: Unk = "<unk>"
    cls: Cls = None
    sep: Sep = None
    mask: Mask = None
    masked: Masked = False
    special: Extra = ()
    add_bos: AddBos = False
    add_eos: AddEos = None

    @model_validator(mode="after")
    def _fits(self) -> Chars:
        _check(self, 0)
        return self


class Loaded(Model):
    """A tokenizer that somebody trained before: a `tokenizer.json`, or a Hugging Face folder that holds one."""

    kind: Literal["loaded"] = "loaded"
    path: Path = Field(description="The file or folder.")
    add_bos: bool | None = Field(None, description="Put bos before each document; null: as the tokenizer says.")
    add_eos: bool | None = Field(None, description="Put eos after each document; null: as the tokenizer says, or where "
                                                   "there is one and no cls.")


Trained = BPE | WordPiece | Unigram | Chars
Kind = Trained | Loaded

MASKED: Mapping[str, Mapping[str, str]] = {
    "bpe": {"cls": "<|cls|>", "sep": "<|sep|>", "mask": "<|mask|>"},
    "unigram": {"cls": "<s>", "sep": "</s>", "mask": "<mask>"},
    "chars": {"cls": "<cls>", "sep": "<sep>", "mask": "<mask>"},
    "wordpiece": {},
}


def roles(cfg: Trained) -> dict[str, str]:
    """Return {role: token} of what `cfg` asks for, `masked` spelt out."""
    given = cfg.model_dump(include=set(ROLES))
    wanted = MASKED[cfg.kind] if _masked(cfg) else {}
    named = {role: given.get(role) or wanted.get(role) for role in ROLES}
    return {role: token for role, token in named.items() if token}


def _masked(cfg: Trained) -> bool:
    return isinstance(cfg, WordPiece) or cfg.masked


def adds_eos(cfg: Trained) -> bool:
    """Return whether documents end with eos."""
    wanted = not _masked(cfg) if cfg.add_eos is None else cfg.add_eos
    return wanted and cfg.eos is not None


def specials(cfg: Trained) -> list[str]:
    """Return the special tokens in the order of their ids: pad, unk, then the roles, then the others."""
    named = roles(cfg)
    order = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    return list(dict.fromkeys([named[r] for r in order if r in named] + list(cfg.special)))


def _check(cfg: Trained, floor: int) -> None:
    """Raise ValueError for a token that is missing, odd or has no room beside `floor` others."""
    tokens = specials(cfg)
    if any(len(t) < 2 or t != t.strip() for t in tokens):
        raise ValueError(_("a special token needs two characters or more and no space around it: {tokens}").format(
            tokens=tokens))
    if cfg.add_bos and cfg.bos is None:
        raise ValueError(_("add_bos needs a token: set bos, as bos: {token!r}").format(token="<s>"))
    if cfg.add_eos and cfg.eos is None:
        raise ValueError(_("add_eos needs a token: set eos, as eos: {token!r}").format(token="</s>"))
    if cfg.vocab <= floor + len(tokens):
        raise ValueError(_("vocab={vocab} leaves no room beside {n} single characters and special tokens; raise it")
                         .format(vocab=cfg.vocab, n=floor + len(tokens)))


def pattern(han: int, digits: int) -> str:
    """Return the regular expression whose matches are the pre-tokens (after GPT-4's, with every run bounded)."""
    letters = rf"(?:(?![{HAN}{SOUTH}])[\p{{L}}\p{{M}}]){{1,{LONGEST}}}"
    return "|".join((
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        rf"[{HAN}]{{1,{han}}}",
        rf"[{SOUTH}]{{1,16}}",
        rf"[^\r\n\p{{L}}\p{{M}}\p{{N}}]?{letters}",
        rf"\p{{N}}{{1,{digits}}}",
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]{{1,{LONGEST}}}[\r\n]{{0,8}}",
        rf"\s{{0,{LONGEST // 2}}}[\r\n]{{1,{LONGEST // 2}}}",
        rf"\s{{1,{LONGEST}}}(?!\S)",
        rf"\s{{1,{LONGEST}}}",
    ))


_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The rules of others, as they spell them.  Their runs have no bound: Chinese takes more memory to train on.
CUTS: Mapping[str, str] = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": rf"{_WORD}\p{{N}}{{1,3}}{_REST}", "qwen2": rf"{_WORD}\p{{N}}{_REST}"}


def untrained(cfg: Trained, model: Any = None) -> Raw:
    """Return the normalizer, pre-tokenizer and decoder of `cfg` around `model`, an empty one when not given."""
    match cfg:
        case BPE():
            raw = Raw(model or models.BPE())
            split = pre_tokenizers.Split(Regex(CUTS.get(cfg.cut) or pattern(cfg.han, cfg.digits)), "isolated")
            raw.pre_tokenizer = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
            raw.decoder = decoders.ByteLevel()
        case WordPiece():
            raw = Raw(model or models.WordPiece(unk_token=cfg.unk, max_input_chars_per_word=100))
            raw.normalizer = normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=cfg.lowercase)
            runs = rf"[{HAN}{SOUTH}]{{1,16}}|(?:(?![{HAN}{SOUTH}])\S){{1,{LONGEST}}}"
            raw.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(runs), "isolated")])
            raw.decoder = decoders.WordPiece()
        case Unigram():
            raw = Raw(model or models.Unigram())
            scheme = "first" if cfg.space else "never"
            raw.normalizer = normalizers.NFKC()
            split = pre_tokenizers.Split(Regex(pattern(cfg.han, cfg.digits)), "isolated")
            raw.pre_tokenizer = pre_tokenizers.Sequence(
                [split, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)])
            raw.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
        case Chars():
            raw = Raw(model or models.WordLevel(vocab={}, unk_token=cfg.unk or ""))
            raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
            raw.decoder = decoders.Fuse()
    return raw
