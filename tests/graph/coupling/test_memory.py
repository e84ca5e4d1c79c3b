"""The estimate of memory: by hand, and against the definition of a live set on the graph that a cut makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from mil_cli.graph.coupling import Counter, MemoryEstimate, analyse, cut, repair
from mil_cli.graph.model import Model
from mil_cli.graph.residual import remove_branches, residual_chains
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit

VIEWS = {"view", "reshape", "flatten", "contiguous", "squeeze", "unsqueeze", "clone", "_unsafe_view", "dropout"}
OVER_OPERANDS = {"relu", "add", "mul", "gelu", "sigmoid", "batch_norm", "relu_", "add_", "hardtanh"}


class Sizes(Interpreter):
    """Keeps the bytes of everything that runs."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.graph)
        self.bytes: dict[Node, list[int]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        values = result if isinstance(result, tuple | list) else [result]
        self.bytes[n] = [value.nbytes if isinstance(value, Tensor) else 0 for value in values]
        return result


def brute_force(model: Model) -> int:
    """Return the bytes of weights and of the largest live set: for each step, all tensors born and still to be read."""
    runner = Sizes(model)
    with torch.no_grad():
        runner.run(*model.batch_input(1)[0], enable_io_processing=False)
    nodes = [node for node in model.graph.graph.nodes if node.op in ("placeholder", "call_function")]
    (output,) = (node for node in model.graph.graph.nodes if node.op == "output")
    end = len(nodes)
    place = {node: number for number, node in enumerate(nodes)}

    def name(node: Node) -> str:
        return str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)

    tensors: dict[tuple[Node, int], tuple[int, int, int]] = {}  # birth, last read, bytes
    lies: dict[tuple[Node, int], tuple[Node, int]] = {}

    def which(node: Node) -> tuple[Node, int]:
        if node.op == "call_function" and "getitem" in str(node.target):
            return node.args[0], int(node.args[1])  # type: ignore[return-value, arg-type]
        return node, 0

    def readers(tensor: tuple[Node, int]) -> list[int]:
        source, _ = tensor
        takers = [source] if len(runner.bytes[source]) == 1 else []
        takers += [user for user in source.users if which(user) == tensor and which(user) != (user, 0)]
        return [
            end if user is output else place[user]
            for taker in takers
            for user in taker.users
            if user is output or which(user) == (user, 0)
        ]

    def root(tensor: tuple[Node, int]) -> tuple[Node, int]:
        while tensor in lies:
            tensor = lies[tensor]
        return tensor

    for step, node in enumerate(nodes):
        if which(node) != (node, 0):
            continue
        operands = [root(which(used)) for used in node.all_input_nodes if used in place]
        for number, size in enumerate(runner.bytes[node]):
            own = (node, number)
            last = end if node.op == "placeholder" else max([step, *readers(own)])
            same = [one for one in operands if name(node) in VIEWS]
            over = [
                one
                for one in operands
                if name(node) in OVER_OPERANDS and tensors[one][1] == step and tensors[one][2] == size
            ]
            if same or over:
                lies[own] = (same or over)[0]
                birth, before, kept = tensors[root(own)]
                tensors[root(own)] = (birth, max(before, last), kept)
            else:
                tensors[own] = (step, last, size)
    live = [
        sum(size for birth, last, size in tensors.values() if birth <= step <= last) + scratch(node, runner)
        for step, node in enumerate(nodes)
    ]
    stored = {**dict(model.named_parameters()), **constants(model)}
    return sum(value.numel() * value.element_size() for value in stored.values()) + max(live)


def constants(model: Model) -> dict[str, Tensor]:
    """Return the buffers that something else than a batch norm reads."""
    read = (node for node in model.graph.graph.nodes if node.op == "get_attr")
    names = {str(node.target) for node in read if any("batch_norm" not in str(user.target) for user in node.users)}
    return {name: value for name, value in model.graph.named_buffers() if name in names}


def scratch(node: Node, runner: Sizes) -> int:
    if "scaled_dot_product_attention" not in str(node.target):
        return 0
    query, key = node.args[:2]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    shapes = [tuple(used.meta["val"].shape) for used in (query, key)]
    (heads, length), others = shapes[0][1:3], shapes[1][2]
    return 2 * int(heads) * int(length) * int(others) * 4


