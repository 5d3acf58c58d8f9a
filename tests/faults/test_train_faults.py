"""A training run survives what machines do to it: every case ends in the same weights, or in one clear sentence."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli import command, danlu, danlu_until, environment, weights_hash

STEPS = 40
SAVE_POINTS = ("ckpt.before_shard", "ckpt.mid_shard", "ckpt.before_fsync", "ckpt.async.mid", "ckpt.before_manifest",
               "ckpt.before_rename", "ckpt.after_rename", "ckpt.before_prune", "ckpt.mid_prune")


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that saves every 10."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"out: unused\nmodel: {{kind: decoder, family: gpt2, width: 32, layers: 2, heads: 2, context: 64, dropout: 0.1}}\n"
        f"data: [{{path: {corpus}}}]\nobjective: causal_lm\noptim: {{kind: adamw, lr: 1e-3}}\n"
        f"schedule: {{kind: cosine, warmup: 5}}\nsteps: {STEPS}\nrows: 8\nlength: 32\noverlong: split\nprecision: fp32\n"
        f"every: {{log: 1, evaluate: 20, save: 10, keep: 2}}\nthreads: 1\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert danlu("train", recipe, "--out", out).code == 0
    return weights_hash(out)


def whole(out: Path, reference: str) -> None:
    assert weights_hash(out) == reference
    assert [p.name for p in out.iterdir() if p.name.startswith((".tmp", ".trash"))] == []
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def test_killed_in_the_middle_of_a_step_resumes_to_the_bit(recipe: Path, reference: str, tmp_path: Path) -> None:
    # a save waits for the one before it: after step 20, checkpoint-10 is on disk however slow the writing thread was
    assert danlu("train", recipe, "--out", tmp_path / "a", fault="train.step:kill:27").code == -signal.SIGKILL
    ended = danlu("train", recipe, "--out", tmp_path / "a", "--resume").clean()
    assert ended.code == 0 and re.search("resuming from checkpoint-[12]0", ended.err)
    whole(tmp_path / "a", reference)


@pytest.mark.slow
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_killed_while_saving_never_loads_half_a_checkpoint(recipe: Path, reference: str, tmp_path: Path, point: str) -> None:
    # visits before the second periodic save differ from point to point: the third visit of a once-a-save point is step 20
    visits = {"ckpt.mid_shard": 150, "ckpt.before_fsync": 6, "ckpt.before_prune": 1, "ckpt.mid_prune": 1}.get(point, 3)
    assert danlu("train", recipe, "--out", tmp_path / "a", fault=f"{point}:kill:{visits}").code == -signal.SIGKILL
    assert danlu("train", recipe, "--out", tmp_path / "a").clean().code == 0
    whole(tmp_path / "a", reference)


@pytest.mark.slow
def test_killed_at_random_times_until_done(recipe: Path, reference: str, tmp_path: Path) -> None:
    draw, kills = random.Random(0), 0
    for _attempt in range(12):
        process = subprocess.Popen(command("train", recipe, "--out", tmp_path / "a"), env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=draw.uniform(2.0, 8.0) if kills < 10 else 120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert danlu("train", recipe, "--out", tmp_path / "a").code == 0
    whole(tmp_path / "a", reference)


def test_a_save_that_fails_is_told_and_the_run_goes_on(recipe: Path, reference: str, tmp_path: Path) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", fault="ckpt.async:raise:2").clean()
    assert ended.code == 0 and "a checkpoint could not be written" in ended.err
    whole(tmp_path / "a", reference)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(recipe: Path, reference: str, tmp_path: Path, number: int, code: int) -> None:
    ended = danlu_until("train", recipe, "--out", tmp_path / "a", "steps=40", seen="step 1/", signals=(number,)).clean()
    assert ended.code == code and "the same command goes on from there" in ended.last
    assert danlu("train", recipe, "--out", tmp_path / "a").code == 0
    whole(tmp_path / "a", reference)


@pytest.mark.slow
def test_two_interrupts_stop_at_once_and_leave_the_last_checkpoint_whole(recipe: Path, reference: str, tmp_path: Path) -> None:
    out = tmp_path / "a"
    process = subprocess.Popen(command("train", recipe, "--out", out), env=environment("train.step:slow:15,train.step:slow:16"),
                               stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not (out / "checkpoint-10").is_dir():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert danlu("train", recipe, "--out", out).code == 0
    whole(out, reference)


@pytest.mark.parametrize("damage", ["flip", "no manifest", *(pytest.param(each, marks=pytest.mark.slow) for each in
                                                             ("truncate", "empty", "no optimizer"))])
def test_a_damaged_checkpoint_is_named_set_aside_and_not_used(recipe: Path, reference: str, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "a"
    assert danlu("train", recipe, "--out", out).code == 0
    newest = out / "checkpoint-40"
    model = newest / "model.safetensors"
    if damage == "flip":
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
    elif damage == "truncate":
        os.truncate(model, model.stat().st_size - 100)
    elif damage == "empty":
        model.write_bytes(b"")
    else:
        (newest / {"no manifest": "manifest.json", "no optimizer": "optimizer.safetensors"}[damage]).unlink()
    ended = danlu("train", recipe, "--out", out).clean()
    assert ended.code == 0 and "checkpoint-40 is damaged" in ended.err and "resuming from checkpoint-30" in ended.err
    assert [p.name for p in out.iterdir() if p.name.startswith("checkpoint-40.corrupt")]
    whole(out, reference)


@pytest.mark.slow
def test_a_full_disk_costs_the_save_not_the_run(recipe: Path, tmp_path: Path) -> None:
    """On a file system of 3 MB; needs user namespaces."""
    out = tmp_path / "out"
    out.mkdir()
    script = f'mount -t tmpfs -o size=700k t "{out}" && "$@"; code=$?; ls "{out}"; exit $code'
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *command("train", recipe, "--out", out / "r")],
                          capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 5, done.stderr


@pytest.mark.slow
def test_a_file_size_limit_is_a_full_disk_too(recipe: Path, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(command("train", recipe, "--out", tmp_path / "a", "guard.reload=false"), capture_output=True,
                          text=True, env=environment(), preexec_fn=limit, timeout=120, check=False)
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert "step 40/40" in done.stderr, "the run itself went on to its end"


def test_a_folder_that_cannot_be_written_is_refused_at_once(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = danlu("train", recipe, "--out", tmp_path / "file" / "run").clean()
    assert ended.code == 2 and "cannot be written" in ended.last


def test_a_dead_data_worker_is_an_error_not_a_hang(recipe: Path, reference: str, tmp_path: Path) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", "workers=2", fault="data.worker:kill:8", timeout=60).clean()
    assert ended.code == 3 and "a process that makes batches died" in ended.last
    assert danlu("train", recipe, "--out", tmp_path / "a", "workers=1").code == 0
    whole(tmp_path / "a", reference)


@pytest.mark.slow
def test_memory_that_runs_out_is_one_sentence_with_advice(recipe: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (1_500_000_000, 1_500_000_000))

    large = ("model.width=2048", "model.layers=16", "model.heads=16")
    done = subprocess.run(command("train", recipe, "--out", tmp_path / "a", *large),
                          capture_output=True, text=True, env=environment(), preexec_fn=limit, timeout=120, check=False)
    assert done.returncode == 5 and "Traceback" not in done.stderr and "layout.micro" in done.stderr


def test_bad_gradients_are_skipped_counted_and_then_stop_the_run(recipe: Path, tmp_path: Path) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", fault="grad:nan:10").clean()
    assert ended.code == 6 and "4 updates in a row" in ended.last
    assert json.loads((tmp_path / "a" / "failed-batch.json").read_text())["batch"]["ids"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("grad_norm") == "nan" for line in lines), "not a number stays visible in the log"


def test_a_rate_that_explodes_is_stopped(recipe: Path, tmp_path: Path) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", "precision=bf16", "optim={kind: sgd, lr: 1e6}", "clip=null").clean()
    assert ended.code == 6, ended.err


def test_a_spike_is_skipped_and_its_history_survives(recipe: Path, tmp_path: Path) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", fault="loss:scale50:15").clean()
    assert ended.code == 6 and "deviations above its history" in ended.err
    state = json.loads((tmp_path / "a" / "checkpoint-10" / "trainer_state.json").read_text())
    assert len(state["progress"]["history"]) == 10


def test_another_tokenizer_is_refused_with_both_hashes(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(corpus, copy)
    assert danlu("train", recipe, "--out", tmp_path / "a", f"data={copy}", fault="train.step:kill:17").code != 0
    tokenizer = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[40], list(vocab)[41]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    tokenizer.write_text(json.dumps(content))
    ended = danlu("train", recipe, "--out", tmp_path / "a", f"data={copy}").clean()
    assert ended.code == 4 and "tokenizer" in ended.last


def test_a_vocabulary_too_small_for_the_data_is_refused_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", "model.vocab=50").clean()
    assert ended.code == 4 and "model.vocab" in ended.last and not list(tmp_path.glob("a/checkpoint-*"))


def test_evaluation_rows_in_the_training_data_stop_the_run(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", f"eval=[{{path: {corpus}, split: train}}]").clean()
    assert ended.code == 3 and "stand in the training data" in ended.last
    assert danlu("train", recipe, "--out", tmp_path / "b", f"eval=[{{path: {corpus}, split: train}}]", "guard.overlap=1",
                 "steps=6").code == 0


@pytest.mark.parametrize(("change", "words"), [
    (["overlong=error"], "overlong"), (["length=100"], "context"), (["steps=-1", "rows=0"], "steps: must be > 0"),
    (["layout.micro=3"], "layout.micro=3 does not divide rows=8"), (["model.heads=5"], "heads=5 does not divide width=32"),
    (["optim.lr=nan"], "optim.lr"), (["lerning_rate=1"], "learning_rate"),
])
def test_impossible_settings_are_refused_in_seconds(recipe: Path, tmp_path: Path, change: list[str], words: str) -> None:
    ended = danlu("train", recipe, "--out", tmp_path / "a", *change).clean()
    assert ended.code in (2, 3) and words in ended.err and not (tmp_path / "a" / "run.json").exists()


def test_pickles_are_refused_and_never_opened(recipe: Path, tmp_path: Path) -> None:
    import pickle

    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "vocab_size": 320, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32,
        "architectures": ["GPT2LMHeadModel"]}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    ended = danlu("generate", folder, "--prompt", "x").clean()
    assert ended.code in (3, 7) and not marker.exists()
    ended = danlu("train", recipe, "--out", tmp_path / "a", "model=null", f"start={folder}").clean()
    assert ended.code == 7 and not marker.exists()


def test_a_run_that_goes_on_elsewhere_is_told_so(recipe: Path, tmp_path: Path) -> None:
    assert danlu("train", recipe, "--out", tmp_path / "a", "steps=10").code == 0
    ended = danlu("train", recipe, "--out", tmp_path / "a", "steps=10", "threads=2").clean()
    assert ended.code == 0 and "threads: 1 then, 2 now" in ended.err


def test_a_run_that_may_not_resume_leaves_older_checkpoints_alone(recipe: Path, tmp_path: Path) -> None:
    assert danlu("train", recipe, "--out", tmp_path / "a", "steps=10").code == 0
    before = weights_hash(tmp_path / "a")
    ended = danlu("train", recipe, "--out", tmp_path / "a", "steps=20", "resume=false").clean()
    assert ended.code == 2 and "resume" in ended.last
    assert weights_hash(tmp_path / "a") == before


@pytest.mark.skipif(sys.platform != "linux", reason="user namespaces")
def test_training_needs_no_network(recipe: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run(["unshare", "-rn", *command("train", recipe, "--out", tmp_path / "a", "steps=6")],
                          capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
