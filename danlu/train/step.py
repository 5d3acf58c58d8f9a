"""The engine: rows to gradients, gradients to a step.  The only code that knows how a step is cut up.

Sums and counts come from the objective; the one division, by the count of the whole step, is here, so that any split
of the same rows gives the same loss and gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu import chance
from danlu.fault import fault
from danlu.objectives.protocol import Batch, Objective
from danlu.parallel import autocast


class Engine:
    """One process, one device, `micro` micro-batches a step."""

    def __init__(self, model: nn.Module, objective: Objective, *, device: torch.device, precision: str, micro: int,
                 clip: float | None, seed: int) -> None:
        self.model, self.objective, self.device, self.precision = model, objective, device, precision
        self.micro, self.clip, self.seed = micro, clip, seed
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.scales = torch.tensor(objective.scales, dtype=torch.float64)

    def to_device(self, batch: Batch) -> dict[str, Tensor]:
        """Return the batch where the model is."""
        if self.device.type == "cpu":
            return dict(batch)
        return {name: column.to(self.device, non_blocking=True) for name, column in batch.items()}

    def sums(self, batch: Batch) -> Tensor:
        """Return [terms] sums of the losses of `batch` (forward only, under the current grad mode)."""
        with autocast(self.precision, self.device):
            out = self.model(**{name: batch[name] for name in self.objective.inputs if name in batch})
        return self.objective.loss(out, batch)

    def forward_backward(self, batch: Batch, *, step: int) -> Tensor:
        """Add the gradient of the step's mean loss to `.grad`; return [terms] mean losses, float64 on the CPU.

        A term that nothing counts for (no pair in the batch, say) is 0 and adds nothing.
        """
        batch = self.to_device(batch)
        counts = self.objective.count(batch).double().clamp(min=1e-12).cpu()
        weights = (self.scales / counts).to(self.device)
        size = batch["ids"].shape[0] // self.micro
        total = torch.zeros(len(self.scales), dtype=torch.float64, device=self.device)
        for number in range(self.micro):
            part = batch if self.micro == 1 else {k: v[number * size : (number + 1) * size] for k, v in batch.items()}
            torch.manual_seed(chance.torch_seed(self.seed, "dropout", (step, number)))
            sums = self.sums(part)
            loss = (sums * weights.to(sums.dtype)).sum()
            (self.scaler.scale(loss) if self.scaler else loss).backward()
            total += sums.detach().double()
        return total.cpu() / counts

    def update(self, optimizer: Optimizer, lr: float, *, allow: Callable[[float], bool]) -> float:
        """Clip, ask `allow(norm)`, step and clear the gradients; return the norm before clipping."""
        if self.scaler:
            self.scaler.unscale_(optimizer)
        if fault("grad") == "nan":
            self.parameters[0].grad.fill_(float("nan"))        # type: ignore[union-attr]
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip or float("inf")))
        if allow(norm):
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler:
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm
