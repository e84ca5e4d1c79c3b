"""Specifications and trees as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils import _pytree as pytree

from mil_cli.graph.spec import ModelSpec, TensorSpec
from mil_cli.graph.tree import Record, leaf_names, plain_spec, portable_spec

SPEC = ModelSpec(
    inputs=(TensorSpec("x", (5, 3), "float32", {0: "batch"}),),
    outputs=(TensorSpec("y", (5,), "int64", {0: "batch"}), TensorSpec("z", (), "bool")),
    in_tree="[1, null]",
    out_tree="[1, null]",
    out_constants={1: None, 3: "text"},
    task="classification",
    source="a test",
    notices=("one",),
)


def test_a_round_trip_through_json() -> None:
    assert ModelSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
    assert SPEC.inputs[0].torch_dtype == torch.float32
    assert SPEC.batch == "batch"
    assert SPEC.with_(inputs=()).batch is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"inputs": None},
        {"inputs": [{"name": "x", "shape": [1], "dtype": "float99", "dynamic": {}}]},
        {"outputs": [{"name": "x", "shape": [1], "dtype": "float32", "dynamic": {"4": "batch"}}]},
    ],
)
def test_bad_json_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        ModelSpec.from_json(SPEC.to_json() | change)


def test_records() -> None:
    record = Record({"a": 1, "b": 2})
    assert (record.a, record["b"], record[0], list(record), len(record)) == (1, 2, 1, ["a", "b"], 2)
    assert repr(record) == "Record(a=1, b=2)"
    leaves, tree = pytree.tree_flatten({"r": record})
    assert leaves == [1, 2]
    assert pytree.tree_unflatten([3, 4], tree)["r"].b == 4
    dumped = pytree.treespec_dumps(tree)
    assert pytree.tree_unflatten([3, 4], pytree.treespec_loads(dumped))["r"].a == 3
    with pytest.raises(AttributeError, match="there are: a, b"):
        _ = record.c


def test_names_of_leaves() -> None:
    value = {"a": [1, 2], "b": Record({"c": 3}), "d": (4, {"e": 5})}
    spec = portable_spec(value)
    assert leaf_names(spec, alone="output") == ["a_0", "a_1", "b.c", "d_0", "d_1.e"]
    assert leaf_names(portable_spec(7), alone="output") == ["output"]
    assert leaf_names(portable_spec((7, [8])), alone="output") == ["output_0", "output_1_0"]
    plain = pytree.tree_unflatten(pytree.tree_leaves(value), plain_spec(spec))
    assert plain == {"a": [1, 2], "b": {"c": 3}, "d": (4, {"e": 5})}
