"""Plain training as a stage: what it hands to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.registry import config_type, function_of
from mil_cli.stages.train.supervised import SupervisedConfig, supervised
from mil_cli.task.regression import Regression
from mil_cli.training.checkpoint import FileSlot
from mil_cli.training.config import TrainerConfig
from mil_cli.training.loop import fit


class _Context:
    def __init__(self, data: Data, slot: FileSlot) -> None:
        self.name, self.task, self.data = "baseline", Regression(), data
        self.seed, self.progress = 5, SilentProgress()
        self.notes: dict[str, object] = {}
        self.slots: dict[str, FileSlot] = {"fit": slot}

    def trainer(self, overrides: Mapping[str, Any]) -> TrainerConfig:
        return TrainerConfig.model_validate(TrainerConfig(epochs=3, batch_size=10).merged(overrides))

    def slot(self, name: str = "main") -> FileSlot:
        return self.slots[name]

    def note(self, **facts: object) -> None:
        self.notes.update(facts)


def test_it_is_the_loop_with_the_stages_settings(tmp_path: Any) -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    split = TensorSplit((x, x @ torch.tensor([1.0, -2.0, 0.5, 3.0])))
    data = Data(name="line", train=split, val=split, test=split)
    model = Model.capture(nn.Linear(4, 1), (x[:4],))
    before = model.fingerprint()
    slot = FileSlot(tmp_path / "fit.ckpt")
    context = _Context(data, slot)
    config = SupervisedConfig(trainer={"learning_rate": 0.02, "optimizer": {"momentum": 0.5}})
    trained = supervised(model, config, cast("Context", context))
    expected = fit(model, task=Regression(), data=data, settings=context.trainer(config.trainer), seed=5)
    assert trained.fingerprint() == expected.model.fingerprint()
    assert model.fingerprint() == before
    assert context.notes == {"history": expected.history, "stopped": None}
    assert slot.load() is not None
    again = supervised(model, config, cast("Context", context))
    assert again.fingerprint() == trained.fingerprint()


def test_it_is_registered() -> None:
    assert config_type("train", "supervised") is SupervisedConfig
    assert function_of(SupervisedConfig()) is supervised
    with pytest.raises(ValidationError):
        SupervisedConfig.model_validate({"epochs": 3})
