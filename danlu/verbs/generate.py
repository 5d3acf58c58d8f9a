"""`danlu generate run --prompt …`: stream what a model writes; or answer a file of prompts, many at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from danlu import config, files, parallel
from danlu.adapt import folder as adapters
from danlu.data.tokenizer import Tokenizer
from danlu.decode import Sampling, beam
from danlu.decode import draft as drafts
from danlu.decode.many import Answer, answers
from danlu.decode.pack import pack
from danlu.decode.schema import Grammar
from danlu.errors import ConfigError, DataError
from danlu.generate import Writer, generate, text, writes
from danlu.models.decoder import DecoderModel
from danlu.nn import packed
from danlu.nn.forms import Low
from danlu.train import checkpoint
from danlu.words import _

ALONE = ("num_beams", "draft", "n", "schema")           # ways to answer that exclude each other


def main(run: Path, *, prompt: str, max_new_tokens: int | None, temperature: float, top_k: int | None, top_p: float | None,
         repetition_penalty: float, stop: list[str], seed: int, num_beams: int, length_penalty: float, draft: Path | None,
         schema: Path | None, data: Path | None, out: Path | None, n: int, batch: int, precision: str, as_json: bool) -> int:
    """Print the prompt and, as it comes, what the model writes after it; or write the answers to the prompts of a file."""
    if n < 1 or batch < 1 or num_beams < 1:
        raise ConfigError(_("--n, --batch and --num-beams must be at least 1"))
    _check(num_beams=num_beams > 1, draft=draft is not None, schema=schema is not None, n=n > 1, data=data, out=out,
           prompt=prompt)
    tokenizer, model = _opened(run, precision)
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty,
                           "seed": seed, "stop": tuple(stop), "schema": None if schema is None else _schema(schema)}
    if data is not None and out is not None:
        prompts = list(_prompts(data))
        said = _answers(model, tokenizer, [_ids(one, tokenizer) for one in prompts], max_new_tokens, how, n=n, batch=batch)
        return _write(out, prompts, said, n=n, as_json=as_json)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    ids = _ids(prompt, tokenizer)
    most = _most(model, ids, max_new_tokens)
    if schema is not None or n > 1:
        many = [answer.text for answer in _answers(model, tokenizer, [ids], most, how, n=n, batch=batch)]
        return _tell_many(prompt, many, as_json=as_json)
    if num_beams > 1:
        found = beam.search(model, ids, beams=num_beams, max_new_tokens=most, length_penalty=length_penalty,
                            ends=_ends(tokenizer))
        return _tell(prompt, text(found[0].ids, partial(tokenizer.decode, special=False), stop=stop), as_json=as_json)
    if draft is not None:
        asked = config.validate(Sampling, {**how, "max_new_tokens": most})
        new = drafts.write(model, _opened(draft, precision)[1], ids, asked.model_copy(update={"stop": ()}), ends=_ends(tokenizer))
    else:
        new = generate(model, ids, max_new_tokens=most, temperature=temperature, top_k=top_k, top_p=top_p,
                       repetition_penalty=repetition_penalty, eos=tokenizer.special.eos, seed=seed)
    return _tell(prompt, text(new, partial(tokenizer.decode, special=False), stop=stop), as_json=as_json)


def _check(*, data: Path | None, out: Path | None, prompt: str, **asked: bool) -> None:
    """Raise ConfigError for options that exclude each other."""
    chosen = [name for name in ALONE if asked[name]]
    options = [f"--{name.replace('_', '-')}" for name in chosen]
    if len(chosen) > 1 and set(chosen) != {"schema", "n"}:
        raise ConfigError(_("{options} cannot be used together").format(options=", ".join(options)))
    if (data is None) != (out is None):
        raise ConfigError(_("--data and --out belong together"), fix=_("give the file of prompts and that for the answers"))
    if data is not None and (prompt or asked["num_beams"] or asked["draft"]):
        raise ConfigError(_("--data cannot be used together with --prompt, --num-beams or --draft"))


def _opened(run: Path, precision: str) -> tuple[Tokenizer, Writer]:
    """Return the tokenizer and the model of a run, as precise as asked for."""
    device = parallel.start(threads=None, device="auto")
    folder = checkpoint.chosen(run)
    tokenizer, model = Tokenizer.load(adapters.tokenizer_in(folder)), adapters.load(folder, device=device)
    if not writes(model):
        raise ConfigError(_("an encoder does not write; give a decoder"), where=str(run))
    if precision == "fp32":
        return tokenizer, model.eval()
    # thin matrices that are whole become others like any; rounded ones have types of their own
    if any(not isinstance(form, Low) or form.rounded is not None for _name, form in packed.forms(model)):
        raise ConfigError(_("--precision is for whole weights; these are in fewer bits, and are written with as they are"),
                          where=str(run), fix=_("leave the precision as it is"))
    if isinstance(model, DecoderModel) and device.type == "cpu":
        return tokenizer, pack(model, bits=8 if precision == "int8" else 16)
    if precision == "int8":
        raise ConfigError(_("--precision int8 is for decoders of Danlu's own families on a CPU"))
    return tokenizer, model.bfloat16().eval()


def _answers(model: Writer, tokenizer: Tokenizer, prompts: list[list[int]], most: int | None, how: dict[str, Any], *,
             n: int, batch: int) -> Iterator[Answer]:
    """Yield `n` answers to each prompt, in order; the seeds of one prompt's follow each other."""
    asked = [(ids, config.validate(Sampling, {**how, "seed": how["seed"] + k, "max_new_tokens": _most(model, ids, most)}))
             for ids in prompts for k in range(n)]
    ends = _ends(tokenizer)
    return answers(model, asked, slots=batch, decode=partial(tokenizer.decode, special=False), ends=ends,
                   grammar=lambda: Grammar(tokenizer, ends))


