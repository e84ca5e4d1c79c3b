from __future__ import annotations

from typing import Any

import pytest
import torch

from mil_cli.data.base import Data
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.loop import fit
from tests.stages.quantize.striped import Net, SmoothNet, stripes


@pytest.fixture(scope="session")
def data() -> Data:
    return Data(name="stripes", train=stripes(512, 0), val=stripes(256, 1), test=stripes(8, 2))


@pytest.fixture(scope="session")
def model(data: Data) -> Model:
    """A trained float net; some gammas are negative, with the weights before them mirrored."""
    torch.manual_seed(0)
    net = Model.capture(Net(), (torch.randn(2, 1, 8, 8),))
    settings = TrainerConfig(epochs=6, batch_size=64, learning_rate=0.1)
    net = fit(net, task=Classification(), data=data, settings=settings, seed=0).model
    with torch.no_grad():
        state = net.state_dict()
        for conv, norm in (("stem.0", "stem.1"), ("body.0", "body.1")):
            for name in (f"{conv}.weight", f"{norm}.weight", f"{norm}.running_mean"):
                state[name][2:5] *= -1
    return net


@pytest.fixture(scope="session")
def smooth(data: Data) -> Model:
    """A trained float net with SiLU, ReLU and GELU."""
    torch.manual_seed(0)
    net = Model.capture(SmoothNet(), (torch.randn(2, 1, 8, 8),))
    settings = TrainerConfig(epochs=6, batch_size=64, learning_rate=0.1)
    return fit(net, task=Classification(), data=data, settings=settings, seed=0).model


@pytest.fixture
def inserted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """Keep the model with its quantizers as it goes into training, and as it comes out of it."""
    kept: dict[str, Model] = {}
    original = Context.finetune

    def finetune(self: Context, model: Model, **options: Any) -> Model:
        kept["start"] = model.clone()
        trained = original(self, model, **options)
        kept["trained"] = trained.clone()
        return trained

    monkeypatch.setattr(Context, "finetune", finetune)
    return kept
