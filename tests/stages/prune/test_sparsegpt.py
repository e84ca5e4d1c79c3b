"""SparseGPT against least squares, against Wanda."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.data.tensors import TensorSplit
from mil_cli.graph.model import Model
from mil_cli.stages.prune.sparsegpt import SparseGptConfig, solve, sparsegpt
from mil_cli.stages.prune.wanda import WandaConfig, wanda
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import make_context, trained_digits


def correlated(samples: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator) + 2 * torch.eye(inputs)
    return torch.randn(samples, inputs, generator=generator) @ mix


def data_of(inputs: Tensor) -> Data:
    split = TensorSplit((inputs, torch.zeros(len(inputs), dtype=torch.int64)))
    return Data(name="correlated", train=split, val=split, test=split)


def test_where_the_first_input_goes_the_rest_is_the_least_squares_solution() -> None:
    x = correlated(200, 6).double()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    weight[:, 0] *= 1e-3  # it costs least, for every output
    config = SparseGptConfig(sparsity=1 / 6, damping=1e-9)
    found, kept = solve(weight, x.T @ x, config)
    assert kept.tolist() == [[False] + [True] * 5] * 4
    expected = torch.linalg.lstsq(x[:, 1:], x @ weight.T).solution.T
    torch.testing.assert_close(found[:, 1:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_outputs_stay_closer_than_wandas(pattern: str | None) -> None:
    x = correlated(500, 32)
    torch.manual_seed(0)
    net = Model.capture(nn.Linear(32, 16).eval(), (torch.randn(2, 32),))
    settings: dict[str, Any] = {"pattern": pattern, "smallest": 0, "samples": 500, "train": False}
    errors = []
    for run, config in ((sparsegpt, SparseGptConfig(**settings)), (wanda, WandaConfig(**settings))):
        sparse = run(net, config, make_context(data_of(x)))  # type: ignore[operator]
        assert float((sparse.state_dict()["weight"] == 0).double().mean()) == 0.5
        errors.append(float((sparse(x) - net(x)).detach().square().mean()))
    assert errors[0] < 0.9 * errors[1]


def test_a_network_stays_good_without_training_and_better_than_by_wanda() -> None:
    data = digits()
    net = trained_digits()
    settings: dict[str, Any] = {"sparsity": 0.6, "train": False}
    used = make_context(data)
    solved = sparsegpt(net, SparseGptConfig(**settings), used)
    by_wanda = wanda(net, WandaConfig(**settings), make_context(data))
    images = next(iter(data.val.batches(200)))[0]
    errors = [float((model(images) - net(images)).detach().square().mean()) for model in (solved, by_wanda)]
    assert errors[0] < 0.7 * errors[1]
    assert used.notes["sparsity"] == pytest.approx(0.6, abs=2e-3)
    trained = sparsegpt(
        net, SparseGptConfig(sparsity=0.6), make_context(data, trainer=TrainerConfig(epochs=1, learning_rate=0.01))
    )
    for name in used.notes["sparse_layers"]:  # type: ignore[attr-defined]
        assert float((trained.state_dict()[name] == 0).double().mean()) == pytest.approx(0.6, abs=2e-3)
