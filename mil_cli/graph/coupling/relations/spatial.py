"""Pooling and resampling: channels pass, space stays."""

from __future__ import annotations

from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for

_POOLS = {
    f"{kind}{rank}d": rank
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    for rank in (1, 2, 3)
} | {"max_pool2d_with_indices": 2, "_adaptive_avg_pool2d": 2, "max_pool3d_with_indices": 3}

_RESAMPLES = (
    *(f"upsample_nearest{rank}d" for rank in (1, 2, 3)),
    *(f"_upsample_nearest_exact{rank}d" for rank in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)


def pool(operation: Operation) -> None:
    """Relate the axes before the pooled ones."""
    data = operation.input
    first = operation.rank(data) - _POOLS[operation.name]
    for output in operation.outputs:
        for axis in range(first):
            operation.link(data, axis, output, axis)
        operation.freeze(output, range(first, operation.rank(output)), "pooled")
    operation.freeze(data, range(first, operation.rank(data)), "pooled")


def resample(operation: Operation) -> None:
    """Relate batch and channels."""
    data, output = operation.input, operation.output
    if operation.inputs[1:]:
        raise UnsupportedForm("several tensors")
    for key in (data, output):
        operation.freeze(key, range(2, operation.rank(key)), "resampled")
    for axis in (0, 1):
        operation.link(data, axis, output, axis)


def grid_sample(operation: Operation) -> None:
    """Relate batch and channels; the grid's axes are positions."""
    data, grid, output = operation.inputs[0], operation.inputs[1], operation.output
    for axis in (0, 1):
        operation.link(data, axis, output, axis)
    operation.link(grid, 0, data, 0)
    for key, start in ((data, 2), (output, 2), (grid, 1)):
        operation.freeze(key, range(start, operation.rank(key)), "resampled")


def affine_grid(operation: Operation) -> None:
    """Relate the batch; everything else counts positions."""
    theta, output = operation.need("theta"), operation.output
    operation.link(theta, 0, output, 0)
    for key in (theta, output):
        operation.freeze(key, range(1, operation.rank(key)), "the axis counts positions")


RULES: Rules = {
    **rules_for(affine_grid, "affine_grid_generator"),
    **rules_for(pool, *_POOLS),
    **rules_for(resample, *_RESAMPLES),
    **rules_for(grid_sample, "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
}
