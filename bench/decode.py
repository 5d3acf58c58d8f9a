"""Tokens a second of GPT-2 124 M (random weights), beside `transformers.generate` in bfloat16, in turns.

    python -m bench.decode --batch 1 --rounds 5
    python -m bench.decode --batch 8 --rounds 5

A step writes the same number of tokens after each of `--batch` prompts of equal length, the likeliest each time, with the cache.
Ours goes the way that `danlu generate --data` goes.  Every contender has a process of its own, see `bench.race`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.race import ELSEWHERE, Worker, race
from danlu.decode.many import answers
from danlu.decode.pack import pack
from danlu.decode.sampling import Sampling
from danlu.models.build import build
from danlu.models.decoder import Decoder, DecoderModel

VOCAB, PROMPT = 50257, 32
BYTES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass
class Writer:
    """What the race steps."""

    step: Callable[[], Any]

    def loss(self) -> float:
        """Nothing is learned."""
        return 0.0

    def close(self) -> None:
        """Nothing is open."""


def prompts(batch: int) -> list[list[int]]:
    """Return `batch` prompts of random ids."""
    return torch.randint(0, VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()    # type: ignore[no-any-return]


def theirs(size: str, precision: str) -> Writer:
    """Return transformers' GPT-2; `size` is BATCHxTOKENS."""
    import transformers

    batch, tokens = (int(n) for n in size.split("x"))
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).to(getattr(torch, BYTES[precision])).eval()
    ids = torch.tensor(prompts(batch))
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return Writer(lambda: model.generate(ids, **settings))


def ours(size: str, precision: str) -> Writer:
    """Return our GPT-2, laid out for the CPU unless in fp32; `size` is BATCHxTOKENS."""
    batch, tokens = (int(n) for n in size.split("x"))
    model = build(Decoder(preset="gpt2", vocab=VOCAB), "cpu").init(0).eval()
    assert isinstance(model, DecoderModel)
    if precision != "fp32":
        model = pack(model, bits=8 if precision == "int8" else 16)
    how = Sampling(max_new_tokens=tokens, temperature=0)
    return Writer(lambda: list(answers(model, [(ids, how) for ids in prompts(batch)], slots=batch)))


def main() -> None:
    """Print tokens a second of each contender, and the ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=int, default=1, help="steps between two turns")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    size = f"{given.batch}x{given.tokens}"
    workers = [Worker(name, size, threads=given.threads) for name in (
        "bench.decode:theirs:bf16", "bench.decode:ours:bf16", "bench.decode:ours:int8")]
    try:
        results = race(workers, rounds=given.rounds, block=given.block, warm=1, retries=1)
    finally:
        for worker in workers:
            worker.close()
    first = next(iter(results.values())).median
    print(f"batch {given.batch}, {given.tokens} tokens after {PROMPT}, {given.threads} threads")
    for name, result in results.items():
        rate = given.batch * given.tokens / result.median
        print(f"{name:28} {rate:8.1f} tokens/s   ratio {first / result.median:5.2f}   peak {result.peak:6.0f} MB   "
              f"{result.disturbed} of {len(result.blocks)} blocks disturbed (others used more than {ELSEWHERE} cores)")


if __name__ == "__main__":
    main()
