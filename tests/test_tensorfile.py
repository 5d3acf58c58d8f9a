"""Files of tensors: the safetensors library reads what is written here, and the hash is the file's."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from danlu import tensorfile

SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(list(tensorfile.NAMES))), max_size=5))
def test_the_library_reads_the_same_bits(tmp_path_factory: pytest.TempPathFactory, specs: dict) -> None:
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    specs.pop("__metadata__", None)
    tensors = {name: (torch.rand(shape) * 9).to(dtype) for name, (shape, dtype) in specs.items()}
    written = tensorfile.write(path, tensors, metadata={"format": "pt"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape and torch.equal(read[name], tensor)
    data = path.read_bytes()
    assert written == (len(data), hashlib.sha256(data).hexdigest())


def test_transposed_and_sliced_tensors_are_written_in_order(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensorfile.write(tmp_path / "x", {"t": base.T, "s": base[:, 1:3]})
    read = load_file(tmp_path / "x")
    assert torch.equal(read["t"], base.T) and torch.equal(read["s"], base[:, 1:3])


def test_large_tensors_are_hashed_in_pieces(tmp_path: Path) -> None:
    written = tensorfile.write(tmp_path / "x", {"a": torch.randn(5_000_000)})
    assert written.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"):
        tensorfile.stream(tmp_path / "x", [tensorfile.Spec("announced", torch.float32, (2,))], [torch.zeros(3)])


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        tensorfile.write(tmp_path / "x", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
