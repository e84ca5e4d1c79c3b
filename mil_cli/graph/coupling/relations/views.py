"""Ops that only rearrange: views, permutations, concatenation, splitting, slices, repeats, padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mil_cli.graph.coupling.operators import written_after
from mil_cli.graph.coupling.table import Indices, Operation, Rules, UnsupportedForm, rules_for

VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten")
"""Ops that regroup row-major positions and nothing else."""


def aligned_groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut two shapes of equal product into the smallest groups of consecutive axes of equal product.

    Returns:
        Pairs of (axes of `a`, axes of `b`): ``(6, 4), (2, 3, 4)`` gives ``((0,), (0, 1)), ((1,), (2,))``.
    """
    groups = []
    a_axes: list[int] = []
    b_axes: list[int] = []
    a_size = b_size = 1
    i = j = 0
    while i < len(a) or j < len(b):
        if a_axes and b_axes and a_size == b_size:
            groups.append((tuple(a_axes), tuple(b_axes)))
            a_axes, b_axes, a_size, b_size = [], [], 1, 1
        take_a = i < len(a) and (j >= len(b) or (a_size <= b_size and not (a_axes and a_size == b_size)))
        if take_a:
            a_size *= a[i]
            a_axes.append(i)
            i += 1
        elif j < len(b):
            b_size *= b[j]
            b_axes.append(j)
            j += 1
        else:
            a_size *= a[i]
            a_axes.append(i)
            i += 1
    if a_axes and b_axes:
        groups.append((tuple(a_axes), tuple(b_axes)))
    return groups


def view(operation: Operation) -> None:
    """Relate the smallest groups of axes that hold the same positions."""
    data, output = operation.input, operation.output
    for a_axes, b_axes in aligned_groups(operation.shape(data), operation.shape(output)):
        operation.regroup(data, a_axes, output, b_axes)


def _permuted(operation: Operation, order: Sequence[int]) -> None:
    for target, source in enumerate(order):
        operation.link(operation.input, source, operation.output, target)


def permute(operation: Operation) -> None:
    """Relate the axes in their new order."""
    _permuted(operation, operation.value("dims"))


def transpose(operation: Operation) -> None:
    """Relate the axes with two of them exchanged."""
    rank = operation.rank(operation.input)
    order = list(range(rank))
    if operation.name == "numpy_T":
        order.reverse()
    elif rank >= 2:
        first, second = _exchanged_axes(operation, rank)
        order[first], order[second] = order[second], order[first]
    _permuted(operation, order)


def _exchanged_axes(operation: Operation, rank: int) -> tuple[int, int]:
    if operation.name == "t":
        return 0, 1
    if operation.name in ("mT", "adjoint"):
        return rank - 2, rank - 1
    names = ("dim0", "dim1") if operation.has("dim0") else ("axis0", "axis1")
    return operation.value(names[0]), operation.value(names[1])


def movedim(operation: Operation) -> None:
    """Relate the axes in the order that a trial on distinct sizes shows."""
    trial = torch.empty([size + 2 for size in range(operation.rank(operation.input))], device="meta")
    moved = operation.node.target(trial, *operation.node.args[1:], **operation.node.kwargs)  # type: ignore[operator]
    _permuted(operation, [size - 2 for size in moved.shape])


def squeeze(operation: Operation) -> None:
    """Relate the axes larger than 1, in order; the others carry nothing."""
    data, output = operation.input, operation.output
    sources = [axis for axis, size in enumerate(operation.shape(data)) if size != 1]
    targets = [axis for axis, size in enumerate(operation.shape(output)) if size != 1]
    for source, target in zip(sources, targets, strict=True):
        operation.link(data, source, output, target)


def expand(operation: Operation) -> None:
    """Relate the axes whose size stays."""
    operation.link_broadcast(operation.input, operation.output)


def cat(operation: Operation) -> None:
    """Place each part's entries one after the other on the axis."""
    output = operation.output
    axis = operation.axis(output, operation.value("dim", 0))
    offset = 0
    for part in operation.keys("tensors"):
        if operation.shape(part) == (0,):
            continue
        size = operation.shape(part)[axis]
        operation.link(part, axis, output, axis, np.arange(size), np.arange(offset, offset + size))
        offset += size
        operation.link_all(part, output, but=(axis,))


def stack(operation: Operation) -> None:
    """Relate all axes but the new one."""
    output = operation.output
    new = operation.axis(output, operation.value("dim", 0))
    for part in operation.keys("tensors"):
        for axis in range(operation.rank(part)):
            operation.link(part, axis, output, axis + (axis >= new))
    operation.freeze(output, new, "a stacked axis counts tensors")


