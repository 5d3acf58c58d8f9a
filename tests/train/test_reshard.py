"""A checkpoint saved under any layout is the same checkpoint: loaded under any other, and opened by anybody."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reshard import FIRST, FOUR, LAST, MODELS, STEP
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from danlu.errors import DataError, IncompatibleError
from danlu.models import weights
from danlu.models.build import build
from danlu.optim import AdamW
from danlu.train import checkpoint
from danlu.train.shards import Parts

SAVED = [target for cases in (FIRST, FOUR, LAST) for _source, _layout, target in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process for each model, and what the processes of other layouts made of it."""
    folder = tmp_path_factory.mktemp("reshard")
    for kind, cfg in MODELS.items():
        torch.manual_seed(0)
        model = build(cfg, "cpu").init(0)
        ema = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
        optimizer = AdamW(lr=1e-2).build(model.named_parameters())
        for _step in range(STEP):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        snap = checkpoint.snapshot(STEP, cfg, model, optimizer, ema=ema, state={"best_global_step": STEP}, facts={},
                                   tokenizer=None)
        (folder / "one" / kind).mkdir(parents=True)
        checkpoint.save(folder / "one" / kind, snap)
        named = {"model": snap.model, "ema": ema}
        save_file({f"{group}/{n}": t.clone() for group, tensors in named.items() for n, t in tensors.items()}
                  | checkpoint.flatten(optimizer)[0], folder / f"{kind}.safetensors")
    program = Path(__file__).with_name("reshard.py")
    ended = subprocess.run([sys.executable, str(program), str(folder)], capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 0, ended.stderr[-8000:]
    return folder


def saved(folder: Path, label: str, kind: str) -> Path:
    return folder / label / kind / f"checkpoint-{STEP}"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("label", SAVED)
def test_one_process_reads_what_any_layout_has_saved(folder: Path, label: str, kind: str) -> None:
    path, cfg = saved(folder, label, kind), MODELS[kind]
    assert checkpoint.verify(path) == []
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["config.json", "ema", "generation_config.json", "manifest.json", "model.safetensors", "shards", "trainer_state.json"])
    for part in (".", "ema"):                            # to the byte what one process writes
        assert (path / part / "model.safetensors").read_bytes() == (
            saved(folder, "one", kind) / part / "model.safetensors").read_bytes()
    model = build(cfg, "cpu").init(1)
    optimizer = AdamW(lr=1e-2).build(model.named_parameters())
    ema = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    checkpoint.load(path, model, optimizer, ema=ema)
    expected = load_file(folder / f"{kind}.safetensors")
    found = {f"model/{n}": t for n, t in model.state_dict().items()} | {f"ema/{n}": t for n, t in ema.items()}
    found |= checkpoint.flatten(optimizer)[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("label", "kind"), [("four-fsdp-tp", "llama"), ("four-fsdp-pp", "gpt2")])
def test_transformers_opens_what_many_have_saved(folder: Path, label: str, kind: str) -> None:
    path, cfg = saved(folder, label, kind), MODELS[kind]
    theirs, said = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(said.values()), said
    ids = torch.randint(cfg.vocab or 0, (2, 8))
    torch.testing.assert_close(theirs.eval()(ids).logits, weights.load(path).eval()(ids)["logits"], atol=1e-5, rtol=0)
    assert checkpoint.chosen(path) == path / "ema"


def test_damage_in_the_shards_is_found(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(folder / "four-fsdp-tp" / "llama", out)
    (path,) = checkpoint.listing(out)
    shard = sorted((path / "shards").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert [shard.name in problem for problem in checkpoint.verify(path)] == [True]
    assert checkpoint.verify(path, hashes=False) == []
    shard.write_bytes(content[:-4])
    with pytest.raises(DataError, match=shard.name):
        Parts(path / "shards")
    shard.unlink()
    whole = Parts(path / "shards")
    cut = next(name for name, pieces in whole.pieces.items() if name.endswith("up.weight/exp_avg") and pieces)
    with pytest.raises(DataError, match=cut):
        whole.part(cut, (0, 0), tuple(build(MODELS["llama"]).state_dict()[cut.rpartition("/")[0]].shape))
    assert checkpoint.newest(out) is None and not path.exists()


def test_a_part_is_put_together_from_what_it_overlaps(tmp_path: Path) -> None:
    whole = torch.arange(35.0).reshape(5, 7)
    save_file({"a": whole[:, :3].contiguous()}, tmp_path / "1.safetensors",
              metadata={"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [0, 0]}}'})
    save_file({"a": whole[:, 3:].contiguous(), "empty": torch.zeros(0, 2)}, tmp_path / "2.safetensors",
              metadata={"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [0, 3]}, "empty": {"saved_offsets": [4, 0]}}'})
    parts = Parts(tmp_path)
    assert torch.equal(parts["a"], whole) and parts.like["empty"].shape == (4, 2)
    for offset, shape in (((1, 2), (3, 4)), ((0, 3), (5, 4)), ((4, 6), (1, 1)), ((2, 2), (0, 3))):
        expected = whole[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
        assert torch.equal(parts.part("a", offset, shape), expected)
    with pytest.raises(DataError, match="empty"):
        parts["empty"]


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    cfg, path = MODELS["llama"], saved(folder, "two-pp", "llama")
    state = dict(build(cfg, "cpu").state_dict())
    some: dict[str, Tensor] = {"norm.weight": torch.zeros(16)}
    weights.fill(some, cfg, path)                        # a stage holds only some of the names
    assert torch.equal(some["norm.weight"], load_file(folder / "llama.safetensors")["model/norm.weight"])
    with pytest.raises(IncompatibleError, match=r"norm\.weight"):
        weights.fill(state | {"norm.weight": torch.zeros(1)}, cfg, path)
    with pytest.raises(IncompatibleError, match=r"norm\.scale"):
        weights.fill({"norm.scale": torch.zeros(16)}, cfg, path)
    with pytest.raises(IncompatibleError, match="layers"):
        weights.fill(some, cfg.model_copy(update={"layers": 1}), path)
