"""Every layout against one process: the same rows, losses and gradients per parameter, in float64.

Run by the tests as each of N processes; prints one JSON line for each case.  `python matrix.py CASE …` takes some of them,
and the word `adapters` the adapters in place of the plain models, the word `heads` the heads of tasks.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from danlu import parallel
from danlu.adapt import IA3, QAT, Adapter, BitFit, Bottleneck, Freeze, LoRA, Prefix, Prompt, PTuning
from danlu.layout import Layout, Local
from danlu.models.build import Config, build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.nn import placed
from danlu.nn.tasks import Head
from danlu.objectives import Answer, Choose, Classify, Embed, Regress, Tag
from danlu.objectives.lm import CausalLM, MaskedLM
from danlu.objectives.mixture import Mixture, Part
from danlu.objectives.pairs import NextSentence
from danlu.objectives.protocol import UNLEARNED, Objective
from danlu.objectives.tasks import Task, Tasks
from danlu.optim import AdamW
from danlu.parallel.place import Placed, alone, place
from danlu.parallel.world import World, meshed
from danlu.train.outer import Outer
from danlu.train.penalty import Pull, fisher
from danlu.train.sparsify import Magnitude, Sparsify, TwoFour
from danlu.train.step import Engine
from danlu.train.zeros import Zeros

sys.path.insert(0, str(Path(__file__).parent.parent))
from objectives.small import rng, vocab

ROWS, LENGTH, VOCAB, STEPS = 16, 16, 64, 4
CPU = torch.device("cpu")

def case(**fields: Any) -> dict[str, Any]:
    return fields


FOUR = {
    "ddp": case(dp=4), "ddp, micro": case(dp=4, micro=2), "fsdp": case(dp=4, shard="full", micro=2),
    "fsdp grads": case(dp=4, shard="grads", micro=2), "hsdp": case(dp=4, shard="hybrid", group=2), "tp": case(tp=4, micro=2),
    "tp+sp": case(tp=4, sequence=True), "cp": case(cp=4, micro=2), "cp fsdp": case(cp=2, dp=2, shard="full"),
    "cp ddp": case(cp=2, dp=2), "pp 1f1b": case(pp=4, micro=4),
    "pp interleaved": case(pp=2, dp=2, micro=4, pipeline="interleaved"),
    "pp zero bubble": case(pp=2, dp=2, micro=4, pipeline="zero_bubble"), "pp uneven": case(pp=2, tp=2, micro=2, stages=(3, 1)),
    "dp×tp": case(dp=2, tp=2), "fsdp×tp": case(dp=2, tp=2, shard="full", micro=2),
    "fsdp×tp+sp": case(dp=2, tp=2, shard="full", sequence=True), "dp×pp": case(dp=2, pp=2, micro=4),
    "fsdp×pp": case(dp=2, pp=2, micro=2, shard="full"), "tp×pp": case(tp=2, pp=2, micro=4),
    "tp+sp×pp": case(tp=2, pp=2, micro=2, sequence=True), "cp×pp": case(cp=2, pp=2, micro=2), "cp×tp": case(cp=2, tp=2),
    "fsdp×tp, recomputed": case(dp=2, tp=2, shard="full", micro=2, recompute="full"),
    "pp, recomputed": case(pp=2, dp=2, micro=2, recompute=2),
}
EIGHT = {
    "dp×tp×pp": case(dp=2, tp=2, pp=2, micro=2), "cp×tp×pp": case(cp=2, tp=2, pp=2, micro=4),
    "fsdp×tp+sp×pp": case(dp=2, tp=2, pp=2, micro=2, shard="full", sequence=True),
    "hsdp×cp": case(dp=4, cp=2, shard="hybrid", group=4),
}

MODELS: dict[str, tuple[Config, Objective]] = {
    "causal LM": (Decoder(family="qwen3", width=32, layers=4, heads=4, kv_heads=4, hidden=64, vocab=VOCAB, context=LENGTH),
                  CausalLM(smoothing=0.1, z_loss=1e-3)),
    "causal LM, tied": (Decoder(family="gpt2", width=32, layers=4, heads=4, vocab=VOCAB, context=LENGTH), CausalLM()),
    "NSP": (Encoder(width=32, layers=4, heads=4, vocab=VOCAB, context=LENGTH, dropout=0.0, attention_dropout=0.0,
                    outputs=("nsp",)), NextSentence()),
    "MLM+NSP": (Encoder(width=32, layers=4, heads=4, vocab=VOCAB, context=LENGTH, dropout=0.0, attention_dropout=0.0,
                        outputs=("mlm", "nsp")),
                Mixture(parts=(Part(objective=MaskedLM()), Part(objective=NextSentence(), weight=0.5)))),
    "tasks, penalties": (
        Encoder(width=32, layers=4, heads=4, vocab=VOCAB, context=LENGTH, dropout=0.0, attention_dropout=0.0, outputs=("mlm",),
                tasks=(Head(name="mood", labels=("a", "b", "c")), Head(name="stars", problem="regression"))),
        Tasks(parts={"mood": Task(objective=Classify(labels=("a", "b", "c")), weight=2.0), "stars": Task(objective=Regress()),
                     "words": Task(objective=MaskedLM(), weight=0.5)})),
}


# Of these, weights become 0 on the way.
SPARSE: dict[str, Sparsify] = {"causal LM": Magnitude(begin=1, until=3, every=1),
                               "causal LM, tied": Magnitude(begin=1, until=3, every=1, over="model"),
                               "MLM+NSP": TwoFour(begin=1, until=3, every=1)}

# … and adapters: the base is frozen, and what is added is cut, or not, with its matrix.
ADAPTED: dict[str, tuple[str, Adapter]] = {
    "LoRA": ("causal LM", LoRA(rank=4)), "LoRA embed": ("causal LM, tied", LoRA(rank=4, target=("embed", "c_attn", "down"))),
    "DoRA": ("causal LM", LoRA(rank=4, dora=True)), "PiSSA": ("MLM+NSP", LoRA(rank=4, init="pissa")),
    "IA3": ("causal LM, tied", IA3()), "houlsby": ("causal LM", Bottleneck(style="houlsby", reduction=4)),
    "prefix": ("causal LM", Prefix(tokens=3)), "prompt": ("causal LM, tied", Prompt(tokens=4)),
    "ptuning": ("MLM+NSP", PTuning(tokens=4, hidden=8)), "bitfit": ("MLM+NSP", BitFit()), "freeze": ("causal LM", Freeze(last=1)),
    "QAT": ("causal LM", QAT(bits=4, group=24)), "QAT, tied": ("causal LM, tied", QAT(bits=8)),
}


def _encoder(objective: Objective) -> tuple[Config, Objective]:
    return Encoder.model_validate({
        "width": 32, "layers": 4, "heads": 4, "vocab": VOCAB, "context": LENGTH, "dropout": 0.0, "attention_dropout": 0.0,
        "outputs": (), "tasks": objective.tasks()}), objective


def _decoder(objective: Objective) -> tuple[Config, Objective]:
    return Decoder.model_validate({
        "family": "qwen2", "width": 32, "layers": 4, "heads": 4, "kv_heads": 4, "hidden": 64, "vocab": VOCAB, "context": LENGTH,
        "lm": False, "tasks": objective.tasks()}), objective


LABELS = ("a", "b", "c")
HEADS: dict[str, tuple[Config, Objective]] = {
    "classify": _encoder(Classify(labels=LABELS, class_weights={"a": 0.3}, smoothing=0.1)),
    # as many classes as a row has tokens: their columns are not of tokens all the same
    "several": _encoder(Classify(labels=tuple(str(n) for n in range(LENGTH)), several=True, focal=1.0)),
    "regress": _decoder(Regress()), "tag": _encoder(Tag(labels=LABELS, class_weights={"b": 2.0})), "answer": _encoder(Answer()),
    "choose": _encoder(Choose()), "embed": _encoder(Embed.model_validate({"loss": "cosine"})),
    "tag, decoder": _decoder(Tag(labels=LABELS)), "answer, decoder": _decoder(Answer()), "choose, decoder": _decoder(Choose()),
    "embed, decoder": _decoder(Embed.model_validate({"loss": "cosine"})),
}


def rows_of(step: int, objective: Objective) -> dict[str, Tensor]:
    """Return rows of two stretches of unequal length, labelled for each task."""
    draw, rows = np.random.default_rng(step), []
    for _row in range(ROWS):
        first, second = (int(n) for n in draw.integers(3, LENGTH // 2 + 1, 2))
        size = first + second
        row = {"ids": draw.integers(5, VOCAB, size), "weights": np.ones(size, np.float32),
               "segments": np.ones(size, np.int32), "key": np.zeros(4, np.int64)}
        if isinstance(objective, Classify | Regress):
            label: Any = draw.integers(0, 3) if not getattr(objective, "several", False) else draw.integers(0, 2, LENGTH)
            row |= {"label": np.float32(label) if isinstance(objective, Regress) else label, "parts": np.array([first, second])}
        elif isinstance(objective, Tag):
            row |= {"tags": np.where(draw.random(size) < 0.5, draw.integers(0, 3, size), UNLEARNED)}
        elif isinstance(objective, Answer):
            row |= {"answer": np.array([first, size - 1]), "parts": np.array([first, second])}
        elif isinstance(objective, Choose):
            row |= {"parts": np.array([1, first - 1, 2, second - 2]), "label": draw.integers(0, 2)}
        else:
            row |= {"parts": np.array([first, second]), "label": draw.random()}
        rows.append(row)
    return objective.collate(rows, vocab(VOCAB), rng(), LENGTH)


def batch_of(step: int, encoder: bool) -> dict[str, Tensor]:
    """Return rows of two documents and some padding, of which some tokens are learned."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=draw)
    border = torch.randint(4, 9, (ROWS, 1), generator=draw)
    place = torch.arange(LENGTH)[None].expand(ROWS, LENGTH)
    end = torch.randint(12, LENGTH + 1, (ROWS, 1), generator=draw)
    weights = (torch.rand(ROWS, LENGTH, generator=draw) < (0.3 if encoder else 0.8)) & (place < end)
    batch = {"ids": ids, "labels": torch.where(weights, torch.randint(0, VOCAB, (ROWS, LENGTH), generator=draw), UNLEARNED),
             "weights": weights.double().float()}
    if encoder:
        segments = (place < end).int()
        return batch | {"segments": segments, "positions": place.clone(), "types": (place >= border).long(),
                        "nsp": torch.randint(0, 2, (ROWS,), generator=draw), "nsp_weights": torch.ones(ROWS), **_tasks(draw)}
    segments = torch.where(place < border, 1, 2).int() * (place < end).int()
    return batch | {"segments": segments, "positions": torch.where(place < border, place, place - border)}


