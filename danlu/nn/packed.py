"""Layers whose weights are in another form: fewer bits, or two thin matrices.

A layer keeps its name and loses its `weight`; the parts of its form stand in its place, as buffers, or as weights that learn.
O outputs, I inputs, M rows of all batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.nn.attention import working_dtype
from danlu.nn.forms import Bits, Cut, Int8, Kernel, Low, Parts, Rounded, Table, Told

FEW = 16                                                 # rows up to which a CPU's kernels on packed weights beat whole matrices


class PackedLinear(nn.Linear):
    """A linear layer whose weight is in fewer bits; `weight` makes the whole matrix anew whenever it is asked for."""

    form: Rounded

    @property
    def weight(self) -> Tensor:                          # type: ignore[override]
        return whole(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] from x [..., I]."""
        return multiplied(x, self, self.bias)


class PackedEmbedding(nn.Embedding):
    """A table of tokens in 8 bits, of which only the rows that are asked for are made whole."""

    form: Int8

    @property
    def weight(self) -> Tensor:                          # type: ignore[override]
        return whole(self)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., D] from ids [...]."""
        rows: Tensor = self.codes[ids].float() * self.scales[ids, None]     # type: ignore[index, operator, union-attr]
        return rows


class LowLinear(nn.Linear):
    """A linear layer whose weight is the product of two thin matrices, which learn unless they are in fewer bits."""

    form: Low

    @property
    def weight(self) -> Tensor:                          # type: ignore[override]
        return whole(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] from x [..., I]."""
        up, down = thin(self)
        if self.form.rounded is not None:
            kind = working_dtype(x)
            return F.linear(F.linear(x.to(kind), down.to(kind)), up.to(kind), None if self.bias is None else self.bias.to(kind))
        return F.linear(F.linear(x, down), up, self.bias)


def thin(layer: LowLinear) -> tuple[Tensor, Tensor]:
    """Return the two matrices [O, r] and [r, I] that `layer` computes with."""
    return layer.form.thin(_parts(layer), layer.in_features)


def _parts(layer: Any) -> dict[str, Tensor]:
    return {name: getattr(layer, name) for name in layer.form.parts(*_size(layer))}


def whole(layer: Any) -> Tensor:
    """Return the matrix [O, I] that `layer` computes with; float32."""
    parts = _parts(layer)
    matrix: Tensor = layer.form.dense(parts, _size(layer)[1])
    return matrix if "factors" not in parts else matrix / parts["factors"].float()


def multiplied(x: Tensor, layer: Any, bias: Tensor | None) -> Tensor:
    """Return x·Wᵀ + b [..., O] of x [..., I] and a packed W [O, I]: by a kernel where one is faster and nothing learns."""
    learns = torch.is_grad_enabled() and x.requires_grad
    rows = x.numel() // x.shape[-1]
    whole_numbers = isinstance(layer.form, Int8) and layer.form.activations
    able = (x.device.type == "cpu" or rows > FEW) if whole_numbers else rows <= FEW    # torch._int_mm on a GPU refuses 16 rows
    kernel = _kernel(layer) if not learns and able and rows else None
    kind = working_dtype(x)
    if kernel is None:
        return F.linear(x.to(kind), layer.weight.to(kind), None if bias is None else bias.to(kind))
    flat = x.reshape(rows, -1)
    if "factors" in layer._buffers:
        flat = flat / layer.factors
    out: Tensor = kernel(flat).to(kind).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias.to(kind)


def _kernel(layer: Any) -> Kernel | None:
    """Return the layer's kernel, made once for each place that its parts are in."""
    codes = layer.codes
    if layer.__dict__.get("made_for") is not codes:
        layer.__dict__["kernel"] = layer.form.kernel({"codes": codes, "scales": layer.scales}, _size(layer)[1])
        layer.__dict__["made_for"] = codes
    return layer.__dict__["kernel"]                      # type: ignore[no-any-return]


def _size(layer: Any) -> tuple[int, int]:
    """Return rows and columns of a linear layer's or an embedding's matrix."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features


def is_packed(layer: object) -> bool:
    """Return whether a layer's weight is stored in another form."""
    return isinstance(layer, PackedLinear | PackedEmbedding | LowLinear)


def become(layer: Any, form: Rounded | Low, parts: Parts | None = None) -> None:
    """Turn a linear layer or an embedding into a packed one.  parts: of its weight; None: empty ones, on the weight's device."""
    assert type(layer) in (nn.Linear, nn.Embedding) or is_packed(layer), "a plain layer is packed, or a packed one anew"
    device = next(held for held in [*layer._parameters.values(), *layer._buffers.values()] if held is not None).device
    for name in layer.form.parts(*_size(layer)) if is_packed(layer) else ("weight",):
        (layer._buffers if name in layer._buffers else layer._parameters).pop(name)
    layer.__class__ = LowLinear if isinstance(form, Low) else PackedEmbedding if isinstance(layer, nn.Embedding) else PackedLinear
    layer.form = form
    for name, part in form.parts(*_size(layer)).items():
        tensor = torch.empty(part.shape, dtype=part.dtype, device=device) if parts is None else parts[name].to(part.dtype)
        assert tensor.shape == part.shape, f"{name} is {tuple(tensor.shape)}, not {part.shape}"
        # also where there is one column: as it will lie in memory when it is read again
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(form, Low) and form.rounded is None:
            layer.register_parameter(name, nn.Parameter(tensor))
        else:
            layer.register_buffer(name, tensor)


def forms(model: nn.Module) -> Table:
    """Return (name, form) of the packed layers of `model`."""
    return [(name, layer.form) for name, layer in model.named_modules() if is_packed(layer)]      # type: ignore[misc]


def cuts(model: nn.Module, sizes: Mapping[str, torch.Size]) -> Table:
    """Return (name, form) of the linear layers that are smaller than `sizes` of weights, by name, say."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return [(name, Cut(rows=layer.out_features, columns=layer.in_features)) for name, layer in layers
            if sizes.get(f"{name}.weight") not in (None, torch.Size(_size(layer)))]


def install(model: nn.Module, table: Table) -> None:
    """Give the layers that `table` names the forms it tells, empty.  AttributeError: there is no such layer."""
    for name, form in table:
        layer: Any = model.get_submodule(name)
        if isinstance(form, Cut):
            cut_to(layer, layer.weight.new_empty(form.rows, form.columns),
                   None if layer.bias is None else layer.bias.new_empty(form.rows))
        elif not isinstance(form, Bits):
            become(layer, form)


def cut_to(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer another weight [O, I] and bias [O], of whatever size."""
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)


def table_of(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Return (name, form) of what `groups_of` gives; pydantic's ValidationError where it is not understood."""
    told = [(one["layers"], Told.model_validate({"form": one["form"]}).form) for one in groups]
    return [(name, form) for names, form in told for name in names]


def groups_of(table: Table) -> list[dict[str, Any]]:
    """Return the layers of each form as JSON-ready values, in the order in which forms are first told."""
    groups: dict[Any, list[str]] = {}
    for name, form in table:
        groups.setdefault(form, []).append(name)
    return [{"form": form.model_dump(mode="json"), "layers": names} for form, names in groups.items()]
