"""Both branches of a choice are written out and put back; each is counted, cut and proven."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mil_cli.export.onnx import export_onnx
from mil_cli.graph.branches import COND, branch_path, choose_branch, inline_branches, restore_branches
from mil_cli.graph.count import count_layers
from mil_cli.graph.coupling import Counter, analyse, check_equivalence, cut, repair
from mil_cli.graph.model import Model, copy_graph
from mil_cli.graph.nodes import calls, get_attribute, op_name
from mil_cli.graph.residual import remove_branches, residual_chains


class Choice(nn.Module):
    """A wide branch of two layers, a narrow one of one, and a constant that only the narrow one has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.up, self.down, self.narrow = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = torch.cond(
            x.sum() > 0,
            lambda z: self.down(self.up(z).relu()),
            lambda z: self.narrow(z) + torch.tensor(SHIFT),
            (y,),
        )
        return self.last(y.relu())


SHIFT = [0.5 * number for number in range(8)]
HIGH, LOW = torch.rand(5, 6), -torch.rand(5, 6)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model.capture(Choice().eval(), (torch.randn(4, 6),))


def half(model: Model) -> tuple[Model, dict[int, set[int]]]:
    coupling = analyse(model)
    removed = repair(coupling, {number: set(space.free[::2]) for number, space in enumerate(coupling.spaces)})
    return cut(model, coupling, removed), removed


def test_written_out_and_put_back_is_the_same(model: Model) -> None:
    graph = copy_graph(model.graph)
    inline_branches(graph)
    names = [op_name(node) for node in calls(graph)]
    assert names.count("linear") == 5
    assert {len(branch_path(node)) for node in calls(graph) if op_name(node) == "linear"} == {0, 1}
    assert not any(isinstance(child, GraphModule) for child in graph.children())
    for x in (HIGH, LOW):
        assert torch.equal(graph(x), model(x))
    restore_branches(graph)
    graph.graph.lint()
    graph.recompile()
    assert [op_name(node) for node in calls(graph)].count("linear") == 2
    assert not graph.graph.find_nodes(op="call_function", target=choose_branch)
    (call,) = graph.graph.find_nodes(op="call_function", target=COND)
    bodies = [get_attribute(graph, node.target) for node in call.args[1:3]]
    assert [[op_name(node) for node in calls(body)].count("linear") for body in bodies] == [2, 1]
    for x in (HIGH, LOW):
        assert torch.equal(graph(x), model(x))


def test_all_inner_channels_of_both_branches_can_be_cut(model: Model) -> None:
    coupling = analyse(model)
    assert coupling.unknown == ()
    assert sorted(len(space.free) for space in coupling.spaces if space.free) == [8, 8, 20]


def test_both_branches_count_before_and_after_a_cut(model: Model) -> None:
    assert model.macs() == 6 * 8 + 2 * 8 * 20 + 8 * 8 + 8 * 3
    assert sum(layer.params for layer in count_layers(model)) == model.num_params()
    coupling = analyse(model)
    assert Counter(coupling).macs({}) == model.macs()
    small, removed = half(model)
    assert small.macs() == 6 * 4 + 2 * 4 * 10 + 4 * 4 + 4 * 3
    assert Counter(coupling).macs(removed) == small.macs()
    assert Counter(coupling).params(removed) == small.num_params()


@pytest.mark.parametrize("weight", ["up.weight", "narrow.bias"])
def test_a_branch_that_no_input_takes_is_compared_as_well(model: Model, weight: str) -> None:
    coupling = analyse(model)
    small, removed = half(model)
    inputs = [((HIGH if weight == "narrow.bias" else LOW,), {})]
    assert check_equivalence(model, coupling, removed, small, inputs).equivalent
    with torch.no_grad():
        dict(small.named_parameters())[weight].add_(0.5)
    assert not check_equivalence(model, coupling, removed, small, inputs).equivalent


@pytest.mark.slow
def test_a_cut_choice_is_archived_and_exported(model: Model, tmp_path: Path) -> None:
    small, _ = half(model)
    small.save(tmp_path / "m.pt2")
    loaded = Model.load(tmp_path / "m.pt2")
    assert loaded.fingerprint() == small.fingerprint()
    assert set(loaded.state_dict()) == set(Choice().state_dict())
    export_onnx(small, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for x in (HIGH, LOW):
        expected = small(x)
        assert torch.equal(loaded(x), expected)
        (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(given, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_what_a_branch_computes_counts_for_the_fingerprint(model: Model) -> None:
    other = model.clone()
    (call,) = other.graph.graph.find_nodes(op="call_function", target=COND)
    body = get_attribute(other.graph, call.args[1].target)
    next(node for node in calls(body) if op_name(node) == "relu").target = torch.ops.aten.tanh.default
    assert other.fingerprint() != model.fingerprint()


class Guarded(nn.Module):
    """The small table is only looked up where it has all that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Embedding(4, 16), nn.Embedding(8, 16)
        self.hidden, self.last, self.inner = nn.Linear(16, 12), nn.Linear(12, 3), nn.Linear(16, 16)

    def forward(self, places: Tensor) -> Tensor:
        found = torch.cond(places.max() < 4, lambda v: self.small(v), lambda v: self.inner(self.large(v)), (places,))
        return self.last(self.hidden(found).relu())


def test_a_branch_that_the_samples_cannot_run_is_left_whole() -> None:
    torch.manual_seed(0)
    places = torch.randint(4, 8, (4, 3))
    places[:, 0] = 7
    model = Model.capture(Guarded().eval(), (places,))
    coupling = analyse(model)
    assert [reason for _, reason, _ in coupling.unknown] == ["no rule for the operator cond"]
    assert Counter(coupling).macs({}) == model.macs() == 3 * (16 * 12 + 12 * 3)
    small, removed = half(model)
    assert dict(small.named_parameters())["hidden.weight"].shape == (6, 16)
    assert check_equivalence(model, coupling, removed, small, [((places,), {})]).equivalent


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.inner, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        z = self.inner(y)
        z = torch.cond(z.sum() > 0, lambda v: v + self.a(v), lambda v: v * 2 + self.b(v), (z,))
        return self.last(y + z)


def test_a_residual_branch_takes_a_choice_with_it_but_is_not_sought_inside() -> None:
    torch.manual_seed(0)
    module = Skipping().eval()
    model = Model.capture(module, (torch.randn(4, 6),))
    coupling = analyse(model)
    ((branch,),) = residual_chains(coupling.graph)
    remove_branches(model.graph, [branch])
    assert torch.equal(model(HIGH), module.last(module.first(HIGH).relu()))
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"first", "last"}
