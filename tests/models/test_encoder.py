"""The encoder is held to transformers: the same logits from the same folder, in both directions, nothing left over."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForNextSentencePrediction, AutoModelForPreTraining

from danlu import config
from danlu.errors import IncompatibleError
from danlu.models import encoder, weights
from danlu.models.build import build
from danlu.models.encoder import Encoder
from danlu.objectives import CausalLM, MaskedLM, Mixture
from tests.objectives.small import rng, row, text, vocab

TINY = {"vocab": 200, "width": 32, "layers": 2, "heads": 4, "context": 40}
SHAPES = {
    "pretraining": (Encoder(**TINY, outputs=("mlm", "nsp")), AutoModelForPreTraining),
    "masked": (Encoder(**TINY, outputs=("mlm",), activation="gelu_tanh", types=3), AutoModelForMaskedLM),
    "pair": (Encoder(**TINY, outputs=("nsp",)), AutoModelForNextSentencePrediction),
    "order": (Encoder(**TINY, outputs=("mlm", "sop")), AutoModelForPreTraining),
    "bare": (Encoder(**TINY, outputs=()), AutoModel),
    "roberta": (Encoder(**TINY, family="roberta", outputs=("mlm",)), AutoModelForMaskedLM),
    "roberta-pad": (Encoder(**TINY, family="roberta", outputs=("mlm",), pad=3, activation="relu"),
                    AutoModelForMaskedLM),
    "roberta-bare": (Encoder(**TINY, family="roberta", outputs=()), AutoModel),
}


def random(cfg, seed=0):
    """Return a model in which no weight is 0 or 1, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = build(cfg, "cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.2)
    return model.eval()


def padded(cfg, seed=1):
    """Return ids, segments and types of rows of unequal length; ids stay clear of the padding id."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, cfg.vocab, (3, 20), generator=draw)
    segments = (torch.arange(20) < torch.tensor([20, 13, 1])[:, None]).int()
    types = torch.randint(cfg.types, (3, 20), generator=draw) * segments
    return torch.where(segments > 0, ids, cfg.pad), segments, types


def assert_same(ours, theirs, cfg):
    ids, segments, types = padded(cfg)
    with torch.no_grad():
        a = ours(ids, segments=segments, types=types)
        b = theirs(ids, attention_mask=segments.long(), token_type_ids=types, output_hidden_states=True)
    real = segments > 0
    pairs = [(a["hidden"], b["hidden_states"][-1] if "hidden_states" in b else b["last_hidden_state"])]
    if "mlm" in cfg.outputs:
        pairs.append((a["logits"], b.prediction_logits if "prediction_logits" in b else b.logits))
    for mine, other in pairs:
        torch.testing.assert_close(mine[real], other[real], atol=1e-5, rtol=0)
    if "nsp" in cfg.outputs or "sop" in cfg.outputs:
        logits = b.seq_relationship_logits if "seq_relationship_logits" in b else b.logits
        torch.testing.assert_close(a["nsp" if "nsp" in cfg.outputs else "sop"], logits, atol=1e-5, rtol=0)
    if not cfg.outputs:
        torch.testing.assert_close(a["pooled"], b.pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_what_we_write_opens_in_transformers(name, tmp_path: Path):
    cfg, auto = SHAPES[name]
    ours = random(cfg)
    weights.save(tmp_path / "model", ours)
    theirs, info = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert {k: v for k, v in info.items() if v} == {}
    assert_same(ours, theirs.eval(), cfg)
    again = weights.load(tmp_path / "model")
    assert again.cfg == cfg
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize(("cls", "outputs"), [
    ("BertForPreTraining", ("mlm", "nsp")), ("BertForMaskedLM", ("mlm",)), ("BertModel", ()),
    ("BertForNextSentencePrediction", ("nsp",)), ("RobertaForMaskedLM", ("mlm",)), ("RobertaModel", ()),
])
def test_what_transformers_writes_opens_here(cls, outputs, tmp_path: Path):
    made = getattr(transformers, cls)
    torch.manual_seed(0)
    theirs = made(made.config_class(vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                    intermediate_size=48, max_position_embeddings=34, type_vocab_size=2)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 0.1, 0.2)
    theirs.save_pretrained(tmp_path)
    ours = weights.load(tmp_path).eval()
    assert ours.cfg.outputs == outputs and ours.cfg.hidden == 48
    assert ours.cfg.context == (34 if "Bert" in cls and "Rob" not in cls else 32)
    assert_same(ours, theirs, ours.cfg)


def test_old_names_and_unread_heads(tmp_path: Path):
    """Google's own files say gamma and beta, hold position ids and the tied weights twice."""
    whole = random(SHAPES["pretraining"][0])
    weights.save(tmp_path / "model", whole)
    file = tmp_path / "model" / "model.safetensors"
    held = load_file(file)
    held |= {"cls.predictions.decoder.weight": held["bert.embeddings.word_embeddings.weight"].clone(),
             "cls.predictions.decoder.bias": held["cls.predictions.bias"].clone(),
             "bert.embeddings.position_ids": torch.arange(40)[None]}
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in held.items()}
    assert any("gamma" in k for k in old)
    save_file(old, file, metadata={"format": "pt"})
    ids = padded(whole.cfg)[0]
    expected = whole(ids)
    for heads in (None, ("mlm",), ("nsp",), ()):
        part = weights.load(tmp_path / "model", heads=heads).eval()
        assert part.cfg.outputs == (("mlm", "nsp") if heads is None else heads)
        for key, value in part(ids).items():
            torch.testing.assert_close(value, expected[key])
    save_file(old | {"cls.predictions.decoder.bias": torch.ones(200)}, file, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"decoder\.bias differs"):
        weights.load(tmp_path / "model")
    save_file(old | {"adapter.weight": torch.ones(2, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"adapter\.weight belongs to nothing"):
        weights.load(tmp_path / "model")
    save_file({k: v for k, v in old.items() if "seq_relationship.bias" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"seq_relationship\.bias is missing"):
        weights.load(tmp_path / "model")


def test_roberta_and_its_tokenizer_agree_on_padding(tmp_path: Path):
    """transformers takes the first position from pad_token_id: 0 here would shift every position by one."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 0, "content": "<pad>"}]}))
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    with pytest.raises(IncompatibleError, match="the model's is 1, the tokenizer's 0"):
        weights.save(tmp_path / "wrong", random(SHAPES["roberta"][0]), tokenizer=tokenizer)
    cfg = Encoder(**TINY, family="roberta").filled(vocab=200, heads=("mlm",), pad=0)
    ours = random(cfg)
    weights.save(tmp_path / "right", ours, tokenizer=tokenizer)
    assert_same(ours, AutoModelForMaskedLM.from_pretrained(tmp_path / "right").eval(), cfg)
    weights.save(tmp_path / "bert", random(SHAPES["masked"][0]), tokenizer=tokenizer)


def test_three_heads_survive_a_folder(tmp_path: Path):
    ours = random(Encoder(**TINY, outputs=("sop", "mlm", "nsp")))
    weights.save(tmp_path / "model", ours)
    again = weights.load(tmp_path / "model").eval()
    ids = padded(ours.cfg)[0]
    assert again.cfg.outputs == ("mlm", "nsp", "sop")
    for key, value in ours(ids).items():
        assert torch.equal(again(ids)[key], value)
    with pytest.raises(IncompatibleError, match="comes with nsp"):
        weights.load(tmp_path / "model", heads=("sop",))
    with pytest.raises(IncompatibleError, match="no head sop"):
        SHAPES["pretraining"][0].with_heads(("sop",))


@pytest.mark.parametrize("change", [
    {"position_embedding_type": "relative_key"}, {"is_decoder": True}, {"tie_word_embeddings": False},
    {"architectures": ["BertLMHeadModel"]}, {"hidden_act": "mish"}, {"strange_new_key": 1},
    {"danlu": {"width": 3}}, {"num_attention_heads": 5},
])
def test_a_config_that_computes_something_else_is_refused(change, tmp_path: Path):
    weights.save(tmp_path / "model", random(SHAPES["pretraining"][0]))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(IncompatibleError):
        weights.read_config(tmp_path / "model")


@pytest.mark.parametrize("name", ["masked", "pretraining", "roberta"])
@pytest.mark.parametrize("path", ["plain", "sdpa"])
def test_packed_documents_do_not_see_each_other(name, path):
    model = random(SHAPES[name][0])
    for block in model.blocks:
        block.attention.path = path
    ids = torch.randint(10, 200, (1, 24), generator=torch.Generator().manual_seed(3))
    lengths = [9, 3, 8]
    segments = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor([*lengths, 4]))[None].int()
    positions = torch.cat([*map(torch.arange, lengths), torch.zeros(4, dtype=torch.int64)])[None]
    with torch.no_grad():
        packed = model(ids, positions=positions, segments=segments)["logits"][0]
        alone = torch.cat([model(part)["logits"][0] for part in ids[:, :20].split(lengths, 1)])
    torch.testing.assert_close(packed[:20], alone, atol=2e-6, rtol=1e-5)
    assert packed.isfinite().all()


def loss_of(model, objective, rows, length):
    batch = objective.collate(rows, vocab(), rng(), length)
    out = model(**{name: batch[name] for name in objective.inputs if name in batch})
    return objective.loss(out, batch), objective.count(batch)


@pytest.mark.parametrize("objective", [
    MaskedLM(), MaskedLM(whole_word=True), Mixture(parts=("masked_lm", "next_sentence")),
    Mixture(parts=("next_sentence", "sentence_order", "masked_lm")),
])
def test_any_split_and_padding_gives_the_same_loss_and_gradient(objective):
    model = random(Encoder(**TINY, outputs=objective.heads)).double()
    rows = [row(text(9 + i, i), key=i, other=text(20, i + 50)) for i in range(7)]
    total, count = loss_of(model, objective, rows, 30)
    total.sum().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    cuts = (rows[:1], 12), (rows[1:4], 33), (rows[4:], 18)
    parts = [loss_of(model, objective, part, length) for part, length in cuts]
    sum(p[0] for p in parts).sum().backward()
    torch.testing.assert_close(sum(p[0] for p in parts), total, rtol=1e-6, atol=1e-6)
    assert torch.equal(sum(p[1] for p in parts), count)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[n], rtol=1e-5, atol=1e-6)


def test_packing_gives_the_loss_of_each_document_alone():
    """With every token hidden, chance has no say, so packed and separate rows must agree."""
    model, objective = random(SHAPES["masked"][0]), MaskedLM(rate=0.999999, replace=1.0, random=0.0)
    documents = [text(n, n) for n in (5, 9, 3)]
    packed, count = loss_of(model, objective, [row(*documents)], 30)
    alone = [loss_of(model, objective, [row(d)], len(d) + 2) for d in documents]
    assert count.item() == sum(a[1].item() for a in alone) == 17 - sum((d < 5).sum() for d in documents)
    torch.testing.assert_close(packed, sum(a[0] for a in alone), rtol=1e-5, atol=1e-5)


def test_causal_packing_gives_the_loss_of_each_document_alone():
    decoder = pytest.importorskip("danlu.models.decoder")
    cfg = decoder.Decoder(family="llama", vocab=200, width=32, layers=2, heads=4, context=40)
    model, objective = random(cfg), CausalLM(smoothing=0.1, z_loss=0.01)
    documents = [text(n, n) for n in (5, 9, 3)]
    packed, count = loss_of(model, objective, [row(*documents)], 30)
    alone = [loss_of(model, objective, [row(d)], len(d) - 1) for d in documents]
    assert count.tolist() == [17 - 3] * 2
    torch.testing.assert_close(packed, sum(a[0] for a in alone), rtol=1e-5, atol=1e-4)


def test_scores_are_those_of_the_logits():
    model, objective = random(SHAPES["pretraining"][0]), Mixture(parts=("masked_lm", "next_sentence"))
    batch = objective.collate([row(text(20, i), key=i, other=text(20, i + 9)) for i in range(4)], vocab(), rng(), 24)
    inputs = {n: batch[n] for n in ("ids", "positions", "segments", "types") if n in batch}
    told = model(**inputs, labels=batch["labels"], weights=batch["weights"])
    logits = model(**inputs)["logits"].flatten(0, 1)
    index = batch["weights"].flatten().nonzero()[:, 0]
    assert torch.equal(told["mlm"].index, index) and "logits" not in told
    expected = logits[index].log_softmax(-1).gather(1, batch["labels"].flatten()[index, None])[:, 0]
    torch.testing.assert_close(told["mlm"].logp, expected, atol=1e-5, rtol=1e-5)


def test_the_head_reads_only_what_is_learned():
    model, seen = random(SHAPES["masked"][0]), []
    model.head.register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape))
    batch = MaskedLM().collate([row(text(20, 1))], vocab(), rng(), 24)
    model(batch["ids"], labels=batch["labels"], weights=batch["weights"])
    assert seen == [(int((batch["weights"] > 0).sum()), 32)]


def test_first_weights_are_the_papers():
    cfg = Encoder(vocab=2000, width=64, layers=2, heads=4, outputs=("mlm", "nsp"))
    model = build(cfg).to_empty(device="cpu").init(7)
    table = model.embed.weight.detach()
    assert table.abs().max() <= 0.04 and table.std() == pytest.approx(0.02 * 0.8796, rel=0.02)   # cut at 2 deviations
    assert model.pairs["nsp"].weight.std() > 0.01 and model.pairs["nsp"].bias.eq(0).all()
    assert all(p.eq(1).all() for n, p in model.named_parameters() if n.endswith(("norm1.weight", "embed_norm.weight")))
    assert all(p.eq(0).all() for n, p in model.named_parameters() if n.endswith("bias"))
    roberta = Encoder(**TINY | {"vocab": 2000}, family="roberta", outputs=("mlm",))
    roberta = build(roberta).to_empty(device="cpu").init(7)
    wide = roberta.embed.weight.detach()
    assert wide.std() == pytest.approx(0.02, rel=0.02) and wide.abs().max() > 0.06
    deeper = build(Encoder(vocab=2000, width=64, layers=3, heads=4, outputs=("mlm",))).to_empty(device="cpu").init(7)
    assert torch.equal(deeper.blocks[1].mlp.up.weight, model.blocks[1].mlp.up.weight)
    assert not torch.equal(build(cfg).to_empty(device="cpu").init(8).embed.weight, table)


@pytest.mark.parametrize("name", encoder.PRESETS)
def test_presets_have_the_papers_sizes(name):
    """In million parameters without vocabulary: Devlin et al., 2019; Turc et al., 2019; Liu et al., 2019."""
    cfg = Encoder(preset=name).filled(vocab=30522 if "roberta" not in name else 50265, heads=("mlm",))
    cfg = Encoder.model_validate(cfg.model_dump() | {"pooler": "roberta" not in name})
    expected = {"bert-tiny": 4.4, "bert-mini": 11.2, "bert-small": 28.8, "bert-medium": 41.4, "bert-base": 109.5,
                "bert-large": 335.1, "roberta-base": 124.6, "roberta-large": 355.4}[name]
    held = [p.numel() for n, p in build(cfg).named_parameters() if "head" not in n.split(".")]
    total = sum(held) + (0 if "roberta" not in name else sum(p.numel() for p in build(cfg).head.parameters()))
    assert total / 1e6 == pytest.approx(expected, abs=0.1)


def test_fields_are_filled_in():
    cfg = config.validate(Encoder, {"preset": "roberta-base", "layers": 3})
    assert (cfg.layers, cfg.width, cfg.types, cfg.eps, cfg.pad, cfg.hidden) == (3, 768, 1, 1e-5, 1, 3072)
    assert cfg.outputs is None and cfg.pooler is None
    full = cfg.filled(vocab=99, heads=("mlm",), pad=4)
    assert (full.vocab, full.outputs, full.pooler, full.pad, full.layers) == (99, ("mlm",), False, 4, 3)
    assert Encoder(pad=7).filled(vocab=9, heads=("nsp", "mlm"), pad=4).pad == 7
    assert Encoder().filled(vocab=9, heads=("nsp", "mlm")).pooler is True
    assert full.filled(vocab=5, heads=("mlm",)) == full
    assert config.validate(Encoder, config.dump(full)) == full


@pytest.mark.parametrize(("fields", "match"), [
    ({"width": 30, "heads": 4}, "does not divide"), ({"preset": "bert-giant"}, "bert-tiny"),
    ({"outputs": ("nsp",), "pooler": False}, "reads the pooler"),
    ({"family": "roberta", "outputs": ("mlm", "nsp")}, "family=bert"),
])
def test_wrong_combinations_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Encoder(**fields)


def test_what_does_not_fit_is_refused():
    with pytest.raises(IncompatibleError, match="no head lm"):
        Encoder().filled(vocab=9, heads=("lm",))
    with pytest.raises(IncompatibleError, match="needs the head nsp"):
        Encoder(outputs=("mlm",)).filled(vocab=9, heads=("mlm", "nsp"))
    with pytest.raises(IncompatibleError, match="41 tokens do not fit the model's context of 40"):
        random(SHAPES["bare"][0])(torch.ones(1, 41, dtype=torch.int64))


def test_flops_are_those_counted():
    from torch.utils.flop_counter import FlopCounterMode

    cfg = Encoder(vocab=50, width=32, layers=3, heads=4, outputs=(), pooler=False, dropout=0, attention_dropout=0)
    model = random(cfg)
    for block in model.blocks:
        block.attention.path = "plain"
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(2, 24, dtype=torch.int64))["hidden"].sum().backward()
    # The products of the gradient of the first block's input are needed by the embeddings, so all are counted.
    assert counter.get_total_flops() == pytest.approx(model.flops(24) * 2 * 24, rel=0.02)
