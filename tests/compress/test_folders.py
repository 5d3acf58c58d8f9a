"""Folders of smaller models: as large as is said, opened again to the bit, used by every verb, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compress.small import SHAPES, ids, model, said
from evaluate.small import decoder, encoder, table, texts, trained

from danlu import cli, files
from danlu.adapt.targets import linears
from danlu.compress import folder
from danlu.compress.factorize import Factorize, factorize
from danlu.compress.prune import Prune, prune
from danlu.compress.quantize import Quantize, quantize
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.evaluate.subject import open_subject
from danlu.export import artefacts
from danlu.export.artefacts import kind_of
from danlu.models import weights
from danlu.nn import packed

WAYS: dict[str, Any] = {
    "int8": Quantize(), "dynamic": Quantize(method="dynamic"), "gptq": Quantize(bits=4, method="gptq", group=32),
    "awq": Quantize(bits=4, method="awq", group=32), "nf4": Quantize(bits=4, method="nf4"), "keep": Quantize(embeddings="keep"),
    "magnitude": Prune(), "2:4": Prune(method="2:4"), "heads": Prune(method="heads"), "ffn": Prune(method="ffn"),
    "layers": Prune(method="layers"), "low": Factorize(rank=20)}


def smaller(made: Any, way: str) -> Any:
    how, given = WAYS[way], ids()
    if isinstance(how, Prune):
        return prune(made, how, given)
    (quantize if isinstance(how, Quantize) else factorize)(made, how, given)     # type: ignore[operator]
    return made


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_opened_says_the_same_to_the_bit(tmp_path: Path, family: str, way: str) -> None:
    made = smaller(model(family), way)
    folder.write(tmp_path / "small", made, receipt={}, sparse=way in ("magnitude", "2:4"))
    opened = weights.load(tmp_path / "small").eval()
    assert torch.equal(said(opened, ids(seed=1)), said(made, ids(seed=1)))
    again = tmp_path / "again"
    folder.write(again, opened, receipt={}, sparse=way in ("magnitude", "2:4"))
    name = next(p.name for p in again.glob("*.safetensors"))
    assert files.sha256(again / name) == files.sha256(tmp_path / "small" / name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["int8", "dynamic", "gptq", "nf4", "magnitude", "2:4", "heads", "ffn", "layers", "low"])
def test_a_folder_is_as_large_as_the_method_says(tmp_path: Path, way: str, dtype: str) -> None:
    """Counted by hand for a BERT of 4 layers, 256 wide: bytes of a weight, its scales, and all the rest as it is."""
    whole = model("bert", width=256, layers=4)
    matrices = {name: tuple(layer.weight.shape) for name, layer in linears(whole).items()}
    total, wide = sum(p.numel() for p in whole.parameters()), 4 if dtype == "fp32" else 2
    inside = sum(a * b for a, b in matrices.values())
    rows, vocab = sum(a for a, _b in matrices.values()), whole.embed.weight.shape
    rest = (total - inside - vocab[0] * vocab[1]) * wide
    eight = vocab[0] * vocab[1] + 4 * vocab[0]
    block = 4 * 256 * 257 + 256 * 1024 * 2 + 1024 + 256 + 4 * 256
    wanted = {"int8": inside + 4 * rows + eight + rest, "dynamic": inside + 4 * rows + eight + rest,
              "gptq": inside / 2 + inside / 32 * 4 + eight + rest, "nf4": inside / 2 + inside / 64 * 2 + eight + rest,
              "magnitude": (total - inside / 2) * wide + inside / 8, "2:4": (total - inside / 2) * wide + inside / 8,
              "heads": (total - 4 * (4 * 256 * 128 + 3 * 128)) * wide,
              "ffn": (total - 4 * (2 * 512 * 256 + 512)) * wide, "layers": (total - 2 * block) * wide,
              "low": (total - inside + 20 * sum(a + b for a, b in matrices.values())) * wide}[way]
    made = smaller(whole, way)
    told = folder.write(tmp_path / "small", made, receipt={}, dtype=dtype, sparse=way in ("magnitude", "2:4"))
    found = sum(p.stat().st_size for p in (tmp_path / "small").glob("*.safetensors"))
    assert found == told == folder.size(tmp_path / "small") and found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("way", ["magnitude", "2:4", "ffn", "layers", "heads"])
def test_transformers_opens_what_is_pruned(tmp_path: Path, family: str, way: str) -> None:
    made = smaller(model(family), way)
    folder.write(tmp_path / "small", made, receipt={})
    if way == "heads" and family in ("gpt2", "bert"):    # whose config has no word for fewer heads
        assert (tmp_path / "small" / weights.PACKED).is_file()
        return
    cls = transformers.AutoModelForSequenceClassification if family == "bert" else transformers.AutoModelForCausalLM
    theirs = cls.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        found = torch.cat([theirs(input_ids=row["ids"]).logits.flatten(0, -2) for row in ids()])
    torch.testing.assert_close(found, said(made, ids()), atol=2e-5, rtol=1e-5)


def test_transformers_does_not_open_what_is_packed_as_something_else(tmp_path: Path) -> None:
    folder.write(tmp_path / "small", smaller(model("llama"), "int8"), receipt={})
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_fewer_heads_then_fewer_bits(tmp_path: Path) -> None:
    made = prune(model("bert"), Prune(method="heads"), ids())
    folder.write(tmp_path / "heads", made, receipt={})
    made = weights.load(tmp_path / "heads").eval()
    quantize(made, Quantize(), ids())
    folder.write(tmp_path / "both", made, receipt={})
    assert torch.equal(said(weights.load(tmp_path / "both").eval(), ids()), said(made, ids()))
    made = prune(weights.load(tmp_path / "heads").eval(), Prune(method="layers"), ids())
    folder.write(tmp_path / "layers", made, receipt={})
    assert torch.equal(said(weights.load(tmp_path / "layers").eval(), ids()), said(made, ids()))


def test_packed_weights_are_not_taken_for_whole_ones(tmp_path: Path) -> None:
    folder.write(tmp_path / "small", smaller(model("llama"), "int8"), receipt={})
    with pytest.raises(IncompatibleError, match="packed, in fewer bits"):
        weights.read_tensors(tmp_path / "small")
    with pytest.raises(ConfigError, match="exists already"):
        folder.write(tmp_path / "small", model("llama"), receipt={})


@pytest.mark.parametrize("spoil", ["cut", "config", "form", "layer"])
def test_a_spoilt_folder_is_refused(tmp_path: Path, spoil: str) -> None:
    at = tmp_path / "small"
    folder.write(at, smaller(model("llama"), "gptq"), receipt={})
    told = json.loads((at / "config.json").read_text())
    groups = told["quantization_config"]["forms"]
    if spoil == "cut":
        (at / weights.PACKED).write_bytes((at / weights.PACKED).read_bytes()[:-100])
    elif spoil == "config":
        groups[0]["form"]["group"] = 16
    elif spoil == "form":
        groups[0]["form"]["kind"] = "int5"
    else:
        groups[0]["layers"][0] = "blocks.9.attention.q"
    (at / "config.json").write_text(json.dumps(told))
    with pytest.raises((DataError, IncompatibleError)):
        weights.load(at)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier, a decoder, and rows for both."""
    at = tmp_path_factory.mktemp("compress")
    trained(at, encoder(at), [{"path": str(table(at / "train.csv", ["text", "label"], texts(120, 1)))}], steps=20)
    table(at / "test.csv", ["text", "label"], texts(40, 2))
    decoder(at / "lm", [text for text, _label in texts(100, 3)])
    (at / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text, _label in texts(40, 4)))
    return at


