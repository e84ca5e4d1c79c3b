"""Elastic layers against torch's functions on slices taken by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.errors import ModelError
from mil_cli.spaces import BatchNorm2d, Conv2d, CostCounter, DesignedSpace, Kernel, LayerNorm, Linear, Width


def _choose(size: Any, value: int) -> None:
    size.chosen = size.choices.index(value)


def test_a_convolution_reads_the_first_channels_and_the_centre_of_its_kernel() -> None:
    ins, outs, kernel = Width([2, 3]), Width([4, 6]), Kernel([3, 7])
    layer = Conv2d(ins, outs, kernel, stride=2, padding=kernel // 2)
    x = torch.randn(2, 2, 9, 9)
    for size, value in ((ins, 2), (outs, 4), (kernel, 3)):
        _choose(size, value)
    expected = functional.conv2d(x, layer.weight[:4, :2, 2:5, 2:5], layer.bias[:4], stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected)
    _choose(kernel, 7)
    assert layer(x).shape == expected.shape


def test_a_smaller_kernel_is_mapped_step_by_step_from_the_next_larger_ones_centre() -> None:
    kernel = Kernel([3, 5, 7], transformed=True)
    layer = Conv2d(2, 4, kernel, padding=kernel // 2)
    x = torch.randn(2, 2, 9, 9)
    _choose(kernel, 3)
    plain = functional.conv2d(x, layer.weight[:, :, 2:5, 2:5], layer.bias, padding=1)
    torch.testing.assert_close(layer(x), plain)  # maps begin as identities
    assert layer.maps is not None
    five, three = layer.maps.matrices
    with torch.no_grad():
        for matrix in (five, three):
            matrix.normal_()
    larger = torch.einsum("ij,ocj->oci", five, layer.weight[:, :, 1:6, 1:6].reshape(4, 2, 25)).reshape(4, 2, 5, 5)
    smaller = torch.einsum("ij,ocj->oci", three, larger[:, :, 1:4, 1:4].reshape(4, 2, 9)).reshape(4, 2, 3, 3)
    torch.testing.assert_close(layer(x), functional.conv2d(x, smaller, layer.bias, padding=1))
    _choose(kernel, 5)
    torch.testing.assert_close(layer(x), functional.conv2d(x, larger, layer.bias, padding=2))
    layer(x).sum().backward()
    assert five.grad is not None
    assert three.grad is None
    layer.reset_parameters()
    layer.maps.reset_parameters()
    assert torch.equal(five, torch.eye(25))


def test_a_built_layer_has_the_mapped_kernel_and_no_maps() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = Kernel([1, 3], transformed=True)
            self.conv = Conv2d(2, 4, self.kernel, padding=self.kernel // 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.conv(x))

    space = DesignedSpace(Net().eval())
    nn.init.constant_(space.module.conv.maps.matrices[0], 3.0)
    smallest, x = space.smallest, torch.randn(1, 2, 6, 6)
    built = space.build(smallest, inherit=True)
    assert type(built.conv) is nn.Conv2d
    with space.active(smallest):
        torch.testing.assert_close(built(x), space.module(x))
    counter = CostCounter(space, (x,))
    for architecture in (smallest, space.largest):
        built = space.build(architecture, inherit=True)
        assert counter.params(architecture) == sum(parameter.numel() for parameter in built.parameters())
        assert counter.macs(architecture) == 36 * built.conv.weight.numel()


def test_a_depthwise_convolution_has_as_many_groups_as_channels() -> None:
    width = Width([2, 5])
    layer = Conv2d(width, width, 3, groups=width, bias=False)
    assert layer.weight.shape == (5, 1, 3, 3)
    _choose(width, 2)
    x = torch.randn(1, 2, 5, 5)
    each = [functional.conv2d(x[:, [channel]], layer.weight[[channel]]) for channel in range(2)]
    torch.testing.assert_close(layer(x), torch.cat(each, dim=1))


def test_a_linear_layer_after_a_flatten_reads_whole_channels() -> None:
    width = Width([2, 3])
    layer = Linear(width * 4, 5)
    maps = torch.randn(6, 3, 2, 2)
    _choose(width, 2)
    expected = torch.einsum("bchw,ochw->bo", maps[:, :2], layer.weight.reshape(5, 3, 2, 2)[:, :2]) + layer.bias
    torch.testing.assert_close(layer(maps[:, :2].flatten(1)), expected)


def test_a_norm_moves_the_statistics_of_its_channels_alone() -> None:
    width = Width([2, 4])
    layer = BatchNorm2d(width, momentum=0.3)
    _choose(width, 2)
    x = 3 + 2 * torch.randn(8, 2, 3, 3)
    y = layer(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, torch.cat([0.3 * x.mean((0, 2, 3)), torch.zeros(2)]))
    assert layer.running_var[2:].tolist() == [1.0, 1.0]
    assert layer.num_batches_tracked == 1


def test_a_norm_without_momentum_has_the_mean_of_all_batches_as_torchs() -> None:
    layer, torchs = BatchNorm2d(Width([2, 4]), momentum=None), nn.BatchNorm2d(4, momentum=None)
    for _ in range(3):
        x = 3 + 2 * torch.randn(8, 4, 3, 3)
        layer(x), torchs(x)
    torch.testing.assert_close(layer.running_mean, torchs.running_mean)
    torch.testing.assert_close(layer.running_var, torchs.running_var)


def test_a_norm_without_running_statistics_uses_those_of_the_batch_in_evaluation() -> None:
    layer = BatchNorm2d(Width([2, 4]), affine=False, track_running_stats=False).eval()
    x = torch.randn(8, 4, 3, 3)
    torch.testing.assert_close(layer(x), functional.batch_norm(x, None, None, training=True))


def test_a_layer_norm_is_over_what_is_active() -> None:
    width = Width([3, 6])
    layer = LayerNorm(width)
    nn.init.normal_(layer.weight)
    _choose(width, 3)
    x = torch.randn(4, 3)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer.weight[:3]
    torch.testing.assert_close(layer(x), expected)


def test_layers_without_choices_are_those_of_torch() -> None:
    torch.manual_seed(0)
    elastic = nn.Sequential(Conv2d(1, 4, 3, 2, 1), BatchNorm2d(4), nn.Flatten(), Linear(64, 3), LayerNorm(3))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3), nn.LayerNorm(3))
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(elastic(x), plain(x), rtol=0, atol=0)
    assert elastic.state_dict().keys() == plain.state_dict().keys()


def test_sizes_can_be_computed() -> None:
    width, factor, kernel = Width([16, 8]), Width([2, 3]), Kernel([3, 5])
    hidden, padding, doubled = width * factor, kernel // 2, 2 * width
    assert (int(hidden), int(padding), int(doubled)) == (48, 2, 32)
    _choose(width, 8)
    assert (int(hidden), hidden.largest, int(doubled)) == (24, 48, 16)
    assert hidden.bases == (width, factor)
    with pytest.raises(TypeError):
        width * 1.5  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Width([]), "Width: needs a list"),
        (lambda: Width(8), "Width: needs a list"),  # type: ignore[arg-type]
        (lambda: Width([8, 0]), "at least 1 .got 0"),
        (lambda: Width([8, 8]), "named twice"),
        (lambda: Kernel([3, 4]), "all odd or all even"),
        (lambda: Conv2d(Width([3, 4]), 8, 1, groups=2), "3 and 8 channels in 2 groups"),
        (lambda: Conv2d(Width([4, 8]), Width([4, 8]), 1, groups=Width([4, 8])), "give the same Width"),
        (lambda: Conv2d(8, 8, 1, groups=Width([2, 8])), "none may read more channels"),
    ],
)
def test_what_cannot_be_is_told(make: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()
