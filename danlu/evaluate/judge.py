"""From what a model says of labelled rows to the figures of its task: collected batch by batch, judged once.

B rows, N rows of all batches, T tokens, K classes, P choices, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.errors import DataError
from danlu.evaluate import metrics
from danlu.evaluate import spans as found_spans
from danlu.evaluate.answers import answers as judge_answers
from danlu.evaluate.interval import estimate
from danlu.evaluate.metrics import Judged
from danlu.log import say
from danlu.objectives import Answer, Choose, Classify, Embed, Objective, Regress, Tag
from danlu.objectives.answer import best_spans
from danlu.objectives.choose import preferred
from danlu.objectives.protocol import Batch, Out
from danlu.words import _

RESAMPLES = 200                                          # in training, where the interval is not shown
Arrays = Mapping[str, Any]                               # columns of rows that are there, as numpy arrays [N, …]
Text = Mapping[str, Any]                                 # what a row of the source said, as it was kept beside its shards


class Whole(Protocol):
    """Gives a column as it is where no row is cut over processes."""

    def __call__(self, column: Tensor, *, tokens: bool) -> Tensor: ...


def can_judge(objective: Objective) -> bool:
    """Return whether there are figures of this objective beside its loss."""
    return isinstance(objective, Classify | Regress | Tag | Answer | Choose | Embed)


def require(objective: Objective) -> None:
    """Raise ConfigError unless the libraries that judge this objective are installed."""
    if isinstance(objective, Tag):
        found_spans.require()
    if isinstance(objective, Tag | Classify | Regress) or (isinstance(objective, Embed) and not objective.across):
        metrics.require()


def _uncut(column: Tensor, *, tokens: bool) -> Tensor:
    return column


@dataclass
class Said:
    """What a model said of rows, and what is true of them, as columns [N, …]; `counts` is 0 for a row that only fills up.

    length: of the longest row there can be; columns of tokens are that wide.  whole: undoes what layouts cut.
    """

    objective: Objective
    length: int = 0
    whole: Whole = _uncut
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)
    _first: int = 0

    def begin(self, texts: Sequence[Text]) -> None:
        """Begin a part of the data, of which `texts` was kept; its rows are numbered from 0."""
        self._first = len(self.texts)
        self.texts.extend(texts)

    def add(self, out: Out, batch: Batch) -> None:
        """Take in a batch."""
        said: Any = out[self.objective.heads[0]]         # type: ignore[attr-defined]
        for name, (column, tokens) in _READ[type(self.objective)](self.objective, said, batch).items():
            held = self.whole(column.detach(), tokens=tokens).cpu()
            if tokens:
                held = F.pad(held, (0, self.length - held.shape[1]), value=-1)
            self.columns.setdefault(name, []).append(held + self._first if name == "example" else held)

    def arrays(self) -> dict[str, Tensor]:
        """Return the columns, each as one tensor; every process of a run has equally many rows."""
        return {name: torch.cat(parts) for name, parts in self.columns.items()}


Read = dict[str, tuple[Tensor, bool]]                    # columns of a batch, and whether they are of tokens


def _read_rows(objective: Classify | Regress, said: Tensor, batch: Batch) -> Read:
    return {"said": (said.double(), False), "truth": (batch["label"].double(), False), "counts": (batch["row_weights"], False)}


def _read_tags(objective: Tag, said: Tensor, batch: Batch) -> Read:
    return {"classes": (said.argmax(-1).int(), True), "words": (batch["words"].int(), True),
            "example": (batch["example"], False), "counts": (batch["row_weights"], False)}


def _read_answers(objective: Answer, said: Tensor, batch: Batch) -> Read:
    return {"said": (best_spans(said, batch, most=objective.max_answer_tokens), False), "example": (batch["example"], False),
            "counts": (batch["row_weights"], False)}


def _read_choices(objective: Choose, said: Tensor, batch: Batch) -> Read:
    chances = torch.log_softmax(preferred(said, batch).double(), 1)
    return {"said": (chances.argmax(1), False), "truth": (batch["label"], False),
            "loss": (-chances.gather(1, batch["label"][:, None])[:, 0], False), "counts": (batch["row_weights"], False)}


def _read_vectors(objective: Embed, said: Tensor, batch: Batch) -> Read:
    counts = (batch["row_weights"], False)
    if objective.across:
        return {"said": (said[:, :2].double(), False), "counts": counts}
    return {"said": (F.cosine_similarity(said[:, 0].double(), said[:, 1].double()), False),
            "truth": (batch["label"].double(), False), "counts": counts}


_READ: dict[type, Callable[..., Read]] = {
    Classify: _read_rows, Regress: _read_rows, Tag: _read_tags, Answer: _read_answers, Choose: _read_choices,
    Embed: _read_vectors}


def judge(objective: Objective, arrays: Mapping[str, Tensor], texts: Sequence[Text] = (), *,
          resamples: int = metrics.RESAMPLES) -> Judged:
    """Return the figures of the task for what `Said.arrays` gave, and the texts of its rows where the task is judged by them."""
    found = real(arrays)
    if isinstance(objective, Regress):
        return metrics.scores(found["truth"], found["said"][:, 0], resamples=resamples)
    if isinstance(objective, Tag):
        return _judge_tags(objective, found, texts, resamples)
    if isinstance(objective, Answer):
        pairs = zip(answered(objective, found, texts), texts, strict=True)
        return judge_answers([(one["said"], text["answers"]) for one, text in pairs], resamples=resamples)
    if isinstance(objective, Choose):
        ones = np.ones(len(found["said"]))
        right = (found["said"] == found["truth"]).astype(np.float64)
        return Judged({"accuracy": estimate(right, ones, resamples=resamples),
                       "loss": estimate(found["loss"], ones, resamples=resamples)})
    if isinstance(objective, Embed):
        if objective.across:
            return metrics.retrieval(found["said"][:, 0], found["said"][:, 1], resamples=resamples)
        return metrics.scores(found["truth"], found["said"], resamples=resamples)
    assert isinstance(objective, Classify)
    if objective.several:
        return metrics.several(found["truth"], found["said"], objective.labels, resamples=resamples)
    return metrics.classes(found["truth"], found["said"], objective.labels, resamples=resamples)


def real(arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the columns as numpy arrays, of the rows that do not only fill a batch."""
    there = arrays["counts"] > 0
    return {name: np.asarray(column[there]) for name, column in arrays.items()}


