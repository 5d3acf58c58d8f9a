"""Danlu beside its peers: same model, same batch, same data, same machine, interleaved."""
