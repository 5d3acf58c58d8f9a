"""Which parts of a model an adapter means, by our names or Hugging Face's, and what of the model is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from danlu.errors import ConfigError
from danlu.models import weights
from danlu.models.build import Config
from danlu.words import _


class Site(NamedTuple):
    """A module of the Hugging Face model that has a weight, and what of ours it is."""

    theirs: str
    ours: tuple[str, ...]               # several where theirs is one fused matrix (GPT-2's c_attn)
    turned: bool                        # theirs is transposed (GPT-2's Conv1D)


def sites(cfg: Config) -> list[Site]:
    """Return all modules with a weight of the model that `cfg` describes, in Hugging Face's order."""
    return [Site(name.theirs.removesuffix(".weight"), tuple(o.removesuffix(".weight") for o in name.ours), name.turned)
            for name in weights.named(cfg) if name.ours and not name.copy and name.theirs.endswith(".weight")]


def theirs(cfg: Config) -> dict[str, str]:
    """Return Hugging Face's module for each of ours."""
    return {ours: site.theirs for site in sites(cfg) for ours in site.ours}


def matches(pattern: str, *names: str) -> bool:
    """Return whether `pattern` means a module of these names: its last parts, or with * and ? the whole of it."""
    return any(name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern) for name in names if name)


def chosen(model: Any, target: str | Sequence[str], *, embeddings: bool) -> list[tuple[str, Any]]:
    """Return (name, module) of the layers that `target` means; "all" are the linear layers of the blocks.

    Raises ConfigError for a pattern that means none, or one that cannot be adapted.
    """
    foreign = model.cfg.kind == "foreign"                # whose embeddings and own kinds of layers may compute something else
    named, kinds = theirs(model.cfg), (nn.Linear, nn.Embedding) if embeddings and not foreign else (nn.Linear,)
    able = {name: module for name, module in model.named_modules()
            if isinstance(module, kinds) and not (foreign and type(module) is not nn.Linear)
            and name not in ("head", "types") and not name.startswith("heads.")}
    if target == "all":
        inside = f"{model.inner.base_model_prefix}." if foreign else "blocks."
        return [(name, module) for name, module in able.items()
                if name.startswith(inside) and isinstance(module, nn.Linear) and "pooler" not in name.split(".")]
    found: dict[str, Any] = {}
    for pattern in [target] if isinstance(target, str) else target:
        here = {name: module for name, module in able.items() if matches(pattern, name, named.get(name, ""))}
        if not here:
            raise ConfigError(_("no layer that could be adapted is called {name!r}; there are {names}").format(
                name=pattern, names=", ".join(sorted({name.rsplit(".", 1)[-1] for name in able}))), where="adapt.target")
        found |= here
    return [(name, module) for name, module in able.items() if name in found]


def linears(model: Any, *, keep: tuple[str, ...] = (), also: tuple[str, ...] = (),
            where: str = "--", kinds: tuple[type[nn.Linear], ...] = (nn.Linear,)) -> dict[str, nn.Linear]:
    """Return the linear layers of `model` but for heads, by name; without those that `keep` means, with those of `also`.

    Raises ConfigError for a name that means no layer; `where` is said before "keep" and "also".
    """
    foreign = model.cfg.kind == "foreign"
    table = model.inner.get_output_embeddings() if foreign and not model.cfg.tasks else None
    able = {name: layer for name, layer in model.named_modules() if type(layer) in kinds and layer is not table}
    known = theirs(model.cfg)

    def named(patterns: tuple[str, ...], option: str) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            here = {name for name in [*able, "embed"] if matches(pattern, name, known.get(name, ""))}
            if not here:
                raise ConfigError(_("no layer is called {name!r}; there are {names}").format(
                    name=pattern, names=", ".join(sorted({name.rsplit(".", 1)[-1] for name in able}))), where=where + option)
            found |= here
        return found

    kept, more = named(keep, "keep"), named(also, "also")
    return {name: layer for name, layer in able.items() if name not in kept
            and (name in more or not (name == "head" or name.startswith("heads.") or name.startswith("pairs.")))}


def freeze(model: Any, kept: Sequence[str]) -> None:
    """Let nothing of `model` learn but a task's heads and the modules that `kept` means.  ConfigError: there is no such."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    named, twice = theirs(model.cfg), {"embed"} if model.cfg.kind != "foreign" and model.cfg.tied else set()
    if model.cfg.kind == "foreign":
        twice = {name.rpartition(".")[0] for pair in model.inner.all_tied_weights_keys.items() for name in pair}
    for pattern in kept:
        here = [name for name, module in model.named_modules() if name and matches(pattern, name, named.get(name, ""))
                and any(True for _parameter in module.parameters())]
        if not here:
            raise ConfigError(_("there is no module {name!r}").format(name=pattern), where="adapt.modules_to_save")
        if twice & set(here):
            raise ConfigError(_("the head reads the token embedding, too: it cannot be saved as a part of its own"),
                              where="adapt.modules_to_save", fix=_("leave it out, or use adapt=freeze"))
        for name in here:
            model.get_submodule(name).requires_grad_(True)
    for site in sites(model.cfg):
        learns = [model.get_submodule(ours).weight.requires_grad for ours in site.ours]
        if any(learns) and not all(learns):
            raise ConfigError(_("{names} are one matrix in the Hugging Face layout, {theirs}: name all of them").format(
                names=", ".join(ours.rsplit(".", 1)[-1] for ours in site.ours), theirs=site.theirs),
                where="adapt.modules_to_save")
    for name, parameter in model.named_parameters():
        parameter.requires_grad |= name.startswith("heads.")


def kept(model: Any, cfg: Config) -> Iterator[str]:
    """Yield the names of `model`'s tensors that a checkpoint must hold beside the base: what is trained or was added."""
    base = weights.shapes(cfg).keys()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name not in base:
            yield name
