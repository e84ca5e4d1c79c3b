"""A model that sees its images at a lower resolution: it takes the same inputs, and makes them smaller itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from mil_cli.errors import ModelError
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls
from mil_cli.graph.spec import TensorSpec

_RESIZE = torch.ops.aten.upsample_bilinear2d.vec
_IMAGE_AXES = 4


def first_image(model: Model) -> TensorSpec:
    """Return the first input of a model that may be images: floating, four axes, the last two fixed and above 1.

    Raises:
        ModelError: There is none.
    """
    return _images(model)[0]


def at_resolution(model: Model, share: float) -> Model:
    """Return a copy of a model that shrinks its images before it does what it did.

    All inputs count as images of which `first_image` takes the first. They are interpolated linearly between the
    centers of pixels, as `torch.nn.functional.interpolate` does by ``mode="bilinear"``, which reads every pixel down to
    a share of one half.

    Args:
        model: The model; not changed.
        share: The height and width that images are to have, relative to what they have; rounded to whole pixels.

    Raises:
        ModelError: There is no image, the rest of the model takes no other size, or it would give other sizes.
    """
    images, result = _images(model), model.clone()
    graph = result.graph
    before = _output_sizes(graph)
    tensors = [node for node in graph.graph.find_nodes(op="placeholder") if isinstance(node.meta["val"], Tensor)]
    for node, spec in zip(tensors, model.spec.inputs, strict=True):
        if spec in images:
            _resize(node, [max(1, round(share * size)) for size in spec.shape[2:]])
    try:
        _renew_values(graph)
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        raise _refusal(share, str(error).splitlines()[0]) from None
    if _output_sizes(graph) != before:
        raise _refusal(share, "its outputs would have other sizes")
    graph.graph.lint()
    graph.recompile()
    return result


def _images(model: Model) -> list[TensorSpec]:
    if images := [spec for spec in model.spec.inputs if _is_image(spec)]:
        return images
    shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in model.spec.inputs)
    raise ModelError("the model takes no images of a fixed height and width", value=shapes)


def _is_image(spec: TensorSpec) -> bool:
    floating = getattr(torch, spec.dtype).is_floating_point
    sizes = spec.shape[2:]
    return floating and len(spec.shape) == _IMAGE_AXES and not {2, 3} & {*spec.dynamic} and min(sizes) > 1


def _refusal(share: float, reason: str) -> ModelError:
    return ModelError(f"the model does not run on smaller images: {reason}", value=f"{share:.0%} of their size")


def _resize(image: Node, sizes: Sequence[int]) -> None:
    graph = image.graph
    after = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(after):
        resized = graph.call_function(_RESIZE, (image, list(sizes), False, None))
    image.replace_all_uses_with(resized, delete_user_cb=lambda user: user is not resized)


def _renew_values(graph: GraphModule) -> None:
    """Let the nodes of a graph know the shapes that they have now (``meta["val"]``), in place."""
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with mode, enable_python_dispatcher(), torch.no_grad():  # else some operators fix the size of the batch
        for node in calls(graph):
            args, kwargs = map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _output_sizes(graph: GraphModule) -> list[Any]:
    """Return what is known of each output's shape; sizes that follow the batch's are not numbers."""
    values = [node.meta["val"] for node in graph.graph.output_node().all_input_nodes]
    return [[str(size) for size in value.shape] if isinstance(value, Tensor) else str(value) for value in values]
