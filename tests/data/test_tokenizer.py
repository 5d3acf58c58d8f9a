"""Tokenizers against transformers, against themselves in other processes, and against text that plays tricks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data import corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Raw

from danlu.data import kinds, pieces, vocabulary
from danlu.data.coverage import report, script
from danlu.data.tokenizer import BPE, Chars, Kind, Loaded, Tokenizer, Unigram, WordPiece, train
from danlu.errors import ConfigError, DataError, IncompatibleError

TEXTS = corpus.english() + corpus.chinese()
SMALL: list[kinds.Trained] = [
    BPE(vocab=600), BPE(vocab=500, masked=True, special=("<|user|>",)), BPE(vocab=400, bos="<|bos|>", add_bos=True),
    WordPiece(vocab=800), WordPiece(vocab=600, lowercase=False, special=("[USER]",)),
    Unigram(vocab=800), Unigram(vocab=700, masked=True, space=False), Chars(), Chars(masked=True, vocab=100),
]
Made = dict[kinds.Trained, Tokenizer]
TRICKS = ["<|endoftext|>", "<|pad|>", "[MASK]", "[CLS]", "<mask>", "<s></s>", "<unk>", "[UNK]", "<eos>", "<|user|>",
          "a<|endoftext|>b <mask> [SEP][MASK]", " <pad> ", "<|cls|><|mask|>"]


@pytest.fixture(scope="module")
def made() -> Made:
    return {cfg: train(iter(TEXTS), cfg) for cfg in SMALL}


def name(cfg: object) -> str:
    return "-".join(f"{v}" for v in cfg.model_dump(exclude_unset=True).values()) or type(cfg).__name__    # type: ignore[attr-defined]


each = pytest.mark.parametrize("cfg", SMALL, ids=name)


# round trip

@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_bytes_lose_nothing(made: Made, text: str) -> None:
    for cfg in SMALL[:2]:
        assert made[cfg].decode(made[cfg].encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from([*TRICKS, "x", " ", "\n", "天地", "é"]), max_size=8))
def test_known_characters_lose_nothing(made: Made, parts: list[str]) -> None:
    text = "".join(parts).replace("é", "")
    tokenizer = made[SMALL[7]]
    if tokenizer.special.unk not in tokenizer.encode(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    unigram = made[SMALL[6]]                    # space=False
    if unigram.special.unk not in unigram.encode(text):
        assert unigram.decode(unigram.encode(text)) == text


# special tokens

@each
@pytest.mark.parametrize("text", TRICKS)
def test_text_never_becomes_a_special_token(made: Made, cfg: kinds.Trained, text: str) -> None:
    tokenizer = made[cfg]
    special = {i for i in np.flatnonzero(tokenizer.special.reserved).tolist() if i != tokenizer.special.unk}
    batch, one = tokenizer.encode_batch(["plain", text])[1], tokenizer.encode(text)
    assert len(one) and not special & set(one.tolist()) and one.tolist() == batch.tolist()


def word_tokenizer(kind: str) -> Raw:
    """A tokenizer whose vocabulary itself lists <mask>, cut at spaces only: plain text could hit it."""
    tokens = ["<pad>", "<unk>", "<mask>", "<", "mask", ">", "▁", "▁a", "▁b", "a", "b"]
    if kind == "unigram":
        raw = Raw(models.Unigram([(t, 0.0 if i < 3 else -float(i)) for i, t in enumerate(tokens)], unk_id=1))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "wordlevel":
        raw = Raw(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        raw = Raw(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", ignore_merges=True))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<pad>", "<unk>", "<mask>"])
    raw.add_tokens([AddedToken("<tool>", special=False)])
    raw.add_special_tokens(["<late>"])
    return raw


@pytest.mark.parametrize("kind", ["unigram", "wordlevel", "bpe"])
def test_a_foreign_vocabulary_that_lists_its_special_tokens(tmp_path: Path, kind: str) -> None:
    raw = word_tokenizer(kind)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    mask = tokenizer.id("<mask>")
    assert mask == 2 and 2 in raw.encode("a <mask> b").ids and tokenizer.special.mask == 2
    if kind == "bpe":                           # cannot be told apart: refused rather than learned
        with pytest.raises(DataError, match="<mask>"):
            tokenizer.encode("a <mask> b")
    else:
        assert 2 not in tokenizer.encode("a <mask> b").tolist()
    assert tokenizer.encode("a <tool> <late>").tolist()[-2:].count(tokenizer.id("<late>")) == 0
    assert tokenizer.id("<tool>") in tokenizer.encode("a <tool>").tolist() and tokenizer.special.size == 13
    assert tokenizer.encode("a b").tolist() == raw.encode("a b").ids


def test_a_special_token_that_is_ordinary_text_is_refused() -> None:
    for cfg in (BPE(vocab=400, special=("USER",)), WordPiece(vocab=400, special=("user",)), BPE(vocab=400, eos="##")):
        with pytest.raises(ConfigError, match=r"ordinary text.*<\|"):
            train(TEXTS, cfg)


# the Chinese problem

def longest(raw: Raw, texts: list[str]) -> int:
    return max(len(piece) for text in texts for piece, _span in raw.pre_tokenizer.pre_tokenize_str(text))


def test_pre_tokens_of_chinese_are_bounded() -> None:
    run = "".join(corpus.chinese(1, 5000)).replace("，", "").replace("。", "")
    gpt4 = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    assert max(len(p) for p, _span in gpt4.pre_tokenize_str(run)) > 4000           # what the others do
    for han in (1, 4, 8):
        cut = pre_tokenizers.Split(Regex(kinds.pattern(han, 3)), "isolated")
        assert max(len(p) for p, _span in cut.pre_tokenize_str(run)) == han


@pytest.mark.parametrize("text", [
    "天" * 999, "カタカナ" * 99, "ประเทศไทย" * 99, "x" * 999, "\n" * 999, " " * 999, "!" * 999, "1" * 999, "é" * 999,
    "한국어" * 99, "ー" * 99, "\u0301" * 500, "天1x!" * 99])
@pytest.mark.parametrize("cfg", [BPE(vocab=400), Unigram(vocab=400), WordPiece(vocab=400)], ids=name)
def test_no_text_makes_a_long_pre_token(cfg: kinds.Trained, text: str) -> None:
    raw = kinds.untrained(cfg)
    pieces = raw.pre_tokenizer.pre_tokenize_str(raw.normalizer.normalize_str(text) if raw.normalizer else text)
    assert max((span[1] - span[0] for _piece, span in pieces), default=0) <= kinds.LONGEST + 9
    if not isinstance(cfg, WordPiece):
        spans = [(0, 0), *(span for _piece, span in pieces)]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))         # nothing is left out


def test_english_is_cut_as_gpt4_cuts_it() -> None:
    gpt4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+")
    theirs = pre_tokenizers.Split(Regex(gpt4), "isolated")
    ours = pre_tokenizers.Split(Regex(kinds.pattern(4, 3)), "isolated")
    for text in corpus.english(20):
        short = text.replace("=" * 60, "")
        assert ours.pre_tokenize_str(short) == theirs.pre_tokenize_str(short)


def test_counting_forgets_the_rarest_and_keeps_the_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "WORDS", 500)
    monkeypatch.setattr(vocabulary, "SLICE", 400)
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(0x4E00, 0x9000, 100))) + "，天地玄黄，" for _ in range(400)]
    words = vocabulary._words(vocabulary.Feed(texts, 1 << 30), kinds.untrained(BPE()))
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("天地玄黄")[0][0]
    assert len(words) <= 500 and words[spelt] == 400


@pytest.mark.slow
def test_training_on_chinese_needs_a_bounded_memory() -> None:
    """Runs that never repeat: 30 MB are 2.5 million different pieces of four, and more text needs no more memory."""
    program = (
        "import resource; import numpy as np; from danlu.data.tokenizer import BPE, train\n"
        "rng = np.random.default_rng(0)\n"
        "texts = (''.join(map(chr, rng.integers(0x4E00, 0x5600, 10_000))) for _ in range(1000))\n"
        "train(texts, BPE(vocab=1000)); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1200


def test_counting_first_changes_nothing() -> None:
    cfg = BPE(vocab=700)
    direct = kinds.untrained(cfg)
    direct.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=700, min_frequency=2, special_tokens=kinds.specials(cfg), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    assert json.loads(direct.to_str())["model"] == json.loads(train(TEXTS, cfg).raw.to_str())["model"]


# determinism

def test_the_same_texts_give_the_same_bytes_in_any_process(made: Made) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from data.test_tokenizer import SMALL, TEXTS, train\n"
        "print(*(train(iter(TEXTS), cfg).sha256 for cfg in SMALL))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [made[cfg].sha256 for cfg in SMALL]


def test_training_reads_no_more_than_it_may() -> None:
    given = iter(TEXTS)
    tokenizer = train(given, BPE(vocab=300, text_bytes=10_000))
    trained = tokenizer.settings["danlu"]["trained"]
    assert not trained["complete"] and 10_000 <= trained["bytes"] < 10_000 + len(TEXTS[trained["texts"] - 1].encode())
    assert next(given) == TEXTS[trained["texts"] + 1]
    assert train(TEXTS, BPE(vocab=300)).settings["danlu"]["trained"]["complete"]


@pytest.mark.parametrize("cfg", [BPE(), WordPiece(), Unigram(), Chars()], ids=name)
def test_no_text_is_an_error(cfg: kinds.Trained) -> None:
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train(texts, cfg)


# vocabularies

@each
def test_sizes_and_special_ids(made: Made, cfg: kinds.Trained) -> None:
    tokenizer, special = made[cfg], made[cfg].special
    wanted = kinds.specials(cfg)
    assert tokenizer.size <= cfg.vocab and special.size == tokenizer.size
    assert [tokenizer.id(token) for token in wanted] == list(range(len(wanted)))
    assert np.flatnonzero(special.reserved).tolist() == list(range(len(wanted)))
    for role in kinds.ROLES:
        token = kinds.roles(cfg).get(role)
        assert getattr(special, role) == (None if token is None else tokenizer.id(token))
    assert tokenizer.dtype == "uint16" and len(special.starts) == len(special.ends) == tokenizer.size


def test_the_alphabet_is_cut_by_frequency() -> None:
    text = "天" * 50 + "地" * 40 + "玄" * 30 + "黄" * 20 + "\n"
    for cfg in (WordPiece(vocab=32, alphabet=3), Unigram(vocab=32, alphabet=3), Chars(vocab=16 + 3, unk="<unk>")):
        extra = ["宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"] if isinstance(cfg, Chars) else []
        tokenizer = train([text, *extra], cfg)
        known = [c for c in "天地玄" if tokenizer.special.unk not in tokenizer.encode(c)]
        assert known == list("天地玄")
        assert tokenizer.special.unk in tokenizer.encode("藏" if extra else "黄")


def test_characters_are_the_set_of_characters(made: Made) -> None:
    text = "\n".join(TEXTS)
    tokenizer = train([text], Chars(eos=None, pad=None, unk=None))
    assert tokenizer.size == len(set(text))
    assert tokenizer.encode("".join(sorted(set(text)))).tolist() == list(range(tokenizer.size))
    with pytest.raises(DataError, match="ö"):
        tokenizer.encode("aöb")
    known = made[SMALL[7]]
    for sample in [*TEXTS[:5], "öa<eos>", ""]:
        assert known.encode(sample).tolist() == known.raw.__class__.from_str(_unmarked(known)).encode(sample).ids


def _unmarked(tokenizer: Tokenizer) -> str:
    """The tokenizer.json without added tokens, for the library's own slow path by character."""
    return json.dumps(json.loads(tokenizer.raw.to_str()) | {"added_tokens": []})


