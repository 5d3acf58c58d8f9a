"""`danlu generate run --prompt …`: stream what a model writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from danlu import parallel
from danlu.adapt import folder as adapters
from danlu.data.tokenizer import Tokenizer
from danlu.errors import ConfigError
from danlu.generate import generate, text, writes
from danlu.train import checkpoint
from danlu.words import _


def main(run: Path, *, prompt: str, max_new_tokens: int | None, temperature: float, top_k: int | None, top_p: float | None,
         repetition_penalty: float, stop: list[str], seed: int, as_json: bool) -> int:
    """Print the prompt and, as it comes, what the model writes after it."""
    device = parallel.start(threads=None, device="auto")
    folder = checkpoint.chosen(run)
    tokenizer, model = Tokenizer.load(adapters.tokenizer_in(folder)), adapters.load(folder, device=device)
    if not writes(model):
        raise ConfigError(_("an encoder does not write; give a decoder"), where=str(run))
    if prompt == "-":
        prompt = sys.stdin.read()
    ids = tokenizer.encode(prompt).tolist()
    if not ids or tokenizer.add_bos:
        ids = [start_of(tokenizer), *ids]
    most = max_new_tokens or min(128, model.cfg.context - model.ahead.room() - len(ids))
    new = generate(model.eval(), ids, max_new_tokens=most, temperature=temperature, top_k=top_k, top_p=top_p,
                   repetition_penalty=repetition_penalty, eos=tokenizer.special.eos, seed=seed)
    pieces = text(new, lambda part: tokenizer.decode(part, special=False), stop=stop)
    if as_json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False))
        return 0
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def start_of(tokenizer: Tokenizer) -> int:
    """Return the id that a text begins with: bos, or eos where a tokenizer has only that (GPT-2)."""
    special = tokenizer.special
    start = special.bos if special.bos is not None else special.eos
    if start is None:
        raise ConfigError(_("the tokenizer has no token that begins a text"), fix=_("give a --prompt"))
    return start
