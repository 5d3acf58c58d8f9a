"""Distillation of what is inside models, against `transformers`' own states and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import several
import torch
import torch.nn.functional as F
import transformers
from cli import danlu
from torch import Tensor

from danlu import config
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.models.encoder import Encoder
from danlu.objectives.inside import uniform
from danlu.parallel import World
from danlu.train import checkpoint
from danlu.train.feed import Steps
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.setup import Work, assemble, make_model, open_data, settle

BIG = {"width": 48, "layers": 4, "heads": 4, "context": 64}
SMALL = {"width": 32, "layers": 2, "heads": 2, "context": 64}
STILL = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a teacher and a student of each make, and rows."""
    folder = tmp_path_factory.mktemp("inside")
    several.labelled(folder / "mood.jsonl", 60)
    several.texts(folder / "words.jsonl")
    from danlu.data.tokenizer import Tokenizer
    for kind, made in (("encoder", "wordpiece"), ("decoder", "bpe")):
        tok = several.tokenizer(folder / f"{kind}-tok", made)
        size = Tokenizer.load(tok).special.size
        for name, shape, seed in (("teacher", BIG, 1), ("student", SMALL, 2), ("equal", SMALL, 3)):
            cfg: Any = (Encoder.model_validate({**shape, **STILL, "vocab": size, "outputs": ("mlm",),
                                               "init_std": 0.2}) if kind == "encoder" else
                        Decoder.model_validate({**shape, "family": "llama", "vocab": size, "init_std": 0.2, "kv_heads": 2}))
            weights.save(folder / f"{kind}-{name}", build(cfg, "cpu").init(seed), tokenizer=tok)
    return folder


def learning(world: Path, out: Path, kind: str = "encoder", **changes: Any) -> Run:
    base: dict[str, Any] = {"start": str(world / f"{kind}-student"), "frozen": {"teacher": str(world / f"{kind}-teacher")},
                            "tokenizer": str(world / f"{kind}-tok"), "pack": False}
    if kind == "encoder":
        base |= {"objective": "classify", "data": [{"path": str(world / "mood.jsonl")}]}
    else:
        base |= {"objective": "causal_lm", "length": 48, "data": [{"path": str(world / "words.jsonl")}]}
    return several.recipe(out, **base | changes)


def made(run: Run) -> tuple[Work, dict[str, Tensor]]:
    data = open_data(run)
    run, choice = settle(run, data, World(run.layout), None)
    work = assemble(run, data, make_model(run, choice, World(run.layout)))
    steps = Steps(work.rows, work.engine.objective, data.tokenizer.special, per_step=run.step_rows, length=run.length, seed=0,
                  position=work.rows.begin(), tight=run.tight)
    return work, next(iter(steps))[0]


def real(batch: dict[str, Tensor]) -> Tensor:
    """Which tokens are no padding."""
    return batch["segments"] > 0 if "segments" in batch else torch.ones_like(batch["ids"], dtype=torch.bool)


