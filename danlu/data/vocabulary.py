"""Learn a tokenizer's vocabulary from a stream of texts: bounded memory, and the same bytes every time.

The trainers of the `tokenizers` library keep every different pre-token, at some 700 bytes each; and even pieces of four
Han characters hardly ever repeat, so that Chinese took seventy times its size.  Here pre-tokens are counted first, in a
table that forgets the rarest when it is full (lossy counting: Manku and Motwani, 2002), and only what is left is trained
on: measured 0.5, 1.1 and 1.3 GB for 20, 60 and 250 MB of Chinese (20 MB took 2.0 GB with GPT-4's pattern and no table).

The trainers also walk hash maps, so WordPiece breaks ties and Unigram orders equal scores differently in each process.
WordPiece is given every single character in one fixed order beforehand; what Unigram found is put in order afterwards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from tokenizers import Tokenizer as Raw
from tokenizers import models, pre_tokenizers, processors, trainers

from danlu.data.kinds import BPE, Chars, Trained, Unigram, WordPiece, roles, specials, untrained
from danlu.errors import ConfigError, DataError
from danlu.words import _

SLICE = 1 << 16          # characters cut or trained on at once, so that one huge text needs no huge memory
WORDS = 1 << 20          # different pre-tokens in memory; beyond that the rarer half is forgotten
REPEATS = 1 << 25        # pre-tokens handed to a trainer; beyond that all counts are divided
CODES = 0x110000         # Unicode code points


@dataclass
class Feed:
    """Iterates over `texts` in slices up to `limit` bytes, and counts what it gave."""

    source: Iterable[str]
    limit: int
    texts: int = 0
    bytes: int = 0
    complete: bool = True

    def __iter__(self) -> Iterator[str]:
        for text in self.source:
            if self.bytes >= self.limit:
                self.complete = False
                return
            self.texts += 1
            for start in range(0, len(text), SLICE):
                part = text[start : start + SLICE]
                self.bytes += len(_encoded(part, "utf-8"))
                yield part


def learn(feed: Feed, cfg: Trained) -> Raw:
    """Return a trained tokenizer with its special tokens and templates; `feed` has counted what was read."""
    _refuse_plain(cfg)
    match cfg:
        case BPE():
            raw = _bpe(feed, cfg)
        case WordPiece():
            raw = _wordpiece(feed, cfg)
        case Unigram():
            raw = _unigram(feed, cfg)
        case Chars():
            raw = _chars(feed, cfg)
    raw.add_special_tokens(specials(cfg))
    _add_template(raw, cfg)
    return raw


def _refuse_plain(cfg: Trained) -> None:
    """Raise ConfigError for a special token that the text itself could produce."""
    if isinstance(cfg, Chars):
        return
    raw = untrained(cfg)
    for token in specials(cfg):
        text = raw.normalizer.normalize_str(token) if raw.normalizer else token
        if len(raw.pre_tokenizer.pre_tokenize_str(text)) < 2:
            raise ConfigError(
                _("the special token {token!r} looks like ordinary text").format(token=token),
                fix=_("write it as <|{token}|>").format(token=token.strip("<|>")))


def _bpe(feed: Feed, cfg: BPE) -> Raw:
    raw = untrained(cfg)
    words = _words(feed, raw)
    final, raw.pre_tokenizer = raw.pre_tokenizer, pre_tokenizers.Split(" ", "removed")
    raw.train_from_iterator(_repeated(words), trainers.BpeTrainer(
        vocab_size=cfg.vocab, min_frequency=cfg.min_frequency, special_tokens=specials(cfg), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    raw.pre_tokenizer = final
    return raw


def _wordpiece(feed: Feed, cfg: WordPiece) -> Raw:
    raw, counts = untrained(cfg), np.zeros(CODES, np.int64)
    words = _words(feed, raw, counts)
    chars, inner = _alphabet_of_words(counts, raw, cfg.alphabet or cfg.vocab // 2)
    raw.normalizer, raw.pre_tokenizer = None, pre_tokenizers.Split(" ", "removed")
    raw.train_from_iterator(_repeated(words), trainers.WordPieceTrainer(
        vocab_size=cfg.vocab, min_frequency=cfg.min_frequency, show_progress=False,
        special_tokens=specials(cfg) + ["##" + c for c in inner],
        initial_alphabet=chars, limit_alphabet=len(chars), continuing_subword_prefix="##"))
    vocab = raw.get_vocab()
    return untrained(cfg, models.WordPiece(vocab=vocab, unk_token=cfg.unk, max_input_chars_per_word=100))


def _alphabet_of_words(counts: np.ndarray, raw: Raw, places: int) -> tuple[list[str], list[str]]:
    """Return the frequent characters, and those of them that can stand inside a word, in `places` places together."""
    chars: list[str] = []
    inner: list[str] = []
    for char in _frequent(counts):
        if char.isspace():
            continue
        word = raw.pre_tokenizer.pre_tokenize_str(raw.normalizer.normalize_str(f"a{char}a"))
        joins = len(word) == 1
        if len(chars) + len(inner) + 1 + joins > places:
            break
        chars.append(char)
        if joins:
            inner.append(char)
    return sorted(chars), sorted(inner)


def _unigram(feed: Feed, cfg: Unigram) -> Raw:
    raw, special, counts = untrained(cfg), specials(cfg), np.zeros(CODES, np.int64)
    words = _words(feed, raw, counts)
    kept = _frequent(counts)[: cfg.alphabet or cfg.vocab // 2]
    rare = dict.fromkeys(set(np.flatnonzero(counts).tolist()) - {ord(c) for c in kept} - {ord(" ")}, " ")
    raw.normalizer, raw.pre_tokenizer = None, pre_tokenizers.Split(" ", "removed")
    raw.train_from_iterator(_repeated(words, rare), trainers.UnigramTrainer(
        vocab_size=cfg.vocab - len(special), special_tokens=[], show_progress=False))
    vocab = [(token, 0.0) for token in special] + _ordered(_pieces(raw))
    return untrained(cfg, models.Unigram(vocab=vocab, unk_id=special.index(cfg.unk), byte_fallback=False))


def _pieces(raw: Raw) -> list[tuple[str, float]]:
    return [(piece, score) for piece, score in json.loads(raw.to_str())["model"]["vocab"]]


def _ordered(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return the pieces by falling score, then by text, whatever order the trainer's hash maps gave.

    The trainer hands characters it had no piece for the least score plus 0, 0.0001, 0.0002 … in arbitrary order;
    they all get the least score here.  The last digits of a sum depend on the order of its terms, hence six digits.
    """
    least = min(score for _piece, score in pieces)
    steps = [(score - least) * 1e4 for _piece, score in pieces]
    filler = [len(piece) == 1 and step < len(pieces) and abs(step - round(step)) < 1e-6
              for (piece, _score), step in zip(pieces, steps, strict=True)]
    settled = [(piece, round(least if f else score, 6)) for (piece, score), f in zip(pieces, filler, strict=True)]
    return sorted(settled, key=lambda entry: (-entry[1], entry[0]))


