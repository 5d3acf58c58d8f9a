"""Do two artefacts say the same?  Logits, text, prompts, where they stop; and parity.json, which travels with the second.

T tokens of a row, K classes, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

import danlu
from danlu import files
from danlu.config import Model
from danlu.errors import DanluError
from danlu.export.protocol import Artefact, Heads, Names, Reads, Said, Says, Tells
from danlu.export.texts import DIALOGUES
from danlu.export.told import Profile, causes
from danlu.train import receipt
from danlu.words import _

FILE = "parity.json"
OF_ROWS = ("logits", "KL", "top-1", "cosine", "greedy")  # the checks of what a model says of rows
PROMPTS, PROMPT, NEW = 3, 8, 16                  # of the greedy continuation: how many, tokens of each, new ones


class Limits(Model):
    """What may differ.  None: shown, not judged."""

    difference: float | None = Field(1e-3, ge=0)     # of any logit, in standard deviations of the first artefact's logits
    kl: float | None = Field(None, ge=0)             # mean over positions, nats
    top1: float | None = Field(1.0, ge=0, le=1)      # share of positions with the same likeliest, ties within `difference` apart
    cosine: float | None = Field(None, ge=-1, le=1)  # of vectors, mean
    greedy: bool = True                              # whether continuations must be equal, such ties left out
    ids: bool = True                                 # … and the ids of texts, with what they come back as


EXACT = Limits()
ROUNDED = {"bf16": Limits(difference=0.1, kl=0.01, top1=1.0), "fp16": Limits(difference=1e-2, kl=1e-3, top1=1.0)}
QUANTIZED = {8: Limits(difference=None, kl=0.02, top1=0.95, cosine=0.98, greedy=False),
             4: Limits(difference=None, kl=0.3, top1=0.8, cosine=0.9, greedy=False)}


def limits_of(kind: str, *, dtype: str = "fp32", bits: int = 8) -> Limits:
    """Return what may differ by the kind of the second artefact: rounding in fp32, in few bits of weights, in few bits."""
    if kind == "quantized":
        return QUANTIZED[8 if bits > 4 else 4]
    return ROUNDED.get(dtype, EXACT)


State = Literal["green", "red", "shown", "not compared"]


class Check(NamedTuple):
    """One thing compared."""

    name: str
    state: State
    value: float | None = None
    limit: float | None = None
    told: str = ""                               # the first difference, or why it was not compared


class Report(NamedTuple):
    """What was found."""

    a: tuple[str, str]                           # name and kind
    b: tuple[str, str]
    checks: tuple[Check, ...]
    causes: tuple[str, ...]                      # what a red check most likely comes from
    rows: int
    tokens: int
    texts: int
    basis: str                                   # hash of the rows and texts that were compared on

    @property
    def green(self) -> bool:
        """Whether nothing is red and what is said of rows was compared."""
        return all(c.state != "red" for c in self.checks) and any(c.state == "green" and c.name in OF_ROWS for c in self.checks)

    @property
    def red(self) -> tuple[str, ...]:
        """The names of the red checks."""
        return tuple(c.name for c in self.checks if c.state == "red")

    def record(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {"schema": 1, "green": self.green, "a": dict(zip(("name", "kind"), self.a, strict=True)),
                "b": dict(zip(("name", "kind"), self.b, strict=True)), "checks": [c._asdict() for c in self.checks],
                "causes": list(self.causes), "rows": self.rows, "tokens": self.tokens, "texts": self.texts, "basis": self.basis}


def compare(a: Artefact, b: Artefact, rows: Sequence[Sequence[int]], texts: Sequence[str], *, limits: Limits = EXACT,
            dialogues: Sequence[Sequence[Mapping[str, str]]] = DIALOGUES) -> Report:
    """Return how far `b` is from `a` on rows of ids (each short enough for both), texts and conversations.

    What one of the two has no word for is not compared, and the report says so.
    """
    given = [list(row) for row in rows if len(row)]
    checks = list[Check]()
    profile = Profile()
    if given:
        checks += _of_heads(a, b, given, limits, profile)
    else:
        checks.append(Check("logits", "not compared", told=_("there are no rows")))
    text = [_ids(a, b, texts), _back(a, b, texts)]
    checks += text if limits.ids else [c._replace(state="shown") if c.state == "red" else c for c in text]
    checks += [_prompts(a, b, dialogues), _ends(a, b), _labels(a, b)]
    red = frozenset(c.name for c in checks if c.state == "red")
    return Report((a.name, a.kind), (b.name, b.kind), tuple(checks), causes(red, profile), len(given), sum(map(len, given)),
                  len(texts), files.digest([given, list(texts), [list(map(dict, d)) for d in dialogues]]))


def _of_heads(a: Artefact, b: Artefact, rows: list[list[int]], limits: Limits, profile: Profile) -> list[Check]:
    """Compare what each head says of rows; of each check the head that does worst in it."""
    if not isinstance(a, Heads) or not isinstance(b, Heads) or not (a.heads() or b.heads()):
        return _logits(a, b, rows, limits, profile)
    mine, theirs = a.heads(), b.heads()
    if set(mine) != set(theirs):
        return [Check("heads", "red", told=_("{a} here, {b} there").format(a=mine, b=theirs))]
    found: dict[str, Check] = {}
    for head in (*mine[1:], mine[0]):                        # the first is left to be asked about its labels
        a.ask(head)
        b.ask(head)
        for check in _logits(a, b, rows, limits, profile):
            named = check._replace(told=f"{head}: {check.told}" if check.told else head)
            if check.name not in found or (check.state == "red" and found[check.name].state != "red"):
                found[check.name] = named
    return list(found.values())


def _logits(a: Artefact, b: Artefact, rows: list[list[int]], limits: Limits, profile: Profile) -> list[Check]:
    """Compare what is said of rows, number by number and as distributions, then what follows them."""
    said = list[tuple[Said, Said]]()
    for row in rows:
        mine = a.logits(row)
        try:
            said.append((Said(row, mine), Said(row, b.logits(row))))
        except Exception as error:                           # every runtime has classes of its own for an id it does not know
            return [Check("logits", "red", told=_("a row of {n} ids cannot be read: {why}").format(
                n=len(row), why=str(error).splitlines()[0][:80] if str(error) else type(error).__name__))]
    for one, other in said:
        if one.logits.shape != other.logits.shape:
            return [Check("shape", "red", told=_("{a} here, {b} there").format(a=one.logits.shape, b=other.logits.shape))]
    first, second = (np.concatenate([pair[side].logits.reshape(-1, pair[side].logits.shape[-1]) for pair in said])
                     for side in (0, 1))                                                     # [N, K]
    spread = float(first.std())
    apart = float(np.abs(first - second).max())
    allowed = None if limits.difference is None else limits.difference * spread
    unlike = apart if spread == 0 else apart / spread
    found = [_judged("logits", unlike, limits.difference,
                     _("at most {apart:.3g} apart; standard deviation {spread:.3g}").format(apart=apart, spread=spread))]
    says: Says = next((one.says() for one in (a, b) if isinstance(one, Tells)), "classes")
    if says == "vector":
        found.append(_cosine(first, second, limits))
    elif first.shape[-1] > 1:                                                                # one number is no distribution
        p, q = (first, second) if says == "classes" else (_over_places([pair[side].logits for pair in said]) for side in (0, 1))
        found.append(_judged("KL", float(_kl(p, q).mean()), limits.kl))
        found.append(_top1(p, q, 2 * (allowed or 0.0), limits))
    if any(c.state == "red" for c in found):
        _look(a, b, said, allowed if allowed is not None else EXACT.difference * spread, profile)   # type: ignore[operator]
    if _continues(a, said[0][0]):
        found.append(_greedy(a, b, rows, 2 * (allowed or 0.0), limits))
    return found


def _judged(name: str, value: float, limit: float | None, told: str = "") -> Check:
    """Return a check that is green where value ≤ limit; what is no number is red."""
    if not np.isfinite(value):
        return Check(name, "red", None, limit, _("not a number"))
    return Check(name, "shown" if limit is None else "green" if value <= limit else "red", value, limit, told)


def _kl(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return KL(first ‖ second) [N] of logits [N, K], nats."""
    p, q = (x - x.max(-1, keepdims=True) for x in (first, second))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    kl: np.ndarray = np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
    return kl


