"""Questions with answers from the public record; the tool's own figure lies within the stated error of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from danlu.adapt.lora import LoRA
from danlu.layout import Layout
from danlu.planner import estimate
from danlu.planner.hardware import parse
from danlu.planner.large import Large, large, optimal, states
from danlu.planner.public import parameters, pretraining, public
from danlu.train.recipe import Run

TRACES = estimate.Traces()


class Golden(NamedTuple):
    question: str
    source: str
    known: float
    error: float                                         # the share by which the tool may be off
    figure: Callable[[], float]


def count(name: str) -> float:
    return parameters(public(name).config)


def plan(name: str, tokens: float, machine: str = "1xA100-80GB") -> Large:
    return large(public(name), parse(machine), tokens)


def run(name: str, layout: Layout, *, length: int = 512, recompute: str = "full", adapt: LoRA | None = None) -> Run:
    made = pretraining(public(name).config, length=length, rows=layout.dp)
    return made.model_copy(update={"layout": layout, "recompute": recompute, "adapt": adapt})


def static(name: str, layout: Layout) -> float:
    part, _waiting = estimate.parts(run(name, layout), TRACES)[0]
    return sum(part.static())


GOLDEN = [
    Golden("parameters of GPT-3", "Brown et al. (2020), arXiv 2005.14165, table D.1", 174.6e9, 0.001, lambda: count("gpt3-175b")),
    Golden("FLOPs of GPT-3", "Brown et al. (2020), arXiv 2005.14165, table D.1; without attention's own products", 3.14e23, 0.05,
           lambda: plan("gpt3-175b", 300e9).flops),
    Golden("days of GPT-3 on 1,024 A100", "Narayanan et al. (2021), arXiv 2104.04473", 34, 0.2,
           lambda: plan("gpt3-175b", 300e9, "1024xA100").usual / 86400),
    Golden("days of GPT-3 on 285 V100 at their peak: 3.14e23 ÷ (285 × 125e12)", "Brown et al. (2020), table D.1; V100 data sheet",
           102, 0.05, lambda: plan("gpt3-175b", 300e9, "285xV100").peak / 86400),
    Golden("parameters of Llama-3-8B", "meta-llama/Meta-Llama-3-8B", 8.03e9, 0.001, lambda: count("llama-3-8b")),
    Golden("bytes of Llama-3-8B's weights in bf16", "total_size of its model.safetensors.index.json", 16_060_522_496, 1e-6,
           lambda: 2 * count("llama-3-8b")),
    Golden("bytes of Llama-3-70B's weights in bf16", "total_size of its model.safetensors.index.json", 141_107_412_992, 1e-6,
           lambda: 2 * count("llama-3-70b")),
    Golden("FLOPs of Llama-3-405B on 15.6T tokens", "Llama team (2024), arXiv 2407.21783, section 1; without attention", 3.8e25,
           0.12, lambda: plan("llama-3-405b", 15.6e12).flops),
    Golden("H100-hours of Llama-3.1-405B", "model card of meta-llama/Llama-3.1-405B", 30.84e6, 0.2,
           lambda: plan("llama-3-405b", 15.6e12, "16384xH100").hours),
    Golden("A100-hours of Llama-2-7B", "Touvron et al. (2023), arXiv 2307.09288, table 2", 184_320, 0.2,
           lambda: plan("llama-2-7b", 2e12).hours),
    Golden("A100-hours of Llama-2-70B", "Touvron et al. (2023), arXiv 2307.09288, table 2", 1_720_320, 0.2,
           lambda: plan("llama-2-70b", 2e12).hours),
    Golden("FLOPs of Chinchilla", "Hoffmann et al. (2022), arXiv 2203.15556: the budget of Gopher", 5.76e23, 0.05,
           lambda: plan("chinchilla-70b", 1.4e12).flops),
    Golden("parameters that Chinchilla's compute trains best", "Hoffmann et al. (2022), arXiv 2203.15556, section 4", 70e9, 0.03,
           lambda: optimal(5.76e23)[0]),
    Golden("tokens for them", "Hoffmann et al. (2022), arXiv 2203.15556, section 4", 1.4e12, 0.03, lambda: optimal(5.76e23)[1]),
    Golden("parameters of PaLM", "Chowdhery et al. (2022), arXiv 2204.02311, table 1", 540.35e9, 0.001,
           lambda: count("palm-540b")),
    Golden("FLOPs of PaLM on 780B tokens", "Chowdhery et al. (2022), arXiv 2204.02311: 2527 zettaFLOPs", 2.527e24, 0.05,
           lambda: plan("palm-540b", 780e9).flops),
    Golden("parameters of BLOOM", "bigscience/bloom", 176_247_271_424, 0.001, lambda: count("bloom-176b")),
    Golden("parameters of the GPT of a trillion", "Narayanan et al. (2021), arXiv 2104.04473, table 1", 1008e9, 0.001,
           lambda: count("megatron-1t")),
    Golden("parameters of BERT-large", "Devlin et al. (2019), arXiv 1810.04805: 340M", 340e6, 0.02, lambda: count("bert-large")),
    Golden("model states of 7.5B parameters in one device", "Rajbhandari et al. (2020), arXiv 1910.02054, figure 1", 120e9, 0.01,
           lambda: states(public("megatron-7.5b").config)),
    Golden("… cut over 64 devices, ZeRO-3", "Rajbhandari et al. (2020), arXiv 1910.02054, figure 1", 1.9e9, 0.03,
           lambda: static("megatron-7.5b", Layout(dp=64, shard="full"))),
    Golden("bytes a parameter of training in mixed precision with Adam",
           "Rajbhandari et al. (2020), arXiv 1910.02054, section 3.1", 16, 1e-3,
           lambda: states(public("llama-2-7b").config) / count("llama-2-7b")),
]


@pytest.mark.parametrize("one", GOLDEN, ids=lambda one: one.question)
def test_the_figure_is_the_known_one(one: Golden) -> None:
    assert one.figure() == pytest.approx(one.known, rel=one.error)
    assert len(one.source) > 8


def peak(name: str, layout: Layout, *, adapt: LoRA | None = None) -> float:
    return estimate.held(run(name, layout, adapt=adapt), TRACES).peak


def test_all_parameters_of_7b_do_not_fit_one_device_of_80_gb_and_fit_four() -> None:
    # 16 bytes a parameter (Rajbhandari et al., 2020): 108 GB before any activation
    assert peak("llama-2-7b", Layout()) > 80e9
    assert peak("llama-2-7b", Layout(dp=4, shard="full")) < 80e9 - parse("4xA100").base


def test_qlora_tunes_65b_in_48_gb() -> None:
    # Dettmers et al. (2023), arXiv 2305.14314: a 65B model with adapters of rank 64 on one GPU of 48 GB, which is 48 GiB
    assert 65.29e9 * 0.5 < peak("llama-65b", Layout(), adapt=LoRA(rank=64, base="nf4")) < 48 * 2**30 - parse("A100").base


def test_questions_enough() -> None:
    assert len(GOLDEN) >= 20 and len({one.question for one in GOLDEN}) == len(GOLDEN)
