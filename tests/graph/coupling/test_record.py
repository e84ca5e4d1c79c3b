"""Recording by shapes alone: falls back where values decide, keeps integers, knows shared weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from mil_cli.graph.coupling.record import record

aten = torch.ops.aten


def test_shapes_that_depend_on_values_are_found_by_a_full_run() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.nonzero.default, (x,)))
    recording = record(GraphModule(nn.Module(), graph), (torch.tensor([[0.0, 1.0], [2.0, 3.0]]),), {})
    assert recording.shapes["nonzero_default"] == (3, 2)
    assert recording.values["nonzero_default"].tolist() == [[0, 1], [1, 0], [1, 1]]


def test_integers_keep_their_values_beside_floats_without() -> None:
    root = nn.Module()
    root.register_buffer("index", torch.tensor([2, 0]))
    root.register_parameter("weight", nn.Parameter(torch.randn(4, 3)))
    graph = Graph()
    x = graph.placeholder("x")
    doubled = graph.call_function(aten.mul.Tensor, (graph.get_attr("index"), 1))
    rows = graph.call_function(aten.index_select.default, (graph.get_attr("weight"), 0, doubled))
    graph.output(graph.call_function(aten.matmul.default, (x, rows)))
    recording = record(GraphModule(root, graph), (torch.randn(5, 2),), {})
    assert recording.values["mul_tensor"].tolist() == [2, 0]
    assert recording.shapes["index_select_default"] == (2, 3)
    assert recording.shapes["matmul_default"] == (5, 3)
    assert recording.dtypes["matmul_default"] == torch.float32
    assert not recording.leaves["@weight"].is_meta


def test_an_integer_tensor_changed_in_place_by_floats_is_run_in_full() -> None:
    root = nn.Module()
    root.register_buffer("index", torch.tensor([0, 0]))
    graph = Graph()
    x = graph.placeholder("x")
    index = graph.call_function(aten.clone.default, (graph.get_attr("index"),))
    graph.output(graph.call_function(aten.copy_.default, (index, x)))
    recording = record(GraphModule(root, graph), (torch.tensor([3.0, 4.0]),), {})
    assert recording.values["copy__default"].tolist() == [3, 4]


def test_a_weight_read_under_two_names_is_one_leaf() -> None:
    root = nn.Module()
    root.first = nn.Linear(2, 2)
    root.second = nn.Module()
    root.second.weight = root.first.weight
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.linear.default, (x, graph.get_attr("first.weight")))
    graph.output(graph.call_function(aten.linear.default, (y, graph.get_attr("second.weight"))))
    recording = record(GraphModule(root, graph), (torch.randn(1, 2),), {})
    assert recording.leaf_names == {"@first.weight": ["first.weight", "second.weight"]}