CALLS = [("quantize",), ("quantize", "--method", "dynamic"), ("quantize", "--bits", "4", "--method", "gptq"),
         ("quantize", "--bits", "4", "--method", "awq", "--group", "32"), ("quantize", "--method", "nf4"),
         ("prune", "--method", "wanda", "--packed"), ("prune", "--method", "heads"), ("prune", "--method", "layers"),
         ("factorize", "--rank", "4")]


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_every_verb_works_on_every_kind(run: Path, tmp_path: Path, words: tuple[str, ...],
                                        capsys: pytest.CaptureFixture[str]) -> None:
    verb, *rest = words
    for start, data in ((run / "run", run / "test.csv"), (run / "lm/model", run / "lines.jsonl")):
        out = tmp_path / start.name
        assert cli.main([verb, str(start), *rest, "--data", str(data), "--out", str(out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["after"]["bytes"] == folder.size(out) < told["before"]["bytes"]
        assert told["distance"]["kl"] is not None and told["distance"]["compared"] > 0
        record = json.loads((out / "run.json").read_text())
        base = Path(record["source"]["folder"])
        assert record["kind"] == verb and record["source"]["sha256"] == {
            "model.safetensors": files.sha256(base / "model.safetensors")}
        assert record["files"]["config.json"]["sha256"] == files.sha256(out / "config.json")
        assert cli.main(["eval", str(out), "--data", str(data), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["results"]
    assert cli.main(["eval", str(tmp_path / "run"), "--json"]) == 0          # on what the run held out
    assert cli.main(["predict", str(tmp_path / "run"), "--text", "the film was fine"]) == 0
    assert cli.main(["generate", str(tmp_path / "model"), "--prompt", "the", "--max-new-tokens", "4", "--temperature", "0"]) == 0


def test_a_run_is_compared_on_its_own_rows_and_damage_is_seen(run: Path, tmp_path: Path) -> None:
    assert cli.main(["quantize", str(run / "run"), "--bits", "4", "--method", "gptq", "--out", str(tmp_path / "a")]) == 0
    assert str(run) in json.loads((tmp_path / "a/run.json").read_text())["rows"]
    opened = open_subject(tmp_path / "a")
    assert opened.run is not None and kind_of(opened) == "quantized" and kind_of(open_subject(run / "run")) == "danlu"
    assert cli.main(["export", str(tmp_path / "a"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    file = tmp_path / "a" / weights.PACKED
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(IncompatibleError, match="damaged"):
        open_subject(tmp_path / "a")


def test_what_cannot_be_made_leaves_nothing_behind(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = str(run / "lm/model")
    assert cli.main(["quantize", lm, "--method", "gptq", "--out", str(tmp_path / "a")]) == 2
    assert "there are no rows" in capsys.readouterr().err
    assert cli.main(["factorize", lm, "--error", "0.0001", "--data", str(run / "lines.jsonl"), "--out", str(tmp_path / "a")]) == 2
    assert cli.main(["quantize", lm, "--bits", "4", "--method", "dynamic", "--out", str(tmp_path / "a")]) == 2
    assert cli.main(["quantize", lm, "--out", str(tmp_path / "b")]) == 0
    assert cli.main(["quantize", str(tmp_path / "b"), "--out", str(tmp_path / "a")]) == 2
    assert not list(tmp_path.glob("*a*"))


def test_training_goes_on_from_what_is_pruned_and_not_from_what_is_packed(run: Path, tmp_path: Path) -> None:
    start = tmp_path / "ffn"
    assert cli.main(["prune", str(run / "run"), "--method", "ffn", "--out", str(start)]) == 0
    shutil.copytree(run / "run", tmp_path / "kept")
    data = [{"path": str(run / "train.csv")}]
    recipe = json.loads((run / "recipe.json").read_text()) | {"start": str(start), "data": data, "steps": 4}
    recipe |= {"out": str(tmp_path / "on")}
    (tmp_path / "on.json").write_text(json.dumps(recipe))
    assert cli.main(["train", str(tmp_path / "on.json")]) == 0
    assert open_subject(tmp_path / "on").cfg.hidden == 64        # type: ignore[union-attr]
    assert cli.main(["quantize", str(run / "run"), "--out", str(tmp_path / "int8")]) == 0
    recipe |= {"out": str(tmp_path / "no"), "start": str(tmp_path / "int8")}
    (tmp_path / "no.json").write_text(json.dumps(recipe))
    assert cli.main(["train", str(tmp_path / "no.json")]) == 4


@pytest.mark.parametrize("way", ["int8", "dynamic", "gptq", "awq", "low", "magnitude"])
def test_a_model_of_transformers_is_made_smaller_too(tmp_path: Path, way: str) -> None:
    config = transformers.DistilBertConfig(vocab_size=200, dim=64, n_layers=2, n_heads=4, hidden_dim=128,
                                           max_position_embeddings=64, num_labels=3, initializer_range=0.15)
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "whole")
    whole, made = (weights.load(tmp_path / "whole").eval() for _copy in range(2))
    made = smaller(made, way)
    folder.write(tmp_path / "small", made, receipt={}, sparse=way == "magnitude")
    opened = weights.load(tmp_path / "small").eval()
    assert torch.equal(said(opened, ids()), said(made, ids()))
    assert folder.size(tmp_path / "small") < folder.size(tmp_path / "whole")
    if way in ("int8", "dynamic"):
        before = said(whole, ids())
        torch.testing.assert_close(said(made, ids()), before, atol=0.05 * float(before.abs().max()), rtol=0)


CHAINS = [("heads", "int8"), ("heads", "gptq"), ("heads", "awq"), ("ffn", "int8"), ("layers", "nf4"), ("magnitude", "int8"),
          ("2:4", "gptq"), ("heads", "low"), ("low", "int8"), ("low", "four"), ("low", "nf4")]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize(("first", "then"), CHAINS)
def test_one_way_follows_another(tmp_path: Path, family: str, first: str, then: str) -> None:
    """The second step changes what the first one wrote, and says what the same steps say where nothing is written between."""
    WAYS["four"] = Quantize(bits=4, group=32)
    folder.write(tmp_path / "first", smaller(model(family), first), receipt={}, sparse=first in ("magnitude", "2:4"))
    both = smaller(weights.load(tmp_path / "first").eval(), then)
    folder.write(tmp_path / "both", both, receipt={})
    wanted = said(smaller(smaller(model(family), first), then), ids(seed=1))
    assert torch.equal(said(weights.load(tmp_path / "both").eval(), ids(seed=1)), wanted)
    # torch adds in another order where a tensor begins elsewhere in memory
    assert folder.size(tmp_path / "both") < folder.size(tmp_path / "first") or first in ("magnitude", "2:4")


def test_thin_matrices_are_rounded_each_by_itself() -> None:
    made = smaller(model("bert"), "low")
    thin = {name: packed.thin(layer) for name, layer in made.named_modules() if isinstance(layer, packed.LowLinear)}
    quantize(made, Quantize())
    for name, (up, down) in thin.items():
        layer = made.get_submodule(name)
        for whole, found in zip((up, down), packed.thin(layer), strict=True):
            scales = whole.detach().abs().amax(1) / 127
            wanted = torch.fake_quantize_per_channel_affine(whole.detach(), scales, torch.zeros(len(scales)).int(), 0, -127, 127)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match="thin ones"):
        quantize(smaller(model("bert"), "low"), Quantize(method="gptq"), ids())
    with pytest.raises(ConfigError, match="packed already"):
        quantize(made, Quantize())


def test_verbs_follow_one_another(run: Path, tmp_path: Path) -> None:
    for verb, options, out in (("factorize", ["--rank", "4"], "thin"), ("prune", ["--method", "heads"], "cut")):
        assert cli.main([verb, str(run / "run"), "--out", str(tmp_path / out), *options]) == 0
        assert cli.main(["quantize", str(tmp_path / out), "--out", str(tmp_path / f"{out}-8")]) == 0
        assert folder.size(tmp_path / f"{out}-8") < folder.size(tmp_path / out)


@pytest.mark.parametrize(("method", "bits"), [("rtn", 4), ("rtn", 8), ("nf4", 4)])
def test_what_may_differ_goes_by_the_bits_of_the_folder(tmp_path: Path, method: str, bits: int) -> None:
    start = encoder(tmp_path)
    words = ["quantize", str(start), "--method", method, "--out", str(tmp_path / "few")]
    assert cli.main([*words, "--bits", str(bits)]) == 0
    assert artefacts.bits_of(tmp_path / "few") == bits
