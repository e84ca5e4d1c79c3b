"""The example inputs that travel with a model: flattening a call, and resizing along the batch axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.errors import ModelError
from mil_cli.graph.spec import ModelSpec

Call = tuple[tuple[Any, ...], dict[str, Any]]


def flatten_call(spec: ModelSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among the leaves of a call, in the order of `spec.inputs`.

    Raises:
        ModelError: If the call has another form than the captured one.
    """
    expected = pytree.treespec_loads(spec.in_tree)
    keywords = expected.children()[1].context
    if set(keywords) == set(kwargs):
        kwargs = {name: kwargs[name] for name in keywords}
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if tree != expected:
        raise ModelError(
            "the inputs do not have the form that the model was captured with",
            value=f"{len(args)} positional and {sorted(kwargs)} named inputs",
            hint=f"the model takes: {', '.join(tensor.name for tensor in spec.inputs)}",
        )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def resize_batch(samples: Call, spec: ModelSpec, batch_size: int) -> Call:
    """Return the samples cut or repeated to `batch_size` along each input's batch axis.

    Raises:
        ModelError: If `batch_size` is not positive, or the model's batch is fixed to another size.
    """
    if batch_size < 1:
        raise ModelError("a batch holds at least one sample", value=batch_size)
    leaves, tree = pytree.tree_flatten(samples)
    tensors = iter(spec.inputs)
    if spec.batch is None:
        sizes = {tensor.shape[0] for tensor in spec.inputs if tensor.shape}
        if sizes and batch_size not in sizes:
            raise ModelError(
                f"the model's inputs have fixed sizes ({', '.join(f'{t.name} {list(t.shape)}' for t in spec.inputs)})",
                value=f"batch size {batch_size}",
                hint="declare the batch axis as dynamic, or change the model so that it takes any batch size",
            )
        return samples
    resized = []
    for leaf in leaves:
        axis = next(tensors).batch_axis() if isinstance(leaf, Tensor) else None
        resized.append(leaf if axis is None else resize_axis(leaf, axis, batch_size))
    args, kwargs = pytree.tree_unflatten(resized, tree)
    return tuple(args), dict(kwargs)


def resize_axis(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Cut or cyclically repeat a tensor along one axis: shape ``[..., n, ...]`` to ``[..., size, ...]``."""
    return tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
