"""Several adapters on one base, switched by name: the base's weights are in memory once, and nothing is read or copied."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from danlu.adapt import folder as adapters
from danlu.errors import ConfigError
from danlu.models import weights
from danlu.models.build import Config, Network, build
from danlu.words import _


class Switch:
    """A base and the adapters that were added to it.  Each is a model of its own, whose base weights are the same tensors."""

    def __init__(self, base: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.base, self.device, self.dtype = Path(base), torch.device(device), dtype
        if (self.base / weights.PACKED).is_file():       # adapters lie on whole weights
            weights.read_tensors(self.base)
        plain = weights.load(self.base, device=device, dtype=dtype).eval()
        self.state: dict[str, Tensor] = dict(plain.state_dict())
        self.models: dict[str | None, Network] = {None: plain}

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return [name for name in self.models if name is not None]

    def add(self, name: str, folder: str | Path) -> None:
        """Read the adapter in `folder` as `name`.  Raises ConfigError if there is one, IncompatibleError for another base."""
        if name in self.models:
            raise ConfigError(_("there is an adapter {name} already").format(name=name), where=str(folder),
                              fix=_("choose another name"))
        opened = adapters.describe(folder, base=self.base)
        stored = {n: t.to(self.device, self.dtype).contiguous() for n, t in adapters.tensors(opened).items()}
        self.models[name] = self._made(opened.cfg, opened.adapt, stored)

    def _made(self, cfg: Config, adapt: adapters.Adapter, stored: dict[str, Tensor]) -> Network:
        model = build(cfg)
        adapt.apply(model)
        shared = {name: self.state[name] for name in weights.shapes(cfg) if name not in stored}
        model.load_state_dict(shared | stored, strict=True, assign=True)
        return model.eval()

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        self.use(name)
        del self.models[name]

    def use(self, name: str | None) -> Network:
        """Return the model with the adapter `name`; None: the base alone.  Raises ConfigError if it was never added."""
        if name not in self.models:
            raise ConfigError(_("there is no adapter {name}; there are {names}").format(
                name=name, names=", ".join(self.names) or "-"), where=str(self.base))
        return self.models[name]
