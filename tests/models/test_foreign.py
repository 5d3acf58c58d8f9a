"""Models of transformers that are no family of ours: the same loss as there, whole runs, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cli import danlu
from evaluate import small
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, AutoModelForQuestionAnswering
from transformers import AutoModelForCausalLM as CausalLM
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoModelForTokenClassification as Tagger

from danlu import config
from danlu.adapt import folder
from danlu.data.kinds import WordPiece
from danlu.data.shards import Shards
from danlu.data.tokenizer import train as learn
from danlu.errors import ConfigError, IncompatibleError, SecurityError
from danlu.generate import generate
from danlu.models import weights
from danlu.nn.tasks import Head
from danlu.objectives import Classify
from danlu.parallel import World
from danlu.train import checkpoint
from danlu.train.intake import taken_in
from danlu.train.recipe import Run
from danlu.train.run import train
from danlu.train.setup import open_data, settle

S: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "intermediate_size": 48, "max_position_embeddings": 64}
G = S | {"num_key_value_heads": 2, "head_dim": 8}
B = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}
D = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
O = S | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}

DECODERS: dict[str, dict[str, Any]] = {"gpt_neox": S, "opt": O, "bloom": B, "gemma": G, "gemma2": G, "falcon": S}
E = S | {"embedding_size": 16}
ENCODERS: dict[str, dict[str, Any]] = {"distilbert": D, "electra": E, "albert": E, "xlm-roberta": S | {"pad_token_id": 1}}
CLASSES = ("bad", "good", "mixed")


def made(kind: str, auto: Any = None, **more: Any) -> Any:
    """A tiny random model of transformers, in evaluation mode."""
    auto = auto or (CausalLM if kind in DECODERS else AutoModelForMaskedLM)
    torch.manual_seed(0)
    model = auto.from_config(CONFIG_MAPPING[kind](**(DECODERS | ENCODERS)[kind] | more)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if p.ndim == 1 and not name.endswith("bias") else 0.0, 0.2)
    return model


def rows(pad: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, segments, attention mask) of two rows, one of them padded."""
    segments = torch.ones(2, 20, dtype=torch.int32)
    segments[1, 15:] = 0
    ids = torch.randint(5, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(segments == 0, pad or 0), segments, (segments > 0).long()


@pytest.mark.parametrize("kind", DECODERS | ENCODERS)
def test_the_loss_is_that_of_transformers_and_the_folder_stays_the_same(kind: str, tmp_path: Path) -> None:
    theirs = made(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weights.load(tmp_path / "theirs").eval()
    cfg: Any = ours.cfg
    ids, segments, mask = rows(cfg.pad)
    labels = ids.masked_fill(mask == 0, -100)
    said = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    if cfg.causal:                                       # they shift, and here the batch is shifted already
        labels = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), 1)
    scores = ours(ids, segments=segments, labels=labels, weights=(labels != -100).float())["lm" if cfg.causal else "mlm"]
    torch.testing.assert_close(-scores.logp.mean(), said.loss, atol=1e-5, rtol=0)
    (-scores.logp.mean()).backward()
    said.loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name].grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert ours.matrix == (kind != "gemma2")                       # which bends its logits after the matrix
    logits = said.logits.detach()
    torch.testing.assert_close(ours(ids, segments=segments)["logits"][mask > 0], logits[mask > 0], atol=1e-5, rtol=0)

    weights.save(tmp_path / "ours", ours)
    back, told = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(back.eval()(input_ids=ids, attention_mask=mask).logits[mask > 0], logits[mask > 0])
    assert weights.read_config(tmp_path / "ours") == cfg
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == load_file(
        tmp_path / "theirs" / "model.safetensors").keys()


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "bloom", "gemma", *ENCODERS])
def test_the_loss_of_classes_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    theirs = made(kind, Classifier, **labels | ({"pad_token_id": 0} if kind in ("gpt_neox", "bloom") else {}))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weights.load(tmp_path / "theirs").eval()
    cfg: Any = ours.cfg
    assert cfg.tasks == (Head(labels=CLASSES),)
    ids, segments, mask = rows(cfg.pad)
    label = torch.tensor([2, 1])
    out = ours(ids, segments=segments, ends=mask.sum(1) - 1)
    loss = Classify(labels=CLASSES).loss(out, {"label": label, "label_weights": torch.ones(2)})[0] / 2
    torch.testing.assert_close(loss, theirs(input_ids=ids, attention_mask=mask, labels=label).loss, atol=1e-5, rtol=0)
    weights.save(tmp_path / "ours", ours)
    back, told = Classifier.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()) and back.config.id2label == dict(enumerate(CLASSES))
    torch.testing.assert_close(back.eval()(input_ids=ids, attention_mask=mask).logits, out["classify"])


