"""Models of `transformers` that are no family of ours, as they are: one process or data parallel, and no more.

Their code, names and config.json are those of the installed library; what a model brings along is never run.
B rows, T tokens, N positions that are learned from, D width, K classes, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from danlu import chance
from danlu.errors import IncompatibleError
from danlu.models.foreign_config import CLASSES, Foreign, library, strange, write
from danlu.models.names import Name
from danlu.nn import head
from danlu.nn.ahead import Ahead
from danlu.nn.paths import Choice
from danlu.words import _

_OLD = re.compile(r"rotary_emb\.inv_freq$|position_ids$|\.(attn|attention)\.(masked_)?bias$|(^|\.)pooler\.")
_IGNORED = "what this model has no use for"


class _Plan(NamedTuple):
    """The weights of a model by name."""

    theirs: dict[str, str]              # our name -> that in a file
    files: dict[str, str]               # name of a weight in the model of transformers -> that in a file
    tied: dict[str, str]                # … that is another's -> our name of the other
    prefix: str                         # of the model without its head
    modern: Callable[[str], str]        # name in a file -> that in the model of transformers


@lru_cache(maxsize=8)
def _plan(cfg: Foreign) -> _Plan:
    """Return the names of the weights.  IncompatibleError: files hold them otherwise than the model does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    with torch.device("meta"):
        model = ForeignModel(cfg)
    inner, ours = model.inner, list(model.state_dict())
    there = [c for c in get_model_conversion_mapping(inner) if not isinstance(c, PrefixChange)]
    back = [c.reverse_transform() for c in reversed(get_model_conversion_mapping(inner, add_legacy=False))
            if not isinstance(c, PrefixChange)]
    bare = {name: name.removeprefix("heads.") if cfg.tasks else name for name in ours}
    for change in back:
        if isinstance(change, WeightConverter) and any(change.rename_source_key(name)[1] for name in bare.values()):
            raise IncompatibleError(_("files of {family} hold the weights in other pieces than the model does, which is not "
                                      "supported").format(family=cfg.family))
    renamed = {name: _renamed(name, back) for name in bare.values()}
    tied = {_renamed(target, back): model.ours(source) for target, source in inner.all_tied_weights_keys.items()}
    return _Plan({name: renamed[theirs] for name, theirs in bare.items()}, renamed | {name: name for name in tied}, tied,
                 inner.base_model_prefix, lambda name: _renamed(name, there))


def _renamed(name: str, changes: Sequence[Any]) -> str:
    for change in changes:
        name = change.rename_source_key(name)[0]
    return name


def names(cfg: Foreign) -> Iterator[Name]:
    """Yield the name of every weight in a file, and what it is here."""
    plan = _plan(cfg)
    yield from (Name(theirs, (ours,)) for ours, theirs in plan.theirs.items())
    yield from (Name(target, (source,), copy=True) for target, source in plan.tied.items())
    yield Name(_IGNORED, ())


def modern(cfg: Foreign, name: str) -> str:
    """Return what `names` calls a tensor that an older file, or one with another head or none, calls `name`."""
    plan = _plan(cfg)
    for one in (name, plan.modern(name)):
        for each in (one, f"{plan.prefix}.{one}", one.removeprefix(f"{plan.prefix}.")):
            if each in plan.files:
                return plan.files[each]
    return name if name.startswith(f"{plan.prefix}.") and not _OLD.search(name) else _IGNORED