def _over_places(said: Sequence[np.ndarray]) -> np.ndarray:
    """Return scores [T, 2] of rows as [2 N, longest T]: where an answer begins, and where it ends; the rest cannot be."""
    longest = max(map(len, said))
    return np.concatenate([np.pad(one.T, ((0, 0), (0, longest - len(one))), constant_values=-1e30) for one in said])


def _cosine(first: np.ndarray, second: np.ndarray, limits: Limits) -> Check:
    """Compare the directions of vectors [N, D]."""
    sizes = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    found = (first * second).sum(-1) / np.maximum(sizes, 1e-30)
    mean, least = float(found.mean()), float(found.min())
    if not np.isfinite(mean):
        return Check("cosine", "red", None, limits.cosine, _("not a number"))
    state: State = "shown" if limits.cosine is None else "green" if mean >= limits.cosine else "red"
    return Check("cosine", state, mean, limits.cosine, _("the least is {least:.4g}").format(least=least))


def _top1(first: np.ndarray, second: np.ndarray, tie: float, limits: Limits) -> Check:
    """Compare the likeliest of [N, K]; where the first two of `first` are within `tie`, either is right."""
    best, other = first.argmax(-1), second.argmax(-1)
    margin = first.max(-1) - np.take_along_axis(first, other[:, None], -1)[:, 0]
    wrong = (best != other) & ~(margin <= tie)
    share = 1.0 - float(wrong.mean())
    told = ""
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        told = _("first at position {at}: {a} and {b}, margin {margin:.3g}").format(
            at=at, a=int(best[at]), b=int(other[at]), margin=float(margin[at]))
    state: State = "shown" if limits.top1 is None else "green" if share >= limits.top1 else "red"
    return Check("top-1", state, share, limits.top1, told)


