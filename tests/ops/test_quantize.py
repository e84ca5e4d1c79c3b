from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from mil_cli.ops.quantize import quantize_affine, quantize_codes


def closed_form(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """Python's own round() is half to even."""
    codes = [
        min(max(round(value / scale) + zero_point, quant_min), quant_max) for value in x.double().flatten().tolist()
    ]
    return torch.tensor([(code - zero_point) * scale for code in codes]).reshape(x.shape)


@pytest.mark.parametrize(
    ("zero_point", "quant_min", "quant_max"),
    [(0, -127, 127), (0, 0, 255), (100, 0, 255), (-128, -128, 127), (0, -8, 7)],
)
def test_forward_per_tensor_is_the_closed_form(zero_point: int, quant_min: int, quant_max: int) -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 20
    scale = 0.25  # a power of two: every quotient is exact, in float32 as in float64
    got = quantize_affine(
        x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), None, quant_min, quant_max
    )
    assert torch.equal(got, closed_form(x, scale, zero_point, quant_min, quant_max))


def test_ties_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    got = quantize_affine(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), None, -8, 7)
    assert got.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


def test_matches_torch_fake_quantize() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 5, generator=generator)
    scale, zero_point = torch.tensor(0.03), torch.tensor(117, dtype=torch.int32)
    ours = quantize_affine(x, scale, zero_point, None, 0, 255)
    torch.testing.assert_close(ours, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255))
    scales = torch.rand(6, generator=generator) * 0.1 + 0.01
    zeros = torch.randint(-20, 20, (6,), generator=generator, dtype=torch.int32)
    for points in (zeros, torch.zeros_like(zeros)):
        ours = quantize_affine(x, scales, points, 1, -127, 127)
        torch.testing.assert_close(ours, torch.fake_quantize_per_channel_affine(x, scales, points, 1, -127, 127))


def test_zero_is_exact_and_nan_stays() -> None:
    x = torch.tensor([0.0, float("nan"), float("inf"), -float("inf")])
    got = quantize_affine(x, torch.tensor(0.013), torch.tensor(7, dtype=torch.int32), None, 0, 255)
    assert got[0] == 0
    assert got[1].isnan()
    assert got[2] == pytest.approx(0.013 * 248)
    assert got[3] == pytest.approx(-0.013 * 7)


def test_codes_are_what_the_operator_rounds_to() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    scale = torch.tensor([0.02, 0.05, 0.01])
    zero_point = torch.tensor([0, 3, -2], dtype=torch.int32)
    codes = quantize_codes(x, scale, zero_point, 1, -64, 64)
    assert codes.dtype == torch.int32
    torch.testing.assert_close((codes - zero_point) * scale, quantize_affine(x, scale, zero_point, 1, -64, 64))
    with pytest.raises(ValueError, match="NaN"):
        quantize_codes(torch.tensor([float("nan")]), torch.tensor(1.0), torch.tensor(0), None, 0, 255)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_gradients_are_those_of_lsq(axis: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(4, 5, generator=generator) * 3).requires_grad_()
    count = 1 if axis is None else x.shape[axis]
    scale = (torch.rand(count, generator=generator) * 0.5 + 0.2).squeeze() if axis is None else None
    if scale is None:
        scale = torch.rand(count, generator=generator) * 0.5 + 0.2
    scale = scale.clone().requires_grad_()
    zero_point = torch.full(scale.shape, 2, dtype=torch.int32)
    upstream = torch.randn(4, 5, generator=generator)
    quantize_affine(x, scale, zero_point, axis, 0, 7).backward(upstream)

    # the same by torch's own autograd: rounding replaced by a straight-through term
    y = x.detach().clone().requires_grad_()
    s = scale.detach().clone().requires_grad_()
    shape = [1, 1]
    if axis is not None:
        shape[axis] = -1
    steps = y / s.reshape(shape if axis is not None else ())
    rounded = steps + (steps.round() - steps).detach()
    clipped = torch.where(steps < -2, torch.tensor(-2.0), torch.where(steps > 5, torch.tensor(5.0), rounded))
    (clipped * s.reshape(shape if axis is not None else ())).backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(scale.grad, s.grad)


def test_operator_contract() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    one, zero = torch.tensor(0.1, requires_grad=True), torch.tensor(3, dtype=torch.int32)
    torch.library.opcheck(quantize_affine, (x, one, zero, None, 0, 255))
    many, zeros = torch.rand(3) + 0.1, torch.zeros(3, dtype=torch.int32)
    torch.library.opcheck(quantize_affine, (x, many.requires_grad_(), zeros, 1, -127, 127))


def test_survives_export_save_and_load() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("scale", torch.tensor([0.01, 0.02, 0.03]))
            self.register_buffer("zero_point", torch.zeros(3, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            weight = quantize_affine(self.linear.weight, self.scale, self.zero_point, 0, -127, 127)
            return nn.functional.linear(x, weight, self.linear.bias)

    module = Quantized().eval()
    x = torch.randn(5, 4)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    again = torch.export.export(
        program.module(check_guards=False), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    stream = io.BytesIO()
    torch.export.save(again, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module(check_guards=False)
    assert any(node.target is torch.ops.mil.quantize_affine.default for node in loaded.graph.nodes)
    other = torch.randn(9, 4)
    assert torch.equal(loaded(other), module(other))
