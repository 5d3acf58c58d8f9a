"""The peers, as their own scripts drive them: a nanoGPT-style loop, the Hugging Face Trainer, `datasets.map`.

Each `*_steps` function returns a Contender whose `step()` does one whole training step: fetch the batch, forward,
backward, clip, update, clear.  B rows, T tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.sizes import SIZES, Size, write


@dataclass(frozen=True)
class Contender:
    """One training loop, ready to step."""

    step: Callable[[], None]
    loss: Callable[[], float] | None = None  # over the whole of val.bin
    close: Callable[[], None] = lambda: None


def folder_of(size: Size, data: str | None) -> Path:
    """Return the folder with train.bin and val.bin: `data`, or a new one with ids drawn at random."""
    if data is not None:
        return Path(data)
    folder = Path(tempfile.mkdtemp(prefix="bench-ids-"))
    write(folder, size.vocabulary)
    return folder


# nanoGPT: the model of model.py and the loop of train.py, written anew


class Norm(nn.Module):
    """LayerNorm without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.c_attn = nn.Linear(size.width, 3 * size.width, bias=False)
        self.c_proj = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.heads, D // self.heads).transpose(1, 2) for y in self.c_attn(x).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, D))


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = Norm(size.width), Attention(size), Norm(size.width)
        self.c_fc = nn.Linear(size.width, 4 * size.width, bias=False)
        self.c_proj = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """GPT-2 without biases and dropout, output tied to the embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.length, size.width)
        self.h = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.ln_f = Norm(size.width)
        self.lm_head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                scale = math.sqrt(2 * size.layers) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, mean=0.0, std=0.02 / scale)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-1)


def nanogpt_batch(file: Path, size: Size) -> tuple[Tensor, Tensor]:
    """Return inputs and labels [B, T] from random places; the map is opened anew each time, as train.py does."""
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    places = torch.randint(len(ids) - size.length, (size.rows,))
    x = torch.stack([torch.from_numpy(ids[i : i + size.length].astype(np.int64)) for i in places])
    y = torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + size.length].astype(np.int64)) for i in places])
    return x, y


def nanogpt_rate(step: int, *, lr: float, least: float, warmup: int, total: int) -> float:
    """Return the learning rate of train.py: linear warm-up, cosine to `least` at `total`."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if step > total:
        return least
    return least + 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup))) * (lr - least)


def whole_loss(model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], file: Path, size: Size) -> float:
    """Return the mean loss over the file cut into rows of T tokens, each token but the first predicted once."""
    ids = torch.from_numpy(np.fromfile(file, dtype=np.uint16).astype(np.int64))
    rows = (len(ids) - 1) // size.length
    x, y = ids[: rows * size.length].view(rows, -1), ids[1 : rows * size.length + 1].view(rows, -1)
    with torch.no_grad():
        losses = [model(a, b)[1].double() * len(a) for a, b in zip(x.split(64), y.split(64), strict=True)]
    return float(torch.stack(losses).sum()) / rows


def nanogpt_steps(size: str, precision: str, *, data: str | None = None, total: int = 2000, seed: int = 1337) -> Contender:
    """Return the loop of train.py with the settings of its character recipe.

    As shipped it runs fp32 on a CPU; `bf16` adds the autocast that it uses on a GPU.
    """
    shape = SIZES[size]
    folder = folder_of(shape, data)
    torch.manual_seed(seed)
    model = NanoGPT(shape)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.99),
    )
    batch = [nanogpt_batch(folder / "train.bin", shape)]
    count = [0]

    def autocast() -> Any:
        return contextlib.nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=dtype_of(precision))

    def step() -> None:
        for g in optimizer.param_groups:
            g["lr"] = nanogpt_rate(count[0], lr=1e-3, least=1e-4, warmup=100, total=total)
        with autocast():
            _logits, loss = model(*batch[0])
        batch[0] = nanogpt_batch(folder / "train.bin", shape)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        count[0] += 1

    def evaluate() -> float:
        with autocast():
            return whole_loss(model, folder / "val.bin", shape)

    return Contender(step, evaluate)