def _tasks(draw: torch.Generator) -> dict[str, Tensor]:
    """Return the columns of three tasks whose rows come at random, so that a micro-batch may lack one."""
    turn = torch.randint(0, 3, (ROWS,), generator=draw)
    mine = {name: (turn == number).float() for number, name in enumerate(("mood", "stars", "words"))}
    return {"mood/label": torch.randint(0, 3, (ROWS,), generator=draw), "mood/label_weights": mine["mood"].clone(),
            "stars/label": torch.randn(ROWS, generator=draw), "stars/label_weights": mine["stars"].clone(),
            **{f"{name}/rows": column for name, column in mine.items()}}


def penalised(model: Placed, objective: Objective) -> list[Pull]:
    """Return EWC's penalty by the Fisher information of two rows, which every process looks at."""
    engine = Engine(model, objective, precision="fp64", clip=None, seed=0)
    number = ROWS // engine.layout.dp
    rows = [{name: column[:number].clone() for name, column in batch_of(step, True).items()} for step in (8, 9)]
    for batch in rows:
        for name, column in batch.items():
            if name.endswith("weights"):
                column[1:] = 0
    found = {leaf.name: total for leaf, total in zip(engine.leaves, fisher(engine, rows), strict=True)}
    return [Pull(engine.leaves, lambda leaf: 1e4 * found[leaf.name])]


