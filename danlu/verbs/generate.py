"""`danlu generate run --prompt …`: stream what a model writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from danlu import parallel
from danlu.data.tokenizer import Tokenizer
from danlu.generate import generate_text
from danlu.models import weights
from danlu.train import checkpoint


def main(run: Path, *, prompt: str, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
         repetition_penalty: float, stop: list[str], seed: int, as_json: bool) -> int:
    """Print the prompt and, as it comes, what the model writes after it."""
    device = parallel.start(threads=None, device="auto")
    folder = checkpoint.chosen(run)
    tokenizer, model = Tokenizer.load(folder), weights.load(folder, device=device)
    if prompt == "-":
        prompt = sys.stdin.read()
    pieces = generate_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                           top_p=top_p, repetition_penalty=repetition_penalty, stop=tuple(stop), seed=seed)
    if as_json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False))
        return 0
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
