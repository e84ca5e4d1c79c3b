from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mil_cli.errors import StageError
from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.stages.quantize.calibrate import calibrate


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, values: Tensor) -> None:
        self.seen.append(values.clone())

    def range(self) -> tuple[float, float]:
        return 0.0, 0.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
        return {"y": torch.relu(self.linear(x)) + shift}


def test_observers_see_each_value_of_each_batch_once() -> None:
    module = Net().eval()
    model = Model.capture(module, (torch.randn(2, 3),), {"shift": torch.randn(2, 2)})
    before = model.fingerprint()
    nodes = {op_name(node): node for node in [*model.graph.graph.find_nodes(op="placeholder"), *calls(model.graph)]}
    observers = {nodes["relu"]: Recorder(), model.graph.graph.find_nodes(op="placeholder")[0]: Recorder()}
    batches = [((torch.randn(count, 3),), {"shift": torch.randn(count, 2)}) for count in (4, 4, 1)]
    with SilentProgress().work("calibrating") as bar:
        assert calibrate(model.graph, observers, batches, bar=bar) == 3
    relu, inputs = observers.values()
    for (args, _), hidden, seen in zip(batches, relu.seen, inputs.seen, strict=True):
        assert torch.equal(seen, args[0])
        torch.testing.assert_close(hidden, torch.relu(module.linear(args[0])))
        assert not hidden.requires_grad
    assert model.fingerprint() == before
    with SilentProgress().work("calibrating") as bar, pytest.raises(StageError, match="no calibration samples"):
        calibrate(model.graph, observers, [], bar=bar)