def steps(model: Placed, objective: Objective, encoder: bool, sparse: Sparsify | None = None,
          ) -> list[tuple[Tensor, float, dict[str, Tensor]]]:
    """Return (losses, the value of penalties and the share of zeros, norm, this process's gradients) of each step."""
    penalties = penalised(model, objective) if isinstance(objective, Tasks) else []
    engine = Engine(model, objective, precision="fp64", clip=0.5, seed=0, penalties=penalties)
    optimizer = AdamW(lr=1e-2).build((leaf.name, leaf.local) for leaf in engine.leaves)
    if sparse is not None:
        engine.zeros = Zeros(sparse, model.parts[0].cfg, engine.leaves, engine.world, total=STEPS)
    dp, index, made = engine.layout.dp, engine.world.index("dp"), []
    for step in range(STEPS):
        size = ROWS // dp
        whole = rows_of(step, objective) if objective.tasks() and not isinstance(objective, Tasks) else batch_of(step, encoder)
        batch = {name: column[index * size : (index + 1) * size] for name, column in whole.items()}
        losses = engine.forward_backward(batch, step=step)
        grads: dict[str, Tensor] = {}

        def look(norm: float, grads: dict[str, Tensor] = grads) -> bool:
            share = min(1.0, 0.5 / (norm + 1e-6))
            grads |= {leaf.name: leaf.local.grad / share for leaf in engine.leaves}     # type: ignore[operator]
            return True

        norm = engine.update(optimizer, 1e-2, allow=look)
        share = 0.0 if engine.zeros is None else engine.zeros.share
        made.append((torch.cat((losses, torch.tensor([engine.penalty, share], dtype=torch.float64))), norm, grads))
    return made


