from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.errors import StageError
from mil_cli.graph.functional import make_functional
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.stages.quantize.layers import NEVER, NO_TABLES
from mil_cli.stages.quantize.placement import Placement, Policy, choose_policy, place


class Block(nn.Module):
    """Two convolutions with a shortcut, pooling, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 3, padding=1)})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.first(x)), 2)
        y = self.inner["b"](torch.relu(self.inner["a"](x)))
        return self.head(functional.dropout(torch.relu(x + y).mean((2, 3)), 0.5, self.training))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv1d(2, 8, 2, 2)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).transpose(1, 2)
        y = self.norm(x)
        mixed = functional.scaled_dot_product_attention(*(layer(y) for layer in self.layers[:3]))
        return x + self.layers[3](mixed)


def placed(
    module: nn.Module, shape: tuple[int, ...], policy: Policy, *, skip: tuple[str, ...] = (), narrow: bool = False
) -> Placement:
    model = Model.capture(module.eval(), (torch.randn(shape),))
    make_functional(model.graph)
    few = (lambda layer: not layer.edge) if narrow else None
    return place(model.graph, policy=policy, skip=skip, narrow=few)


def ops(nodes: object) -> list[str]:
    return sorted(op_name(node) for node in nodes)  # type: ignore[attr-defined]


def test_policy_follows_the_content() -> None:
    assert choose_policy(Model.capture(Block().eval(), (torch.randn(2, 1, 8, 8),)).graph) == "cnn"
    assert choose_policy(Model.capture(Attention().eval(), (torch.randn(2, 2, 8),)).graph) == "transformer"
    assert choose_policy(Model.capture(nn.Linear(3, 3).eval(), (torch.randn(2, 3),)).graph) == "transformer"


class Weighed(nn.Module):
    """Two convolutions of which each channel takes a share, and probabilities at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 5, padding=2)
        self.shares, self.head = nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.first(x), self.second(x)], 1)
        shares = self.shares(both.sum(1).mean((2, 3))).view(-1, 2, 4, 1, 1).softmax(1)
        return self.head((both * shares).sum(1).mean((2, 3))).softmax(-1)


