"""What a preparation is told to do (`Prepare`), and one pass over its inputs (`Job.rows`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from danlu.config import Model
from danlu.data import formats, pool
from danlu.data.blocks import Block
from danlu.data.clean import Clean
from danlu.data.inputs import MIB, ROW_BYTES, File, Input, Inputs
from danlu.data.ledger import Ledger, Totals
from danlu.data.progress import Progress
from danlu.data.split import Split
from danlu.data.tokenizer import BPE, Chars, Loaded, Unigram, WordPiece
from danlu.data.work import Answer, Want, Work
from danlu.errors import DataError
from danlu.words import _

WORTH = 4 * MIB                                     # bytes of text for which starting one more process pays


def _kind(value: Any) -> str:
    """Return the kind of a tokenizer's configuration: without one, it is loaded if it has a path, else byte pairs."""
    if isinstance(value, dict):
        return str(value.get("kind", "loaded" if "path" in value else "bpe"))
    return str(value.kind)


Tokenizers = Annotated[
    Annotated[BPE, Tag("bpe")] | Annotated[WordPiece, Tag("wordpiece")] | Annotated[Unigram, Tag("unigram")]
    | Annotated[Chars, Tag("chars")] | Annotated[Loaded, Tag("loaded")],
    Discriminator(_kind)]


class Prepare(Model):
    """What to prepare, from what, and where."""

    ALIASES = {  # noqa: RUF012
        "output_dir": "out", "dataset": "inputs", "val_size": "split.val", "val_set_size": "split.val",
        "split_dataset_ratio": "split.val", "preprocessing_num_workers": "workers", "dataset_num_proc": "workers",
        "overwrite_output_dir": "overwrite",
    }
    out: Path = Field(description="Folder of the prepared data.")
    inputs: Inputs = Field(description="What to read; a bare text is a path.")
    clean: Clean = Field(default=Clean(), description="How texts are cleaned, and which are dropped.")
    dedup: Literal["exact", "loose", "none"] = Field(
        default="exact", description="Drop texts that stood before; loose ignores case, width and white space.")
    split: Split = Field(default=Split(), description="How rows are shared out to train, val and test.")
    tokenizer: Tokenizers = Field(
        default_factory=BPE, description="Tokenizer to learn from the training rows, or {path: …} to load one.")
    rejects: float = Field(
        default=0.01, ge=0, le=1, allow_inf_nan=False, description="Largest share of rows that may be at fault.")
    max_row_bytes: int = Field(
        default=ROW_BYTES, ge=1, le=1 << 30, description="Reject rows with more bytes than this.")
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="What to do with a damaged file: stop, or keep what stands before the damage.")
    workers: int | None = Field(
        default=None, ge=0, le=1024, description="Processes; 0: none beside this one; null: by cores and size.")
    shard_tokens: int = Field(default=1 << 24, ge=1, description="Tokens in a shard, before the next one begins.")
    seed: int = Field(default=0, ge=0, description="Decides which rows validate.")
    overwrite: bool = Field(default=False, description="Replace what `out` holds.")


@dataclass(frozen=True)
class Job:
    """What every pass over the inputs needs."""

    cfg: Prepare
    inputs: tuple[Input, ...]
    files: tuple[File, ...]
    say: Callable[[str], None]

    @property
    def text_bytes(self) -> int:
        """Return about how many bytes of text the inputs hold, as far as their sizes tell."""
        return sum((file.size or 0) * (4 if file.packed or file.format == "parquet" else 1) for file in self.files)

    @property
    def workers(self) -> int:
        """Return how many processes the work is worth."""
        if self.cfg.workers is not None:
            return self.cfg.workers
        cores = len(os.sched_getaffinity(0))
        endless = any(file.size is None for file in self.files)
        return cores if endless else min(cores, self.text_bytes // WORTH) if self.text_bytes >= 2 * WORTH else 0

    def work(self, want: Want, **more: Any) -> Work:
        """Return the work on each block."""
        cfg = self.cfg
        return Work(files=self.files, inputs=self.inputs, clean=cfg.clean, split=cfg.split, seed=cfg.seed,
                    row_bytes=cfg.max_row_bytes, loose=cfg.dedup == "loose", want=want, **more)

    def ledger(self, totals: Totals | None = None) -> Ledger:
        """Return a ledger that has seen nothing."""
        watch = any(item.split is not None for item in self.inputs)
        return Ledger([file.path for file in self.files], rejects=self.cfg.rejects, dedup=self.cfg.dedup != "none",
                      watch=watch, totals=totals)

    def rows(self, ledger: Ledger, state: Progress, work: Work, what: str, after: dict[str, Any] | None = None
             ) -> Iterator[tuple[Answer, Any]]:
        """Yield (answer, which of its rows stay) for all blocks in order, from the one after the commit `after` on.

        Counts them in the ledger, writes rejects and fingerprints to the logs, and tells how it goes.
        """
        state.open_logs()
        start = after["done"][0] if after else 0
        blocks = formats.stream(self.files, self.inputs, row_bytes=self.cfg.max_row_bytes,
                                skip_broken=self.cfg.on_error == "skip", start=start)
        left = _later(blocks, after, self.files) if after else blocks
        answers = pool.ordered(left, work, workers=self.workers, name=self._place)
        for answer in _told(answers, self.say, what, self.text_bytes):
            keep = ledger.take(answer)
            state.log(answer.rejects, self.files[answer.file].path, *ledger.fresh)
            yield answer, keep
        state.close()

    def _place(self, block: Block) -> str:
        return f"{self.files[block.file].path}:{block.line}"


def _later(blocks: Iterator[Block], after: dict[str, Any], found: tuple[File, ...]) -> Iterator[Block]:
    """Yield the blocks after those that are done.  Raises DataError when these are not what they were."""
    done, met = tuple(after["done"]), False
    for block in blocks:
        place = (block.file, block.number)
        if place == done:
            met = block.mark == after["mark"]
        if place > done and not met:
            raise DataError(_("the input is not the one that the interrupted preparation read"),
                            where=found[done[0]].path,
                            fix=_("give the same input again, or set overwrite: true to start anew"))
        if place > done:
            yield block


def _told(answers: Iterator[Answer], say: Callable[[str], None], what: str, total: int) -> Iterator[Answer]:
    """Yield the answers; say every five seconds how far they are."""
    start = last = time.monotonic()
    rows = size = 0
    for answer in answers:
        rows, size, now = rows + answer.read, size + answer.size, time.monotonic()
        if now - last >= 5:
            last = now
            share = f"{min(1, size / total):.0%}, " if total else ""
            say(_("{what}: {share}{rows} rows, {size:.0f} MB, {speed:.1f} MB/s").format(
                what=what, share=share, rows=rows, size=size / 1e6, speed=size / 1e6 / (now - start)))
        yield answer