class Joined(nn.Module):
    """Branches that live beside each other, are joined and divided again."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.left, self.right = nn.Conv2d(32, 24, 3, padding=1, stride=2), nn.Conv2d(32, 16, 1, stride=2)
        self.mixed = nn.Conv2d(40, 24, 1)
        self.out = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.wide(x)))
        x = torch.cat([torch.relu(self.left(x)), self.right(x)], 1)
        first, second = self.mixed(x).chunk(2, 1)
        result: Tensor = self.out((first * second.sigmoid()).flatten(1))
        return result


def test_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 2)).eval()
    model = Model.capture(net, (torch.randn(2, 1, 4, 4),))
    estimate = MemoryEstimate(Counter(analyse(model)))
    weights = 4 * (8 + 8 + 32 + 4 + 128 + 2)
    # input 16, first map 128 (the rectifier writes over it), second map 64: all three while the second layer runs
    assert estimate.weights({}) == weights
    assert estimate.activations({}) == 4 * (16 + 128 + 64)
    assert estimate({}) == weights + 4 * (16 + 128 + 64)


def test_what_is_read_later_is_not_written_over() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            before: Tensor = self.layer(x)
            return torch.relu(before) + before.sigmoid()

    model = Model.capture(Later().eval(), (torch.randn(2, 8),))
    # the input stays; the layer's output, and relu's beside it; sigmoid writes over the former, the sum over relu's
    assert MemoryEstimate(Counter(analyse(model))).activations({}) == 4 * 3 * 8


def test_a_slice_of_a_whole_axis_is_no_copy() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2)[:, 2:] * 3

    model = Model.capture(Part().eval(), (torch.randn(2, 8),))
    assert sum("slice" in node.name for node in model.graph.graph.nodes) == 2  # one of samples: all of them
    assert MemoryEstimate(Counter(analyse(model))).activations({}) == 4 * (8 + 8 + 6)


class Attending(nn.Module):
    """One tensor is query, key and value; masks, positions and scales are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.layer, self.out = nn.Linear(16, 24), nn.Linear(24, 4)
        self.register_buffer("mask", torch.ones(12, 12).tril().bool())
        self.register_buffer("places", torch.randn(6, 24))
        self.register_buffer("scale", torch.rand(24))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.norm(x)) * self.scale + self.places
        h = h[:, None]
        h = nn.functional.scaled_dot_product_attention(h, h, h)[:, 0]
        h = h.masked_fill(self.mask[3:9, 1:2], 0.0)  # type: ignore[index]
        result: Tensor = self.out(h)
        return result


class Scaled(nn.Module):
    """A buffer has as many entries as a layer that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3)
        self.register_buffer("scale", torch.rand(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.norm(self.first(x))) * self.scale)
        return result


def test_a_tensor_that_attends_to_itself_and_what_is_read_beside_weights() -> None:
    model = Model.capture(Attending().eval(), (torch.randn(2, 6, 16),))
    estimate = MemoryEstimate(Counter(analyse(model)))
    # what is cut out of the mask, positions, and scales: single numbers but for the mask
    assert estimate.constants({}) == 6 + 4 * 6 * 24 + 4 * 24
    # the input, what attends, what comes of it; its scores and their softmax
    assert estimate.activations({}) == 4 * (6 * 16 + 2 * 6 * 24 + 2 * 6 * 6)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "joined": lambda: (Joined(), torch.randn(2, 3, 8, 8)),
    "resnet": lambda: (resnet20(width=8), torch.randn(2, 1, 16, 16)),
    "buffers": lambda: (Scaled(), torch.randn(2, 3, 8, 8)),
    "vit": lambda: (vit(image_size=16, patch=4, dim=32, depth=2, heads=4), torch.randn(2, 1, 16, 16)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("resnet", "vit") else ()) for name in NETS]
)
def test_a_cut_needs_what_the_definition_says_of_the_model_that_it_makes(name: str) -> None:
    torch.manual_seed(0)
    net, sample = NETS[name]()
    model = Model.capture(net.eval(), (sample,))
    coupling = analyse(model)
    estimate = MemoryEstimate(Counter(coupling))
    generator = torch.Generator().manual_seed(0)
    whole = estimate({})
    assert whole == brute_force(cut(model, coupling, {}))
    for share in (0.2, 0.5, 0.8):
        drawn = {
            number: {label for label in space.free if float(torch.rand((), generator=generator)) < share}
            for number, space in enumerate(coupling.spaces)
        }
        removed = repair(coupling, drawn)
        smaller = cut(model, coupling, removed)
        assert estimate(removed) == brute_force(smaller) <= whole


class Gated(nn.Module):
    """Residual branches in a row, whose insides are divided and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Conv2d(8, 32, 1) for _ in range(3))
        self.back = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for wide, back in zip(self.wide, self.back, strict=True):
            first, second = wide(x).chunk(2, 1)
            x = back(first * second.sigmoid()) + x
        return x.mean((2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "channels"), [(lambda: resnet20(width=8), 1), (Gated, 8)], ids=["rectified_sums", "sums"]
)
def test_branches_that_are_left_out_take_no_memory(net: Callable[[], nn.Module], channels: int) -> None:
    torch.manual_seed(0)
    model = Model.capture(net().eval(), (torch.randn(2, channels, 16, 16),))
    coupling = analyse(model)
    estimate = MemoryEstimate(Counter(coupling))
    branches = [branch for chain in residual_chains(coupling.graph) for branch in chain]
    for gone in ([branches[0]], branches[1:3], branches[:1] + branches[-1:], branches):
        smaller = cut(model, coupling, {})
        remove_branches(smaller.graph, gone)
        dropped = frozenset[str]().union(*(branch.nodes for branch in gone))
        assert estimate({}, dropped) == brute_force(smaller)


def test_wider_types_take_more() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x).double()
            return result

    model = Model.capture(Double().eval(), (torch.randn(2, 8),))
    # 8 + 4 single numbers, and 4 double ones while they are made
    assert MemoryEstimate(Counter(analyse(model))).activations({}) == 4 * 12 + 8 * 4
    assert MemoryEstimate(Counter(analyse(model))).weights({}) == 4 * 36
