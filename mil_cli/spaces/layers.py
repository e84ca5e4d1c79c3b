"""Layers of torch that take a `Width` or a `Kernel` in place of a number.

They hold the weights of the largest; a smaller one reads the first channels (Yu et al. 2019, "Slimmable Neural
Networks", arXiv:1812.08928) and the centre of the kernel (Cai et al. 2020, "Once-for-All", arXiv:1908.09791).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.errors import ModelError
from mil_cli.spaces.plain import Searchable, ties
from mil_cli.spaces.sizes import Kernel, Size, combinations, largest


class Elastic(Searchable):
    """What the elastic layers share; comes before torch's layer among the bases of a class.

    Attributes:
        torch_type: Torch's layer.
        sizes: By the name of a layer's argument: the size that stands for it.
    """

    torch_type: ClassVar[type[nn.Module]]
    sizes: dict[str, Size]

    def active(self, argument: str) -> Any:
        """Return the active value of an argument."""
        return int(self.sizes[argument]) if argument in self.sizes else getattr(self, argument)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is active of weights and buffers, by their names: views of the whole ones, or made of them."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of torch's layer of the active sizes."""
        raise NotImplementedError

    def plain(self, memo: dict[int, Any]) -> nn.Module:
        """Return torch's layer of the active sizes, with copies of the active weights."""
        tensors = self.tensors()
        held = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), torch.empty(()))
        layer = self.torch_type(**self.arguments(), device="meta", dtype=held.dtype).to_empty(device=held.device)
        whole: Any = self
        with torch.no_grad():
            for name, tensor in tensors.items():
                shared = getattr(whole, name)
                getattr(layer, name).copy_(tensor).requires_grad_(shared.requires_grad)
                if isinstance(shared, nn.Parameter):  # layers that share a weight share it in the copy
                    made, key = getattr(layer, name), (id(shared), tuple(tensor.shape))
                    # A whole weight may be that of a layer of torch too, which the copy knows by the weight alone.
                    tied = memo.setdefault(id(shared), made) if tensor is shared else ties(memo).setdefault(key, made)
                    setattr(layer, name, tied)
        layer.train(whole.training)
        return layer


class Conv2d(Elastic, nn.Conv2d):
    """`torch.nn.Conv2d` with choices; ``groups=width`` with ``in_channels=width`` is depthwise at any width.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: As in torch.
        padding: As in torch; ``kernel // 2`` keeps height and width whatever the kernel.
        dilation: As in torch.
        groups: As in torch.
        bias: Whether there is one.

    Raises:
        ModelError: Groups do not divide the channels of some combination of choices.
    """

    torch_type = nn.Conv2d

    def __init__(
        self,
        in_channels: int | Size,
        out_channels: int | Size,
        kernel_size: int | tuple[int, int] | Size,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | Size = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | Size = 1,
        bias: bool = True,
    ) -> None:
        sizes = _sizes(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            padding=padding,
            groups=groups,
        )
        _check_groups(in_channels, out_channels, groups)
        super().__init__(
            largest(in_channels),
            largest(out_channels),
            kernel_size.largest if isinstance(kernel_size, Size) else kernel_size,
            stride,
            padding.largest if isinstance(padding, Size) else padding,
            dilation,
            largest(groups),
            bias,
        )
        self.sizes = sizes
        self.maps: KernelMaps | None = None
        if isinstance(kernel_size, Kernel) and kernel_size.transformed:
            self.maps = KernelMaps(kernel_size.choices[:-1])

    def tensors(self) -> dict[str, Tensor]:
        """Return the active parts of ``weight`` (out, in / groups, kernel, kernel) and ``bias`` (out,)."""
        out_channels = self.active("out_channels")
        weight = _first(self.weight, out_channels, self.active("in_channels") // self.active("groups"))
        if "kernel_size" in self.sizes:
            kernel = self.active("kernel_size")
            weight = _centre(weight, kernel) if self.maps is None else self.maps(weight, kernel)
        return {"weight": weight, **({} if self.bias is None else {"bias": _first(self.bias, out_channels)})}

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, h', w') with the active weights."""
        tensors = self.tensors()
        return functional.conv2d(
            input,
            tensors["weight"],
            tensors.get("bias"),
            self.stride,
            self.active("padding"),
            self.dilation,
            self.active("groups"),
        )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the `torch.nn.Conv2d` of the active sizes."""
        active = {
            name: self.active(name) for name in ("in_channels", "out_channels", "kernel_size", "padding", "groups")
        }
        return {**active, "stride": self.stride, "dilation": self.dilation, "bias": self.bias is not None}


class KernelMaps(nn.Module):
    """Makes smaller kernels of the largest: the centre of the next larger one, mapped linearly (Cai et al. 2020).

    Args:
        sizes: The smaller sizes, in ascending order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self._sizes = tuple(reversed(sizes))
        self.matrices = nn.ParameterList(torch.empty(size**2, size**2) for size in self._sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make all maps identities."""
        for matrix in self.matrices:
            nn.init.eye_(matrix)

    def forward(self, weight: Tensor, kernel: int) -> Tensor:
        """Return kernels (out, in, kernel, kernel) of the largest ones (out, in, k, k)."""
        for size, matrix in zip(self._sizes, self.matrices, strict=True):
            if size >= kernel:
                centre = _centre(weight, size)
                weight = functional.linear(centre.flatten(2), matrix).view_as(centre)
        return weight


