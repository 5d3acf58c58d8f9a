"""Text to ids and back.

Encoding is for *data*: no special token is added, and text that looks like one (`<|endoftext|>` in a web page) stays
text.  Special ids enter only through `frame`, or through the code that builds rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Raw

from danlu import files
from danlu.data import pieces, rules, vocabulary
from danlu.data.kinds import BPE, ROLES, Chars, Kind, Loaded, Unigram, WordPiece, adds_eos, roles
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.words import _

__all__ = ["BPE", "Chars", "Kind", "Loaded", "Special", "Tokenizer", "Unigram", "WordPiece", "train"]

KNOWN: Mapping[str, tuple[str, ...]] = {        # names by which a bare tokenizer.json is understood
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<|bos|>", "[BOS]"),
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "cls": ("[CLS]", "<cls>", "<|cls|>"),
    "sep": ("[SEP]", "<sep>", "<|sep|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}
BY_CHARACTER = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True, eq=False)
class Special:
    """What an objective must know of a vocabulary; roles are ids, None where there is no such token."""

    size: int
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    cls: int | None
    sep: int | None
    mask: int | None
    reserved: np.ndarray    # [size] bool: special, or no token at all; never a target of masking
    starts: np.ndarray      # [size] bool: opens a word wherever it stands (the first token of a text always does)
    ends: np.ndarray        # [size] bool: ends a sentence


class Tokenizer:
    """A vocabulary with the rules that use it; made by `train` or `Tokenizer.load`."""

    def __init__(self, text: str, *, named: Mapping[str, str], guessed: Sequence[str] = (), add_bos: bool,
                 add_eos: bool, settings: Mapping[str, Any]) -> None:
        content = json.loads(text)
        if content.get("truncation") or content.get("padding"):      # a saved truncation would cut data silently
            content |= {"truncation": None, "padding": None}
            text = json.dumps(content, ensure_ascii=False, indent=2)
        self._text, self.settings = text, dict(settings)
        self.named, self.guessed = dict(named), tuple(guessed)
        self.add_bos, self.add_eos = add_bos, add_eos
        self.raw = Raw.from_str(text)
        ids = self.raw.get_vocab(with_added_tokens=True).values()
        self.size = max(ids, default=-1) + 1
        self._table = _character_table(content)
        self._data = rules.for_data(content, self._special_ids())
        self._leaks = np.array(sorted(rules.leaks(self._data, self.raw, self._special_ids() - self._unknown())), np.int64)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Return the tokenizer of a `tokenizer.json`, or of a folder that holds one."""
        return _load(Path(path))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` [n] int64, without special ones."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text; the library spreads a batch over the processor's cores."""
        return self._encoded(self._data, texts)

    def encode_pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of texts that stand right after one another: no blank is put between them."""
        first = next((place for place, text in enumerate(texts) if text), 0) + 1
        return self._encoded(self._data, texts[:first]) + self._encoded(self._later, texts[first:])

    def _encoded(self, by: Raw, texts: Sequence[str]) -> list[np.ndarray]:
        if self._table is not None:
            return [self._by_character(text) for text in texts]
        try:
            found = by.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:                       # the library raises no narrower class
            raise DataError(_("a text cannot be tokenised: {why}").format(why=error), where=_culprit(texts)) from error
        result = [np.array(one.ids, np.int64) for one in found]
        for text, ids in zip(texts, result, strict=True) if self._leaks.size else ():
            self._refuse_leak(text, ids)
        return result

    def encode_spans(self, text: str, *, inside: bool = False) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return the ids of `text` [n] and the characters start:end that each stands for.

        `inside`: the text stands after a special token, where some tokenizers put no blank before its first word.
        """
        found = (self._inner if inside else self._data).encode(text, add_special_tokens=False)
        ids = np.array(found.ids, np.int64)
        if self._leaks.size:
            self._refuse_leak(text, ids)
        return ids, found.offsets

    def frame(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids of a document: with bos before and eos after where this tokenizer adds them."""
        before = [self.special.bos] if self.add_bos else []
        after = [self.special.eos] if self.add_eos else []
        return np.concatenate([np.array(before, np.int64), ids, np.array(after, np.int64)])

    def together(self, stretches: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[int, int]]:
        """Return one text's ids or two as a row that a task reads, and how many ids are of type 0 and of type 1.

        Special tokens stand where the tokenizer's own template puts them (BERT: [CLS] A [SEP] B [SEP]); a tokenizer
        without one gets cls and sep if it has them, else what `frame` adds.
        """
        before, between, after, types = self._around[len(stretches) - 1]
        row = np.concatenate([before, stretches[0], *([between, stretches[1]] if len(stretches) > 1 else []), after])
        second = len(stretches[1]) + len(after) if types and len(stretches) > 1 else 0
        return row, (len(row) - second, second)

    def begins(self, stretches: Sequence[np.ndarray]) -> tuple[int, ...]:
        """Return where in the row of `together` each stretch begins."""
        before, between, _after, _types = self._around[len(stretches) - 1]
        first = len(before)
        return (first,) if len(stretches) == 1 else (first, first + len(stretches[0]) + len(between))

    def room_beside(self, stretches: int) -> int:
        """Return how many special tokens `together` adds."""
        before, between, after, _types = self._around[stretches - 1]
        return len(before) + (len(between) if stretches > 1 else 0) + len(after)

    @cached_property
    def _around(self) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, bool], ...]:
        """Return for one text and for two: the ids before, between and after, and whether the second is of type 1."""
        return tuple(self._template(number) for number in (1, 2))

    def _template(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        parts = [self.raw.encode("a", add_special_tokens=False) for _part in range(number)]
        full = self.raw.post_process(parts[0], parts[1] if number == 2 else None, True)
        if len(full.ids) > sum(len(part.ids) for part in parts):
            places = [i for i, special in enumerate(full.special_tokens_mask) if not special]
            first, last = places[0], places[-1]
            inner = [i for i in range(first, last) if full.special_tokens_mask[i]]
            ids = np.array(full.ids, np.int64)
            return ids[:first], ids[inner], ids[last + 1 :], number == 2 and full.type_ids[last] == 1
        named = {role: self.id(token) for role, token in self.named.items()}
        if named.get("cls") is not None and named.get("sep") is not None:
            cls, sep = (np.array([named[role]], np.int64) for role in ("cls", "sep"))
            return cls, sep, sep, True
        whole = self.frame(np.zeros(0, np.int64))
        before, after = np.split(whole, [int(self.add_bos)])
        return before, np.array([i for i in [named.get("eos")] if i is not None], np.int64), after, False

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """Return the text of `ids`; special tokens are spelt out, or left out with `special=False`."""
        text: str = self.raw.decode([int(i) for i in ids], skip_special_tokens=not special)
        return text

    def id(self, token: str) -> int | None:
        """Return the id of a token given as the vocabulary spells it, None when there is none."""
        found: int | None = self.raw.token_to_id(token)
        return found

    @property
    def controls(self) -> tuple[str, ...]:
        """The spellings of the special tokens, but for unk, which stands for nothing that one could write."""
        return tuple(sorted(t for i in self._special_ids() - self._unknown() if (t := self.raw.id_to_token(i))))

    @cached_property
    def _inner(self) -> Raw:
        """The rules for data that does not begin a text: a blank that only the first word gets is left out."""
        return rules.inside(self._data)

    @cached_property
    def _later(self) -> Raw:
        """The rules for data that goes on a text: what puts a blank before its first word is left out."""
        return rules.going_on(self._data)

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each id stands for [size], readable where they are whole characters; b"" for no token."""
        return pieces.read(self._text, self.size, self.raw.get_vocab(with_added_tokens=True))

    @cached_property
    def special(self) -> Special:
        """Roles, reserved ids, and which ids start words or end sentences."""
        reserved = np.array([not piece for piece in self.pieces], bool)
        reserved[sorted(self._special_ids())] = True
        plain = [b"" if gone else piece for piece, gone in zip(self.pieces, reserved, strict=True)]
        inner = {i for t, i in self.raw.get_vocab().items() if t.startswith("##")} if self._wordpiece() else None
        starts = pieces.starts(plain) if inner is None else np.array([i not in inner for i in range(self.size)], bool)
        ids = {role: self.id(self.named[role]) if role in self.named else None for role in ROLES}
        return Special(size=self.size, reserved=reserved, starts=starts | reserved, ends=pieces.ends(plain), **ids)

    @cached_property
    def sha256(self) -> str:
        """The hash of the canonical tokenizer.json: equal for equal rules, whatever the spacing of the file."""
        return files.digest(json.loads(self._text))

    @property
    def dtype(self) -> str:
        """The least unsigned type that holds every id."""
        return "uint16" if self.size <= 1 << 16 else "uint32"

    def save(self, folder: Path) -> None:
        """Write the Hugging Face layout, which `AutoTokenizer.from_pretrained(folder)` opens with the same ids.

        One trap is not ours: beside a config.json of a model type that transformers has on its list of wrong tokenizer
        classes (qwen2 is), AutoTokenizer puts that model's rules around this vocabulary.  There, use
        `PreTrainedTokenizerFast.from_pretrained(folder)`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tokens = {f"{role}_token": token for role, token in self.named.items()}
        own = self.settings.get("danlu", {}) | {"add_bos": self.add_bos, "add_eos": self.add_eos}
        files.write_text(folder / "tokenizer.json", self._text)
        files.write_json(folder / "special_tokens_map.json", tokens)
        files.write_json(folder / "tokenizer_config.json", {**_HF, **self.settings, **tokens, "danlu": own})

    def _special_ids(self) -> set[int]:
        added = {i for i, token in self.raw.get_added_tokens_decoder().items() if token.special}
        return added | {i for t in self.named.values() if (i := self.id(t)) is not None}

    def _unknown(self) -> set[int]:
        """Unk may come out of plain text, unless the same token has another role."""
        others = {t for role, t in self.named.items() if role != "unk"}
        unknown = self.named.get("unk")
        return {i} if unknown and unknown not in others and (i := self.id(unknown)) is not None else set()

    def _wordpiece(self) -> bool:
        return bool(json.loads(self._text)["model"]["type"] == "WordPiece")

    def _by_character(self, text: str) -> np.ndarray:
        try:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        except UnicodeEncodeError as error:
            raise DataError(_("a text cannot be tokenised: {why}").format(why=error), where=_culprit([text])) from None
        ids: np.ndarray = self._table[codes].astype(np.int64)    # type: ignore[index]
        if ids.size and ids.min() < 0:
            raise DataError(_("the vocabulary has no {char!r}, and no unk token").format(char=text[int(ids.argmin())]),
                            fix=_("give the tokenizer an unk token"))
        return ids

    def _refuse_leak(self, text: str, ids: np.ndarray) -> None:
        """Raise DataError when plain text came out as a special id."""
        hit = self._leaks[np.isin(self._leaks, ids)]
        if hit.size:
            token = self.raw.id_to_token(int(hit[0]))
            raise DataError(
                _("the text holds {token!r}, which this tokenizer cannot tell from its special token").format(
                    token=token), where=text[:40],
                fix=_("clean such texts out, or use a tokenizer that keeps special tokens apart"))


_HF = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def train(texts: Iterable[str], cfg: Kind) -> Tokenizer:
    """Return the tokenizer that `cfg` describes, learned from `texts`; the same texts give the same tokenizer.json.

    Reads at most `cfg.text_bytes`; `settings["danlu"]["trained"]` says how much was read and whether that was all.
    """
    if isinstance(cfg, Loaded):
        return _override(Tokenizer.load(cfg.path), cfg)
    feed = vocabulary.Feed(texts, cfg.text_bytes)
    raw = vocabulary.learn(feed, cfg)
    read = {"texts": feed.texts, "bytes": feed.bytes, "complete": feed.complete}
    settings: dict[str, Any] = {"danlu": {"config": cfg.model_dump(mode="json"), "trained": read}}
    if cfg.add_bos and not {"cls", "sep"} <= roles(cfg).keys():
        settings["add_bos_token"] = True                 # what other tools put before a prompt; never eos
    return Tokenizer(raw.to_str(pretty=True), named=roles(cfg), add_bos=cfg.add_bos, add_eos=adds_eos(cfg),
                     settings=settings)


def _override(tokenizer: Tokenizer, cfg: Loaded) -> Tokenizer:
    for role, wanted in (("bos", cfg.add_bos), ("eos", cfg.add_eos)):
        if wanted and role not in tokenizer.named:
            raise ConfigError(_("add_{role} is set, but the tokenizer has no {role} token").format(role=role),
                              where=str(cfg.path))
    tokenizer.add_bos = tokenizer.add_bos if cfg.add_bos is None else cfg.add_bos
    tokenizer.add_eos = tokenizer.add_eos if cfg.add_eos is None else cfg.add_eos
    return tokenizer


def _load(path: Path) -> Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        raw = Raw.from_str(text)
    except OSError as error:
        raise DataError(
            _("the tokenizer cannot be read: {why}").format(why=error.strerror), where=str(file),
            fix=_("name a tokenizer.json or a folder that holds one")) from None
    except Exception as error:                           # the library raises no narrower class
        raise DataError(_("this is not a tokenizer: {why}").format(why=error), where=str(file)) from None
    settings = _json(file.with_name("tokenizer_config.json"))
    said = {**_json(file.with_name("special_tokens_map.json")), **settings}
    named = {role: token for role in ROLES if (token := _content(said.get(f"{role}_token")))}
    for role, token in named.items():
        if raw.token_to_id(token) is None:
            raise IncompatibleError(_("the {role} token {token!r} is not in the vocabulary").format(
                role=role, token=token), where=str(file))
    guessed = {} if named else _guess(raw, json.loads(text))
    named = named or guessed
    settings.pop("auto_map", None)                       # names code that would be run
    own = settings.get("danlu", {})
    framed = {"cls", "sep"} <= named.keys()
    first = raw.encode("a").ids[:1]
    opens = "bos" in named and not framed and first == [raw.token_to_id(named["bos"])]
    return Tokenizer(text, named=named, guessed=tuple(guessed), settings=settings,
                     add_bos=own.get("add_bos", opens), add_eos=own.get("add_eos", "eos" in named and not framed))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = files.read_json(path)
    except ValueError as error:
        raise DataError(_("this is not JSON: {why}").format(why=error), where=str(path)) from None
    if not isinstance(value, dict):
        raise DataError(_("this should be a JSON object"), where=str(path))
    return value


def _content(token: Any) -> str | None:
    """A token is text, or a table with its text under `content`."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _guess(raw: Raw, content: Mapping[str, Any]) -> dict[str, str]:
    added = {token.content for token in raw.get_added_tokens_decoder().values()}
    named = {role: next((n for n in names if n in added), None) for role, names in KNOWN.items()}
    unknown = content["model"].get("unk_token")
    named["unk"] = unknown if isinstance(unknown, str) and raw.token_to_id(unknown) is not None else named["unk"]
    return {role: token for role, token in named.items() if token}


def _character_table(content: Mapping[str, Any]) -> np.ndarray | None:
    """Return {code point: id} [CODES] when every character is a token, -1 for those unknown; else None.

    The library's own path takes some microseconds a character.
    """
    plain = [t for t in content["added_tokens"] if not t["special"]]
    if content["model"]["type"] != "WordLevel" or content["pre_tokenizer"] != BY_CHARACTER:
        return None
    if content["normalizer"] is not None or plain:
        return None
    vocab = content["model"]["vocab"]
    table = np.full(vocabulary.CODES, vocab.get(content["model"]["unk_token"], -1), np.int32)
    for token, index in vocab.items():
        if len(token) == 1:
            table[ord(token)] = index
    return table


def _culprit(texts: Sequence[str]) -> str | None:
    """Return the start of the text that is not valid Unicode, if one is."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return ascii(text[max(0, error.start - 20) : error.start + 20])
    return None
