"""Batch-norm folding leaves the outputs as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_attribute, op_name
from mil_cli.ops.quantize import quantize_affine, quantize_codes

CASES = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (4, 9, 9)),
    "conv2d-grouped": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (4, 5, 5, 5)),
    "conv2d-plain-norm": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (4, 9, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (4, 9, 9)),
    "transposed-grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (4, 9, 9)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (4,)),
}


def randomise(model: Model) -> None:
    """Give norms statistics that a trained model could have, scales of both signs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name:
                value.copy_(torch.rand(value.shape, generator=generator) * 4 + 0.01)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))


def norms(model: Model) -> int:
    return sum(op_name(node) == "batch_norm" for node in calls(model.graph))


@pytest.mark.parametrize("name", CASES)
def test_outputs_stay(name: str) -> None:
    layer, norm, shape = CASES[name]
    model = Model.capture(nn.Sequential(layer, norm, nn.ReLU()), (torch.randn(4, *shape),))
    randomise(model)
    before = model.fingerprint()
    folded = fold_batch_norm(model)
    assert model.fingerprint() == before
    assert norms(folded) == 0
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    x = torch.randn(7, *shape)
    expected, actual = model(x), folded(x)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(parameter.requires_grad for parameter in folded.parameters())


def test_a_folded_model_is_saved_and_loaded(tmp_path) -> None:
    model = Model.capture(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (torch.randn(4, 3, 8, 8),))
    randomise(model)
    folded = fold_batch_norm(model)
    folded.save(tmp_path / "f.pt2")
    loaded = Model.load(tmp_path / "f.pt2")
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded(x), folded(x))
    assert loaded.fingerprint() == folded.fingerprint()


class Shared(nn.Module):
    """Weights used twice, an activation between, an output read twice, a norm over the wrong axis."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied_too = nn.Conv2d(4, 4, 3, padding=1)
        self.tied_too.weight = self.tied.weight
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(8, 6)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.over_length = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[1](self.shared(self.norms[0](self.shared(x))))
        x = self.norms[3](self.tied_too(self.norms[2](self.tied(x))))
        y = self.twice(x)
        x = self.norms[4](y) + y
        return self.over_length(self.linear(x[:, :, 0]))


def test_what_is_shared_is_left_alone() -> None:
    model = Model.capture(Shared(), (torch.randn(3, 4, 8, 8),))
    randomise(model)
    folded = fold_batch_norm(model)
    assert norms(folded) == norms(model)
    x = torch.randn(5, 4, 8, 8)
    assert torch.equal(folded(x), model(x))


def test_a_weight_that_is_also_read_in_a_list_is_left_alone() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).mean((0, 2, 3)) + torch.cat([self.conv.weight, self.conv.weight]).sum()

    model = Model.capture(Listed(), (torch.randn(3, 4, 8, 8),))
    randomise(model)
    folded = fold_batch_norm(model)
    x = torch.randn(5, 4, 8, 8)
    assert torch.equal(folded(x), model(x))


def test_a_shared_norm_is_folded_into_each_layer() -> None:
    class OneNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(self.norm(self.a(x))))

    model = Model.capture(OneNorm(), (torch.randn(3, 4, 8, 8),))
    randomise(model)
    folded = fold_batch_norm(model)
    assert norms(folded) == 0
    assert not any(name.startswith("norm") for name in folded.state_dict())
    x = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


class QuantizedWeights(nn.Module):
    """Layers that read their weights through quantizers, each with a batch norm after it."""

    def __init__(self, axis: int | None, quant_min: int = -7) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.linear, self.norm2 = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.axis, self.quant_min = axis, quant_min
        for name, count in (("conv", 6), ("linear", 5)):
            shape = () if axis is None else (count,)
            self.register_buffer(f"{name}_scale", torch.full(shape, 0.5))
            self.register_buffer(f"{name}_zero", torch.zeros(shape, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        weight = quantize_affine(self.conv.weight, self.conv_scale, self.conv_zero, self.axis, self.quant_min, 7)
        x = torch.relu(self.norm(nn.functional.conv2d(x, weight))).mean((2, 3))
        weight = quantize_affine(self.linear.weight, self.linear_scale, self.linear_zero, self.axis, self.quant_min, 7)
        return self.norm2(nn.functional.linear(x, weight, self.linear.bias))


def codes_of(model: Model) -> dict[str, Tensor]:
    found = {}
    for node in calls(model.graph):
        if op_name(node) == "quantize_affine":
            x, scale, zero_point = (get_attribute(model.graph, str(source.target)) for source in node.args[:3])
            found[str(node.args[0].target)] = quantize_codes(x.detach(), scale, zero_point, *node.args[3:])
    return found


@pytest.mark.parametrize("axis", [None, 0])
def test_codes_of_quantized_weights_stay_up_to_their_sign(axis: int | None) -> None:
    model = Model.capture(QuantizedWeights(axis), (torch.randn(4, 3, 8, 8),))
    randomise(model)
    with torch.no_grad():
        state = model.state_dict()
        for name in ("conv_scale", "linear_scale"):
            state[name].abs_().add_(0.1)
        # midway between two codes for every channel, where rounding decides
        state["conv.weight"][:, 0, 0, 0] = state["conv_scale"] * 2.5
        state["norm.weight"][0] = 0.0
        state["norm.weight"][1] = -1.5
    before, gamma = codes_of(model), {"conv.weight": state["norm.weight"], "linear.weight": state["norm2.weight"]}
    folded = fold_batch_norm(model)
    assert norms(folded) == 0
    x = torch.randn(16, 3, 8, 8)
    expected, actual = model(x), folded(x)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, codes in codes_of(folded).items():
        signs = gamma[name].sign().int().reshape(-1, *[1] * (codes.ndim - 1))
        assert torch.equal(codes, before[name] * signs), name
        assert (gamma[name] < 0).any()
    for name in ("conv_scale", "linear_scale"):
        scale = folded.state_dict()[name]
        assert scale.shape == (6 if name == "conv_scale" else 5,)
        assert bool((scale > 0).all())


def test_codes_without_a_mirror_image_are_folded_where_no_gamma_is_negative() -> None:
    model = Model.capture(QuantizedWeights(0, quant_min=-8), (torch.randn(4, 3, 8, 8),))
    randomise(model)
    state = model.state_dict()
    with torch.no_grad():
        for name in ("conv_scale", "linear_scale", "norm.weight"):
            state[name].abs_().add_(0.1)
        state["conv.weight"][:, 0, 0, 0] = -9 * state["conv_scale"]
        state["norm2.weight"][1] = -1.5
    before, x = codes_of(model), torch.randn(16, 3, 8, 8)
    folded = fold_batch_norm(model)
    assert norms(folded) == 1
    assert bool((before["conv.weight"][:, 0, 0, 0] == -8).all())
    assert torch.equal(codes_of(folded)["conv.weight"], before["conv.weight"])
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
