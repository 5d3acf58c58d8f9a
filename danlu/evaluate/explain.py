"""What a model of a task looks at: how much each token moves what it says, and where its attention lies.

T tokens, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from danlu.data.encode import encode
from danlu.data.example import Asked, Content, Labelled, Tagged, Unusable
from danlu.errors import ConfigError, DataError, IncompatibleError
from danlu.evaluate import rows
from danlu.evaluate.lines import Line, row_of
from danlu.evaluate.tell import tell, unlabelled
from danlu.nn.collective import numbered
from danlu.objectives import Answer, Classify, Regress, Tag
from danlu.objectives.protocol import UNLEARNED
from danlu.words import _

STEPS = (64, 256, 1024)                                  # of the integral: more where a share of it would be missed
MISSED = 0.01


class Explained(NamedTuple):
    """What a model says of a text, and why."""

    told: dict[str, Any]                                 # as `danlu predict` tells it
    target: str                                          # what the scores are about
    tokens: list[str]                                    # [T]
    scores: list[float]                                  # [T] share of each token in the logit, beside a text of padding
    gap: float                                           # what the scores miss of that difference: 0 for an exact integral
    attention: np.ndarray                                # [L, T, T] mean over the heads: from each token to each other


def explain(task: rows.Task, texts: tuple[str, ...], *, target: str | None = None, word: int | None = None,
            attention: bool = True) -> Explained:
    """Return what the model says of a text, or of two, with integrated gradients (Sundararajan et al., 2017) and attention.

    target: the class that is asked about (default: the one it says); word: whose tag is asked about (default: the first that is
    not O).  Of an answer both its ends are asked about.  attention: whether it is looked at, too.
    Raises ConfigError or DataError for texts and targets that do not fit.
    """
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError:
        raise ConfigError(_("explanations are made by an extra"), fix='pip install "danlu[explain]"') from None
    model: Any = task.subject.model
    content, line = _line(task, texts)
    batch = rows.collated(task.objective, [unlabelled(line.rows[0], task.objective)], task.subject.tokenizer.special, task.length)
    inputs = {name: batch[name].to(task.device) for name in task.objective.inputs if name in batch}
    (_row, outs), = rows.answered(task, [line])
    told = tell(task.objective, outs, line)
    name, read = _asked(task, outs[0], told, target, word, line, content)
    ids, others = inputs.pop("ids"), tuple(inputs.items())

    def said(given: Tensor, *rest: Tensor) -> Tensor:
        return read(model(given, **dict(zip((key for key, _value in others), rest, strict=True)))[task.objective.heads[0]])

    blank = _blank(task, ids)
    for steps in STEPS:
        found, gap = LayerIntegratedGradients(said, model.embed).attribute(
            ids, baselines=blank, additional_forward_args=tuple(value for _key, value in others), n_steps=steps,
            internal_batch_size=32, return_convergence_delta=True)
        if abs(float(gap)) <= MISSED * float(found.sum(-1).abs().sum()):
            break
    size = len(line.rows[0]["ids"])
    tokens = [task.subject.tokenizer.decode([int(i)]) for i in ids[0, :size]]
    seen = _attention(model, ids, dict(others), size) if attention else np.zeros((0, size, size), np.float32)
    return Explained(told, name, tokens, found[0, :size].sum(-1).tolist(), float(gap), seen)


def _line(task: rows.Task, texts: tuple[str, ...]) -> tuple[Content, Line]:
    wants = task.objective.wants
    if wants not in ("label", "labels", "score", "tags", "answer"):
        raise IncompatibleError(_("what a {kind} model says is not explained yet").format(kind=task.objective.kind),
                                where=str(task.subject.folder))
    if wants == "answer" and len(texts) != 2:
        raise ConfigError(_("a question needs the text that holds its answer"), where="--text", fix="--text QUESTION --pair TEXT")
    content: Content = (Tagged(tuple(texts[0].split()), None) if wants == "tags" else Asked(texts[0], texts[1], ())
                        if wants == "answer" else Labelled(texts, None))
    try:
        made = encode(content, task.encoder())
    except Unusable as error:
        raise DataError(error.detail, where="--text", fix="--overlong cut") from None
    if len(made) > 1:
        raise DataError(_("the text is longer than a row, and only one row is explained"), where="--text", fix=_("shorten it"))
    line = Line("--text", 1, {}, texts[0] if len(texts) == 1 else list(texts), None, content, tuple(map(row_of, made)),
                kept=made[0].text)
    return content, line


def _asked(task: rows.Task, said: np.ndarray, told: Mapping[str, Any], target: str | None, word: int | None,  # noqa: PLR0917
           line: Line, content: Content) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the name of what is asked about, and what reads its logit [B] off a head's output."""
    objective = task.objective
    labels = tuple(getattr(objective, "labels", ()))
    if target is not None and target not in labels:
        raise ConfigError(_("there is no class {name!r}; there are {names}").format(name=target, names=", ".join(labels) or "-"),
                          where="--target")
    if isinstance(objective, Classify):
        number = labels.index(target) if target is not None else int(said.argmax())
        return labels[number], lambda out: out[:, number]
    if isinstance(objective, Regress):
        return objective.name, lambda out: out.reshape(len(out), -1)[:, 0]
    if isinstance(objective, Tag) and isinstance(content, Tagged):
        tags = list(told["predicted"])
        chosen = word if word is not None else next((i for i, tag in enumerate(tags) if tag != "O"), 0)
        if not 0 <= chosen < len(tags):
            raise ConfigError(_("word {n} is not among 0..{last}").format(n=chosen, last=len(tags) - 1), where="--word")
        place = int(np.flatnonzero(line.rows[0]["tags"] != UNLEARNED)[chosen])
        number = labels.index(target if target is not None else tags[chosen])
        return f"{content.words[chosen]}: {labels[number]}", lambda out: out[:, place, number]
    assert isinstance(objective, Answer)
    first, last = _ends(objective, said, line)
    return str(told["predicted"]), lambda out: out[:, first, 0] + out[:, last, 1]


def _ends(objective: Answer, said: np.ndarray, line: Line) -> tuple[int, int]:
    """Return the first and last token of the likeliest stretch of the text."""
    start = int(line.rows[0]["parts"][0])
    inside = slice(start, len(said))
    scores = said[inside, 0][:, None] + said[inside, 1][None]
    allowed = np.triu(np.ones_like(scores, bool)) & ~np.triu(np.ones_like(scores, bool), objective.max_answer_tokens)
    first, last = np.unravel_index(int(np.where(allowed, scores, -np.inf).argmax()), scores.shape)
    return start + int(first), start + int(last)


def _blank(task: rows.Task, ids: Tensor) -> Tensor:
    """Return the ids with padding in place of every token that is not special."""
    special = task.subject.tokenizer.special
    filler = next((i for i in (special.pad, special.unk, special.eos) if i is not None), 0)
    kept = torch.from_numpy(np.asarray(special.reserved)).to(ids.device)[ids]
    return torch.where(kept, ids, filler)


def _attention(model: Any, ids: Tensor, others: Mapping[str, Tensor], size: int) -> np.ndarray:
    blocks = [block for _number, block in numbered(model.blocks)]
    for block in blocks:
        block.attention.watch = []
    try:
        with torch.no_grad():
            model(ids, **others)
        seen = [block.attention.watch[0][0, :, :, -ids.shape[1]:].mean(0) for block in blocks]
    finally:
        for block in blocks:
            block.attention.watch = None
    return torch.stack([one[-ids.shape[1]:][:size, :size] for one in seen]).float().cpu().numpy()
