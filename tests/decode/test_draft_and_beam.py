"""Speculative decoding against the model alone, its distribution against the exact one; beams against transformers."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tiny import MAKES, made, prompts, tiny
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from danlu.decode.beam import search
from danlu.decode.draft import Luck, probabilities, write
from danlu.decode.sampling import Sampling
from danlu.errors import ConfigError, IncompatibleError
from danlu.generate import generate
from danlu.models import weights

SMALL = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 0, "head_width": 0}


@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("make", MAKES)
def test_a_draft_changes_no_greedy_token(make: str, penalty: float) -> None:
    model = tiny(make)
    how = Sampling(max_new_tokens=40, temperature=0, repetition_penalty=penalty)
    for draft in (made("gpt2", 7, **SMALL), made("gpt2", 7, **SMALL, context=50), model):
        for prompt in prompts(3, seed=2):
            wanted = list(generate(model, prompt, max_new_tokens=40, temperature=0, repetition_penalty=penalty, eos=256))
            assert list(write(model, draft, prompt, how, ends=[256], ahead=3)) == wanted


def test_a_perfect_draft_saves_passes() -> None:
    model, luck = tiny("grouped"), Luck()
    assert len(list(write(model, model, [1, 2], Sampling(max_new_tokens=40, temperature=0), ahead=4, luck=luck))) == 40
    assert luck.passes == 8 and luck.taken == luck.proposed == 32


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8, "frequency_penalty": 0.9}])
def test_what_is_drawn_has_the_distribution_of_the_model(how: dict[str, Any]) -> None:
    model, draft = made("gpt2", 3, vocab=6), made("gpt2", 8, vocab=6, **SMALL)
    counts: Counter[tuple[int, ...]] = Counter()
    luck, times, prompt = Luck(), 1500, [1, 4, 2]
    for seed in range(times):
        asked = Sampling(max_new_tokens=3, seed=seed, **how)
        counts[tuple(write(model, draft, prompt, asked, ahead=2, luck=luck))] += 1
    wanted = {}
    for text in itertools.product(range(6), repeat=3):
        p, said = 1.0, list[int]()
        for token in text:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *said]]))["logits"][0, -1]
            p *= float(probabilities(logits, prompt, said, asked)[token])
            said.append(token)
        wanted[text] = p * times
    assert sum(wanted.values()) == pytest.approx(times)
    assert all(wanted[text] > 0 for text in counts)
    common = [text for text in wanted if wanted[text] >= 5]
    seen = [*(counts[text] for text in common), times - sum(counts[text] for text in common)]
    right = [*(wanted[text] for text in common), times - sum(wanted[text] for text in common)]
    if right[-1] < 5:
        seen, right = [*seen[:-2], seen[-1] + seen[-2]], [*right[:-2], right[-1] + right[-2]]
    assert chisquare(seen, right).pvalue > 0.001
    assert 0 < luck.taken < luck.proposed                       # both branches were taken


def test_drafts_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(IncompatibleError):
        write(tiny("gpt2"), made("gpt2", vocab=99), [1], Sampling(max_new_tokens=2))
    with pytest.raises(ConfigError):
        write(tiny("gpt2"), tiny("gpt2"), [1], Sampling(max_new_tokens=2, stop=("a",)))


SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "num_key_value_heads": 2}
THEIRS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                               bos_token_id=None, eos_token_id=None)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
}


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("family", THEIRS)
def test_beams_are_those_of_transformers(family: str, penalty: float, tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = THEIRS[family]().eval()
    for p in theirs.parameters():
        p.data.mul_(4)
    theirs.save_pretrained(tmp_path)
    ours: Any = weights.load(tmp_path).eval()
    for prompt, ends, beams in (([5, 9, 2, 33], [7], 3), ([1], [7, 8, 12], 4), ([3, 4, 5], [], 2), ([60, 1], [5], 1)):
        eos = {"eos_token_id": ends} if ends else {}
        made = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=14,
                               num_beams=beams, do_sample=False, length_penalty=penalty, pad_token_id=0, early_stopping=False,
                               num_return_sequences=beams, return_dict_in_generate=True, output_scores=True, **eos)
        got = search(ours, prompt, beams=beams, max_new_tokens=14, length_penalty=penalty, ends=ends)
        wanted = [row[len(prompt):].tolist() for row in made.sequences]
        cut = [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in wanted]
        assert [list(beam.ids) for beam in got] == cut
        if beams > 1:
            assert [beam.score for beam in got] == pytest.approx(made.sequences_scores.tolist(), abs=1e-4)


def test_one_beam_is_the_greedy_text() -> None:
    for make, prompt in zip(MAKES, prompts(4), strict=True):
        (beam,) = search(tiny(make), prompt, beams=1, max_new_tokens=20)
        assert list(beam.ids) == list(generate(tiny(make), prompt, max_new_tokens=20, temperature=0))