def missing(objective: Tag) -> str:
    """Return the tag of a word that the model never saw."""
    return "O" if "O" in objective.labels else objective.labels[0]


def tagged(objective: Tag, found: Arrays, texts: Sequence[Text]) -> tuple[list[list[str]], int]:
    """Return a tag for every word of every text, and how many words the model never saw; those count as O."""
    _check(found, texts)
    empty = missing(objective)
    tags = [[""] * len(text["words"]) for text in texts]
    for example, classes, words in zip(found["example"], found["classes"], found["words"], strict=True):
        for place in np.flatnonzero(words >= 0):
            tags[example][words[place]] = objective.labels[classes[place]]
    unseen = sum(tag == "" for row in tags for tag in row)
    return [[tag or empty for tag in row] for row in tags], unseen


def _judge_tags(objective: Tag, found: Arrays, texts: Sequence[Text], resamples: int) -> Judged:
    said, unseen = tagged(objective, found, texts)
    if unseen:
        say(_("{n} words were cut off: no tag was predicted, and they count as O").format(n=unseen))
    truth = [list(text["tags"]) for text in texts]
    if all(name == "O" or name[1:2] == "-" for name in objective.labels):
        return found_spans.spans(truth, said, resamples=resamples)
    right = np.array([sum(a == b for a, b in zip(*both, strict=True)) for both in zip(truth, said, strict=True)], np.float64)
    return Judged({"accuracy": estimate(right, np.array([len(row) for row in truth], np.float64), resamples=resamples)})


def answered(objective: Answer, found: Arrays, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """Return for each question {"said": the best answer of all windows, "score", "null": the score of no answer}.

    said is "" where there may be no answer and that scores higher by more than the threshold.
    """
    _check(found, texts)
    order = np.argsort(found["example"], kind="stable")
    borders = np.searchsorted(found["example"][order], np.arange(1, len(texts)))
    none = sum(not text["answers"] for text in texts)
    if none and not objective.may_be_empty:
        say(_("{n} questions have no answer in their context, and the model always gives one: objective.may_be_empty is false "
              "in its run").format(n=none))
    return [read_off(objective, best, text) for best, text in zip(np.split(found["said"][order], borders), texts, strict=True)]


def read_off(objective: Answer, best: np.ndarray, text: Text) -> dict[str, Any]:
    """Return {"said", "score", "null"} of a question; best [windows, 4]: what `best_spans` gave for each."""
    score, start, stop, _none = best[best[:, 0].argmax()]
    none = best[:, 3].min()                              # of the window that is least sure that there is none
    spans = text["spans"]
    said = text["context"][spans[2 * int(start)] : spans[2 * int(stop) + 1]].strip()
    if objective.may_be_empty and none - score > objective.null_threshold:
        said = ""
    return {"said": said, "score": float(score), "null": float(none)}


def span_of(objective: Answer, logits: np.ndarray, row: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return [4] what `best_spans` gives for one row; logits [n, 2]."""
    batch = {"ends": torch.tensor([len(logits) - 1]), "window": torch.from_numpy(np.asarray(row["window"], np.int64))[None]}
    return best_spans(torch.from_numpy(logits)[None], batch, most=objective.max_answer_tokens)[0].numpy()    # type: ignore[no-any-return]


def _check(found: Arrays, texts: Sequence[Text]) -> None:
    if not texts or (len(found["example"]) and found["example"].max() >= len(texts)):
        raise DataError(_("the texts of the rows that are judged are not there"),
                        fix=_("delete the prepared folder, so that the rows are prepared again"))