class Theirs:
    """A folder as `transformers` opens it: states of blocks, and what the last block's projections made, [B, T, …]."""

    def __init__(self, folder: Path, batch: dict[str, Tensor]) -> None:
        model = transformers.AutoModel.from_pretrained(folder).eval()
        blocks = model.encoder.layer if hasattr(model, "encoder") else model.layers
        last = blocks[-1].attention.self if hasattr(model, "encoder") else blocks[-1].self_attn
        self.parts: list[Tensor] = []
        for name in ("query", "key", "value") if hasattr(model, "encoder") else ("q_proj", "k_proj", "v_proj"):
            getattr(last, name).register_forward_hook(lambda _m, _x, out: self.parts.append(out))
        self.states: list[Tensor] = []
        for block in blocks:
            block.register_forward_hook(lambda _m, _x, out: self.states.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            model(input_ids=batch["ids"], attention_mask=real(batch).long())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("like", ["mse", "cosine"])
@pytest.mark.parametrize("teacher", ["teacher", "equal"])
def test_states_are_compared_as_the_formula_says(world: Path, tmp_path: Path, kind: str, like: str, teacher: str) -> None:
    folder = world / f"{kind}-{teacher}"
    work, batch = made(learning(world, tmp_path / "run", kind, frozen={"teacher": str(folder)},
                                distil={"hidden": 0.7, "like": like}))
    losses = work.engine.forward_backward(batch, step=0)
    student, by = Theirs(world / f"{kind}-student", batch), Theirs(folder, batch)
    assert (work.engine.probes is None) == (teacher == "equal")
    matrix = torch.eye(32) if work.engine.probes is None else work.engine.probes.matrices[0].detach()
    chosen = [by.states[1], by.states[3]] if teacher == "teacher" else by.states
    wanted = 0.0
    for mine, theirs in zip(student.states, chosen, strict=True):
        said, there = (mine @ matrix.mT)[real(batch)], theirs[real(batch)]
        apart = (said - there).square().mean(-1) if like == "mse" else 1 - F.cosine_similarity(said, there, dim=-1)
        wanted += float(apart.mean()) / 2
    assert work.engine.objective.terms[-1] == "distil/hidden" and work.engine.objective.scales[-1] == 0.7
    assert float(losses[-1]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("heads", [None, 8])
def test_relations_are_compared_as_the_formula_says(world: Path, tmp_path: Path, kind: str, heads: int | None) -> None:
    run = learning(world, tmp_path / "run", kind, distil={"relations": 1.0, "relation_heads": heads})
    work, batch = made(run)
    losses = work.engine.forward_backward(batch, step=0)
    student, by = Theirs(world / f"{kind}-student", batch), Theirs(world / f"{kind}-teacher", batch)
    number, total, tokens = heads or 2, 0.0, 0
    for row in range(len(batch["ids"])):
        size = int(real(batch)[row].sum())
        tokens += size
        for mine, theirs in zip(student.parts, by.parts, strict=True):
            for a, b in zip(mine[row, :size].chunk(number, -1), theirs[row, :size].chunk(number, -1), strict=True):
                for t in range(size):
                    seen = t + 1 if kind == "decoder" else size
                    p = torch.softmax(b[:seen] @ b[t] / b.shape[1] ** 0.5, 0)
                    q = torch.softmax(a[:seen] @ a[t] / a.shape[1] ** 0.5, 0)
                    total += float((p * (p / q).log()).sum()) / number / 3
    assert work.engine.objective.terms[-1] == "distil/relations"
    assert float(losses[-1]) == pytest.approx(total / tokens, rel=1e-3)


def test_blocks_are_evenly_spread() -> None:
    assert uniform(4, 12) == (2, 5, 8, 11) and uniform(2, 2) == (0, 1) and uniform(3, 4)[-1] == 3
    assert uniform(6, 2) == (0, 0, 0, 1, 1, 1) or len(uniform(6, 2)) == 6


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_student_comes_nearer_and_goes_on_to_the_bit(world: Path, tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"steps": 10, "distil": {"weight": 0.5, "hidden": 1.0, "relations": 1.0}}
    whole = train(learning(world, tmp_path / "whole", kind, **changes))
    told = [line for line in several.lines(tmp_path / "whole") if "train/distil/hidden_loss" in line]
    for term in ("hidden", "relations"):
        assert told[-1][f"train/distil/{term}_loss"] < told[0][f"train/distil/{term}_loss"]
    again = learning(world, tmp_path / "cut", kind, **changes | {"every": {"log": 1, "evaluate": 0, "save": 4, "keep": 9}})
    train(again)
    for path in checkpoint.listing(tmp_path / "cut"):
        if path.name not in ("checkpoint-0", "checkpoint-4"):
            path.rename(path.with_name(f"gone-{path.name}"))
    last = train(again)
    a, b = weights.load(whole).state_dict(), weights.load(last).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    opened = transformers.AutoModel.from_pretrained(last)
    assert not any("distil" in name for name, _p in opened.named_parameters()), "the matrices are no part of the model"


def test_teachers_of_unlike_width_have_a_matrix_each(world: Path, tmp_path: Path) -> None:
    two = {"first": str(world / "encoder-teacher"), "second": str(world / "encoder-equal")}
    work, batch = made(learning(world, tmp_path / "run", frozen=two, distil={"hidden": 1.0}))
    assert work.engine.probes is not None and list(work.engine.probes.matrices) == [0]
    both = float(work.engine.forward_backward(batch, step=0)[-1])
    each = []
    for folder in two.values():
        work, batch = made(learning(world, tmp_path / "run", frozen={"one": folder}, distil={"hidden": 1.0}))
        each.append(float(work.engine.forward_backward(batch, step=0)[-1]))
    assert both == pytest.approx(sum(each) / 2, rel=1e-5)


def test_recomputing_blocks_changes_nothing(world: Path, tmp_path: Path) -> None:
    gradients = []
    for recompute in ("none", "full"):
        work, batch = made(learning(world, tmp_path / "run", recompute=recompute, distil={"hidden": 1.0, "relations": 1.0}))
        work.engine.forward_backward(batch, step=0)
        gradients.append({leaf.name: leaf.local.grad for leaf in work.engine.leaves})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        made(learning(world, tmp_path / "a", distil={"relations": 1.0, "relation_heads": 5}))
    for layout, inside, said in (({"pp": 2, "micro": 2}, "hidden", "inside all blocks"), ({"cp": 2}, "relations", "cuts")):
        with pytest.raises(ConfigError, match=said):
            learning(world, tmp_path / "b", layout=layout, distil={inside: 1.0})
    with pytest.raises(ConfigError, match="compile lets nobody look"):
        learning(world, tmp_path / "c", compile=True, distil={"relations": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_layout_changes_nothing(world: Path, tmp_path: Path, kind: str) -> None:
    layouts = {"one": (), "ddp": ("layout.dp=2", "layout.micro=2"), "fsdp": ("layout.dp=2", "layout.shard=full"),
               "tp": ("layout.tp=2",), "tp+sp": ("layout.tp=2", "layout.sequence=true"),
               "cp": ("layout.cp=2", "distil.relations=0")}
    told = {}
    for name, layout in layouts.items():
        run = learning(world, tmp_path / name, kind, steps=4, every={"log": 1, "evaluate": 0},
                       distil={"hidden": 1.0, "relations": 1.0})
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(config.to_yaml(run), encoding="utf-8")
        assert danlu("train", recipe, *layout).code == 0
        told[name] = [line for line in several.lines(tmp_path / name) if "train/loss" in line]
    for name in list(layouts)[1:]:
        for mine, theirs in zip(told["one"], told[name], strict=True):
            for term in ("hidden", "relations") if name != "cp" else ():
                key = f"train/distil/{term}_loss"
                assert theirs[key] == pytest.approx(mine[key], rel=1e-3)
    first = [told[name][0]["train/distil/hidden_loss"] for name in layouts]
    assert first == pytest.approx([first[0]] * len(first), rel=1e-4)
