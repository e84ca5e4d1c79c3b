"""What evaluation loses and training has: restored or reported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, op_name


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8)
        return x * keep / 0.8


class Loses(nn.Module):
    """Random depth, an auxiliary head, a frozen norm and a norm with a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.frozen = nn.BatchNorm2d(8)
        self.cumulative = nn.BatchNorm2d(8, momentum=None)
        self.path = DropPath()
        self.head, self.auxiliary = nn.Linear(8, 3), nn.Linear(8, 3)

    def train(self, mode: bool = True) -> Loses:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.path(self.cumulative(self.frozen(self.conv(x)))).mean((2, 3))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


class Attention(nn.Module):
    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


@pytest.mark.parametrize("weights", [False, True])
def test_attention_dropout_comes_back(weights: bool) -> None:
    torch.manual_seed(0)
    module = Attention(weights=weights)
    model = Model.capture(module, (torch.randn(4, 6, 8),))
    assert model.spec.notices == ()
    x = torch.randn(3, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), module.eval()(x))
    model.train()
    torch.manual_seed(5)
    actual = model(x)
    torch.manual_seed(5)
    torch.testing.assert_close(actual, module.train()(x))
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_transformer_layer_trains_as_the_eager_one() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True)
    model = Model.capture(module, (torch.randn(4, 6, 16),)).train()
    x = torch.randn(3, 6, 16)
    torch.manual_seed(1)
    actual = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(actual, module.train()(x))


def test_what_cannot_be_restored_is_reported() -> None:
    model = Model.capture(Loses(), (torch.randn(4, 3, 8, 8),))
    text = "\n".join(model.spec.notices)
    assert "random depth or noise in path (DropPath)" in text
    assert "auxiliary does more in training than in evaluation (linear)" in text
    assert "2 tensors in training and 1 in evaluation" in text
    assert "auxiliary.bias, auxiliary.weight" in text
    assert "cumulative: a cumulative average" in text


def test_unused_parameters_do_not_count_but_keep_their_names() -> None:
    module = Loses()
    model = Model.capture(module, (torch.randn(4, 3, 8, 8),))
    assert set(model.state_dict()) == set(module.state_dict())
    used = sum(p.numel() for name, p in module.named_parameters() if not name.startswith("auxiliary"))
    assert model.num_params() == used


def test_frozen_norms_stay_frozen_and_cumulative_ones_move() -> None:
    model = Model.capture(Loses(), (torch.randn(4, 3, 8, 8),)).train()
    frozen, cumulative = (node for node in calls(model.graph) if op_name(node) == "batch_norm")
    assert get_argument(frozen, "training") is False
    assert get_argument(cumulative, "training") is True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(8, 3, 8, 8))
    after = model.state_dict()
    assert torch.equal(before["frozen.running_mean"], after["frozen.running_mean"])
    assert not torch.equal(before["cumulative.running_mean"], after["cumulative.running_mean"])


def test_a_norm_frozen_by_hand_stays_frozen() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).train()
    module[1].eval()
    model = Model.capture(module, (torch.randn(4, 3, 8, 8),)).train()
    norms = [get_argument(node, "training") for node in calls(model.graph) if op_name(node) == "batch_norm"]
    assert norms == [False, True]


def test_a_training_branch_that_cannot_be_captured_is_a_notice() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and float(x.sum()) > 0:
                return x * 2
            return F.relu(x)

    model = Model.capture(Branches(), (torch.randn(4, 3),))
    assert any("training mode cannot be captured" in notice for notice in model.spec.notices)
    x = torch.randn(2, 3)
    assert torch.equal(model(x), F.relu(x))


def test_restored_dropout_survives_an_archive(tmp_path) -> None:
    module = Attention(weights=False)
    model = Model.capture(module, (torch.randn(4, 6, 8),))
    model.save(tmp_path / "m.pt2")
    loaded = Model.load(tmp_path / "m.pt2")
    x = torch.randn(3, 6, 8)
    assert torch.equal(loaded(x), model(x))
    torch.manual_seed(5)
    actual = loaded.train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(actual, module.train()(x))
