"""What is said of a few ids of each token, against all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from danlu.nn import candidates, head


@pytest.mark.parametrize("soften", [None, 2.5])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_the_full_softmax(soften: float | None, biased: bool,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "CHUNK_BYTES", 256)
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()
                            for shape in ((9, 6), (13, 6), (13,)))
    by = [hidden, weight, *([bias] if biased else [])]
    ids = torch.randint(13, (9, 4), generator=draw)
    up = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    temperature = None if soften is None else torch.tensor([soften], dtype=torch.float64)
    logits = hidden @ weight.T + (bias if biased else 0)
    wanted = F.log_softmax(logits / (soften or 1), -1).gather(1, ids)
    grads = torch.autograd.grad((wanted * up).sum(), by)
    scores = head.scores(hidden, weight, ids[:, 0], bias=bias if biased else None, index=torch.arange(9))
    found = candidates.of_ids(hidden, weight, ids, scores, None, bias=bias if biased else None, soften=temperature)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(torch.autograd.grad((found * up).sum(), by), grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    best = candidates.best(hidden.detach(), weight.detach(), torch.arange(9), 5, bias=bias.detach() if biased else None,
                           soften=temperature)
    values, order = F.log_softmax(logits / (soften or 1), -1).topk(5)
    assert torch.equal(best.ids, order)
    torch.testing.assert_close(best.logp.double(), values.detach(), rtol=1e-5, atol=1e-6)
