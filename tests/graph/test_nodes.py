"""Helpers on nodes and attributes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mil_cli.graph import nodes
from mil_cli.graph.model import Model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.inner(x) + 1)  # here


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.capture(Net(), (torch.randn(4, 4),))


def by_name(model: Model, name: str) -> torch.fx.Node:
    return next(node for node in model.graph.graph.nodes if nodes.op_name(node) == name)


def test_names(model: Model) -> None:
    assert [nodes.op_name(node) for node in nodes.calls(model.graph)] == ["linear", "dropout", "add", "relu_"]
    assert nodes.op_name(by_name(model, "placeholder")) == "placeholder"
    assert nodes.namespace(by_name(model, "linear")) == "aten"
    assert nodes.namespace(by_name(model, "placeholder")) == ""


def test_modules_and_lines(model: Model) -> None:
    linear = by_name(model, "linear")
    assert nodes.module_path(linear) == "inner.0"
    assert [path for path, _ in nodes.module_stack(linear)] == ["", "inner", "inner.0"]
    assert nodes.module_stack(linear)[-1][1].endswith("Linear")
    line = nodes.source_line(linear)
    assert line is not None
    assert line.rpartition(":")[0] == __file__
    assert "# here" in Path(__file__).read_text().splitlines()[int(line.rpartition(":")[2]) - 1]
    assert nodes.module_path(by_name(model, "placeholder")) == ""
    assert nodes.source_line(by_name(model, "placeholder")) is None


def test_arguments(model: Model) -> None:
    copied = model.clone()
    dropout = by_name(copied, "dropout")
    assert nodes.get_argument(dropout, "p") == 0.2
    nodes.set_argument(dropout, "p", 0.4)
    assert dropout.args[1] == 0.4
    add = by_name(copied, "add")
    assert nodes.get_argument(add, "alpha") == 1
    nodes.set_argument(add, "alpha", 3)
    assert add.kwargs == {"alpha": 3}
    nodes.set_argument(add, "alpha", 1)
    assert add.kwargs == {}
    with pytest.raises(KeyError):
        nodes.get_argument(add, "nothing")
    with pytest.raises(KeyError):
        nodes.set_argument(add, "nothing", 1)
    assert nodes.schema_index(by_name(copied, "placeholder"), "p") is None


def test_attributes() -> None:
    root = nn.Module()
    nodes.set_attribute(root, "a.b.weight", nn.Parameter(torch.ones(2)))
    nodes.set_attribute(root, "a.b.offset", torch.zeros(2), persistent=False)
    nodes.set_attribute(root, "a.kind", "text")
    assert set(root.state_dict()) == {"a.b.weight"}
    assert nodes.get_attribute(root, "a.kind") == "text"
    nodes.set_attribute(root, "a.b.weight", torch.ones(3))
    nodes.set_attribute(root, "a.b.offset", torch.ones(3))
    assert not list(root.parameters())
    assert set(root.state_dict()) == {"a.b.weight", "a.b.offset"}
    with pytest.raises(AttributeError):
        nodes.get_attribute(root, "a.c.weight")


def test_annotations_do_not_leak_between_copies(model: Model) -> None:
    copied = model.clone()
    nodes.annotate(by_name(copied, "linear"), "key", [1, 2])
    twice = copied.clone()
    nodes.annotate(by_name(twice, "linear"), "key", None)
    nodes.annotate(by_name(twice, "linear"), "other", "x")
    assert nodes.read_annotation(by_name(copied, "linear"), "key") == [1, 2]
    assert nodes.read_annotation(by_name(copied, "linear"), "other") is None
    assert nodes.read_annotation(by_name(model, "linear"), "key") is None
    assert nodes.read_annotation(by_name(twice, "linear"), "key") is None


def test_user_files() -> None:
    assert nodes.is_user_file(__file__)
    assert not nodes.is_user_file(torch.__file__)
    assert not nodes.is_user_file("<string>")
    assert not nodes.is_user_file(nodes.__file__)
    assert not nodes.is_user_file(warnings_file())
    trace = (
        f'  File "{torch.__file__}", line 3, in f\n  File "{__file__}", line 7, in g\n  File "{torch.__file__}", line 9'
    )
    assert nodes.user_frame(trace) == f"{__file__}:7"
    assert nodes.user_frame("nothing") is None


def warnings_file() -> str:
    import warnings

    return warnings.__file__
