"""Block-wise fake quantization against the per-channel operator on each block, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mil_cli.ops.blocks import block_codes, block_steps, quantize_blocks
from mil_cli.ops.quantize import quantize_affine


def example(axis: int, block_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 3, generator=generator)
    columns = x.numel() // x.shape[axis]
    return x, torch.rand(x.shape[axis], -(-columns // block_size), generator=generator) / 2 + 0.1


def by_blocks(x: Tensor, scale: Tensor, axis: int, block_size: int) -> Tensor:
    """Each row's blocks through the per-channel operator, one after the other."""
    rows = x.movedim(axis, 0)
    flat = rows.reshape(len(rows), -1)
    zeros = torch.zeros(len(rows), dtype=torch.int32)
    parts = [
        quantize_affine(part, scale[:, index].contiguous(), zeros, 0, -4, 3)
        for index, part in enumerate(flat.split(block_size, 1))
    ]
    return torch.cat(parts, 1).reshape(rows.shape).movedim(0, axis)


@pytest.mark.parametrize(("axis", "block_size"), [(0, 18), (0, 4), (1, 5), (-1, 100)])
def test_a_block_is_rounded_as_a_channel(axis: int, block_size: int) -> None:
    x, scale = (value.requires_grad_() for value in example(axis, block_size))
    found, expected = quantize_blocks(x, scale, axis, block_size, -4, 3), by_blocks(x, scale, axis, block_size)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(*(torch.autograd.grad(y, (x, scale), upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("axis", [0, 2])
def test_codes_are_those_of_the_values(axis: int) -> None:
    x, scale = example(axis, 5)
    codes = block_codes(x, scale, axis, 5, -4, 3)
    assert (codes.dtype, codes.min(), codes.max()) == (torch.int32, -4, 3)
    back = codes.reshape(x.movedim(axis, 0).shape).movedim(0, axis) * block_steps(scale, x.shape, axis, 5)
    torch.testing.assert_close(back, quantize_blocks(x, scale, axis, 5, -4, 3))
    x[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        block_codes(x, scale, axis, 5, -4, 3)


def test_operator_is_well_formed() -> None:
    operator = torch.ops.mil.quantize_blocks.default
    x, scale = example(1, 5)
    torch.library.opcheck(operator, (x.transpose(0, 1), scale, 0, 5, -4, 3))
    torch.library.opcheck(operator, (x.requires_grad_(), scale.requires_grad_(), 1, 5, -4, 3))
    with pytest.raises(Exception, match="one scale for each block"):
        torch.export.export(_Wrong(), (x.detach(), scale.detach()))


class _Wrong(torch.nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return quantize_blocks(x, scale, 1, 7, -4, 3)
