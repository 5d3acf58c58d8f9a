"""Programs of torch.export: the same numbers for any size, and a file in which nothing is pickled."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from danlu.errors import ConfigError, DataError, SecurityError
from danlu.export import torch_export
from tests.export.test_onnx import CONTEXT, HEADS, decoder, encoder, ours, rows


@pytest.mark.parametrize("name", [*HEADS, "lm"])
def test_a_program_says_the_same_whatever_batch_and_length(name: str, tmp_path: Path) -> None:
    model: Any = decoder(kv_heads=2) if name == "lm" else encoder(heads=(HEADS[name],))
    torch_export.write(tmp_path, model)
    found = torch_export.Exported(tmp_path)
    for batch, tokens in ((1, 1), (3, 5), (2, CONTEXT)):
        ids = rows(batch, tokens)
        with torch.no_grad():
            said = model(ids)
        right = said["logits"].numpy() if name == "lm" else ours(HEADS[name].kind, said[HEADS[name].name])
        if name == "choose":
            out = found.run(ids[None])["logits"].numpy().reshape(right.shape)
        elif name == "answer":
            out = np.stack([x.numpy() for x in found.run(ids).values()], -1)
        else:
            out = found.run(ids)["sentence_embedding" if name == "embed" else "logits"].numpy()
        assert np.abs(out - right).max() < 1e-4
    assert np.abs(found.logits(ids[0].tolist()) - right[0]).max() < 1e-4


def test_nothing_in_the_file_is_a_pickle(tmp_path: Path) -> None:
    path = torch_export.write(tmp_path, decoder())
    with zipfile.ZipFile(path) as archive:
        kept = {one.filename: archive.read(one) for one in archive.infolist()}
    assert [name for name, content in kept.items() if content.startswith((b"\x80", b"PK\x03\x04"))] == []


@pytest.mark.parametrize("spoilt", ["inputs", "weights", "sizes", "operations"])
def test_a_file_that_would_be_unpickled_is_refused(spoilt: str, tmp_path: Path) -> None:
    path = torch_export.write(tmp_path, decoder())
    with zipfile.ZipFile(path) as archive:
        kept = {one.filename: archive.read(one) for one in archive.infolist()}
    for name, content in kept.items():
        if spoilt == "inputs" and name.endswith("sample_inputs/model.pt"):
            kept[name] = b"\x80\x04."
        if spoilt == "weights" and name.endswith("weights_config.json"):
            kept[name] = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
        if spoilt == "sizes" and name.endswith("models/model.json"):
            kept[name] = re.sub(rb'"expr_str": "[^"]*"', b'"expr_str": "open(Symbol(chr(47)))"', content, count=1)
        if spoilt == "operations" and name.endswith("models/model.json"):
            kept[name] = re.sub(rb'"target": "torch.ops[^"]*"', b'"target": "torch.load"', content, count=1)
    assert kept != {}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
    with pytest.raises(SecurityError, match="run code"):
        torch_export.Exported(tmp_path)


def test_what_is_no_program_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.pt2"):
        torch_export.Exported(tmp_path)
    (tmp_path / "model.pt2").write_bytes(b"x" * 100)
    with pytest.raises(DataError):
        torch_export.Exported(tmp_path)