def test_words_and_sentences(made: Made) -> None:
    text = "The import statement. Is it so. 天地。秋收。"
    for cfg in (SMALL[0], SMALL[3], SMALL[5]):
        special = made[cfg].special
        ids, spans = made[cfg].encode_spans(text)
        begins = [start for n, (i, (start, _end)) in enumerate(zip(ids, spans, strict=True)) if special.starts[i] or not n]
        words = [text[a:b].strip() for a, b in itertools.pairwise([*begins, len(text)])]
        assert [w for w in words if w and w.isascii()] == ["The", "import", "statement", ".", "Is", "it", "so", "."]
        assert all(sum(c in corpus.HAN for c in w) <= 1 or w in {text[a:b] for a, b in spans} for w in words)
        ends = [text[end - 1] for i, (_start, end) in zip(ids, spans, strict=True) if special.ends[i]]
        assert ends == [".", ".", "。", "。"]


def test_closing_marks_may_follow_a_stop() -> None:
    found = pieces.ends([b'so."', "？」".encode(), b"!)", b"a.b", b"x", b"", "…".encode()[:2], "……".encode()])
    assert found.tolist() == [True, True, True, False, False, False, False, True]


def test_frame_adds_what_the_configuration_says() -> None:
    ids = np.array([40, 41])
    both = train(TEXTS[:5], BPE(vocab=300, bos="<|bos|>", add_bos=True))
    assert both.frame(ids).tolist() == [both.special.bos, 40, 41, both.special.eos]
    assert train(TEXTS[:5], BPE(vocab=300)).frame(ids).tolist()[:2] == [40, 41]
    assert train(TEXTS[:5], BPE(vocab=300, masked=True)).frame(ids).tolist() == [40, 41]
    assert train(TEXTS[:5], WordPiece(vocab=300)).frame(ids).tolist() == [40, 41]