@pytest.mark.parametrize("kind", ["distilbert", "bloom"])
def test_tags_and_answers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    for name, auto in (("tag", Tagger), ("answer", AutoModelForQuestionAnswering)):
        theirs = made(kind, auto)
        theirs.save_pretrained(tmp_path / name)
        ours = weights.load(tmp_path / name).eval()
        ids, segments, mask = rows(ours.cfg.pad)
        said = theirs(input_ids=ids, attention_mask=mask)
        wanted = said.logits if name == "tag" else torch.stack((said.start_logits, said.end_logits), -1)
        torch.testing.assert_close(ours(ids, segments=segments)[name][mask > 0], wanted[mask > 0])


def recipe(out: Path, start: Path, **changes: Any) -> Run:
    base: dict[str, Any] = {
        "out": str(out), "start": str(start), "optim": {"kind": "adamw", "lr": 1e-3}, "schedule": "constant", "steps": 3,
        "rows": 4, "length": 32, "pack": False, "overlong": "split", "precision": "fp32", "threads": 1, "device": "cpu",
        "every": {"log": 1, "evaluate": 2}}
    return config.validate(Run, base | changes)


def decoder(folder: Path, tokenizer: Path, kind: str = "opt", **more: Any) -> Path:
    made(kind, vocab_size=320, **more).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def opt(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("opt") / "model", corpus / "tokenizer", dropout=0.1)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_decoder_trains_goes_on_and_is_judged(corpus: Path, opt: Path, tmp_path: Path) -> None:
    about = {"data": [{"path": str(corpus)}], "objective": "causal_lm"}
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(recipe(tmp_path / "run", opt, **about), only_set=True))
    ended = danlu("train", tmp_path / "recipe.yaml")
    assert ended.code == 0, ended.err
    last = train(recipe(tmp_path / "run", opt, **about, steps=5))           # goes on from step 3 …
    whole = train(recipe(tmp_path / "whole", opt, **about, steps=5))        # … as if it had never stopped
    same = [load_file(one / "model.safetensors") for one in (last, whole)]
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items())
    back, told = CausalLM.from_pretrained(last, output_loading_info=True)
    assert not any(told.values())
    ids = Shards(corpus, "val").document(0).ids[:12].tolist()
    model: Any = checkpoint.load_model(tmp_path / "run")
    wanted = back.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(ids):]
    assert list(generate(model, ids, max_new_tokens=6, temperature=0)) == wanted.tolist()
    ended = danlu("eval", tmp_path / "run", "--json")
    figures = next(iter(json.loads(ended.out)["results"].values()))
    assert ended.code == 0 and 1 < figures["perplexity,none"] < 1000, (ended.err, figures)
    assert danlu("generate", tmp_path / "run", "--prompt", "the furnace", "--max-new-tokens", "3").code == 0


