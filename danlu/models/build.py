"""Config to module.  The annotation is the registry: a new family adds its name to it."""

from __future__ import annotations

import torch
from torch import nn

from danlu.models import decoder, encoder

_MODULES = {decoder.Decoder: decoder.DecoderModel, encoder.Encoder: encoder.EncoderModel}


def build(cfg: decoder.Decoder | encoder.Encoder, device: str = "meta") -> nn.Module:
    """Return the module that `cfg` describes on `device`, without weights (`init` or a checkpoint fills them)."""
    with torch.device(device):
        return _MODULES[type(cfg)](cfg)