def _continues(a: Artefact, said: Said) -> bool:
    """Return whether the artefact is a language model that reads from left to right, so that it can write."""
    ids, logits = said
    if logits.ndim != 2 or len(logits) != len(ids) or len(ids) < 2 or logits.shape[1] <= max(ids):
        return False
    return bool(np.allclose(a.logits(ids[:-1])[-1], logits[-2], atol=1e-2 * float(logits.std()) + 1e-9, rtol=0))


def _greedy(a: Artefact, b: Artefact, rows: list[list[int]], tie: float, limits: Limits) -> Check:
    """Let both write the likeliest token, again and again, after the beginnings of some rows."""
    written, ends = 0, a.ends() or frozenset()
    for row in rows[:PROMPTS]:
        read = row[:PROMPT]
        for number in range(min(NEW, max(map(len, rows)) - len(read))):
            mine, theirs = a.logits(read)[-1], b.logits(read)[-1]
            best, other = int(mine.argmax()), int(theirs.argmax())
            if best != other:
                margin = float(mine[best] - mine[other])
                state: State = "green" if margin <= tie else "red" if limits.greedy else "shown"
                return Check("greedy", state, float(number), None, _("new token {n}: {a} here and {b} there, margin {m:.3g}{tie}")
                             .format(n=number + 1, a=best, b=other, m=margin, tie=_(", a tie") if margin <= tie else ""))
            read = [*read, best]
            written += 1
            if best in ends:
                break
    return Check("greedy", "green" if written else "not compared", float(written), None,
                 _("{n} tokens, all equal").format(n=written))


def _look(a: Artefact, b: Artefact, said: list[tuple[Said, Said]], allowed: float, profile: Profile) -> None:
    """Find out where the difference begins."""
    head = said[0][0].ids[:1]
    alone = a.logits(head) - b.logits(head)
    profile.one_token_agrees = bool(np.abs(alone).max() <= allowed)
    if all(np.abs(np.sort(x.logits, -1) - np.sort(y.logits, -1)).max() <= allowed for x, y in said):
        profile.permuted = True
    logits, others = said[0][0].logits, said[0][1].logits
    if logits.ndim == 2 and len(logits) == len(said[0][0].ids):
        bad = np.flatnonzero(np.abs(logits - others).max(-1) > allowed)
        profile.first_position = int(bad[0]) if len(bad) else None


def _asked(ask: Callable[[str], Any], text: str) -> Any:
    """Return what is answered, or the error that says why not."""
    try:
        return ask(text)
    except DanluError as error:
        return error


def _ids(a: Artefact, b: Artefact, texts: Sequence[str]) -> Check:
    same, refused = 0, 0
    for text in texts:
        mine, theirs = _asked(a.encode, text), _asked(b.encode, text)
        if mine is None or theirs is None:
            return Check("ids", "not compared", told=_no_tokenizer(a if mine is None else b))
        if isinstance(mine, DanluError):
            refused += 1                                     # a vocabulary that cannot say it: no artefact is at fault
            continue
        if isinstance(theirs, DanluError) or mine != theirs:
            if isinstance(theirs, DanluError):
                return Check("ids", "red", float(same), None, _("{text!r}: {why}").format(text=text[:40], why=theirs.what))
            at = next((i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), min(len(mine), len(theirs)))
            return Check("ids", "red", float(same), None, _("{text!r}, from id {at}: {a} here, {b} there").format(
                text=text[:40], at=at, a=mine[at:at + 6], b=theirs[at:at + 6]))
        same += 1
    told = _("{n} texts").format(n=same) + (_(", {n} refused").format(n=refused) if refused else "")
    return Check("ids", "green" if same else "not compared", float(same), None, told)


