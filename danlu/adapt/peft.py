"""Words of `peft`: what it calls kinds, tasks and modules.  `pack` and `unpack` are the two ways of the tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from danlu.adapt import Adapter
from danlu.adapt.targets import Site, kept
from danlu.models import weights
from danlu.models.build import Config, build
from danlu.models.decoder import Decoder

VERSION = "0.21.2"                      # of the layout that is written
VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
TYPES: dict[str, str] = {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING", "ptuning": "P_TUNING",
                         "prefix": "PREFIX_TUNING"}
TASKS: dict[str, str | None] = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "answer": "QUESTION_ANS", "choose": None,
                                "embed": "FEATURE_EXTRACTION"}
def shapes(adapt: Adapter, cfg: Config) -> dict[str, torch.Size]:
    """Return the name and shape of every tensor that belongs to the adapter: what is trained or was added."""
    model = build(cfg)
    adapt.apply(model)
    wanted = set(kept(model, cfg))
    return {name: t.shape for name, t in model.state_dict().items() if name in wanted}


def task_of(cfg: Config) -> str | None:
    """Return PEFT's word for what the model is for, None where it has none."""
    if len(cfg.tasks) == 1:
        return TASKS[cfg.tasks[0].kind]
    if isinstance(cfg, Decoder):
        return "CAUSAL_LM" if cfg.lm else None
    return None if cfg.outputs or cfg.tasks else "FEATURE_EXTRACTION"


def modules(cfg: Config) -> set[str]:
    """Return all modules with tensors of the Hugging Face model."""
    return {name.theirs.rpartition(".")[0] for name in weights.named(cfg)}


def shortest(wanted: Collection[str], among: Iterable[str]) -> list[str]:
    """Return the shortest endings of paths that mean all of `wanted` and, of `among`, nothing else."""
    others, found = set(among) - set(wanted), set()
    for path in wanted:
        parts = path.split(".")
        endings = (".".join(parts[n:]) for n in range(len(parts) - 1, -1, -1))
        found.add(next(e for e in endings if e == path or not any(o == e or o.endswith(f".{e}") for o in others)))
    return sorted(found)


def embeds(site: Site) -> bool:
    """Return whether the module is an embedding."""
    return site.ours[0] in ("embed", "position")