def model_of(name: str) -> tuple[Config, Objective, Adapter | None]:
    """Return a case's model, objective and adapter.  A prompt leaves room for its tokens."""
    if name in MODELS | HEADS:
        return *(MODELS | HEADS)[name], None
    model, adapt = ADAPTED[name]
    return MODELS[model][0].model_copy(update={"context": 2 * LENGTH}), MODELS[model][1], adapt


def possible(layout: Layout) -> list[str]:
    """Return the adapters that can work under a layout."""
    return [name for name, (_model, adapt) in ADAPTED.items()
            if not adapt.check(layout, length=LENGTH, context=2 * LENGTH, pack=False)]


def filled(model: Placed, adapt: Adapter | None) -> Placed:
    """Fill in weights and adapter, and move what the adapter begins with: a factor of 0 would hide the other one."""
    model.init(7)
    for part in model.parts if adapt is not None else ():
        adapt.begin(part, 7)
        for name, p in part.named_parameters():
            if p.requires_grad:
                source = torch.Generator().manual_seed(len(name))
                shift = 0.1 * torch.randn(p.shape, generator=source, dtype=torch.float64)
                placed.local(p).add_(shift[placed.extent(p).slices])
    return model


@cache
def expected_of(name: str) -> list[tuple[Tensor, float, dict[str, Tensor]]]:
    """Return what one process gives."""
    cfg, objective, adapt = model_of(name)
    whole = build(cfg)
    if adapt is not None:
        adapt.apply(whole)
    whole.to(torch.float64).to_empty(device="cpu")
    return steps(filled(alone(whole.train()), adapt), objective, cfg.kind == "encoder", SPARSE.get(name))