def _write(out: Path, prompts: list[str], said: Iterator[Answer], *, n: int, as_json: bool) -> int:
    """Write the answers to prompts, `n` to each, one JSON object a line, in their order."""
    tokens = 0
    with out.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            for number in range(n):
                answer = next(said)
                record = {"prompt": prompt, "text": answer.text, "finish": answer.finish, "tokens": len(answer.ids)}
                file.write(json.dumps(record | ({"number": number} if n > 1 else {}), ensure_ascii=False) + "\n")
                tokens += len(answer.ids)
    done = {"prompts": len(prompts), "answers": n * len(prompts), "tokens": tokens, "out": str(out)}
    print(json.dumps(done, ensure_ascii=False) if as_json else
          _("{n} answers to {m} prompts, {tokens} tokens, in {out}").format(
              n=n * len(prompts), m=len(prompts), tokens=tokens, out=out))
    return 0


def _prompts(data: Path) -> Iterator[str]:
    """Yield the prompt of each line: a JSON object with `prompt` or `text`, or a JSON string."""
    try:
        lines = data.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(_("the prompts cannot be read: {why}").format(why=error), where=str(data)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(_("this is not JSON: {why}").format(why=error), where=f"{data}:{number}") from None
        prompt = row.get("prompt", row.get("text")) if isinstance(row, dict) else row
        if not isinstance(prompt, str):
            raise DataError(_("a line holds a text, or an object with a text under \"prompt\""), where=f"{data}:{number}")
        yield prompt


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = files.read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(_("the schema cannot be read: {why}").format(why=error), where=str(path)) from None
    if not isinstance(schema, dict):
        raise ConfigError(_("this should be a JSON object"), where=str(path))
    return schema


def _tell(prompt: str, pieces: Iterator[str], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False))
        return 0
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _tell_many(prompt: str, texts: list[str], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"prompt": prompt, "text": texts[0], "texts": texts}, ensure_ascii=False))
    else:
        print("\n".join(prompt + one for one in texts))
    return 0


def _ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode(prompt).tolist()
    return [start_of(tokenizer), *ids] if not ids or tokenizer.add_bos else ids


def _most(model: Writer, ids: list[int], most: int | None) -> int:
    return most or max(1, min(128, model.cfg.context - model.ahead.room() - len(ids)))


def _ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    return () if tokenizer.special.eos is None else (tokenizer.special.eos,)


def start_of(tokenizer: Tokenizer) -> int:
    """Return the id that a text begins with: bos, or eos where a tokenizer has only that (GPT-2)."""
    special = tokenizer.special
    start = special.bos if special.bos is not None else special.eos
    if start is None:
        raise ConfigError(_("the tokenizer has no token that begins a text"), fix=_("give a --prompt"))
    return start