@pytest.mark.parametrize(("cls", "values"), [
    (BPE, {"vocab": 257}), (BPE, {"add_bos": True}), (BPE, {"eos": None, "add_eos": True}), (BPE, {"eos": "x"}),
    (BPE, {"eos": "< x"[1:]}), (Unigram, {"vocab": 100, "alphabet": 96}), (BPE, {"vocabulary": 1000})])
def test_impossible_configurations_are_refused(cls: type[BPE], values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        cls(**values)    # type: ignore[arg-type]


# files

@each
def test_transformers_opens_what_is_saved(made: Made, cfg: kinds.Trained, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = made[cfg]
    tokenizer.save(tmp_path)
    for model_type in (None, "gpt2", "llama", "qwen3", "mistral", "bert", "roberta"):
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in [*TEXTS[::25], "a  b\n\n12345 don't 天地", "", " "]:
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
    for role in kinds.ROLES:
        assert getattr(theirs, f"{role}_token_id") == getattr(tokenizer.special, role)
    pair, special = theirs("import", "that"), tokenizer.special
    first, second = tokenizer.encode("import").tolist(), tokenizer.encode("that").tolist()
    if special.cls is not None:
        assert pair["input_ids"] == [special.cls, *first, special.sep, *second, special.sep]
    else:
        assert pair["input_ids"] == ([special.bos] if cfg.add_bos else []) + first + second


@each
def test_save_and_load_change_nothing(made: Made, cfg: kinds.Trained, tmp_path: Path) -> None:
    one = made[cfg]
    one.save(tmp_path)
    two = Tokenizer.load(tmp_path)
    two.save(tmp_path / "again")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()
    assert (one.sha256, one.named, one.add_bos, one.add_eos) == (two.sha256, two.named, two.add_bos, two.add_eos)
    assert two.guessed == () and two.pieces == one.pieces
    assert [e.tolist() for e in one.encode_batch(TEXTS[:3])] == [e.tolist() for e in two.encode_batch(TEXTS[:3])]


def test_a_bare_file_is_understood_by_names_and_says_so(made: Made, tmp_path: Path) -> None:
    for cfg in (SMALL[1], SMALL[3], SMALL[5]):
        made[cfg].raw.save(str(tmp_path / "x.json"))
        found = Tokenizer.load(tmp_path / "x.json")
        assert set(found.guessed) == set(found.named)
        assert {r: t for r, t in kinds.roles(cfg).items() if r not in ("cls", "sep")}.items() <= found.named.items()


def bert(folder: Path) -> None:
    """A folder as transformers 4 wrote it: roles as tables, a truncation saved by accident."""
    raw = Raw(models.WordPiece({t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])},
                               unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    raw.enable_truncation(4)
    raw.enable_padding(length=8)
    raw.save(str(folder / "tokenizer.json"))
    table = {f"{n}_token": {"content": f"[{n.upper()}]", "lstrip": False} for n in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "special_tokens_map.json").write_text(json.dumps(table))
    settings = {"auto_map": {"AutoTokenizer": "evil.py"}, "model_max_length": 9}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_foreign_folder(tmp_path: Path) -> None:
    bert(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a b " * 20).tolist() == [5, 6] * 20        # neither cut nor padded
    assert (tokenizer.special.cls, tokenizer.special.mask, tokenizer.special.eos) == (2, 4, None)
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.guessed) == (False, False, ())
    tokenizer.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert kept["model_max_length"] == 9 and "auto_map" not in kept
    with pytest.raises(ConfigError, match="eos"):
        train([], Loaded(path=tmp_path, add_eos=True))


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for content in ("", "{", "{}", "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    bert(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<gone>"}))
    with pytest.raises(IncompatibleError, match="<gone>"):
        Tokenizer.load(tmp_path)


