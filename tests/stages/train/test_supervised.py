"""Plain training as a stage: what it hands to the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.graph.model import Model
from mil_cli.stages.registry import config_type, function_of
from mil_cli.stages.train.supervised import SupervisedConfig, supervised
from mil_cli.task.regression import Regression
from mil_cli.training.config import TrainerConfig
from mil_cli.training.loop import fit
from tests.stages.contexts import make_context


def test_it_is_the_loop_with_the_stages_settings(tmp_path: Path) -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    split = TensorSplit((x, x @ torch.tensor([1.0, -2.0, 0.5, 3.0])))
    data = Data(name="line", train=split, val=split, test=split)
    model = Model.capture(nn.Linear(4, 1), (x[:4],))
    before = model.fingerprint()
    settings = TrainerConfig(epochs=3, batch_size=10)
    context = make_context(data, task=Regression(), trainer=settings, workspace=tmp_path)
    config = SupervisedConfig(trainer={"learning_rate": 0.02, "optimizer": {"momentum": 0.5}})
    trained = supervised(model, config, context)
    expected = fit(model, task=Regression(), data=data, settings=context.trainer(config.trainer), seed=context.seed)
    assert trained.fingerprint() == expected.model.fingerprint()
    assert model.fingerprint() == before
    assert context.notes == {"history": expected.history, "stopped": None}
    assert (tmp_path / "fit.ckpt").is_file()
    again = supervised(model, config, context)
    assert again.fingerprint() == trained.fingerprint()


def test_it_is_registered() -> None:
    assert config_type("train", "supervised") is SupervisedConfig
    assert function_of(SupervisedConfig()) is supervised
    with pytest.raises(ValidationError):
        SupervisedConfig.model_validate({"epochs": 3})
