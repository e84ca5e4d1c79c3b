"""Linear layers, matrix products, einsum, outer products and embeddings."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from mil_cli.graph.count import einsum_axes, einsum_terms
from mil_cli.graph.coupling.record import Key
from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for


def linear(operation: Operation) -> None:
    """x(..., I) W(O, I) b(O) -> (..., O)."""
    data, weight, output = operation.need("input"), operation.need("weight"), operation.output
    if operation.rank(weight) != 2:
        raise UnsupportedForm("the weight is no matrix")
    operation.link(data, -1, weight, 1)
    operation.link(weight, 0, output, -1)
    for axis in range(operation.rank(data) - 1):
        operation.link(data, axis, output, axis)
    bias = operation.key("bias")
    if bias is not None:
        operation.link(bias, 0, output, -1)


def _product(operation: Operation, left: Key, right: Key) -> None:
    output = operation.output
    left_rank, right_rank, rank = operation.rank(left), operation.rank(right), operation.rank(output)
    if left_rank == 1 and right_rank == 1:
        operation.link(left, 0, right, 0)
        return
    operation.link(left, -1, right, -2 if right_rank > 1 else 0)
    if left_rank > 1:
        operation.link(left, -2, output, -1 if right_rank == 1 else -2)
    if right_rank > 1:
        operation.link(right, -1, output, -1)
    # batch axes stand left of the matrix axes; a vector operand has none
    matrix_axes = (left_rank > 1) + (right_rank > 1)
    for key, key_rank in ((left, left_rank), (right, right_rank)):
        for axis in range(key_rank - 2):
            target = rank - matrix_axes - (key_rank - 2) + axis
            if operation.shape(key)[axis] == operation.shape(output)[target]:
                operation.link(key, axis, output, target)
    # Follows from the links above; said at once, it tells which rows of one operand meet which of the other.
    for back in range(3, min(left_rank, right_rank) + 1):
        if operation.shape(left)[-back] == operation.shape(right)[-back]:
            operation.link(left, -back, right, -back)


def matmul(operation: Operation) -> None:
    """a(..., N, K) b(..., K, M) -> (..., N, M), batch axes broadcast; vectors as in `torch.matmul`."""
    right = next(name for name in ("other", "mat2", "vec") if operation.has(name))
    _product(operation, operation.need("self"), operation.need(right))


def dot(operation: Operation) -> None:
    """Contract two vectors."""
    right = "tensor" if operation.has("tensor") else "other"
    operation.link(operation.need("self"), 0, operation.need(right), 0)


def addmm(operation: Operation) -> None:
    """A matrix product (plain or batched) with something of the result's shape, or broadcast to it, added."""
    names = ("mat1", "mat2") if operation.has("mat1") else ("batch1", "batch2")
    if operation.has("vec"):
        names = ("mat", "vec")
    _product(operation, operation.need(names[0]), operation.need(names[1]))
    operation.link_broadcast(operation.need("self"), operation.output)


def einsum(operation: Operation) -> None:
    """Axes of the same letter correspond; an ellipsis stands for batch axes aligned at the right."""
    terms, result = einsum_terms(operation.argument("equation"))
    places: dict[str, list[tuple[Key, int]]] = defaultdict(list)

    def place(key: Key, letters: str) -> None:
        rank = operation.rank(key)
        names = einsum_axes(letters, rank)
        if len(names) != rank:
            raise UnsupportedForm(f"'{letters}' does not name {rank} axes")
        for axis, name in enumerate(names):
            places[name].append((key, axis))

    for key, letters in zip(operation.keys("tensors"), terms, strict=True):
        place(key, letters)
    place(operation.output, result)
    for found in places.values():
        for (a, a_axis), (b, b_axis) in pairwise(found):
            if operation.shape(a)[a_axis] == operation.shape(b)[b_axis]:
                operation.link(a, a_axis, b, b_axis)


def tensordot(operation: Operation) -> None:
    """Contract several pairs of axes; the others of both follow each other in the result."""
    left, right, output = operation.need("self"), operation.need("other"), operation.output
    contracted = []
    for key, name in ((left, "dims_self"), (right, "dims_other")):
        contracted.append([operation.axis(key, axis) for axis in operation.value(name)])
    for left_axis, right_axis in zip(*contracted, strict=True):
        operation.link(left, left_axis, right, right_axis)
    rest = [
        (key, axis)
        for key, gone in zip((left, right), contracted, strict=True)
        for axis in range(operation.rank(key))
        if axis not in gone
    ]
    for target, (key, axis) in enumerate(rest):
        operation.link(key, axis, output, target)


def bilinear(operation: Operation) -> None:
    """x(..., I) y(..., J) W(O, I, J) b(O) -> (..., O)."""
    weight, output = operation.need("weight"), operation.output
    for number, name in enumerate(("input1", "input2"), start=1):
        data = operation.need(name)
        operation.link(data, -1, weight, number)
        for axis in range(operation.rank(data) - 1):
            operation.link(data, axis, output, axis)
    operation.link(weight, 0, output, -1)
    bias = operation.key("bias")
    if bias is not None:
        operation.link(bias, 0, output, -1)


def distance(operation: Operation) -> None:
    """x(..., P, M) y(..., R, M) -> (..., P, R): features that are zero in both add nothing."""
    left, right, output = operation.need("x1"), operation.need("x2"), operation.output
    operation.link(left, -1, right, -1)
    operation.link(left, -2, output, -2)
    operation.link(right, -2, output, -1)
    for key in (left, right):
        offset = operation.rank(output) - operation.rank(key)
        for axis in range(operation.rank(key) - 2):
            if operation.shape(key)[axis] == operation.shape(output)[axis + offset]:
                operation.link(key, axis, output, axis + offset)


def outer(operation: Operation) -> None:
    """a(N) b(M) -> (N, M)."""
    operation.link(operation.need("self"), 0, operation.output, 0)
    operation.link(operation.need("vec2"), 0, operation.output, 1)


def embedding(operation: Operation) -> None:
    """Rows are chosen by the vocabulary's numbers, so they stay; the features correspond."""
    weight, indices, output = operation.need("weight"), operation.need("indices"), operation.output
    operation.freeze(weight, 0, "the rows are looked up by number (a vocabulary)")
    operation.link(weight, 1, output, -1)
    for axis in range(operation.rank(indices)):
        operation.link(indices, axis, output, axis)


def embedding_bag(operation: Operation) -> None:
    """Rows chosen by number are summed or averaged into bags; the features correspond."""
    weight = operation.need("weight")
    operation.freeze(weight, 0, "the rows are looked up by number (a vocabulary)")
    operation.link(weight, 1, operation.outputs[0], 1)
    operation.freeze_all([key for key in operation.inputs if key != weight], "counts and numbers of rows")


RULES: Rules = {
    **rules_for(linear, "linear"),
    **rules_for(matmul, "matmul", "mm", "bmm", "mv"),
    **rules_for(tensordot, "tensordot"),
    **rules_for(bilinear, "bilinear"),
    **rules_for(distance, "cdist"),
    **rules_for(embedding_bag, "embedding_bag"),
    **rules_for(addmm, "addmm", "baddbmm", "addmv"),
    **rules_for(dot, "dot", "vdot"),
    **rules_for(einsum, "einsum"),
    **rules_for(outer, "outer", "ger"),
    **rules_for(embedding, "embedding"),
}
