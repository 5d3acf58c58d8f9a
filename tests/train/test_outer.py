"""The outer step of replicas that step alone; that it is the paper's is shown in tests/parallel."""

from __future__ import annotations

import pytest
import torch

from danlu.layout import Local
from danlu.models.build import build
from danlu.models.decoder import Decoder
from danlu.optim import GD, LAMB, AdamW, Lion, Muon, Optim
from danlu.parallel import World
from danlu.parallel.place import alone
from danlu.train.outer import SLOT, Outer


@pytest.mark.parametrize("optim", [AdamW(), Muon(), LAMB(), Lion(), GD()], ids=lambda o: o.kind)
def test_replicas_may_meet_before_their_first_update(optim: Optim) -> None:
    # as under fp16, whose first updates are often skipped
    model = build(Decoder(family="gpt2", width=8, layers=1, heads=2, vocab=16, context=8))
    model.to_empty(device="cpu")
    leaves = alone(model.init(0)).leaves()
    optimizer = optim.build((leaf.name, leaf.local) for leaf in leaves)
    outer = Outer(Local(steps=2), leaves, World())
    outer.meet(optimizer)
    for leaf in leaves:
        leaf.local.grad = torch.ones_like(leaf.local)
    optimizer.step()
    outer.meet(optimizer)
    assert all(SLOT in optimizer.state[leaf.local] for leaf in leaves)