def test_the_hash_follows_rules_not_spacing(made: Made, tmp_path: Path) -> None:
    made[SMALL[0]].save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).sha256 == made[SMALL[0]].sha256
    assert len({t.sha256 for t in made.values()}) == len(made)


@pytest.mark.parametrize("cfg", [SMALL[0], SMALL[7]], ids=name)
def test_half_a_surrogate_pair_is_a_data_error(made: Made, cfg: Kind) -> None:
    with pytest.raises(DataError, match="ud800"):
        made[cfg].encode_batch(["fine", "bad \ud800 text"])    # type: ignore[index]
    with pytest.raises(DataError, match="surrogate"):
        train(["bad \ud800 text"], cfg)


# report

def test_report_counts_by_script(made: Made) -> None:
    known = [script(c) for c in "aéＡ天カ한д1!"]
    assert known == ["Latin", "Latin", "Latin", "Han", "Kana", "Hangul", "Cyrillic", "Digit", "Sign"]
    chars = made[SMALL[7]]
    told = report(chars, {"zh": iter(["天地，ab"]), "en": iter(["ab", "c é"])})
    assert told["samples"]["zh"]["scripts"]["Han"] == {"bytes": 6, "tokens": 2, "bytes_per_token": 3}
    assert told["samples"]["zh"]["scripts"]["Latin"] == {"bytes": 2, "tokens": 2, "bytes_per_token": 1}
    assert told["samples"]["en"]["unk_share"] == 1 / 5 and told["samples"]["en"]["texts"] == 2
    plain = int((~chars.special.reserved).sum())
    assert told["unused"]["count"] == plain - len(set("天地，abc "))
    for tokenizer in made.values():
        told = report(tokenizer, {"zh": iter(TEXTS[-3:])})
        size, tokens = sum(len(t.encode()) for t in TEXTS[-3:]), sum(len(tokenizer.encode(t)) for t in TEXTS[-3:])
        assert told["samples"]["zh"]["bytes_per_token"] == size / tokens
        assert sum(s["tokens"] for s in told["samples"]["zh"]["scripts"].values()) == tokens
        json.dumps(told)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_rows_of_tasks_are_framed_as_the_template_says(kind: str, tmp_path: Path) -> None:
    """The ids and types that transformers gives a text and a pair of texts."""
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "a", "b", "c", "d"]
    raw = Raw(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(["<s>", "</s>"])
    raw.post_processor = {
        "bert": processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", [("<s>", 0), ("</s>", 1)]),
        "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        "llama": processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])}[kind]
    raw.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for texts in (("c d",), ("c d", "d c c")):
        row, parts = ours.together([ours.encode(text) for text in texts])
        told = theirs(*texts, return_token_type_ids=True)
        assert row.tolist() == told["input_ids"] and parts == (told["token_type_ids"].count(0), told["token_type_ids"].count(1))
        assert len(row) - sum(len(text.split()) for text in texts) == ours.room_beside(len(texts))
