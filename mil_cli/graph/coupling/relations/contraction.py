"""Linear layers, matrix products, einsum, outer products and embeddings."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

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
    operation.link(operation.need("self"), 0, operation.need("tensor"), 0)


def addmm(operation: Operation) -> None:
    """A matrix product (plain or batched) with something of the result's shape, or broadcast to it, added."""
    names = ("mat1", "mat2") if operation.has("mat1") else ("batch1", "batch2")
    if operation.has("vec"):
        names = ("mat", "vec")
    _product(operation, operation.need(names[0]), operation.need(names[1]))
    operation.link_broadcast(operation.need("self"), operation.output)


def einsum(operation: Operation) -> None:
    """Axes of the same letter correspond; an ellipsis stands for batch axes aligned at the right."""
    equation = operation.argument("equation").replace(" ", "")
    if "->" not in equation:
        raise UnsupportedForm("the result's letters are not given")
    inputs, result = equation.split("->")
    places: dict[str, list[tuple[Key, int]]] = defaultdict(list)

    def place(key: Key, letters: str) -> None:
        rank = operation.rank(key)
        if "..." in letters:
            before, after = letters.split("...")
            hidden = rank - len(before) - len(after)
            names = [*before, *(f".{hidden - position}" for position in range(hidden)), *after]
        else:
            names = list(letters)
        if len(names) != rank:
            raise UnsupportedForm(f"'{letters}' does not name {rank} axes")
        for axis, name in enumerate(names):
            places[name].append((key, axis))

    for key, letters in zip(operation.keys("tensors"), inputs.split(","), strict=True):
        place(key, letters)
    place(operation.output, result)
    for found in places.values():
        for (a, a_axis), (b, b_axis) in pairwise(found):
            if operation.shape(a)[a_axis] == operation.shape(b)[b_axis]:
                operation.link(a, a_axis, b, b_axis)


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


RULES: Rules = {
    **rules_for(linear, "linear"),
    **rules_for(matmul, "matmul", "mm", "bmm", "mv"),
    **rules_for(dot, "dot"),
    **rules_for(addmm, "addmm", "baddbmm", "addmv"),
    **rules_for(einsum, "einsum"),
    **rules_for(outer, "outer", "ger"),
    **rules_for(embedding, "embedding"),
}