class ByHand(nn.Module):
    """Attention in single operators, its shares masked, cast and dropped before the product."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv1d(2, 8, 2, 2)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).transpose(1, 2)
        query, key, value = (layer(x) for layer in self.layers)
        shares = (query @ key.mT).double().softmax(-1).to(x.dtype).unsqueeze(1)
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        return functional.dropout(shares.masked_fill(~mask, 0.0), 0.1, self.training) @ value.unsqueeze(1)


def test_a_softmax_that_weighs_channels_or_ends_a_net_is_no_attention() -> None:
    assert choose_policy(Model.capture(Weighed().eval(), (torch.randn(2, 1, 8, 8),)).graph) == "cnn"
    assert choose_policy(Model.capture(ByHand().eval(), (torch.randn(2, 2, 8),)).graph) == "transformer"


def test_layers_read_few_bits_while_sums_keep_more() -> None:
    placement = placed(Block(), (2, 1, 8, 8), "cnn", narrow=True)
    # What a and b read; the first layer and the head keep theirs.
    assert {op_name(node): ops(layers) for node, layers in placement.narrow.items()} == {
        "max_pool2d": ["conv2d"],
        "relu": ["conv2d"],
    }
    # The value between a and b is read by b alone: it has no second quantizer.
    (between,) = (node for node in placement.narrow if op_name(node) == "relu")
    assert between not in {*placement.owned, *placement.shared, *placement.exclusive}
    # The pooled value is read by the sum as well, which wants it whole.
    assert ops(placement.owned) == ["conv2d", "mean", "placeholder", "relu", "relu"]
    assert "max_pool2d" in ops(placement.shared)


def test_cnn_policy_covers_both_sides_of_everything() -> None:
    placement = placed(Block(), (2, 1, 8, 8), "cnn")
    assert [layer.name for layer in placement.layers] == ["first", "inner.a", "inner.b", "head"]
    # the input; first and its relu; a and its relu; b; the sum and its relu; the mean
    assert ops(placement.owned) == ["conv2d", "mean", "placeholder", "relu", "relu", "relu"]
    # pooling keeps its input's values, dropout is the identity: they share the scale of what comes before
    assert {op_name(node): op_name(root) for node, root in placement.shared.items()} == {
        "max_pool2d": "relu",
        "dropout": "mean",
    }
    assert [layer.edge for layer in placement.layers] == [True, False, False, True]
    assert not placement.kept_float
    # the output of the last layer stays as it is
    assert all("output" not in {user.op for user in node.users} for node in placement.owned)


@pytest.mark.parametrize(
    "end",
    [
        nn.Softmax(1),
        nn.LogSoftmax(1),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.PixelShuffle(2),
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Softmax(1)),
    ],
)
def test_what_finishes_an_output_leaves_the_last_layer_at_the_edge(end: nn.Module) -> None:
    placement = placed(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3)), end), (2, 4, 8, 8), "cnn")
    assert [layer.edge for layer in placement.layers] == [True, False, True]
    channels = 1 if isinstance(end, nn.PixelShuffle) else 4
    inside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), end, nn.Conv2d(channels, 4, 1))
    assert [layer.edge for layer in placed(inside, (2, 4, 8, 8), "cnn").layers] == [True, False, True]


def test_transformer_policy_covers_inputs_of_products_only() -> None:
    placement = placed(Attention(), (2, 2, 8), "transformer")
    assert ops(placement.owned) == ["conv1d", "layer_norm", "placeholder", "scaled_dot_product_attention"]
    assert ops(placement.exclusive) == ["conv1d"]
    norm = next(node for node in placement.owned if op_name(node) == "layer_norm")
    assert ops(placement.readers[norm]) == ["linear", "linear", "linear"]
    assert list(placement.kept_float.values()) == ["products of two activations stay float"]


def test_a_value_read_by_a_float_operator_stays_exact_for_it() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return y + self.linear(y)

    placement = placed(PostNorm(), (2, 4), "transformer")
    (norm,) = placement.owned
    assert ops(placement.readers[norm]) == ["linear"]
    assert len(norm.users) == 2


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("inner", ["first", "head"]),
        ("inner.a", ["first", "inner.b", "head"]),
        ("*.?", ["first", "head"]),
        ("li*", None),
    ],
)
def test_skip_patterns(pattern: str, left: list[str] | None) -> None:
    placement = placed(Block(), (2, 1, 8, 8), "cnn", skip=(pattern,))
    names = [layer.name for layer in placement.layers]
    assert names == (["first", "inner.a", "inner.b"] if left is None else left)
    skipped = {"first", "inner.a", "inner.b", "head"} - set(names)
    assert placement.kept_float == dict.fromkeys(skipped, f"skipped by '{pattern}'")


def test_skip_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(StageError, match="'haed' fits no layer") as caught:
        placed(Block(), (2, 1, 8, 8), "cnn", skip=("haed",))
    assert "did you mean 'head'" in str(caught.value)


def test_reasons_for_float_layers() -> None:
    class Float(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.up = nn.ConvTranspose1d(4, 4, 2)
            self.gru = nn.GRU(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(self.up(self.normed(self.embedding(x)).transpose(1, 2)))[0]

    model = Model.capture(Float().eval(), (torch.zeros(3, 6, dtype=torch.int64),))
    kept = place(model.graph, policy="transformer", never={**NEVER, **NO_TABLES}).kept_float
    assert {name.split(".")[0]: reason.split(" ")[0] for name, reason in kept.items()} == {
        "embedding": "embeddings:",
        "normed": "its",
        "up": "onnxruntime",
        "gru": "onnxruntime",
    }


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x * 2
        functional.relu_(y)
        z = y + 1
        z.add_(x)
        part = x + 3
        part[:, 0].mul_(2).relu_()
        return y, z, part


def test_in_place_operators_become_functional_where_that_is_safe() -> None:
    x = torch.randn(4, 5)
    model = Model.capture(InPlace().eval(), (x,))
    expected = model(x.clone())
    make_functional(model.graph)
    names = [op_name(node) for node in calls(model.graph)]
    assert names.count("relu_") == 1
    assert "add_" not in names
    assert "mul_" in names  # it writes into a view, and so does the rectifier behind it
    for found, reference in zip(model(x.clone()), expected, strict=True):
        assert torch.equal(found, reference)


class Named(nn.Module):
    """The path of the second layer is the name that the node of the first one gets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.linear(torch.relu(self.first(x)))))
        return logits


def test_a_path_of_a_layer_is_not_taken_for_the_node_of_another() -> None:
    assert set(placed(Named(), (2, 4), "transformer", skip=("linear",)).kept_float) == {"linear"}
    assert set(placed(Named(), (2, 4), "transformer", skip=("linear_2",)).kept_float) == {"last"}


class Written(nn.Module):
    """The input of `second` is changed after it was made; `third` reads what is made of it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x[:, :2] += 5.0
        return self.third(torch.relu(self.second(x)))


def test_values_that_are_overwritten_get_no_quantizer() -> None:
    kept = placed(Written(), (2, 4), "transformer")
    assert kept.kept_float == {"second": "an operator in place changes its input after it was made"}
    assert [layer.name for layer in kept.layers] == ["first", "third"]


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.second(self.first(x) + mask))


def test_values_that_are_no_floats_get_no_quantizer() -> None:
    x = torch.randn(2, 1, 4)
    for mask, joined in ((torch.ones(2, 1, 4), True), (torch.ones(2, 1, 4, dtype=torch.int64), False)):
        placement = place(Model.capture(Shifted().eval(), (x, mask)).graph, policy="cnn")
        quantized = [node.name for node in [*placement.owned, *placement.shared]]
        assert ("mask" in quantized) == joined
        assert len(placement.layers) == 2


class Left(nn.Module):
    """Mixes tokens by a matrix, and attends with queries that were learned, which are no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.queries = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(1, 2, 4))
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix @ x
        shares = torch.softmax(self.queries @ x.transpose(1, 2), -1)
        logits: Tensor = self.last(shares @ x)
        return logits


def test_a_weight_on_the_left_is_said_to_stay_float() -> None:
    assert placed(Left(), (2, 3, 4), "transformer").kept_float == {"matmul": "its weight stands on the left"}
