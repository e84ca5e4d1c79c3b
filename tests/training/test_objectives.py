"""Objectives that are bound to a training, taps of the model that it trains, and companions trained along."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from mil_cli.data.base import Data
from mil_cli.graph.model import Model
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.loop import FitResult, fit
from mil_cli.training.objective import Objective, Running
from tests.training.loops import Killed, Slot, same_weights, short_settings


def test_a_bound_objective_sees_the_live_weights_and_each_step_once(
    tiny: Model, patterns: Data, task: Classification
) -> None:
    def run(slot: Slot) -> tuple[FitResult, list[int]]:
        seen: list[int] = []

        def bind(running: Running) -> Objective:
            weights = [parameter for _, parameter in running.model.named_parameters()]
            assert all(parameter is not other for parameter, other in zip(weights, tiny.parameters(), strict=True))

            def objective(outputs: Any, batch: Any) -> torch.Tensor:
                seen.append(running.steps())
                # The steps' numbers enter the loss, so that a resumed training that counted anew would differ.
                return task.loss(outputs, batch) + 0.01 * running.steps() * weights[0].square().sum()

            return objective

        settings = TrainerConfig(epochs=3, batch_size=16, checkpoint_every_seconds=0)
        return fit(tiny, task=task, data=patterns, settings=settings, seed=3, bind=bind, checkpoint=slot), seen

    whole, numbers = run(Slot())
    assert numbers == list(range(12))
    killed = Slot(6)
    with pytest.raises(Killed):
        run(killed)
    killed.kill_at = None
    resumed, numbers = run(killed)
    assert numbers == list(range(12 - len(numbers), 12))
    assert 0 < len(numbers) < 12
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_bound_objective_runs_graphs_in_the_precision_of_the_training(
    precision: Any, patterns: Data, task: Classification
) -> None:
    net = Model.capture(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 3)), (torch.zeros(4, 1, 6, 6),))
    differences = []

    def bind(running: Running) -> Objective:
        def objective(outputs: Any, batch: Any) -> torch.Tensor:
            args, kwargs = task.inputs(batch)
            again = running.forward(running.model.graph, *args, **kwargs)
            full = running.model.graph(*args, **kwargs)
            assert again.dtype == outputs.dtype == torch.float32
            differences.append((bool(torch.equal(again, outputs)), bool(torch.equal(again, full))))
            return task.loss(outputs, batch)

        return objective

    settings = TrainerConfig(epochs=1, batch_size=16, precision=precision)
    fit(net, task=task, data=patterns, settings=settings, seed=3, bind=bind)
    assert {same for same, _ in differences} == {True}
    assert {full for _, full in differences} == ({False} if precision == "bf16-mixed" else {True})


def _tapped_values(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Return what the first convolution gives, by hand."""
    weights = model.state_dict()
    return nn.functional.conv2d(x, weights["conv.weight"], weights["conv.bias"], padding=1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_taps_give_the_values_of_the_same_forward_with_gradients(
    precision: Any, tiny: Model, patterns: Data, task: Classification
) -> None:
    checked = []

    def bind(running: Running) -> Objective:
        def objective(outputs: Any, batch: Any) -> torch.Tensor:
            values = running.tapped()
            assert set(values) == {"conv", "bn"}
            low = precision == "bf16-mixed"
            by_hand = _tapped_values(running.model, batch[0]).detach()
            near = {"rtol": 2e-2, "atol": 5e-2} if low else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(values["conv"].detach().float(), by_hand, **near)
            mean, std = values["bn"].detach().float().mean((0, 2, 3)), values["bn"].detach().float().std((0, 2, 3))
            assert outputs.shape == (len(batch[0]), 3)
            checked.append((mean, std))
            return values["conv"].float().square().mean()

        return objective

    settings = short_settings(epochs=1, precision=precision, scheduler="constant")
    trained = fit(tiny, task=task, data=patterns, settings=settings, seed=3, bind=bind, taps=["conv", "bn"]).model
    assert len(checked) == 4
    # At the first step the norm is in training: its output has mean 0 and deviation 1 over the batch.
    torch.testing.assert_close(checked[0][0], torch.zeros(4), rtol=0, atol=2e-2)
    torch.testing.assert_close(checked[0][1], torch.ones(4), rtol=0, atol=2e-2)
    before, after = tiny.state_dict(), trained.state_dict()
    # The loss reads the convolution alone, so that only it moves, against its own size.
    assert float(after["conv.weight"].norm()) < float(before["conv.weight"].norm())
    assert all(torch.equal(before[name], after[name]) for name in ("head.weight", "bn.weight"))
    assert after.keys() == before.keys()


def test_what_an_objective_holds_is_free_after_training(tiny: Model, patterns: Data, task: Classification) -> None:
    class Held:
        """Stands for a teacher."""

    kept: list[weakref.ref[Held]] = []

    def bind(running: Running) -> Objective:
        held = Held()
        kept.append(weakref.ref(held))

        def objective(outputs: Any, batch: Any) -> torch.Tensor:
            assert held
            assert running.tapped()
            return task.loss(outputs, batch)

        return objective

    gc.collect()
    gc.disable()
    try:
        fit(tiny, task=task, data=patterns, settings=short_settings(epochs=1), seed=3, bind=bind, taps=["bn"])
        assert kept[0]() is None
    finally:
        gc.enable()


def test_taps_change_no_training(tiny: Model, patterns: Data, task: Classification) -> None:
    plain = fit(tiny, task=task, data=patterns, settings=short_settings(), seed=3)
    tapped = fit(tiny, task=task, data=patterns, settings=short_settings(), seed=3, taps=["conv", "bn"])
    assert same_weights(plain.model, tapped.model)


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "gradient_clip": 0.5}, {"precision": "bf16-mixed"}])
def test_companions_are_trained_and_kept_in_checkpoints_but_not_in_the_result(
    changes: dict[str, Any], tiny: Model, patterns: Data, task: Classification
) -> None:
    def run(slot: Slot) -> tuple[FitResult, nn.Linear]:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            adapter = nn.Linear(4, 3)

        def bind(running: Running) -> Objective:
            def objective(outputs: Any, batch: Any) -> torch.Tensor:
                shallow = adapter(running.tapped()["bn"].float().mean((2, 3)))
                return task.loss(outputs, batch) + task.loss(shallow, batch)

            return objective

        result = fit(
            tiny,
            task=task,
            data=patterns,
            settings=short_settings(**changes),
            seed=3,
            bind=bind,
            taps=["bn"],
            companions=adapter,
            checkpoint=slot,
        )
        return result, adapter

    with torch.random.fork_rng():
        torch.manual_seed(5)
        untrained = nn.Linear(4, 3)
    whole, adapter = run(Slot())
    assert not torch.equal(adapter.weight, untrained.weight)
    assert whole.model.state_dict().keys() == tiny.state_dict().keys()
    for kill_at in (1, 6, 11):
        slot = Slot(kill_at)
        with pytest.raises(Killed):
            run(slot)
        resumed, again = run(slot)
        assert same_weights(resumed.model, whole.model), kill_at
        assert torch.equal(again.weight, adapter.weight)
        assert resumed.history == whole.history


