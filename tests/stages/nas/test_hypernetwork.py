"""Weights that a hypernetwork gives: the right shapes and sizes, gradients, and what is shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mil_cli.spaces import Conv2d, DesignedSpace, Kernel
from mil_cli.stages.nas.hypernetwork import Generated, Hypernetwork, HypernetworkConfig
from mil_cli.stages.nas.one_shot import Judge
from mil_cli.stages.nas.shared import step_generator
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import run_through_kills
from tests.stages.nas.designed import context, incoming, space


def _generated(chunk: int = 64) -> Generated:
    searched, model = space(), incoming()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hypernetwork = Hypernetwork(searched, hidden=32, embedding=8, chunk=chunk)
    return Generated(searched, hypernetwork, spec=model.spec, samples=model.samples)


def test_every_weight_is_given_in_its_shape_with_the_variance_of_its_layer() -> None:
    for chunk in (7, 64, 100_000):
        generated = _generated(chunk)
        searched = generated.space
        weights = generated.hypernetwork(torch.from_numpy(searched.encode(searched.largest)))
        own = {name: weight for name, weight in searched.module.named_parameters() if weight.ndim > 1}
        assert {name: weight.shape for name, weight in weights.items()} == {
            name: weight.shape for name, weight in own.items()
        }
        together = torch.cat([weight.flatten() * (weight[0].numel() / 2) ** 0.5 for weight in weights.values()])
        assert float(together.detach().std()) == pytest.approx(1, abs=0.25)


def test_maps_to_smaller_kernels_are_not_given() -> None:
    kernel = Kernel([3, 5], transformed=True)
    searched = DesignedSpace(nn.Sequential(Conv2d(1, 4, kernel, padding=kernel // 2)))
    hypernetwork = Hypernetwork(searched, hidden=8, embedding=4, chunk=32)
    assert list(hypernetwork(torch.from_numpy(searched.encode(searched.largest)))) == ["0.weight"]


def test_nets_that_are_built_of_it_have_nothing_frozen() -> None:
    generated = _generated()
    smallest = generated.space.smallest
    for net in (generated.space.build(smallest), generated.plain(smallest)):
        assert all(parameter.requires_grad for parameter in net.parameters())


def test_maps_to_smaller_kernels_learn_beside_what_is_given() -> None:
    kernel = Kernel([3, 5], transformed=True)
    searched, model = DesignedSpace(nn.Sequential(Conv2d(1, 4, kernel, padding=kernel // 2))), incoming()
    hypernetwork = Hypernetwork(searched, hidden=8, embedding=4, chunk=32)
    generated = Generated(searched, hypernetwork, spec=model.spec, samples=model.samples)
    generated.run(lambda: searched.smallest)
    generated.train()(torch.randn(2, 1, 8, 8)).square().sum().backward()
    (matrix,) = searched.module[0].maps.parameters()  # type: ignore[index, union-attr]
    assert matrix.grad is not None
    assert matrix.grad.any()


def test_a_plain_net_computes_what_the_hypernetwork_runs() -> None:
    generated = _generated()
    searched = generated.space
    x = torch.randn(4, 1, 8, 8)
    for step in range(3):
        path = searched.sample(step_generator(0, step))
        plain = generated.plain(path).train()
        generated.run(lambda path=path: path)  # type: ignore[misc]
        torch.testing.assert_close(generated.train()(x), plain(x), rtol=1e-4, atol=1e-5)


def test_what_was_chosen_changes_the_weights_of_other_layers() -> None:
    generated = _generated()
    searched = generated.space
    names = list(generated.hypernetwork(torch.from_numpy(searched.encode(searched.largest))))
    first, second = (
        generated.hypernetwork(torch.from_numpy(searched.encode(one))) for one in (searched.largest, searched.smallest)
    )
    assert all((first[name] - second[name]).abs().max() > 1e-4 for name in names)


def test_gradients_reach_the_hypernetwork_and_what_is_shared_by_finite_differences() -> None:
    generated, task = _generated(), Classification()
    images, labels = next(iter(context().data.train.batches(16)))
    batch = (images.double(), labels)
    searched = generated.space
    code = torch.from_numpy(searched.encode(searched.largest)).double()
    generated.train().module.double()
    task.loss(generated(batch[0]), batch).backward()
    bias = generated.hypernetwork.out.bias
    assert bias.grad is not None

    def loss(shift: float) -> float:
        with torch.no_grad():
            bias[3] += shift
            weights = generated.hypernetwork(code)
            with searched.active(searched.largest):
                value = task.loss(functional_call(searched.module, weights, (batch[0],)), batch)
            bias[3] -= shift
        return float(value)

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert float(bias.grad[3]) == pytest.approx(numeric, rel=1e-4)
    used = {name for name, weight in searched.module.named_parameters() if weight.grad is not None}
    assert used
    assert all(dict(searched.module.named_parameters())[name].ndim == 1 for name in used)


def test_training_goes_on_after_kills_to_the_same_bits(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    settings = TrainerConfig(epochs=1, batch_size=256, checkpoint_every_seconds=0).model_dump()
    config = HypernetworkConfig.model_validate({"trainer": settings, "hidden": 16, "chunk": 64})
    whole = config.shared(incoming(), context(tmp_path / "whole"))
    pieces = run_through_kills(
        lambda: config.shared(incoming(), context(tmp_path / "pieces")),  # type: ignore[arg-type, return-value]
        monkeypatch,
        saves=[1, 3],
    )
    torch.testing.assert_close(whole.state_dict(), pieces.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_a_hypernetwork_learns_the_digits() -> None:
    around = context()
    config = HypernetworkConfig.model_validate({"trainer": {"epochs": 60, "batch_size": 64}})
    generated = config.shared(incoming(), around)
    judge = Judge(generated, config, around)
    assert judge(generated.space.largest) > 0.35  # chance is 0.1; it learns slowly
    assert judge(generated.space.smallest) > 0.3