@pytest.mark.slow
def test_two_processes_learn_what_one_does(corpus: Path, tmp_path: Path) -> None:
    start = decoder(tmp_path / "model", corpus / "tokenizer", "gpt_neox")
    for name, layout in (("one", "layout.dp=1"), ("two", "layout.dp=2")):
        run = recipe(tmp_path / name, start, data=[{"path": str(corpus)}], objective="causal_lm")
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml(run, only_set=True))
        ended = danlu("train", tmp_path / f"{name}.yaml", layout)
        assert ended.code == 0, ended.err
    one, two = ([line["train/loss"] for line in lines(tmp_path / name) if "train/loss" in line] for name in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("target", ["all", "q_proj,fc1"])
def test_lora_learns_beside_it_and_peft_opens_it(target: str, corpus: Path, opt: Path, tmp_path: Path) -> None:
    run = recipe(tmp_path / "run", opt, data=[{"path": str(corpus)}], objective="causal_lm", optim={"kind": "adamw", "lr": 0.05},
                 adapt={"kind": "lora", "rank": 2, "target": target})
    last = train(run)
    assert not (last / "model.safetensors").exists()
    ours, ids = folder.load(last).eval(), torch.arange(5, 25)[None]
    theirs = peft.PeftModel.from_pretrained(CausalLM.from_pretrained(opt), last).eval()
    plain = CausalLM.from_pretrained(opt).eval()(ids).logits
    assert (theirs(ids).logits - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours(ids)["logits"], theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilbert")
    tokenizer = learn([text for text, _label in small.texts(60, 0, 3)], WordPiece.model_validate({"vocab": 200}))
    made("distilbert", vocab_size=tokenizer.size).save_pretrained(folder / "model")
    tokenizer.save(folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        shutil.copyfile(file, folder / "model" / file.name)
    return folder / "model"


def test_an_encoder_learns_classes_goes_on_and_is_judged(distilbert: Path, tmp_path: Path) -> None:
    table = small.table(tmp_path / "rows.csv", ["text", "label"], small.texts(60, 1))
    about: dict[str, Any] = {"data": [{"path": str(table)}], "objective": "classify", "overlong": "cut",
                             "audit": {"duplicates": 1.0}, "guard": {"overlap": 1.0}}
    train(config_with_rows(tmp_path / "run", distilbert, about, 3))
    last = train(config_with_rows(tmp_path / "run", distilbert, about, 5))
    back, told = Classifier.from_pretrained(last, output_loading_info=True)
    assert not any(told.values()) and set(back.config.id2label.values()) == {"bad", "good"}
    assert any("eval/accuracy" in line for line in lines(tmp_path / "run"))
    ended = danlu("eval", tmp_path / "run", "--data", table, "--json")
    assert ended.code == 0 and "accuracy" in ended.out, ended.err
    again = train(config_with_rows(tmp_path / "again", last, about, 2))                # the head is there, and the same
    assert Classifier.from_pretrained(again).config.id2label == back.config.id2label


def config_with_rows(out: Path, start: Path, about: dict[str, Any], steps: int) -> Run:
    return taken_in(recipe(out, start, **about, steps=steps))


def test_a_pooler_that_is_not_there_is_trained_beside_lora(distilbert: Path, tmp_path: Path) -> None:
    start = tmp_path / "albert"
    made("albert", vocab_size=200, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).save_pretrained(start)
    for file in distilbert.glob("*token*.json"):
        shutil.copyfile(file, start / file.name)
    table = small.table(tmp_path / "rows.csv", ["text", "label"], small.texts(60, 1))
    last = train(config_with_rows(tmp_path / "run", start, {
        "data": [{"path": str(table)}], "objective": "classify", "adapt": "lora", "overlong": "cut",
        "audit": {"duplicates": 1.0}, "guard": {"overlap": 1.0}}, 2))
    base = Classifier.from_pretrained(start, num_labels=2)
    theirs, ids = peft.PeftModel.from_pretrained(base, last).eval(), torch.arange(5, 25)[None]
    torch.testing.assert_close(folder.load(last).eval()(ids)["classify"], theirs(ids).logits, atol=1e-5, rtol=0)
    assert load_file(last / "adapter_model.safetensors")["base_model.model.albert.pooler.weight"].shape == (32, 32)


def test_an_encoder_learns_hidden_tokens(distilbert: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(text for text, _label in small.texts(60, 2)))
    run = config_with_rows(tmp_path / "run", distilbert, {"data": [{"path": str(tmp_path / "text.txt")}],
                                                         "objective": "masked_lm"}, 3)
    _back, told = AutoModelForMaskedLM.from_pretrained(train(run), output_loading_info=True)
    assert not any(told.values())


@pytest.mark.parametrize(("changes", "fix"), [
    ({"layout": {"tp": 2}}, "layout.tp=1"), ({"layout": {"pp": 2, "micro": 2}}, "layout.pp=1"),
    ({"layout": {"cp": 2}}, "layout.cp=1"),
    ({"layout": {"dp": 2, "shard": "full"}}, "layout.shard=none"), ({"compile": True}, "compile=false"),
    ({"recompute": "full"}, "recompute=none"), ({"pack": True}, "pack=false"), ({"adapt": "prompt"}, "adapt=lora"),
    ({"optim": {"kind": "adamw", "lr": 1e-3, "layer_decay": 0.9}}, "optim.layer_decay=1"),
    ({"adapt": {"kind": "lora", "base": "nf4"}}, "adapt.base=null")])
def test_what_it_cannot_follow_is_refused(changes: dict[str, Any], fix: str, corpus: Path, opt: Path, tmp_path: Path) -> None:
    run = recipe(tmp_path / "run", opt, data=[{"path": str(corpus)}], objective="causal_lm", **changes)
    with pytest.raises(ConfigError, match="opt is a model of transformers: one process or data parallel") as error:
        settle(run, open_data(run), World(run.layout), None)
    assert fix in str(error.value)


def changed(folder: Path, target: Path, **more: Any) -> Path:
    shutil.copytree(folder, target)
    data = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(data | more))
    return target


def test_code_of_a_model_is_refused(opt: Path, tmp_path: Path) -> None:
    with pytest.raises(SecurityError, match="auto_map"):
        weights.read_config(changed(opt, tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_x.X"}))


@pytest.mark.parametrize(("more", "why"), [
    ({"model_type": "no_such_thing"}, "'no_such_thing' is not known"), ({"model_type": "t5"}, "neither a decoder nor an encoder"),
    ({"model_type": "vit"}, "neither a decoder nor an encoder"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "wide"}, "does not understand this config.json.*wide")])
def test_what_is_not_a_model_of_text_is_refused(more: dict[str, Any], why: str, opt: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=why):
        weights.read_config(changed(opt, tmp_path / "model", **more))


def test_a_decoder_that_sees_what_comes_is_refused(tmp_path: Path) -> None:
    shape = CONFIG_MAPPING["xlnet"](d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=61)
    CausalLM.from_config(shape).save_pretrained(tmp_path / "model")
    with pytest.raises(IncompatibleError, match="tokens see those after them"):
        weights.load(tmp_path / "model")(torch.arange(10)[None])


def test_weights_in_other_pieces_are_refused(tmp_path: Path) -> None:
    shape = CONFIG_MAPPING["mixtral"](**G | {"num_local_experts": 2})
    CausalLM.from_config(shape).save_pretrained(tmp_path / "model")
    with pytest.raises(IncompatibleError, match="other pieces"):
        weights.load(tmp_path / "model")


def test_pickled_weights_are_refused(opt: Path, tmp_path: Path) -> None:
    folder = changed(opt, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SecurityError, match="can run code"):
        weights.load(folder)


def test_without_the_extra_it_is_named(opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"danlu\[transformers\]"):
        weights.read_config(opt)


def test_our_own_families_need_no_transformers(tmp_path: Path) -> None:
    folder = small.encoder(tmp_path)
    code = f"import sys\nfrom danlu.models import weights as w\nw.load({str(folder)!r})\nassert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
