"""Taking fused projections apart: a view that divides an axis into parts, of which single ones are then selected.

Query, key and value of most vision transformers come out of one linear layer as ``(..., 3 * heads * size)``, are viewed
as ``(..., 3, heads, size)``, permuted, and taken apart. As long as they share that view, their heads must be of one
size. Each part is rewritten to a slice of the layer's output with a view and a permutation of its own; after that the
size of the values' heads is independent of that of queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node, map_arg

from mil_cli.graph.coupling.operators import operator_name, written_after
from mil_cli.graph.coupling.record import Recording
from mil_cli.graph.coupling.relations.views import VIEWS

aten = torch.ops.aten

_VIEWING = frozenset({*VIEWS, "permute", "transpose", "swapaxes", "movedim", "unsqueeze", "squeeze"})
_COPYING = frozenset({"contiguous", "clone"})


def take_apart(recording: Recording) -> None:
    """Rewrite every part that is selected from a viewed axis, in place, and keep the recording true."""
    for node in list(recording.graph.graph.nodes):
        name = operator_name(node)
        if name == "select":
            _rewrite(recording, node, node)
        elif name == "unbind":
            for user in list(node.users):
                if operator_name(user) == "getitem":
                    _rewrite(recording, user, node)


def _rewrite(recording: Recording, part: Node, taken: Node) -> None:
    """Replace `part`, one of what `taken` gives, by a slice of the value that its chain of views begins with."""
    chain = [taken]
    while True:
        before = chain[-1].args[0]
        assert isinstance(before, Node)
        if operator_name(before) not in _VIEWING | _COPYING:
            source = before
            break
        chain.append(before)
    shape = recording.shapes.get(recording.key(source))
    if shape is None or not any(operator_name(node) in VIEWS for node in chain):
        return
    copied = any(operator_name(node) in _COPYING for node in chain)
    if copied and any(written_after(node) for node in (source, *chain)):
        return  # a copy keeps what was there before the write; a slice of the source would not
    whole = torch.empty(shape, dtype=torch.uint8)  # only its strides are looked at
    lies = _followed(recording, source, chain, whole)
    lies = lies[int(part.args[1])] if part is not taken and lies is not None else lies  # type: ignore[arg-type]
    if not isinstance(lies, torch.Tensor) or lies.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return
    found = _segment(whole, lies)
    noted = getattr(source.meta.get("val"), "shape", shape)
    if found is not None and isinstance(noted[found[0]], int):  # a batch has no constant place to be sliced at
        result = _sliced(recording, part, source, *found, lies)
        if copied:  # what follows may rely on it
            with recording.graph.graph.inserting_before(part):
                result = _call(recording, part, aten.contiguous.default, result)
        part.replace_all_uses_with(result)


def _followed(recording: Recording, source: Node, chain: list[Node], whole: torch.Tensor) -> Any:
    """Return a view of `whole` as the chain's last node has it; copies move nothing."""
    values: dict[Node, Any] = {source: whole}

    def known(used: Node) -> Any:
        return values[used] if used in values else recording.values[used.name]

    for node in reversed(chain):
        if operator_name(node) in _COPYING:
            values[node] = values[node.args[0]]  # type: ignore[index]
            continue
        try:
            values[node] = node.target(*map_arg(node.args, known), **map_arg(node.kwargs, known))  # type: ignore[operator]
        except (KeyError, RuntimeError):  # a size that is not known, or a view as another type
            return None
    return values[chain[0]]


def _segment(whole: torch.Tensor, part: torch.Tensor) -> tuple[int, int, int] | None:
    """Return the axis of `whole` of which `part` is a run of entries, its start and its length; None if it is none."""
    if part.numel() == 0 or whole.numel() % part.numel():
        return None
    for axis, size in enumerate(whole.shape):
        length = size * part.numel() // whole.numel()
        start, rest = divmod(int(part.storage_offset()), whole.stride(axis))
        if rest or length >= size or length * whole.numel() != size * part.numel() or start + length > size:
            continue
        wide = sorted(
            (stride, count) for stride, count in zip(part.stride(), part.shape, strict=True) if count != 1
        )  # from the innermost axis
        expected = [(stride, count) for stride, count in zip(whole.stride(), whole.shape, strict=True)]
        expected[axis] = (whole.stride(axis), length)
        if _covers(sorted(wide), sorted(pair for pair in expected if pair[1] != 1), axis_stride=whole.stride(axis)):
            return axis, start, length
    return None


def _covers(part: list[tuple[int, int]], whole: list[tuple[int, int]], *, axis_stride: int) -> bool:
    """Whether the axes of a part are those of the whole, one of them (by its stride) divided further."""
    position = 0
    for stride, count in whole:
        product = 1
        while product < count:
            if position == len(part) or part[position][0] != stride * product:
                return False
            product *= part[position][1]
            position += 1
            if product < count and stride != axis_stride:
                return False
        if product != count:
            return False
    return position == len(part)


def _sliced(
    recording: Recording, part: Node, source: Node, axis: int, start: int, length: int, lies: torch.Tensor
) -> Node:
    """Add, before `part`, a slice of `source` that lies in memory as `lies`."""
    graph = recording.graph.graph
    shape = recording.shapes[recording.key(source)]
    strides = torch.empty(shape, dtype=torch.uint8).stride()
    moves = lies.stride()
    order = sorted(range(lies.ndim), key=lambda place: (-moves[place], lies.shape[place] == 1))
    back = [order.index(place) for place in range(lies.ndim)]
    noted = getattr(source.meta.get("val"), "shape", [None] * len(shape))
    with graph.inserting_before(part):
        sizes: list[Any] = []
        for place in order:
            count, stride = lies.shape[place], moves[place]
            same = next(
                (at for at, size in enumerate(shape) if at != axis and strides[at] == stride and size > 1), None
            )
            if count == 1 or same is None or isinstance(noted[same], int):
                sizes.append(count)
            else:
                asked = graph.call_function(aten.sym_size.int, (source, same))
                asked.meta["val"] = noted[same]
                recording.values[asked.name] = shape[same]
                sizes.append(asked)
        piece = _call(recording, part, aten.slice.Tensor, source, axis, start, start + length, 1)
        viewed = _call(recording, part, aten.reshape.default, piece, sizes)
        return _call(recording, part, aten.permute.default, viewed, back) if back != sorted(back) else viewed


def _call(recording: Recording, like: Node, target: Any, *args: Any) -> Node:
    """Add a call with the shape of its result, where it came from, and what the capture would have noted."""
    graph = recording.graph.graph
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    given = args[0]
    arguments = map_arg(args[1:], lambda used: recording.values[used.name])
    shape = torch.empty(recording.shapes[recording.key(given)], device="meta")
    recording.shapes[node.name] = tuple(target(shape, *arguments).shape)
    recording.dtypes[node.name] = recording.dtypes[recording.key(given)]
    if "val" in given.meta:
        node.meta["val"] = target(given.meta["val"], *map_arg(args[1:], lambda used: used.meta["val"]))
    return node
