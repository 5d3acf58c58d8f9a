"""Config to module.  The annotation is the registry: a new family adds its name to it."""

from __future__ import annotations

import torch

from danlu.models import decoder, encoder, foreign, foreign_config

Config = decoder.Decoder | encoder.Encoder | foreign_config.Foreign
Network = decoder.DecoderModel | encoder.EncoderModel | foreign.ForeignModel


def build(cfg: Config, device: str = "meta") -> Network:
    """Return the module that `cfg` describes on `device`, without weights (`init` or a checkpoint fills them)."""
    with torch.device(device):
        if isinstance(cfg, foreign_config.Foreign):
            return foreign.ForeignModel(cfg)
        return decoder.DecoderModel(cfg) if isinstance(cfg, decoder.Decoder) else encoder.EncoderModel(cfg)