class ForeignModel(nn.Module):
    """A model of transformers under its own names; the head of a task stands under `heads`, as in every model here."""

    def __init__(self, cfg: Foreign) -> None:
        super().__init__()
        try:
            config = library().CONFIG_MAPPING[cfg.family].from_dict(write(cfg))
            config.use_cache = False
            inner = getattr(library(), CLASSES[cfg.head][0]).from_config(config, dtype=torch.float32)
        except Exception as error:                       # as when it is read
            raise strange(error) from None
        self.cfg = cfg
        object.__setattr__(self, "inner", inner)         # not a child, or it would stand before every name
        self.inner: Any
        self.heads, self.blocks = nn.ModuleDict(), nn.ModuleList()       # no block is known as such …
        self.ahead = Ahead()                             # … and nothing is put before the tokens
        for name, child in inner.named_children():
            (self.heads if cfg.tasks and name != inner.base_model_prefix else self).add_module(name, child)
        if next(inner.parameters(recurse=False), None) is not None or (
                cfg.causal and cfg.head == "classify" and not hasattr(inner, "score")):
            raise IncompatibleError(_("transformers has no {family} with the head {head} that is understood here").format(
                family=cfg.family, head=cfg.head))
        self.typed = "token_type_ids" in inspect.signature(inner.forward).parameters
        self.matrix: bool | None = None                  # whether the vocabulary's head is a matrix alone, once it is known
        self.register_state_dict_post_hook(_untied)

    def ours(self, name: str) -> str:
        """Return our name of a weight of the model of transformers."""
        own = not self.cfg.tasks or name.startswith(f"{self.inner.base_model_prefix}.")
        return name if own else f"heads.{name}"

    def forward(self, ids: Tensor, *, positions: Tensor | None = None, segments: Tensor | None = None,
                types: Tensor | None = None, labels: Tensor | None = None, weights: Tensor | None = None,
                ends: Tensor | None = None, starts: Tensor | None = None, last: bool = False) -> dict[str, Any]:
        """Return {"logits" [B, T, V]}, or with labels [B, T] {"lm" or "mlm": Scores}; or what the head of the task says.

        ids, segments, types [B, T], weights [B, T], ends [B] as in our decoders and encoders; segments: 0 is padding, which
        stands at the end, and all else one document.  positions and starts are not used.  `last`: logits [B, 1, V].
        """
        cfg = self.cfg
        if ids.shape[1] > cfg.context:
            raise IncompatibleError(
                _("{n} tokens do not fit the model's context of {context}").format(n=ids.shape[1], context=cfg.context),
                fix=_("shorten the text, or use a model with a longer context"))
        given = {"input_ids": ids}
        if segments is not None:
            real = segments > 0
            if cfg.pad is not None:                      # from which some models count positions
                given["input_ids"] = ids.masked_fill(~real, cfg.pad)
            real[:, 0] = True                            # a row of padding alone would give NaN, and 0 · NaN is no 0
            given["attention_mask"] = real.long()
        if types is not None and self.typed:
            given["token_type_ids"] = types
        return {cfg.tasks[0].name: self._say(given, ends)} if cfg.tasks else self._speak(given, labels, weights, last=last)

    def _say(self, given: dict[str, Tensor], ends: Tensor | None) -> Tensor:
        """Return what the head of the task says: [B, K], [B, T, K] or [B, T, 2]."""
        if self.cfg.causal and self.cfg.head == "classify":      # theirs looks for the last token that is no padding
            x = self.inner.base_model(**given).last_hidden_state
            places = torch.full((len(x),), x.shape[1] - 1, device=x.device) if ends is None else ends
            return self.inner.score(x[torch.arange(len(x), device=x.device), places])    # type: ignore[no-any-return]
        out = self.inner(**given)
        return torch.stack((out.start_logits, out.end_logits), -1) if self.cfg.head == "answer" else out.logits

    def _speak(self, given: dict[str, Tensor], labels: Tensor | None, weights: Tensor | None, *, last: bool) -> dict[str, Any]:
        """Return what the vocabulary's head says; where it is a matrix, [B, T, V] logits are never made in training."""
        if self.matrix is None:
            self.matrix = self._looked(given["input_ids"].device)
        table = self.inner.get_output_embeddings()
        if not self.matrix:
            logits = self.inner(**given).logits
            return {"logits": logits[:, -1:] if last else logits} if labels is None else {
                self.cfg.head: _scores(logits, labels, weights)}
        with _instead(table, lambda x: x):
            x = self.inner(**given).logits               # [B, T, D]
        if labels is None:
            return {"logits": head.logits(x[:, -1:] if last else x, table.weight, table.bias)}
        return {self.cfg.head: head.scores(x, table.weight, labels, weights, bias=table.bias)}

    @torch.no_grad()
    def _looked(self, device: torch.device) -> bool:
        """Return whether the logits are what the output matrix gives, unchanged.

        Raises IncompatibleError where a token of a decoder sees those after it: it would learn to copy.
        """
        cfg, training, table = self.cfg, self.training, self.inner.get_output_embeddings()
        size = min(8, cfg.context)
        ids = torch.arange(size, device=device)[None] % cfg.vocab
        other = torch.where(torch.arange(size, device=device) == size - 1, (ids + 1) % cfg.vocab, ids)
        self.eval()
        try:
            with torch.autocast(device.type, enabled=False):
                if cfg.causal:
                    one, two = (self.inner(input_ids=each).logits[:, :-1] for each in (ids, other))
                    if not torch.allclose(one, two, rtol=0, atol=1e-6 * float(one.abs().max())):
                        raise IncompatibleError(_("in this {family} tokens see those after them, so it cannot learn to "
                                                  "predict them").format(family=cfg.family))
                if type(table) is not nn.Linear:
                    return False
                marked = torch.linspace(-99, 99, size * cfg.vocab, device=device).view(1, size, cfg.vocab)
                with _instead(table, lambda x: marked):
                    return torch.equal(self.inner(input_ids=ids).logits, marked)
        finally:
            self.train(training)

    def use(self, choice: Choice) -> Self:
        """Nothing: transformers computes as it does."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Put the model into training mode, or evaluation."""
        self.inner.training = mode
        return super().train(mode)

    def init(self, seed: int) -> Self:
        """Fill in random weights as transformers does."""
        self._reset(chance.torch_seed(seed, "init"))
        return self

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Give the weights memory, and what no file holds its content."""
        super().to_empty(device=device, recurse=recurse)
        self._mend()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over the weights; those that are tied are another's."""
        whole = {**state_dict, **{self.ours(target): state_dict[self.ours(source)]
                                  for target, source in self.inner.all_tied_weights_keys.items()}}
        made = super().load_state_dict(whole, strict=strict, assign=assign)
        self._mend()
        return made

    def _mend(self) -> None:
        """Tie weights again, and make anew what is neither trained nor stored, such as rotary angles."""
        self.inner.tie_weights(recompute_mapping=False)
        device = next(self.parameters()).device
        if device.type == "meta":
            return
        for module in self.inner.modules():
            for name in module._non_persistent_buffers_set:
                if module._buffers[name] is not None:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        self._reset(None)

    def _reset(self, seed: int | None) -> None:
        """Make all weights anew by `seed`; None: only what no file holds."""
        for module in self.inner.modules():
            module._is_hf_initialized = False
        for tensor in self.inner.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = seed is None
        device = next(self.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if seed is not None:
                torch.manual_seed(seed)
            self.inner.initialize_weights()

    def flops(self, length: int) -> float:
        """Return the FLOPs of training on one token in rows of `length`: 6 for each weight but the table of tokens, if it is
        not the head, too; attention in full.  Of experts all are counted."""
        table = self.inner.get_input_embeddings().weight
        out = None if self.cfg.tasks else self.inner.get_output_embeddings()
        free = 0 if out is not None and out.weight is table else table.numel()
        return 6.0 * (sum(p.numel() for p in self.parameters()) - free) + 12.0 * self.cfg.layers * self.cfg.width * length


def _untied(module: Any, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Leave out of `state` the weights that are another's."""
    for name in module.inner.all_tied_weights_keys:
        state.pop(prefix + module.ours(name), None)


@contextmanager
def _instead(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `module` compute something else for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _scores(logits: Tensor, labels: Tensor, weights: Tensor | None) -> head.Scores:
    """Return what `head.scores` does, of logits [B, T, V]."""
    index = head.learned(labels if weights is None else weights, everything=weights is None)
    x = head.select(logits.flatten(0, 1), index).float()                                        # [N, V]
    logz = x.logsumexp(-1)
    chosen = head.select(labels.flatten(), index)
    return head.Scores(x.gather(1, chosen[:, None])[:, 0] - logz, logz, x.mean(-1) - logz, index)