def meshgrid(operation: Operation) -> None:
    """Every result has an axis for each vector, in their order or with the first two exchanged."""
    vectors = operation.keys("tensors")
    axes = list(range(len(vectors)))
    if operation.has("indexing") and operation.argument("indexing") == "xy" and len(axes) > 1:
        axes[:2] = 1, 0
    for output in operation.outputs:
        for vector, axis in zip(vectors, axes, strict=True):
            if operation.rank(vector):
                operation.link(vector, 0, output, axis)


def split(operation: Operation) -> None:
    """Divide the axis's entries among the parts in order."""
    data = operation.input
    axis = operation.axis(data, operation.value("dim", 0))
    offset = 0
    for part in operation.outputs:
        size = operation.shape(part)[axis]
        operation.link(data, axis, part, axis, np.arange(offset, offset + size), np.arange(size))
        offset += size
        operation.link_all(data, part, but=(axis,))


def unbind(operation: Operation) -> None:
    """Relate all axes but the one taken apart."""
    data = operation.input
    gone = operation.axis(data, operation.value("dim", 0))
    for part in operation.outputs:
        for axis in range(operation.rank(data)):
            if axis != gone:
                operation.link(data, axis, part, axis - (axis > gone))
    operation.freeze(data, gone, "the axis is taken apart into single tensors")


def select(operation: Operation) -> None:
    """Relate all axes but the selected one, whose selected entry must stay."""
    data, output = operation.input, operation.output
    gone = operation.axis(data, operation.value("dim"))
    for axis in range(operation.rank(data)):
        if axis != gone:
            operation.link(data, axis, output, axis - (axis > gone))
    chosen = operation.value("index") % operation.shape(data)[gone]
    operation.freeze(data, gone, "the entry is selected by its index", np.array([chosen]))


def slice_(operation: Operation) -> None:
    """Relate the entries of the slice, whatever its step."""
    data, output = operation.input, operation.output
    axis = operation.axis(data, operation.value("dim", 0))
    size = operation.shape(data)[axis]
    if operation.name == "narrow":
        start = operation.value("start")
        chosen = np.arange(size)[start:][: operation.value("length")]
    else:
        window = slice(operation.value("start"), operation.value("end"), operation.value("step", 1))
        chosen = np.arange(size)[window]
        if window.step not in (None, 1) and written_after(operation.node):
            # once the axis is cut, what is left of the slice is gathered: a copy, that no longer shares memory
            operation.freeze(data, axis, "a slice with a step shares memory that is written later")
    operation.link(data, axis, output, axis, chosen, np.arange(len(chosen)))
    operation.link_all(data, output, but=(axis,))


def flip(operation: Operation) -> None:
    """Relate the flipped axes in reverse."""
    data, output = operation.input, operation.output
    flipped = {operation.axis(data, axis) for axis in operation.value("dims")}
    for axis, size in enumerate(operation.shape(data)):
        if axis in flipped:
            operation.link(data, axis, output, axis, np.arange(size)[::-1].copy(), np.arange(size))
        else:
            operation.link(data, axis, output, axis)


def roll(operation: Operation) -> None:
    """Relate the rolled axes shifted; without axes the whole tensor is rolled, which is frozen."""
    data, output = operation.input, operation.output
    axes, shifts = operation.value("dims", []), operation.value("shifts")
    if not axes:
        raise UnsupportedForm("rolls all axes as one")
    moved = {operation.axis(data, axis): shift for axis, shift in zip(axes, shifts, strict=True)}
    for axis, size in enumerate(operation.shape(data)):
        if axis in moved:
            operation.link(data, axis, output, axis, np.roll(np.arange(size), moved[axis]), np.arange(size))
        else:
            operation.link(data, axis, output, axis)


def repeat(operation: Operation) -> None:
    """Relate each entry to all its copies; copies of a single entry are free, their number is rewritten."""
    data, output = operation.input, operation.output
    offset = operation.rank(output) - operation.rank(data)
    for axis, size in enumerate(operation.shape(data)):
        repeated = operation.shape(output)[axis + offset]
        if repeated == size:
            operation.link(data, axis, output, axis + offset)
        elif size > 1:
            copies = np.arange(repeated)
            operation.link(data, axis, output, axis + offset, copies % size, copies)


