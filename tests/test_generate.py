"""Sampling against transformers' own processors and closed forms; greedy text against transformers.generate."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import RepetitionPenaltyLogitsProcessor as Penalty
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

from danlu.errors import ConfigError
from danlu.generate import choose, generate, keep_best, keep_probable, penalise, text
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder, DecoderModel

S = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
     "max_position_embeddings": 48, "bos_token_id": None, "eos_token_id": None}
THEIRS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=48,
                                               bos_token_id=None, eos_token_id=None)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**S, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**S, num_key_value_heads=2, sliding_window=6)),
}


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("family", THEIRS)
def test_greedy_text_is_that_of_transformers(family: str, penalty: float, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = THEIRS[family]().eval()
    for p in theirs.parameters():
        p.data.mul_(8)                                          # far from ties
    theirs.save_pretrained(tmp_path)
    ours = weights.load(tmp_path).eval()
    prompt = [5, 9, 2, 33]
    wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, repetition_penalty=penalty,
                             pad_token_id=0)[0, 4:].tolist()
    assert len(wanted) == 40
    got = list(generate(ours, prompt, max_new_tokens=40, temperature=0, repetition_penalty=penalty))    # type: ignore[arg-type]
    assert got == wanted


LOGITS = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 3
READ = [1, 1, 7, 39]


@pytest.mark.parametrize("logits", LOGITS)
def test_each_option_is_that_of_transformers(logits: torch.Tensor) -> None:
    row, ids = logits[None], torch.tensor([READ])
    for penalty in (0.7, 1.0, 2.5):
        assert torch.equal(penalise(logits, READ, penalty), Penalty(penalty)(ids, row)[0])
    for k in (1, 5, 40, 99):
        assert torch.equal(keep_best(logits, k), TopK(k)(ids, row)[0])
    for p in (1e-6, 0.3, 0.9, 0.999, 1.0):
        assert torch.equal(keep_probable(logits, p), TopP(p)(ids, row)[0])


def draw(logits: torch.Tensor, times: int = 4000, **settings: object) -> Counter[int]:
    given = {"temperature": 1.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "seed": 3} | settings
    return Counter(choose(logits, [0], number=n, **given) for n in range(times))      # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf, 0.5])
    counts, p = draw(logits, temperature=temperature), (logits / temperature).softmax(-1).tolist()
    assert counts[3] == 0
    for token, share in enumerate(p):
        assert abs(counts[token] - 4000 * share) <= 5 * math.sqrt(4000 * share * (1 - share)), token


def test_options_work_together_in_the_usual_order() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    # 0 was read: 3/10 = 0.3; halved temperature: [.6, 4, 2, 0, -2]; the best three: 4, 2, .6 = 86, 12, 3 %; 90 %: two.
    assert set(draw(logits, 500, repetition_penalty=10.0, temperature=0.5, top_k=3, top_p=0.9)) == {1, 2}
    assert set(draw(logits, 50, temperature=0)) == {0}


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    built = build(Decoder(family="llama", vocab=50, width=16, layers=2, heads=2, context=24), "cpu")
    assert isinstance(built, DecoderModel)
    return built.init(0).eval()


def test_the_seed_decides(model: DecoderModel) -> None:
    def run(seed: int) -> list[int]:
        torch.manual_seed(seed * 7)                             # the global state has no say
        return list(generate(model, [1, 2], max_new_tokens=12, seed=seed))

    assert run(1) == run(1) != run(2)


def test_it_streams_and_ends(model: DecoderModel) -> None:
    whole = list(generate(model, [1, 2, 3], max_new_tokens=12, seed=1))
    assert len(whole) == 12
    assert list(islice(generate(model, [1, 2, 3], max_new_tokens=12, seed=1), 3)) == whole[:3]
    assert list(generate(model, [1, 2, 3], max_new_tokens=12, seed=1, eos=whole[4])) == whole[: whole.index(whole[4])]
    pair = tuple(whole[5:7])
    end = next(i for i in range(12) if tuple(whole[i:i + 2]) == pair) + 2
    assert list(generate(model, [1, 2, 3], max_new_tokens=12, seed=1, stop=((49, 49, 49), pair))) == whole[:end]


def test_a_full_context_is_used_to_the_last_place_and_no_further(model: DecoderModel) -> None:
    assert len(list(generate(model, [1] * 20, max_new_tokens=4))) == 4
    with pytest.raises(ConfigError, match="24"):
        generate(model, [1] * 20, max_new_tokens=5)             # at once, not at the first token


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0},
                                   {"top_p": 1.5}, {"repetition_penalty": 0.0}, {"max_new_tokens": 0}])
def test_impossible_values_are_refused_at_once(model: DecoderModel, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generate(model, [1], **{"max_new_tokens": 2, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        generate(model, [], max_new_tokens=2)


def bytes_tokenizer() -> Tokenizer:
    """Every byte a token: the hardest case for character borders."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = bytes_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20))
def test_text_is_cut_at_characters(whole: str) -> None:
    pieces = list(text(TOKENIZER.encode(whole).ids, TOKENIZER.decode))
    assert "".join(pieces) == whole
    assert len(pieces) == len(whole)                            # each as soon as it is complete


def test_broken_bytes_are_told_at_the_end_once() -> None:
    ids = TOKENIZER.encode("a炼b").ids
    assert list(text(ids[:3], TOKENIZER.decode)) == ["a", "\ufffd"]             # the character never came
    assert "".join(text([*ids[:2], *ids[-1:]], TOKENIZER.decode)) == "a\ufffdb"


@pytest.mark.parametrize(("whole", "stop", "wanted"), [
    ("one\n\ntwo", ("\n\n",), "one"), ("one\ntwo", ("\n\n",), "one\ntwo"), ("abab!", ("abb", "b!"), "aba"),
    ("炼丹炉", ("丹",), "炼"), ("tail", ("lx",), "tail"), ("x", ("x",), ""),
])
def test_stop_strings(whole: str, stop: tuple[str, ...], wanted: str) -> None:
    assert "".join(text(TOKENIZER.encode(whole).ids, TOKENIZER.decode, stop=stop)) == wanted


def test_a_stop_string_ends_the_drawing_of_tokens() -> None:
    drawn = []

    def ids() -> object:
        for token in TOKENIZER.encode("ab.cd").ids:
            drawn.append(token)
            yield token

    assert "".join(text(ids(), TOKENIZER.decode, stop=(".",))) == "ab"          # type: ignore[arg-type]
    assert len(drawn) == 3


def test_words_joined_by_what_stands_before_them() -> None:
    def decode(ids: object) -> str:                             # as WordPiece: a space before all but the first
        return " ".join(f"w{i}" for i in ids)                   # type: ignore[attr-defined]

    assert list(text([1, 2, 3], decode)) == ["w1", " w2", " w3"]