def test_companions_step_as_a_bare_optimizer_does(tiny: Model, patterns: Data, task: Classification) -> None:
    """An adapter on the inputs alone is trained as if there were no model."""
    torch.manual_seed(5)
    adapter = nn.Linear(36, 3)
    bare = nn.Linear(36, 3)
    bare.load_state_dict(adapter.state_dict())
    seen: list[Any] = []

    def bind(running: Running) -> Objective:
        def objective(outputs: Any, batch: Any) -> torch.Tensor:
            seen.append((batch[0].clone(), batch[1]))
            return task.loss(adapter(batch[0].flatten(1)), batch) + 0 * outputs.sum()

        return objective

    optimizer = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    settings = short_settings(scheduler="constant", optimizer=optimizer, learning_rate=None, channels_last=False)
    fit(tiny, task=task, data=patterns, settings=settings, seed=3, bind=bind, companions=adapter)
    by_hand = torch.optim.SGD(
        [{"params": [bare.weight], "weight_decay": 0.01}, {"params": [bare.bias]}], lr=0.1, momentum=0.9
    )
    for images, labels in seen:
        loss = nn.functional.cross_entropy(bare(images.flatten(1)), labels)
        by_hand.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        by_hand.step()
    torch.testing.assert_close(adapter.weight, bare.weight)
    torch.testing.assert_close(adapter.bias, bare.bias)