class Linear(Elastic, nn.Linear):
    """`torch.nn.Linear` with choices.

    Args:
        in_features: Features of the input; after ``flatten(1)`` of (batch, width, h, w) these are ``width * (h * w)``.
        out_features: Features of the output.
        bias: Whether there is one.
    """

    torch_type = nn.Linear

    def __init__(self, in_features: int | Size, out_features: int | Size, bias: bool = True) -> None:
        super().__init__(largest(in_features), largest(out_features), bias)
        self.sizes = _sizes(in_features=in_features, out_features=out_features)

    def tensors(self) -> dict[str, Tensor]:
        """Return the active parts of ``weight`` (out, in) and ``bias`` (out,)."""
        out_features = self.active("out_features")
        bias: Tensor | None = self.bias  # torch does not say that it may be None
        weight = _first(self.weight, out_features, self.active("in_features"))
        return {"weight": weight, **({} if bias is None else {"bias": _first(bias, out_features)})}

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) with the active weights."""
        tensors = self.tensors()
        return functional.linear(input, tensors["weight"], tensors.get("bias"))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the `torch.nn.Linear` of the active sizes."""
        bias: Tensor | None = self.bias
        active = {name: self.active(name) for name in ("in_features", "out_features")}
        return {**active, "bias": bias is not None}


class BatchNorm2d(Elastic, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with choices.

    The running statistics are shared as the weights are: take them anew for an architecture before it is judged.

    Args:
        num_features: Channels.
        eps: As in torch.
        momentum: As in torch; None: running statistics are the mean of all batches.
        affine: Whether there are scales and shifts.
        track_running_stats: Whether evaluation uses running statistics; without, it uses the batch's.
    """

    torch_type = nn.BatchNorm2d

    def __init__(
        self,
        num_features: int | Size,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(largest(num_features), eps, momentum, affine, track_running_stats)
        self.sizes = _sizes(num_features=num_features)

    def tensors(self) -> dict[str, Tensor]:
        """Return the active parts of ``weight``, ``bias``, ``running_mean``, ``running_var``, and the batch count."""
        held = {**self._parameters, **self._buffers}
        channels = self.active("num_features")
        return {
            name: _first(tensor, channels) if tensor.ndim else tensor
            for name, tensor in held.items()
            if tensor is not None
        }

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (batch, channels, h, w); in training the running statistics of these channels move."""
        self._check_input_dim(input)
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / int(self.num_batches_tracked) if momentum is None else momentum
        tensors = self.tensors()
        mean = tensors.get("running_mean")
        return functional.batch_norm(
            input,
            mean,
            tensors.get("running_var"),
            tensors.get("weight"),
            tensors.get("bias"),
            self.training or mean is None,
            momentum or 0.0,
            self.eps,
        )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the `torch.nn.BatchNorm2d` of the active sizes."""
        settings = {name: getattr(self, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
        return {"num_features": self.active("num_features"), **settings}


class LayerNorm(Elastic, nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, with choices.

    Args:
        normalized_shape: Features.
        eps: As in torch.
        elementwise_affine: Whether there are scales and shifts.
        bias: Whether there are shifts.
    """

    torch_type = nn.LayerNorm

    def __init__(
        self, normalized_shape: int | Size, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__(largest(normalized_shape), eps, elementwise_affine, bias)
        self.sizes = _sizes(normalized_shape=normalized_shape)

    def _features(self) -> int:
        return int(self.sizes["normalized_shape"]) if self.sizes else self.normalized_shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return the active parts of ``weight`` and ``bias``."""
        features = self._features()
        return {name: _first(tensor, features) for name, tensor in self._parameters.items() if tensor is not None}

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (..., features)."""
        tensors = self.tensors()
        return functional.layer_norm(input, (self._features(),), tensors.get("weight"), tensors.get("bias"), self.eps)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the `torch.nn.LayerNorm` of the active sizes."""
        settings = {"eps": self.eps, "elementwise_affine": self.elementwise_affine, "bias": self.bias is not None}
        return {"normalized_shape": self._features(), **settings}


def _sizes(**arguments: Any) -> dict[str, Size]:
    return {name: value for name, value in arguments.items() if isinstance(value, Size)}


def _check_groups(in_channels: int | Size, out_channels: int | Size, groups: int | Size) -> None:
    values = (in_channels, out_channels, groups)
    held = largest(in_channels) // max(largest(groups), 1)  # channels that each group reads from the largest weight
    with combinations([value for value in values if isinstance(value, Size)]) as each:
        for _ in each:
            ins, outs, parts = map(int, values)
            if parts < 1 or ins % parts or outs % parts or ins // parts > held:
                raise ModelError(
                    f"the choices allow {ins} and {outs} channels in {parts} groups: groups must divide both, and none "
                    "may read more channels than at the largest sizes",
                    where="Conv2d",
                    value={"in_channels": in_channels, "out_channels": out_channels, "groups": groups},
                    hint="for a depthwise convolution give the same Width as in_channels, out_channels and groups",
                )


def _first(tensor: Tensor, *counts: int) -> Tensor:
    """Return the first entries along the first axes; the tensor itself where that is all of it."""
    if tuple(tensor.shape[: len(counts)]) == counts:
        return tensor
    return tensor[tuple(slice(count) for count in counts)]


def _centre(weight: Tensor, kernel: int) -> Tensor:
    """Return the centre of kernels (out, in, k, k)."""
    start = (weight.shape[-1] - kernel) // 2
    return weight if start == 0 else weight[..., start : start + kernel, start : start + kernel]
