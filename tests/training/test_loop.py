"""The loop: the same steps as a bare one, settings, guards, progress."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mil_cli.data.base import Data
from mil_cli.errors import MilError
from mil_cli.graph.model import Model
from mil_cli.task.classification import Classification
from mil_cli.training.evaluate import evaluate
from mil_cli.training.loop import fit
from tests.training.loops import Killed, Recorder, Slot, same_weights, short_settings


def test_the_steps_are_those_of_a_bare_loop(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = short_settings(
        scheduler="constant",
        channels_last=False,
        optimizer={"_target_": "torch.optim.SGD", "lr": 1.0, "momentum": 0.9, "weight_decay": 0.01},
    )
    result = fit(tiny, task=task, data=patterns, settings=settings, seed=7)

    bare = tiny.clone().train()
    weights = [parameter for parameter in bare.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in bare.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.SGD([{"params": weights, "weight_decay": 0.01}, {"params": others}], lr=0.05, momentum=0.9)
    from mil_cli.data.base import mix_seed

    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(mix_seed(7, 0))
        for epoch in range(3):
            batches = patterns.train.batches(16, shuffle=True, augment=True, seed=7, epoch=epoch, drop_last=True)
            for images, labels in batches:
                loss = torch.nn.functional.cross_entropy(bare(images), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
    assert same_weights(result.model, bare.eval())
    assert result.history[-1]["train_loss"] == pytest.approx(sum(losses[-4:]) / 4)
    assert not same_weights(result.model, tiny)
    assert not result.model.training
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_the_given_model_and_the_global_random_state_stay(tiny: Model, patterns: Data, task: Classification) -> None:
    before, state = tiny.fingerprint(), torch.get_rng_state()
    fit(tiny, task=task, data=patterns, settings=short_settings(epochs=1), seed=0)
    assert tiny.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wanted", [1, 3, 30])
def test_a_number_of_steps_can_take_the_place_of_epochs(
    wanted: int, tiny: Model, patterns: Data, task: Classification
) -> None:
    """Up to an epoch, that many; above, whole passes of equal length. Nothing is evaluated."""
    made: list[tuple[int, int]] = []

    def watched(model: Model, steps: int, total: int) -> None:
        made.append((steps, total))

    settings = short_settings(scheduler="constant", early_stopping=1)
    short = fit(tiny, task=task, data=patterns, settings=settings, seed=3, steps=wanted, before_step=watched)
    total = len(made)
    assert made == [(number, total) for number in range(total)]
    assert wanted <= total <= wanted + len(short.history) - 1
    assert all("val" not in entry for entry in short.history)
    slot = Slot(1)
    with pytest.raises(Killed):
        fit(tiny, task=task, data=patterns, settings=settings, seed=3, steps=wanted, checkpoint=slot)
    resumed = fit(tiny, task=task, data=patterns, settings=settings, seed=3, steps=wanted, checkpoint=slot)
    assert same_weights(resumed.model, short.model)


def test_it_learns_and_seeds_differ(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = short_settings(epochs=12)
    first, again, other = (fit(tiny, task=task, data=patterns, settings=settings, seed=seed) for seed in (1, 1, 2))
    quality = evaluate(first.model, task=task, split=patterns.test, split_name="test")
    assert quality.value > 0.7
    assert same_weights(first.model, again.model)
    assert not same_weights(first.model, other.model)
    assert first.history[-1]["val"] == evaluate(first.model, task=task, split=patterns.val, split_name="val").value


def test_a_loss_that_is_not_finite_stops_and_the_best_is_kept(
    tiny: Model, patterns: Data, task: Classification
) -> None:
    seen = 0

    def objective(outputs: Any, batch: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        loss = task.loss(outputs, batch)
        return loss * float("nan") if seen > 9 else loss

    progress = Recorder()
    result = fit(
        tiny,
        task=task,
        data=patterns,
        settings=short_settings(epochs=6),
        seed=1,
        objective=objective,
        progress=progress,
    )
    assert result.stopped is not None
    assert "nan in epoch 3" in result.stopped
    assert any("diverged" in text and "learning_rate" in text for text in progress.notices)
    best = max(entry["val"] for entry in result.history if "val" in entry)
    assert evaluate(result.model, task=task, split=patterns.val, split_name="val").value == best
    assert len(result.history) == 3


def test_divergence_at_once_gives_the_weights_it_started_from(
    tiny: Model, patterns: Data, task: Classification
) -> None:
    result = fit(tiny, task=task, data=patterns, settings=short_settings(learning_rate=1e30), seed=1)
    assert result.stopped is not None
    assert "those it started from" in result.stopped
    assert same_weights(result.model, tiny)


def test_a_loss_that_grows_without_bound_stops(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = short_settings(epochs=8, scheduler="constant", divergence=5.0, evaluate_every=8)
    steps = 0

    def objective(outputs: Any, batch: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return task.loss(outputs, batch) * (1.0 if steps <= 8 else 100.0)

    result = fit(tiny, task=task, data=patterns, settings=settings, seed=1, objective=objective)
    assert result.stopped is not None
    assert "grew from" in result.stopped
    assert len(result.history) == 3


def test_early_stopping_gives_the_best_on_val(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = short_settings(epochs=30, early_stopping=2, scheduler="constant", learning_rate=0.3)
    progress = Recorder()
    result = fit(tiny, task=task, data=patterns, settings=settings, seed=1, progress=progress)
    values = [entry["val"] for entry in result.history]
    assert result.stopped is not None
    assert len(values) < 30
    assert values.index(max(values)) == len(values) - 3
    assert evaluate(result.model, task=task, split=patterns.val, split_name="val").value == max(values)
    assert "stopped early" in progress.notices[0]


def test_a_reason_to_stop_ends_it_with_the_weights_of_that_epoch(
    tiny: Model, patterns: Data, task: Classification
) -> None:
    reasons = iter([None, "enough", "never asked"])
    settings = short_settings(epochs=5, scheduler="constant", evaluate_every=5)
    result = fit(tiny, task=task, data=patterns, settings=settings, seed=1, stop=lambda running: next(reasons))
    assert result.stopped == "enough"
    shorter = fit(tiny, task=task, data=patterns, settings=short_settings(epochs=2, scheduler="constant"), seed=1)
    assert len(result.history) == 2
    assert same_weights(result.model, shorter.model)


def test_the_average_is_what_training_gives(tiny: Model, patterns: Data, task: Classification) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def remember(model: Model, steps: int, total: int) -> None:
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    settings = short_settings(ema=0.7, epochs=2)
    averaged = fit(tiny, task=task, data=patterns, settings=settings, seed=1, before_step=remember)
    last = fit(tiny, task=task, data=patterns, settings=short_settings(epochs=2), seed=1).model.state_dict()
    expected = states[0]["head.weight"].double()
    steps = [state["head.weight"] for state in states[1:]] + [last["head.weight"]]
    for step, value in enumerate(steps):
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value.double()
    torch.testing.assert_close(averaged.model.state_dict()["head.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert averaged.history[-1]["val"] == pytest.approx(
        evaluate(averaged.model, task=task, split=patterns.val, split_name="val").value
    )


def test_gradients_can_be_changed_and_are_clipped(tiny: Model, patterns: Data, task: Classification) -> None:
    frozen = {"conv.weight"}

    def freeze(model: Model, steps: int, total: int) -> None:
        for name, parameter in model.named_parameters():
            if name in frozen:
                assert parameter.grad is not None
                parameter.grad.zero_()

    settings = short_settings(
        epochs=1,
        scheduler="constant",
        gradient_clip=1e-3,
        optimizer={"_target_": "torch.optim.SGD", "lr": 1.0, "weight_decay": 0.0},
        learning_rate=None,
    )
    result = fit(tiny, task=task, data=patterns, settings=settings, seed=1, before_step=freeze)
    before, after = dict(tiny.named_parameters()), dict(result.model.named_parameters())
    assert torch.equal(before["conv.weight"], after["conv.weight"])
    moved = sum(float(((after[n] - before[n]).detach() ** 2).sum()) for n in before if n not in frozen) ** 0.5
    assert 0 < moved <= 4 * 1e-3 * 1.0001  # four steps, each of at most the clipped norm


def test_progress_counts_every_step(tiny: Model, patterns: Data, task: Classification) -> None:
    progress = Recorder()
    fit(tiny, task=task, data=patterns, settings=short_settings(), seed=1, progress=progress)
    assert progress.total == progress.done == 3 * (70 // 16)
    slot = Slot(kill_at=5)
    with pytest.raises(Killed):
        fit(tiny, task=task, data=patterns, settings=short_settings(), seed=1, checkpoint=slot)
    progress = Recorder()
    fit(tiny, task=task, data=patterns, settings=short_settings(), seed=1, checkpoint=slot, progress=progress)
    assert progress.done == progress.total


def test_a_set_smaller_than_a_batch_is_one_batch(tiny: Model, patterns: Data, task: Classification) -> None:
    result = fit(tiny, task=task, data=patterns, settings=short_settings(batch_size=500, epochs=2), seed=1)
    assert len(result.history) == 2
    assert not same_weights(result.model, tiny)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"_target_": "torch.optim.SDG"}}, "did you mean 'SGD'"),
        ({"optimizer": {"_target_": "torch.optim.SGD", "momentun": 0.9}}, "momentun"),
        (
            {"optimizer": {"_target_": "torch.nn.Linear", "out_features": 3}, "learning_rate": None},
            "Optimizer|cannot be",
        ),
        ({"scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR"}}, "step_size"),
        ({"scheduler": {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}}, "needs no metric"),
        ({"devices": 2}, "torchrun"),
        ({"accelerator": "abacus"}, "trainer.accelerator"),
    ],
)
def test_settings_that_make_nothing_are_told(
    changes: dict[str, Any], words: str, tiny: Model, patterns: Data, task: Classification
) -> None:
    with pytest.raises(MilError, match=words):
        fit(tiny, task=task, data=patterns, settings=short_settings(**changes), seed=0)


def test_a_task_that_does_not_fit_is_told(tiny: Model, patterns: Data) -> None:
    with pytest.raises(MilError, match="none at that position"):
        fit(tiny, task=Classification(target_key=5), data=patterns, settings=short_settings(), seed=0)
