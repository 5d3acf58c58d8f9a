"""Danlu's own loop as a contender: the real feed, engine, optimizer and guard; and a bare loop around the same model.

`danlu:fp32`, `danlu+compile:fp32` in a race; `bare:fp32` shows what the engine costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers import Contender, folder_of
from bench.sizes import SIZES, Size
from danlu import parallel
from danlu.data import shards
from danlu.data.shards import Shards
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.nn import paths
from danlu.objectives.lm import CausalLM, MaskedLM
from danlu.optim import AdamW
from danlu.parallel.place import Placed, alone
from danlu.train.feed import Steps, batches, stream
from danlu.train.guard import Guard
from danlu.train.step import Engine


def vocabulary(size: int) -> Any:
    """Return the special ids that collation asks for: the last four of the vocabulary."""
    reserved = np.zeros(size, bool)
    reserved[-4:] = True
    ends, starts = np.zeros(size, bool), np.ones(size, bool)
    return SimpleNamespace(size=size, bos=None, eos=None, pad=size - 1, unk=None, cls=size - 2, sep=size - 3, mask=size - 4,
                           reserved=reserved, starts=starts, ends=ends)


def prepared(folder: Path, document: int) -> Path:
    """Return a prepared folder that holds the ids of folder/train.bin, cut into documents of that many ids."""
    out = Path(mkdtemp(prefix="bench-shards-"))
    ids = np.fromfile(folder / "train.bin", np.uint16)
    with shards.Writer(out / "train", dtype="uint16") as writer:
        for start in range(0, len(ids) - 1, document):
            writer.add(ids[start : start + document], bytes=document, file=0, line=1)
    shards.write_manifest(out, {"tokenizer": "none", "dtype": "uint16", "splits": {"train": writer.entries},
                                "files": ["train.bin"]})
    return out


def model_of(shape: Size, precision: str, *, compile: bool, recompute: str = "none", bias: bool = False,
             micro: int = 1) -> Placed:
    """Return the model that the peers train too: GPT-2's with erf-GELU, or BERT's with dropout 0.1 as its Trainer has it.

    nanoGPT's has no biases, the Trainer's has.
    """
    device = parallel.start(threads=None, device="cpu")
    common: dict[str, Any] = {"vocab": shape.vocabulary, "width": shape.width, "layers": shape.layers, "heads": shape.heads,
                              "context": shape.length}
    cfg = (Encoder(family="bert", outputs=("mlm",), dropout=0.1, **common) if shape.encoder
           else Decoder(family="gpt2", activation="gelu", qkv_bias=bias, out_bias=bias, mlp_bias=bias, norm_bias=bias,
                        **common))
    model = build(cfg)
    model.to_empty(device=device)
    model.init(0)
    model.use(paths.rule(device, parallel.DTYPES[precision], shape.length, causal=not shape.encoder))
    return alone(model.train(), recompute=recompute, compile=compile, micro=micro)


def feed_of(shape: Size, data: str | None) -> tuple[Any, Iterator[tuple[dict[str, Tensor], Any]]]:
    """Return the objective and its endless batches."""
    objective = MaskedLM() if shape.encoder else CausalLM()
    folder = prepared(folder_of(shape, data), shape.length - 2 if shape.encoder else 100_000)
    rows = stream(Shards(folder), objective, length=shape.length, overlong="split", pack=False, seed=0)
    steps = Steps(rows, objective, vocabulary(shape.vocabulary), per_step=shape.rows, length=shape.length, seed=0,
                  position=rows.begin())
    return objective, batches(steps, workers=0)


def danlu_steps(size: str, precision: str, *, data: str | None = None, compile: bool = False, micro: int = 1,
                recompute: str = "none", bias: bool = False) -> Contender:
    """Return the loop as `danlu train` runs it, without its files and its live line."""
    shape = SIZES[size]
    model = model_of(shape, precision, compile=compile, recompute=recompute, bias=bias, micro=micro)
    objective, feed = feed_of(shape, data)
    engine = Engine(model, objective, precision=precision, clip=1.0, seed=0)
    optimizer = AdamW(lr=1e-3).build((leaf.name, leaf.local) for leaf in engine.leaves)
    guard, number = Guard(max_skips=3, spike=6.0), 0

    def step() -> None:
        nonlocal number
        batch, _position = next(feed)
        losses = engine.forward_backward(batch, step=number)
        loss = float((losses * engine.scales).sum())
        engine.update(optimizer, 1e-3, allow=lambda norm: guard.allow(loss, norm, step=number))
        number += 1

    return Contender(step)


def biased_steps(size: str, precision: str, **more: Any) -> Contender:
    """Return the same with the biases that the Trainer's GPT-2 has."""
    return danlu_steps(size, precision, bias=True, **more)


def thrifty_steps(size: str, precision: str, **more: Any) -> Contender:
    """Return the same a row at a time: the same gradient in less memory."""
    return danlu_steps(size, precision, micro=SIZES[size].rows, **more)


def compiled_steps(size: str, precision: str, **more: Any) -> Contender:
    """Return the same with compiled blocks."""
    return danlu_steps(size, precision, compile=True, **more)


def bare_steps(size: str, precision: str, *, data: str | None = None) -> Contender:
    """Return the shortest loop around the same model: one batch, mean loss, backward, clip, step."""
    shape = SIZES[size]
    model = model_of(shape, precision, compile=False).whole
    objective, feed = feed_of(shape, data)
    optimizer = AdamW(lr=1e-3).build(model.named_parameters())
    parameters = list(model.parameters())
    batch, _position = next(feed)
    count = batch["weights"].sum()

    def step() -> None:
        with parallel.autocast(precision, torch.device("cpu")):
            out = model(**batch)
        (objective.loss(out, batch).sum() / count).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step)