def repeat_interleave(operation: Operation) -> None:
    """Relate each entry to its copies that stand beside it."""
    times = operation.argument("repeats")
    if not isinstance(times, int) or operation.argument("dim") is None:
        raise UnsupportedForm("repeats each entry by a tensor of counts")
    data, output = operation.input, operation.output
    axis = operation.axis(data, operation.value("dim"))
    copies = np.arange(operation.shape(output)[axis])
    operation.link(data, axis, output, axis, copies // times, copies)
    operation.link_all(data, output, but=(axis,))


def pixel_shuffle(operation: Operation) -> None:
    """Relate each channel of the larger image to its r x r channels of the smaller one."""
    data, output = operation.input, operation.output
    squared = operation.value("upscale_factor" if operation.name == "pixel_shuffle" else "downscale_factor") ** 2
    many, few = (data, output) if operation.name == "pixel_shuffle" else (output, data)
    channel = operation.rank(data) - 3
    entries = np.arange(operation.shape(many)[channel])
    operation.link(many, channel, few, channel, entries, entries // squared)
    for key in (data, output):
        operation.freeze(key, (channel + 1, channel + 2), "pixel shuffle mixes the spatial axes")
    for axis in range(channel):
        operation.link(data, axis, output, axis)


def _window_channels(operation: Operation, many: str, few: str) -> None:
    entries = np.arange(operation.shape(many)[1])
    window = operation.shape(many)[1] // operation.shape(few)[1]
    operation.link(many, 1, few, 1, entries, entries // window)
    operation.link(many, 0, few, 0)
    operation.freeze(many, 2, "the axis counts windows")
    operation.freeze(few, (2, 3), "windows cover the spatial axes")


def im2col(operation: Operation) -> None:
    """Relate each channel to its rows of windows."""
    _window_channels(operation, operation.output, operation.input)


def col2im(operation: Operation) -> None:
    """Relate the rows of windows to their channel."""
    _window_channels(operation, operation.input, operation.output)


def unfold(operation: Operation) -> None:
    """Relate all axes but the one that windows slide over."""
    data, output = operation.input, operation.output
    axis = operation.axis(data, operation.value("dimension"))
    operation.link_all(data, output, but=(axis,))
    operation.freeze(data, axis, "windows slide over the axis")
    operation.freeze(output, (axis, operation.rank(output) - 1), "windows slide over the axis")


def pad(operation: Operation) -> None:
    """Relate the entries inside the padding, or what cropping leaves; padding that copies freezes its axes."""
    data, output = operation.input, operation.output
    widths = operation.value("pad" if operation.has("pad") else "padding")
    constant = operation.name == "constant_pad_nd" or operation.value("mode") == "constant"
    rank = operation.rank(data)
    for axis, size in enumerate(operation.shape(data)):
        at = (rank - 1 - axis) * 2
        before, after = (widths[at], widths[at + 1]) if at + 1 < len(widths) else (0, 0)
        if before == after == 0:
            operation.link(data, axis, output, axis)
        elif constant:  # negative widths crop
            inside = np.arange(max(-before, 0), size - max(-after, 0))
            operation.link(data, axis, output, axis, inside, inside + before)
        else:
            operation.freeze(data, axis, "the padding depends on the neighbours")
            operation.freeze(output, axis, "the padding depends on the neighbours")


def glu(operation: Operation) -> None:
    """Relate each entry of the first half, and its gate in the second, to the result's."""
    data, output = operation.input, operation.output
    axis = operation.axis(data, operation.value("dim", -1))
    half = operation.shape(output)[axis]
    both: Indices = np.arange(2 * half)
    operation.link(data, axis, output, axis, both, both % half)
    operation.link_all(data, output, but=(axis,))


RULES: Rules = {
    **rules_for(view, *VIEWS),
    **rules_for(permute, "permute"),
    **rules_for(transpose, "transpose", "t", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint"),
    **rules_for(movedim, "movedim", "moveaxis"),
    **rules_for(squeeze, "squeeze", "squeeze_", "unsqueeze", "unsqueeze_"),
    **rules_for(expand, "expand", "broadcast_to"),
    **rules_for(cat, "cat", "concat", "concatenate"),
    **rules_for(stack, "stack"),
    **rules_for(meshgrid, "meshgrid"),
    **rules_for(
        split,
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "unsafe_split",
        "unsafe_chunk",
        "unsafe_split_with_sizes",
    ),
    **rules_for(unbind, "unbind"),
    **rules_for(select, "select"),
    **rules_for(slice_, "slice", "narrow"),
    **rules_for(flip, "flip"),
    **rules_for(roll, "roll"),
    **rules_for(repeat, "repeat", "tile"),
    **rules_for(repeat_interleave, "repeat_interleave"),
    **rules_for(pixel_shuffle, "pixel_shuffle", "pixel_unshuffle"),
    **rules_for(im2col, "im2col"),
    **rules_for(col2im, "col2im"),
    **rules_for(unfold, "unfold"),
    **rules_for(
        pad,
        "pad",
        "constant_pad_nd",
        *(f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)),
    ),
    **rules_for(glu, "glu"),
}