def dtype_of(precision: str) -> torch.dtype:
    """Return the arithmetic of a precision."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


# Hugging Face Trainer


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Consecutive rows of T tokens of a .bin file; labels too for a causal model."""

    def __init__(self, file: Path, size: Size) -> None:
        ids = np.memmap(file, dtype=np.uint16, mode="r")
        self.rows = ids[: len(ids) // size.length * size.length].reshape(-1, size.length)
        self.causal = not size.encoder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.rows[place].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()} if self.causal else {"input_ids": ids}


def hf_model(size: Size) -> nn.Module:
    """Return GPT2LMHeadModel (dropout 0, erf-GELU as in nanoGPT) or BertForMaskedLM (dropout 0.1, its default)."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    if size.encoder:
        return BertForMaskedLM(
            BertConfig(
                vocab_size=size.vocabulary,
                hidden_size=size.width,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                intermediate_size=4 * size.width,
                max_position_embeddings=size.length,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=size.length,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def hf_collator(size: Size) -> Any:
    """Return the collator of the task: masking for an encoder, plain stacking for a decoder."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, default_data_collator

    if not size.encoder:
        return default_data_collator
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {w: i for i, w in enumerate([*special, *(f"w{i}" for i in range(size.vocabulary - len(special)))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    return DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=True, mlm_probability=0.15)


def hf_arguments(size: Size, precision: str, scratch: str, *, seed: int) -> Any:
    """Return the Trainer's settings: its defaults but for the recipe's, and nothing that stops between steps."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=scratch,
        use_cpu=True,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        max_steps=10**7,
        seed=seed,
        per_device_train_batch_size=size.rows,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def trainer_steps(size: str, precision: str, *, data: str | None = None, seed: int = 0) -> Contender:
    """Return the Trainer's own loop, let through one step at a time.

    `Trainer.train()` runs in a thread and waits at `on_step_begin`; a step is everything between two such moments,
    so start-up is left out and batch loading, collating, clipping, the scheduler and the callbacks are not.
    """
    shape = SIZES[size]
    scratch = tempfile.mkdtemp(prefix="bench-trainer-")
    torch.manual_seed(seed)
    return gated(scratch, model=hf_model(shape), args=hf_arguments(shape, precision, scratch, seed=seed),
                 data_collator=hf_collator(shape), train_dataset=Rows(folder_of(shape, data) / "train.bin", shape))


def gated(scratch: str, **options: Any) -> Contender:
    """Return `Trainer(**options).train()`, let through one step at a time; `scratch` is deleted at the end."""
    from transformers import PrinterCallback, Trainer, TrainerCallback

    go, arrived = threading.Semaphore(0), threading.Semaphore(0)
    failure: list[BaseException] = []
    ended = threading.Event()

    class Gate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
            arrived.release()
            go.acquire()

        def on_step_end(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
            control.should_training_stop = ended.is_set()

    trainer = Trainer(callbacks=[Gate()], **options)
    trainer.remove_callback(PrinterCallback)

    def run() -> None:
        try:
            trainer.train()
        except BaseException as error:
            failure.append(error)
        arrived.release()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    arrived.acquire()

    def step() -> None:
        if failure:
            raise failure[0]
        go.release()
        arrived.acquire()
        if failure:
            raise failure[0]

    def close() -> None:
        ended.set()
        go.release()
        thread.join()
        shutil.rmtree(scratch)

    return Contender(step, close=close)


# datasets.map


def datasets_map(files: list[Path], tokenizer: Path, *, processes: int = 2, column: str = "text") -> dict[str, float]:
    """Read .txt or .jsonl files and tokenise them with `datasets`; return seconds, MB/s and the number of tokens.

    A fresh cache each time: what is measured is work, not the memory of it.  `read_s` is the conversion to Arrow.
    """
    import datasets
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    datasets.disable_progress_bars()
    kind = "json" if files[0].suffix == ".jsonl" else "text"
    cache = tempfile.mkdtemp(prefix="bench-datasets-")
    start = time.perf_counter()
    rows = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train", cache_dir=cache)
    read = time.perf_counter()
    done = rows.map(
        lambda batch: {"input_ids": fast(batch[column], return_attention_mask=False)["input_ids"]},
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=rows.column_names,
    )
    end = time.perf_counter()
    tokens = sum(len(ids) for ids in done["input_ids"])
    shutil.rmtree(cache)
    size = sum(f.stat().st_size for f in files) / 1e6
    return {"read_s": read - start, "map_s": end - read, "mb_per_s": size / (end - start), "tokens": tokens}