def _chars(feed: Feed, cfg: Chars) -> Raw:
    counts, special = np.zeros(CODES, np.int64), specials(cfg)
    for _text in _counted(feed, counts):
        pass
    _refuse_nothing(feed)
    kept = [c for c in _frequent(counts) if counts[ord(c)] >= cfg.min_frequency][: cfg.vocab - len(special)]
    vocab = {token: i for i, token in enumerate(special + sorted(kept))}
    return untrained(cfg, models.WordLevel(vocab=vocab, unk_token=cfg.unk or "<unk>"))


def _add_template(raw: Raw, cfg: Trained) -> None:
    """Make `encode(a, b)` with special tokens frame texts as models expect: [CLS] A [SEP] B [SEP], or bos A."""
    named = roles(cfg)
    cls, sep, bos = named.get("cls"), named.get("sep"), named.get("bos")
    if cls and sep:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0", pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(t, raw.token_to_id(t)) for t in (cls, sep)])
    elif bos and cfg.add_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1", special_tokens=[(bos, raw.token_to_id(bos))])


def _refuse_nothing(feed: Feed) -> None:
    if feed.bytes == 0:
        raise DataError(_("there is no text to train a tokenizer on"), fix=_("look at what the filters rejected"))


def _words(feed: Feed, raw: Raw, counts: np.ndarray | None = None) -> Counter[str]:
    """Return how often each pre-token occurs, the frequent ones; `counts` [CODES] gets those of characters."""
    texts: Iterable[str] = feed if raw.normalizer is None else (raw.normalizer.normalize_str(text) for text in feed)
    words: Counter[str] = Counter()
    for text in texts if counts is None else _counted(texts, counts):
        words.update(map(itemgetter(0), raw.pre_tokenizer.pre_tokenize_str(text)))
        if len(words) > WORDS:
            words = _without_rarest(words, WORDS // 2)
    _refuse_nothing(feed)
    return words


def _without_rarest(words: Counter[str], number: int) -> Counter[str]:
    """Return at most `number` words: those seen more often than the first one that has to go."""
    found = np.fromiter(words.values(), np.int64, len(words))
    bar = int(np.partition(found, -number - 1)[-number - 1])
    return Counter({word: seen for word, seen in words.items() if seen > bar})


def _repeated(words: Counter[str], rare: dict[int, str] | None = None) -> Iterator[str]:
    """Yield each word as often as it was seen, between spaces; characters in `rare` as spaces too."""
    divisor = -(-words.total() // REPEATS)
    waiting, size = list[str](), 0
    for word, seen in words.items():
        spelt, left = f"{word.translate(rare) if rare else word} ", (seen + divisor // 2) // divisor
        while left:
            now = min(left, -(-(SLICE - size) // len(spelt)))
            waiting.append(spelt * now)
            size += len(spelt) * now
            left -= now
            if size >= SLICE:
                yield "".join(waiting)
                waiting, size = [], 0
    yield "".join(waiting)


def _encoded(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise DataError(_("a text holds half of a surrogate pair at character {n}").format(n=error.start),
                        fix=_("clean the text first")) from None


def _counted(texts: Iterable[str], counts: np.ndarray) -> Iterator[str]:
    """Yield the texts; `counts` [CODES] has how often each code point occurs, once all are taken."""
    waiting, size = list[str](), 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size > 1 << 20:
            counts += _tally("".join(waiting))
            waiting, size = [], 0
        yield text
    counts += _tally("".join(waiting))


def _tally(text: str) -> np.ndarray:
    return np.bincount(np.frombuffer(_encoded(text, "utf-32-le"), np.uint32), minlength=CODES)


def _frequent(counts: np.ndarray) -> list[str]:
    """Return the characters that occur, the most frequent first, equals by code point."""
    found = np.flatnonzero(counts)
    return [chr(c) for c in found[np.lexsort((found, -counts[found]))]]
