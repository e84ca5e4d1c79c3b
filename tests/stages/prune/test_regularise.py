"""Penalties before a cut: their gradients against closed forms and autograd, and what training under them leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.errors import StageError
from mil_cli.graph.coupling import Coupling, analyse, group_norms
from mil_cli.graph.coupling.groups import WeightGroups
from mil_cli.graph.model import Model
from mil_cli.stages.prune import rounds
from mil_cli.stages.prune.group_lasso import norm_penalty
from mil_cli.stages.prune.growing_reg import GrowingRegConfig, growing_penalty, growing_reg
from mil_cli.stages.prune.schedule import choose
from mil_cli.stages.prune.slimming import sign_penalty
from mil_cli.stages.registry import config_type, function_of
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import make_context, run_through_kills, trained_digits

DATA = digits()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Model:
    torch.manual_seed(0)
    module = Net()
    nn.init.normal_(module.norm.weight)
    return Model.capture(module.eval(), (torch.randn(2, 1, 8, 8),))


def with_gradients(model: Model) -> tuple[Model, dict[str, Tensor]]:
    training = model.clone().train()
    torch.manual_seed(1)
    for parameter in training.parameters():
        parameter.grad = torch.randn_like(parameter)
    return training, {name: parameter.grad.clone() for name, parameter in training.named_parameters()}  # type: ignore[union-attr]


def added(training: Model, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.grad - before[name] for name, parameter in training.named_parameters()}  # type: ignore[operator]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_slimming_adds_the_gradient_of_the_sum_of_scales(net: Model) -> None:
    training, before = with_gradients(net)
    sign_penalty(net, 0.01, where="x")(training, 0, 1)
    found = added(training, before)
    torch.testing.assert_close(found["norm.weight"], 0.01 * net.state_dict()["norm.weight"].sign())
    assert {name for name, value in found.items() if bool(value.any())} == {"norm.weight"}
    plain = Model.capture(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), (torch.randn(2, 4),))
    with pytest.raises(StageError, match="no batch, group or instance norm"):
        sign_penalty(plain, 0.01, where="x")


def group_sizes(parameters: dict[str, Tensor]) -> Tensor:
    """The norms of all groups, worked out by hand: six channels of the first layer, eight of the second."""
    first = [
        parameters["first.weight"][c].square().sum()
        + parameters["norm.weight"][c].square()
        + parameters["second.weight"][:, c].square().sum()
        for c in range(6)
    ]
    second = [
        parameters["second.weight"][c].square().sum() + parameters["head.weight"][:, c].square().sum() for c in range(8)
    ]
    return torch.stack([*first, *second]).sqrt()


def test_group_lasso_adds_the_gradient_of_the_sum_of_norms(net: Model) -> None:
    training, before = with_gradients(net)
    norm_penalty(net, 0.01, adaptive=False)(training, 0, 1)
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in net.named_parameters()}
    (0.01 * group_sizes(leaves).sum()).backward()
    for name, value in added(training, before).items():
        expected = leaves[name].grad
        torch.testing.assert_close(
            value, torch.zeros_like(value) if expected is None else expected, atol=1e-6, rtol=1e-4
        )


def test_the_adaptive_form_shrinks_small_groups_most(net: Model) -> None:
    training, before = with_gradients(net)
    norm_penalty(net, 0.01, adaptive=True)(training, 0, 1)
    gamma = net.state_dict()["norm.weight"]
    factors = added(training, before)["norm.weight"] / gamma / 0.01
    sizes = group_sizes(dict(net.named_parameters()))[:6].detach()
    expected = 2 ** (4 * (sizes.max() - sizes) / (sizes.max() - sizes.min()))
    torch.testing.assert_close(factors, expected, rtol=1e-3, atol=1e-3)
    assert float(factors.max()) == pytest.approx(16, rel=1e-3)
    assert float(factors.min()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("steps", "strength"), [(0, 0.1), (9, 0.1), (10, 0.2), (25, 0.3), (1000, 0.5)])
def test_growing_regularisation_grows_with_the_steps_on_the_doomed_alone(
    steps: int, strength: float, net: Model
) -> None:
    coupling = analyse(net)
    groups = WeightGroups(net.graph, coupling)
    doomed = [torch.zeros(size, dtype=torch.float64) for size in groups.sizes]
    origin = [space.origin for space in coupling.spaces].index("first.weight")
    doomed[origin][[1, 4]] = 1.0
    training, before = with_gradients(net)
    growing_penalty(groups, doomed, ceiling=0.5, growth=0.1, every=10)(training, steps, 2000)
    found, weights = added(training, before), net.state_dict()
    for channel in range(6):
        factor = strength if channel in (1, 4) else 0.0
        close(found["first.weight"][channel], factor * weights["first.weight"][channel])
        close(found["second.weight"][:, channel], factor * weights["second.weight"][:, channel])


@pytest.fixture(scope="module")
def trained() -> Model:
    return trained_digits()


def loss(model: Model) -> float:
    images, labels = next(iter(DATA.val.batches(len(DATA.val))))  # type: ignore[misc]
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))


STRENGTHS: dict[str, dict[str, Any]] = {
    "group_lasso": {"strength": 1e-2},
    "growing_reg": {"strength": 1.0, "growth": 0.05, "every": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(STRENGTHS))
def test_the_cut_after_the_penalty_loses_less_than_without(method: str, trained: Model) -> None:
    shared = {"macs": 0.65, "round_to": 1, "recalibrate_samples": 256, "compare_samples": 0}
    trainer = {"epochs": 6, "learning_rate": 0.02}
    used = make_context(DATA, name="prune", trainer=TrainerConfig(epochs=1))
    config = config_type("prune", method).model_validate({**shared, **STRENGTHS[method], "trainer": trainer})
    before = trained.fingerprint()
    penalised = function_of(config)(trained, config, used)
    assert trained.fingerprint() == before
    assert penalised.macs() <= 0.65 * trained.macs()
    assert {"quality_before_training", "quality_after_training"} <= set(used.notes)
    only = config.model_copy(update={"strength": 1e-12, **({"growth": 1e-12} if method == "growing_reg" else {})})
    plain = function_of(only)(trained, only, make_context(DATA, name="prune", trainer=TrainerConfig(epochs=1)))
    assert loss(penalised) < loss(plain)


@pytest.mark.slow
def test_slimming_leaves_scales_that_are_small_beside_the_others(trained: Model) -> None:
    """A penalty that is the same for all takes a larger share of the small ones."""

    def smallest_third(strength: float) -> float:
        used = make_context(DATA, trainer=TrainerConfig(epochs=6, learning_rate=0.02))
        penalty = sign_penalty(trained, strength, where="x")
        net = used.finetune(trained, stage=None, name="slim", before_step=penalty)
        gammas = torch.cat(
            [value.detach().abs() for name, value in net.named_parameters() if "bn" in name and "weight" in name]
        )
        return float(gammas.sort().values[: len(gammas) // 3].mean() / gammas.mean())

    assert smallest_third(0.2) < 0.9 * smallest_third(1e-12)


@pytest.mark.slow
def test_what_growing_regularisation_chose_is_what_is_cut(trained: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = {"epochs": 6, "learning_rate": 0.02}
    config = GrowingRegConfig(
        macs=0.5, round_to=1, growth=1.0, strength=2.0, compare_samples=0, recalibrate_samples=0, trainer=trainer
    )
    coupling = analyse(trained)
    chosen, _ = choose(trained, coupling, group_norms(trained.graph, coupling), config, make_context(DATA))
    removed: list[dict[int, set[int]]] = []
    original = rounds.cut

    def cut(model: Model, coupling: Coupling, classes: Any) -> Model:
        removed.append({number: set(found) for number, found in classes.items()})
        return original(model, coupling, classes)

    monkeypatch.setattr(rounds, "cut", cut)
    growing_reg(trained, config, make_context(DATA, name="prune"))
    assert len(removed) == 1
    assert removed[0] == chosen


@pytest.mark.slow
@pytest.mark.parametrize("method", ["group_lasso", "growing_reg"])
def test_killed_and_resumed_is_bit_identical(
    method: str, trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"epochs": 2, "learning_rate": 0.02, "checkpoint_every_seconds": 0}
    config = config_type("prune", method).model_validate(
        {"macs": 0.6, "round_to": 1, "recalibrate_samples": 0, "trainer": trainer, **STRENGTHS[method]}
    )
    run = function_of(config)
    whole = run(trained, config, make_context(DATA, workspace=tmp_path / "whole"))
    resumed = run_through_kills(
        lambda: run(trained, config, make_context(DATA, workspace=tmp_path / "killed")),
        monkeypatch,
        saves=(2, 7),
    )
    assert resumed.fingerprint() == whole.fingerprint()