def _back(a: Artefact, b: Artefact, texts: Sequence[str]) -> Check:
    """Compare the texts that ids come back as."""
    if not isinstance(a, Reads) or not isinstance(b, Reads):
        return Check("round trip", "not compared", told=_no_tokenizer(b if isinstance(a, Reads) else a))
    same = exact = 0
    for text in texts:
        ids = _asked(a.encode, text)
        if ids is None or isinstance(ids, DanluError):
            continue
        mine, theirs = a.decode(ids), b.decode(ids)
        if mine is None or theirs is None:
            return Check("round trip", "not compared", told=_no_tokenizer(a if mine is None else b))
        if mine != theirs:
            return Check("round trip", "red", float(same), None, _("{a!r} here, {b!r} there").format(a=mine[:40], b=theirs[:40]))
        same += 1
        exact += mine == text
    return Check("round trip", "green" if same else "not compared", float(same), None,
                 _("{n} texts come back alike, {m} of them as they were").format(n=same, m=exact))


def _no_tokenizer(one: Artefact) -> str:
    return _("{name} has no tokenizer of its own").format(name=one.name)


def _prompts(a: Artefact, b: Artefact, dialogues: Sequence[Sequence[Mapping[str, str]]]) -> Check:
    same = refused = 0
    for said in dialogues:
        mine, theirs = _asked(a.render, said), _asked(b.render, said)     # type: ignore[arg-type]
        if mine is None or theirs is None:
            told = _("{name} has no chat template").format(name=(a if mine is None else b).name)
            lost = mine is not None and b.encode("a") is not None        # a tokenizer came along, and its template did not
            return Check("prompts", "red" if lost else "not compared", told=told)
        if isinstance(mine, Exception) and isinstance(theirs, Exception):
            refused += 1
            continue
        if mine != theirs:
            return Check("prompts", "red", float(same), None, _parting(str(mine), str(theirs)))
        same += 1
    told = _("{n} conversations, byte for byte").format(n=same) + (_(", {n} refused").format(n=refused) if refused else "")
    return Check("prompts", "green" if same else "not compared", float(same), None, told)


def _parting(mine: str, theirs: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), min(len(mine), len(theirs)))
    return _("from character {at}: {a!r} here, {b!r} there").format(at=at, a=mine[at:at + 30], b=theirs[at:at + 30])


def _ends(a: Artefact, b: Artefact) -> Check:
    mine, theirs = a.ends(), b.ends()
    if mine is None or theirs is None:
        return Check("stops", "not compared", told=_("{name} does not write").format(name=(a if mine is None else b).name))
    told = _("ids {ids}").format(ids=sorted(mine)) if mine == theirs else _("{a} here, {b} there").format(
        a=sorted(mine), b=sorted(theirs))
    return Check("stops", "green" if mine == theirs else "red", None, None, told)


def _labels(a: Artefact, b: Artefact) -> Check:
    mine = a.labels() if isinstance(a, Names) else None
    theirs = b.labels() if isinstance(b, Names) else None
    if mine is None or theirs is None:
        return Check("labels", "not compared", told=_("{name} names no classes").format(name=(a if mine is None else b).name))
    if mine == theirs:
        return Check("labels", "green", float(len(mine)), None, _("{n} classes").format(n=len(mine)))
    at = next((i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), min(len(mine), len(theirs)))
    return Check("labels", "red", None, None, _("class {at}: {a} here, {b} there").format(
        at=at, a=mine[at:at + 1], b=theirs[at:at + 1]))


def write(report: Report, folder: Path, *, source: Path | None = None) -> None:
    """Write parity.json into the artefact's folder: the report, the hash of every file, and of what it was made from.

    source: the folder with the weights it was made from.  It is told by the hash of its content, for `danlu lineage`.
    """
    made = {p.relative_to(folder).as_posix(): files.sha256(p) for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != FILE and not p.name.startswith(".")}
    content = report.record() | ({} if source is None else {"source": receipt.stamp(source)}) | {
        "files": made, "danlu": danlu.__version__, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    files.write_json(folder / FILE, content | {"fingerprint": files.digest(content)})
