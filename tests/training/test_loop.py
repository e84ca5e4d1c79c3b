"""The loop: the same steps as a bare one, exact resume, guards."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from mil_cli.data.base import Data
from mil_cli.errors import MilError
from mil_cli.graph.model import Model
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.evaluate import evaluate
from mil_cli.training.loop import FitResult, fit
from mil_cli.training.objective import Objective, Running


class Killed(Exception):
    """Stands for a kill."""


class Slot:
    """Keeps serialized states; kills when it is about to save for the n-th time, or just after."""

    def __init__(self, kill_at: int | None = None, *, after: bool = True) -> None:
        self.kill_at, self.after = kill_at, after
        self.saves = 0
        self.content: bytes | None = None

    def load(self) -> dict[str, Any] | None:
        return None if self.content is None else torch.load(io.BytesIO(self.content), weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        self.saves += 1
        if self.saves == self.kill_at and not self.after:
            raise Killed
        stream = io.BytesIO()
        torch.save(state, stream)
        self.content = stream.getvalue()
        if self.saves == self.kill_at:
            raise Killed

    def clear(self) -> None:
        self.content = None


class Recorder:
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.done = 0
        self.total: int | None = None

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Recorder]:
        self.total = total
        self.done += done
        yield self

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        self.done += steps

    def notice(self, text: str) -> None:
        self.notices.append(text)


def _settings(**changes: Any) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, "checkpoint_every_seconds": 0, **changes}
    )


def _equal(left: Model, right: Model) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_steps_are_those_of_a_bare_loop(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = _settings(
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
    assert _equal(result.model, bare.eval())
    assert result.history[-1]["train_loss"] == pytest.approx(sum(losses[-4:]) / 4)
    assert not _equal(result.model, tiny)
    assert not result.model.training
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_the_given_model_and_the_global_random_state_stay(tiny: Model, patterns: Data, task: Classification) -> None:
    before, state = tiny.fingerprint(), torch.get_rng_state()
    fit(tiny, task=task, data=patterns, settings=_settings(epochs=1), seed=0)
    assert tiny.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), state)


VARIANTS: dict[str, dict[str, Any]] = {
    "sgd onecycle": {},
    "adamw ema clip": {
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1},
        "learning_rate": None,
        "ema": 0.9,
        "gradient_clip": 0.5,
        "scheduler": {"name": "cosine", "warmup": 0.2},
    },
    "steps by epoch, early stopping": {
        "scheduler": {"_target_": "torch.optim.lr_scheduler.MultiStepLR", "milestones": [1, 2], "gamma": 0.1},
        "early_stopping": 1,
        "epochs": 4,
    },
    "contiguous": {"channels_last": False, "evaluate_every": 2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_killed_and_resumed_is_bit_identical(
    changes: dict[str, Any], tiny: Model, patterns: Data, task: Classification
) -> None:
    settings = _settings(**changes)

    def run(slot: Slot) -> Any:
        return fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot)

    whole_slot = Slot()
    whole = run(whole_slot)
    for kill_at in (1, 2, 4, 5, 9, whole_slot.saves):
        slot = Slot(kill_at)
        with pytest.raises(Killed):
            run(slot)
        resumed = run(slot)
        assert _equal(resumed.model, whole.model), kill_at
        assert resumed.history == whole.history
        assert resumed.stopped == whole.stopped


def test_killed_many_times(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = _settings()
    whole = fit(tiny, task=task, data=patterns, settings=settings, seed=3)
    slot = Slot()
    for kill_at in (3, 1, 2, 4):
        slot.saves, slot.kill_at = 0, kill_at
        with pytest.raises(Killed):
            fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot)
    slot.kill_at = None
    resumed = fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot)
    assert _equal(resumed.model, whole.model)


@pytest.mark.parametrize("wanted", [1, 3, 30])
def test_a_number_of_steps_can_take_the_place_of_epochs(
    wanted: int, tiny: Model, patterns: Data, task: Classification
) -> None:
    """Up to an epoch, that many; above, whole passes of equal length. Nothing is evaluated."""
    made: list[tuple[int, int]] = []

    def watched(model: Model, steps: int, total: int) -> None:
        made.append((steps, total))

    settings = _settings(scheduler="constant", early_stopping=1)
    short = fit(tiny, task=task, data=patterns, settings=settings, seed=3, steps=wanted, before_step=watched)
    total = len(made)
    assert made == [(number, total) for number in range(total)]
    assert wanted <= total <= wanted + len(short.history) - 1
    assert all("val" not in entry for entry in short.history)
    slot = Slot(1)
    with pytest.raises(Killed):
        fit(tiny, task=task, data=patterns, settings=settings, seed=3, steps=wanted, checkpoint=slot)
    resumed = fit(tiny, task=task, data=patterns, settings=settings, seed=3, steps=wanted, checkpoint=slot)
    assert _equal(resumed.model, short.model)


def test_a_finished_training_is_not_repeated(tiny: Model, patterns: Data, task: Classification) -> None:
    slot, settings = Slot(), _settings()
    first = fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot)
    saves = slot.saves

    def never(model: Model, steps: int, total: int) -> None:
        raise AssertionError("a step was made")

    again = fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot, before_step=never)
    assert _equal(first.model, again.model)
    assert slot.saves == saves


@pytest.mark.parametrize("changes", [{"epochs": 4}, {"learning_rate": 0.01}, {"ema": 0.9}])
def test_a_checkpoint_of_other_settings_is_ignored(
    changes: dict[str, Any], tiny: Model, patterns: Data, task: Classification
) -> None:
    slot = Slot()
    fit(tiny, task=task, data=patterns, settings=_settings(), seed=3, checkpoint=slot)
    progress = Recorder()
    settings = _settings(**changes)
    mixed = fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot, progress=progress)
    clean = fit(tiny, task=task, data=patterns, settings=settings, seed=3)
    assert _equal(mixed.model, clean.model)
    assert "ignored" in progress.notices[0]


def test_it_learns_and_seeds_differ(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = _settings(epochs=12)
    first, again, other = (fit(tiny, task=task, data=patterns, settings=settings, seed=seed) for seed in (1, 1, 2))
    quality = evaluate(first.model, task=task, split=patterns.test, split_name="test")
    assert quality.value > 0.7
    assert _equal(first.model, again.model)
    assert not _equal(first.model, other.model)
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
        tiny, task=task, data=patterns, settings=_settings(epochs=6), seed=1, objective=objective, progress=progress
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
    result = fit(tiny, task=task, data=patterns, settings=_settings(learning_rate=1e30), seed=1)
    assert result.stopped is not None
    assert "those it started from" in result.stopped
    assert _equal(result.model, tiny)


def test_a_loss_that_grows_without_bound_stops(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = _settings(epochs=8, scheduler="constant", divergence=5.0, evaluate_every=8)
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
    settings = _settings(epochs=30, early_stopping=2, scheduler="constant", learning_rate=0.3)
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
    settings = _settings(epochs=5, scheduler="constant", evaluate_every=5)
    result = fit(tiny, task=task, data=patterns, settings=settings, seed=1, stop=lambda running: next(reasons))
    assert result.stopped == "enough"
    shorter = fit(tiny, task=task, data=patterns, settings=_settings(epochs=2, scheduler="constant"), seed=1)
    assert len(result.history) == 2
    assert _equal(result.model, shorter.model)


def test_the_average_is_what_training_gives(tiny: Model, patterns: Data, task: Classification) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def remember(model: Model, steps: int, total: int) -> None:
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    settings = _settings(ema=0.7, epochs=2)
    averaged = fit(tiny, task=task, data=patterns, settings=settings, seed=1, before_step=remember)
    last = fit(tiny, task=task, data=patterns, settings=_settings(epochs=2), seed=1).model.state_dict()
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

    settings = _settings(
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
    fit(tiny, task=task, data=patterns, settings=_settings(), seed=1, progress=progress)
    assert progress.total == progress.done == 3 * (70 // 16)
    slot = Slot(kill_at=5)
    with pytest.raises(Killed):
        fit(tiny, task=task, data=patterns, settings=_settings(), seed=1, checkpoint=slot)
    progress = Recorder()
    fit(tiny, task=task, data=patterns, settings=_settings(), seed=1, checkpoint=slot, progress=progress)
    assert progress.done == progress.total


def test_checkpoints_come_by_the_clock(tiny: Model, patterns: Data, task: Classification) -> None:
    now = 0.0

    def step(model: Model, steps: int, total: int) -> None:
        nonlocal now
        now += 10.0

    def saves(every: float) -> int:
        slot = Slot()
        settings = _settings(epochs=4, checkpoint_every_seconds=every)
        fit(
            tiny,
            task=task,
            data=patterns,
            settings=settings,
            seed=1,
            checkpoint=slot,
            before_step=step,
            clock=lambda: now,
        )
        return slot.saves

    assert saves(15.0) == 4 * 2  # an epoch has four steps of 10 s: in its middle and at its end
    assert saves(1e6) == 4
    assert saves(0.0) == 4 * 4


def test_a_set_smaller_than_a_batch_is_one_batch(tiny: Model, patterns: Data, task: Classification) -> None:
    result = fit(tiny, task=task, data=patterns, settings=_settings(batch_size=500, epochs=2), seed=1)
    assert len(result.history) == 2
    assert not _equal(result.model, tiny)


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
        fit(tiny, task=task, data=patterns, settings=_settings(**changes), seed=0)


def test_a_task_that_does_not_fit_is_told(tiny: Model, patterns: Data) -> None:
    with pytest.raises(MilError, match="none at that position"):
        fit(tiny, task=Classification(target_key=5), data=patterns, settings=_settings(), seed=0)


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

    settings = _settings(epochs=1, precision=precision, scheduler="constant")
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
        fit(tiny, task=task, data=patterns, settings=_settings(epochs=1), seed=3, bind=bind, taps=["bn"])
        assert kept[0]() is None
    finally:
        gc.enable()


def test_taps_change_no_training(tiny: Model, patterns: Data, task: Classification) -> None:
    plain = fit(tiny, task=task, data=patterns, settings=_settings(), seed=3)
    tapped = fit(tiny, task=task, data=patterns, settings=_settings(), seed=3, taps=["conv", "bn"])
    assert _equal(plain.model, tapped.model)


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
            settings=_settings(**changes),
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
        assert _equal(resumed.model, whole.model), kill_at
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
    settings = _settings(scheduler="constant", optimizer=optimizer, learning_rate=None, channels_last=False)
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
