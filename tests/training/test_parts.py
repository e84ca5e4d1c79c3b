"""The parts of the loop: settings, optimizers, schedules, averages, slots, evaluation, layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import OutputError
from mil_cli.graph.model import Model
from mil_cli.task.classification import Classification
from mil_cli.task.image_to_image import ImageToImage
from mil_cli.training.batch_norm import recalibrate
from mil_cli.training.checkpoint import FileSlot, NullSlot
from mil_cli.training.config import TrainerConfig, merged_settings
from mil_cli.training.eager import EagerModule
from mil_cli.training.ema import MovingAverage
from mil_cli.training.evaluate import NotFiniteError, Quality, evaluate
from mil_cli.training.layout import to_contiguous, use_channels_last
from mil_cli.training.optimizers import build_optimizer, build_scheduler, schedule

DEFAULT = Path(__file__).parents[2] / "configs" / "trainer" / "default.yaml"


class TestConfig:
    def test_the_shipped_file_is_the_default(self) -> None:
        text = DEFAULT.read_text()
        assert text.startswith("# ")
        settings = yaml.safe_load(text)
        assert settings.pop("defaults") == [{"/optimizer@optimizer": "sgd"}, "_self_"]
        optimizer = yaml.safe_load((DEFAULT.parents[1] / "optimizer" / "sgd.yaml").read_text())
        assert TrainerConfig.model_validate({**settings, "optimizer": optimizer}) == TrainerConfig()

    def test_overrides_are_merged_key_by_key(self) -> None:
        base = TrainerConfig()
        merged = TrainerConfig.model_validate(base.merged({"epochs": 2, "optimizer": {"lr": 0.3}}))
        assert merged.epochs == 2
        assert merged.optimizer == {**base.optimizer, "lr": 0.3}
        other = base.merged({"optimizer": {"_target_": "torch.optim.AdamW", "lr": 1.0}, "scheduler": "cosine"})
        assert TrainerConfig.model_validate(other).optimizer == {"_target_": "torch.optim.AdamW", "lr": 1.0}
        assert TrainerConfig.model_validate(other).scheduler == {"name": "cosine"}
        partial = merged_settings({"scheduler": "cosine", "epochs": 3}, {"scheduler": {"warmup": 0.1}})
        assert partial == {"scheduler": {"name": "cosine", "warmup": 0.1}, "epochs": 3}

    @pytest.mark.parametrize(
        "content",
        [
            {"epochs": 0},
            {"batch_size": 0},
            {"epoch": 3},
            {"optimizer": {"lr": 0.1}},
            {"scheduler": {"name": "onecycl"}},
            {"scheduler": {"name": "cosine", "warmup": 1.0}},
            {"scheduler": {"name": "cosine", "steps": 3}},
            {"scheduler": {"_target_": "x.y", "interval": "week"}},
            {"ema": 1.0},
            {"learning_rate": float("nan")},
            {"gradient_clip": 0},
            {"precision": "8-bit"},
        ],
    )
    def test_settings_out_of_range_are_refused(self, content: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            TrainerConfig.model_validate(content)


class TestOptimizer:
    def test_vectors_get_no_weight_decay_and_frozen_weights_are_left_out(self) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        net[2].weight.requires_grad_(False)
        optimizer = build_optimizer(TrainerConfig(learning_rate=0.7), net.named_parameters())
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay == {
            id(net[0].weight): 5e-4,
            id(net[0].bias): 0.0,
            id(net[1].weight): 0.0,
            id(net[1].bias): 0.0,
            id(net[2].bias): 0.0,
        }
        assert {group["lr"] for group in optimizer.param_groups} == {0.7}


class TestSchedule:
    def test_onecycle_is_torchs(self) -> None:
        total = 40
        parameter = nn.Parameter(torch.zeros(1))
        peer_optimizer = torch.optim.SGD([parameter], lr=1.0)
        peer = torch.optim.lr_scheduler.OneCycleLR(
            peer_optimizer,
            max_lr=2.0,
            total_steps=total,
            pct_start=0.25,
            div_factor=25,
            final_div_factor=1e4 / 25,
            cycle_momentum=False,
        )
        factor = schedule({"name": "onecycle"}, total_steps=total)
        for step in range(total):
            # torch counts the rise from step 0 to pct_start * total - 1.
            if step in (0, total - 1):
                assert 2 * factor(step) == pytest.approx(peer.get_last_lr()[0], rel=1e-6)
            assert 2 * factor(step) == pytest.approx(peer.get_last_lr()[0], abs=0.31)
            peer_optimizer.step()
            if step < total - 1:
                peer.step()
        values = [factor(step) for step in range(total)]
        top = values.index(max(values))
        assert values[top] == 1.0
        assert top == 10
        assert values[: top + 1] == sorted(values[: top + 1])
        assert values[top:] == sorted(values[top:], reverse=True)

    def test_cosine_and_constant(self) -> None:
        cosine = schedule({"name": "cosine", "final": 0.1}, total_steps=11)
        for step in range(11):
            assert cosine(step) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2)
        constant = schedule({"name": "constant", "warmup": 0.5}, total_steps=8)
        assert [round(constant(step), 9) for step in range(8)] == [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
        assert schedule({"name": "onecycle"}, total_steps=1)(0) == pytest.approx(0.04)

    def test_exponential_falls_by_a_share_and_then_stays(self) -> None:
        factor = schedule({"name": "exponential"}, total_steps=101)
        values = [factor(step) for step in range(101)]
        assert values[:65] == pytest.approx([0.01 ** (step / 100) for step in range(65)])
        assert set(values[66:]) == {0.05}
        assert schedule({"name": "exponential", "final": 0.2, "warmup": 0.1}, total_steps=11)(10) == 0.2

    def test_it_steers_the_optimizer(self) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        settings = TrainerConfig(scheduler={"name": "cosine"})
        scheduler, interval = build_scheduler(settings, optimizer, total_steps=3)
        assert interval == "step"
        rates = []
        for _ in range(3):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([0.5, 0.25, 0.0])
        config = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2, "interval": "step"}
        scheduler, interval = build_scheduler(TrainerConfig(scheduler=config), optimizer, total_steps=3)
        assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
        assert interval == "step"


def test_moving_average_copies_what_is_not_floating_point() -> None:
    tensors = {"w": torch.zeros(3), "count": torch.tensor(0)}
    average = MovingAverage(tensors, 0.5)
    expected = 0.0
    for step in range(6):
        tensors["w"].fill_(step + 1.0)
        tensors["count"] += 1
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    assert average.tensors()["w"].tolist() == pytest.approx([expected] * 3)
    assert int(average.tensors()["count"]) == 6
    again = MovingAverage({"w": torch.zeros(3), "count": torch.tensor(0)}, 0.5)
    again.load_state_dict(average.state_dict())
    assert torch.equal(again.tensors()["w"], average.tensors()["w"])


class TestFileSlot:
    def test_round_trip_replace_and_clear(self, tmp_path: Path) -> None:
        slot = FileSlot(tmp_path / "deep" / "fit.ckpt")
        assert slot.load() is None
        slot.save({"a": torch.arange(3), "b": [1, None, "x"], "c": {"d": 0.5}})
        slot.save({"a": torch.arange(4), "b": []})
        state = slot.load()
        assert state is not None
        assert state["a"].tolist() == [0, 1, 2, 3]
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["fit.ckpt"]
        slot.clear()
        slot.clear()
        assert slot.load() is None
        NullSlot().save({})
        assert NullSlot().load() is None

    def test_damage_is_a_warning(self, tmp_path: Path) -> None:
        slot = FileSlot(tmp_path / "fit.ckpt")
        slot.save({"a": torch.arange(300)})
        whole = (tmp_path / "fit.ckpt").read_bytes()
        for content in (whole[:100], b"", b"rubbish"):
            (tmp_path / "fit.ckpt").write_bytes(content)
            with pytest.warns(UserWarning, match="damaged checkpoint"):
                assert slot.load() is None
            assert not (tmp_path / "fit.ckpt").exists()

    def test_an_object_that_would_run_code_is_not_loaded(self, tmp_path: Path) -> None:
        torch.save({"a": nn.Linear(1, 1)}, tmp_path / "fit.ckpt")
        with pytest.warns(UserWarning, match="damaged checkpoint"):
            assert FileSlot(tmp_path / "fit.ckpt").load() is None

    def test_a_folder_in_the_way_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError):
            FileSlot(tmp_path / "file" / "fit.ckpt").save({})


class TestEvaluate:
    def test_a_model_is_scored_in_evaluation_mode(self, tiny: Model, patterns: Data, task: Classification) -> None:
        model = tiny.clone().train()
        quality = evaluate(model, task=task, split=patterns.val, split_name="val", batch_size=7)
        assert model.training
        images, labels = next(iter(patterns.val.batches(1000)))  # type: ignore[misc]
        right = (tiny(images).argmax(1) == labels).float().mean()
        assert quality == Quality(
            metric="accuracy", value=pytest.approx(float(right)), higher_is_better=True, samples=40, split="val"
        )
        as_function = evaluate(lambda x: tiny(x), task=task, split=patterns.val, split_name="val")
        assert as_function.value == pytest.approx(quality.value)

    def test_a_limit_takes_the_same_random_samples(self, task: Classification) -> None:
        labels = torch.arange(100) // 50
        split = TensorSplit((torch.arange(100.0)[:, None], labels))
        seen: list[list[float]] = []

        def predict(x: torch.Tensor) -> torch.Tensor:
            seen.append(x[:, 0].tolist())
            return torch.zeros(len(x), 2)

        for _ in range(2):
            quality = evaluate(predict, task=task, split=split, split_name="val", batch_size=20, limit=40)
            assert quality.samples == 40
            assert 0.2 < quality.value < 0.8
        assert seen[:2] == seen[2:]
        whole = evaluate(predict, task=task, split=split, split_name="val", limit=1000)
        assert whole.samples == 100

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_outputs_that_are_not_finite_are_told(self, value: float, patterns: Data, task: Classification) -> None:
        def predict(x: torch.Tensor) -> torch.Tensor:
            outputs = torch.zeros(len(x), 3)
            outputs[-1, 1] = value
            return outputs

        with pytest.raises(NotFiniteError, match="val"):
            evaluate(predict, task=task, split=patterns.val, split_name="val")

    def test_better_than(self) -> None:
        def quality(value: float, higher: bool) -> Quality:
            return Quality(metric="m", value=value, higher_is_better=higher, samples=1, split="val")

        assert quality(0.5, True).better_than(None)
        assert quality(0.5, True).better_than(quality(0.4, True))
        assert quality(0.4, False).better_than(quality(0.5, False))
        assert not quality(0.5, False).better_than(quality(0.5, False))


class TestLayout:
    def test_channels_last_and_back(self, tiny: Model) -> None:
        model = tiny.clone()
        assert use_channels_last(model, wanted="auto")
        two_channels = nn.Conv2d(2, 4, 3)
        captured = Model.capture(two_channels, (torch.zeros(4, 2, 5, 5),))
        assert use_channels_last(captured, wanted="auto")
        weight = dict(captured.named_parameters())["weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        to_contiguous(captured)
        assert weight.is_contiguous()
        assert not use_channels_last(captured, wanted=False)

    def test_a_captured_view_that_cannot_be_given_falls_back(self) -> None:
        class Viewing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.conv(x)
                return y.view(y.shape[0], -1)

        model = Model.capture(Viewing(), (torch.zeros(4, 2, 5, 5),))
        before = model.fingerprint()
        assert not use_channels_last(model, wanted="auto")
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        assert model.fingerprint() == before

    def test_models_without_images_are_left_alone(self) -> None:
        model = Model.capture(nn.Linear(3, 2), (torch.zeros(4, 3),))
        assert not use_channels_last(model, wanted="auto")

    @pytest.mark.parametrize("captured", [True, False])
    def test_a_group_norm_of_the_images_trains_in_the_plain_layout(self, captured: bool) -> None:
        """torch writes a gradient of its input in channels_last, which none asked for: the process dies."""
        net = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3))
        samples = (torch.randn(4, 4, 6, 6),), {}
        model = Model.capture(net, *samples)
        trainee = model if captured else EagerModule(net, spec=model.spec, samples=samples)
        assert not use_channels_last(trainee, wanted="auto")
        assert not use_channels_last(trainee, wanted=True)
        behind = Model.capture(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)), *samples)
        assert use_channels_last(behind, wanted=True)
        for parameter in list(behind.parameters())[:2]:
            parameter.requires_grad_(False)
        assert not use_channels_last(behind, wanted=True)


def test_image_to_image_trains_by_its_own_loss(patterns: Data) -> None:
    from mil_cli.training.loop import fit

    images = torch.rand(48, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    split = TensorSplit((images, 1 - images))
    model = Model.capture(nn.Conv2d(1, 1, 1), (images[:4],))
    settings = TrainerConfig.model_validate(
        {
            "epochs": 120,
            "batch_size": 16,
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.3, "weight_decay": 0.0},
            "evaluate_every": 120,
        }
    )
    task = ImageToImage(loss_kind="mse")
    result = fit(model, task=task, data=Data(name="d", train=split, val=split, test=split), settings=settings, seed=0)
    weights = {name: value.item() for name, value in result.model.state_dict().items()}
    assert weights == pytest.approx({"weight": -1.0, "bias": 1.0}, abs=1e-3)
    assert result.history[-1]["val"] > 50


def test_the_statistics_of_a_norm_that_is_used_twice_are_those_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(y)

    model = Model.capture(Twice().eval(), (torch.randn(4, 3), torch.randn(4, 3)))
    pairs = [(torch.randn(8, 3), 5 + 2 * torch.randn(8, 3)) for _ in range(3)]
    found = recalibrate(model, [(pair, {}) for pair in pairs]).state_dict()
    values = [value for pair in pairs for value in pair]
    torch.testing.assert_close(found["norm.running_mean"], torch.stack([value.mean(0) for value in values]).mean(0))
    torch.testing.assert_close(found["norm.running_var"], torch.stack([value.var(0) for value in values]).mean(0))