def compare(name: str, world: World, recompute: str | int) -> dict[str, Any]:
    """Return the largest differences of a case from one process."""
    cfg, objective, adapt = model_of(name)
    encoder, expected = cfg.kind == "encoder", expected_of(name)
    layout = world.layout
    model = place(cfg, world, objective, precision="fp64", length=LENGTH, rows=ROWS // layout.dp // layout.micro,
                  recompute=recompute, adapt=adapt)
    extents = {leaf.name: placed.extent(leaf.param) for leaf in model.leaves()}
    found = steps(filled(model, adapt).train().begin(), objective, encoder, SPARSE.get(name))
    loss = max(float((a[0] - b[0]).abs().max()) for a, b in zip(found, expected, strict=True))
    norm = max(abs(a[1] - b[1]) / b[1] for a, b in zip(found, expected, strict=True))
    gradient, worst = 0.0, ""
    for mine, theirs in zip(found, expected, strict=True):
        for key, value in mine[2].items():
            other = theirs[2][key]
            # a gradient that is 0 but for rounding (of a key's bias: softmax does not see it) has no relative error
            scale = max(float(other.abs().max()), 1e-9 * theirs[1])
            difference = float((value - other[extents[key].slices]).abs().max()) / scale if value.numel() else 0.0
            if difference >= gradient:
                gradient, worst = difference, key
    told = torch.tensor([loss, norm, gradient], dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return {"loss": float(told[0]), "norm": float(told[1]), "gradient": float(told[2]), "worst": worst}


def local(steps_alone: int = 2) -> float:
    """Return how far replicas that step alone end from the same made in one process by the paper's formula."""
    cfg, objective = MODELS["causal LM"]
    outer = Local(steps=steps_alone, lr=0.7, momentum=0.9)
    dp = dist.get_world_size()

    def replica(index: int) -> tuple[Engine, torch.optim.Optimizer]:
        whole = build(cfg).to(torch.float64)
        whole.to_empty(device="cpu")
        whole.init(7)
        engine = Engine(alone(whole.train()), objective, precision="fp64", clip=0.5, seed=0)
        return engine, AdamW(lr=1e-2).build((leaf.name, leaf.local) for leaf in engine.leaves)

    def part(step: int, index: int) -> dict[str, Tensor]:
        size = ROWS // dp
        return {name: column[index * size : (index + 1) * size] for name, column in batch_of(step, False).items()}

    made = [replica(i) for i in range(dp)]
    begin = [leaf.local.detach().clone() for leaf in made[0][0].leaves]
    velocity = [torch.zeros_like(x) for x in begin]
    for step in range(STEPS):
        for index, (engine, optimizer) in enumerate(made):
            engine.forward_backward(part(step, index), step=step)
            engine.update(optimizer, 1e-2, allow=lambda norm: True)
        if (step + 1) % steps_alone == 0:
            for n in range(len(begin)):
                held = [engine.leaves[n].local for engine, _optimizer in made]
                move = torch.stack([begin[n] - x.detach() for x in held]).mean(0)
                velocity[n] = outer.momentum * velocity[n] + move
                begin[n] = begin[n] - outer.lr * (move + outer.momentum * velocity[n])
                states = [optimizer.state[x] for x, (_engine, optimizer) in zip(held, made, strict=True)]
                for slot in ("exp_avg", "exp_avg_sq"):
                    mean = torch.stack([state[slot] for state in states]).mean(0)
                    for state in states:
                        state[slot].copy_(mean)
                for x in held:
                    x.data.copy_(begin[n])
    world = meshed(Layout(dp=dp, local=outer), CPU)
    model = place(cfg, world, objective, precision="fp64", length=LENGTH, rows=ROWS // dp)
    engine = Engine(model.init(7).train().begin(), objective, precision="fp64", clip=0.5, seed=0)
    optimizer = AdamW(lr=1e-2).build((leaf.name, leaf.local) for leaf in engine.leaves)
    meeting = Outer(outer, engine.leaves, world)
    for step in range(STEPS):
        engine.forward_backward(part(step, dist.get_rank()), step=step)
        engine.update(optimizer, 1e-2, allow=lambda norm: True)
        if meeting.due(step + 1, STEPS, False):
            meeting.meet(optimizer)
    return max(float((leaf.local.detach() - x).abs().max()) for leaf, x in zip(engine.leaves, begin, strict=True))


def main() -> None:
    """Run the cases of this number of processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    kinds, asked = {"adapters", "heads"} & set(sys.argv[1:]), set(sys.argv[1:]) - {"adapters", "heads"}
    for case, fields in (FOUR if size == 4 else EIGHT).items():
        if asked and case not in asked:
            continue
        layout = Layout(**{name: value for name, value in fields.items() if name != "recompute"})
        world = meshed(layout, CPU)                      # once: each process group has threads of its own
        for model in possible(layout) if "adapters" in kinds else HEADS if kinds else MODELS:
            layout.check(ROWS, length=LENGTH, model=model_of(model)[0].model_dump())
            result = compare(model, world, fields.get("recompute", "none"))
            if rank == 0:
                print(json.dumps({"model": model, "case": case, **result}), flush=True)
    if size == 4 and not kinds and (not asked or "local" in asked):
        difference = local()
        if rank == 0:
            print(json.dumps({"model": "causal LM", "case": "local", "loss": difference, "norm": 0, "gradient": 0}), flush=True)
    parallel.leave()


if __name__ == "__main__":
    main()
