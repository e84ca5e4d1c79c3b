"""What each method says of a channel, against brute force and closed forms; and that all of them meet a target."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.graph.coupling import Coupling, analyse
from mil_cli.graph.model import Model
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.context import Context
from mil_cli.stages.prune import bn_scale, fpgm, hrank, taylor
from mil_cli.stages.prune.activation import mean_magnitude, share_of_nonzero
from mil_cli.stages.prune.hrank import ranks
from mil_cli.stages.prune.magnitude import MagnitudeConfig
from mil_cli.stages.prune.random import RandomConfig
from mil_cli.stages.prune.schedule import random_scores
from mil_cli.stages.prune.values import score_values
from mil_cli.stages.registry import config_type, function_of
from tests.stages.contexts import make_context

METHODS = ("magnitude", "taylor", "fpgm", "hrank", "activation", "bn_scale", "random")


class Net(nn.Module):
    """One inner width of 6 with a norm, one of 8 without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    module = Net()
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    return Model.capture(module.eval(), (torch.randn(2, 2, 8, 8),))


@pytest.fixture(scope="module")
def coupling(model: Model) -> Coupling:
    return analyse(model)


def data(shape: tuple[int, ...] = (2, 8, 8), classes: int = 3) -> Data:
    generator = torch.Generator().manual_seed(0)

    def split(samples: int) -> TensorSplit:
        inputs = torch.randn(samples, *shape, generator=generator)
        return TensorSplit((inputs, torch.randint(0, classes, (samples,), generator=generator)))

    return Data(name="noise", train=split(64), val=split(32), test=split(8))


def context(**changes: Any) -> Context:
    return make_context(**{"data": data(), "name": "prune", **changes})


def by_origin(coupling: Coupling, scores: Any) -> dict[str, Any]:
    return dict(zip((space.origin for space in coupling.spaces), scores, strict=True))


def over_mean(values: Any) -> Any:
    values = np.asarray(values, dtype=np.float64)
    return values / values.mean()


def loss(model: Model, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images).double(), labels))


def test_taylor_is_the_first_order_change_of_the_loss(model: Model, coupling: Coupling) -> None:
    """By finite differences: all that a channel has in one member is scaled down a little."""
    found = taylor.first_order(model, coupling, context(), samples=64, batch_size=64, normalise=False)
    scores = by_origin(coupling, found)
    images, labels = next(iter(data().train.batches(64)))
    members = {
        "first.weight": [["first.weight"], ["norm.weight", "norm.bias"], ["second.weight"]],
        "second.weight": [["second.weight"], ["head.weight"]],
    }
    axes = {("first.weight", "second.weight"): 1, ("second.weight", "head.weight"): 1}
    step = 1e-3
    for origin, groups in members.items():
        for channel in range(len(scores[origin])):
            changes = []
            for group in groups:
                ends = []
                for sign in (1, -1):
                    changed = model.clone()
                    with torch.no_grad():
                        for name in group:
                            axis = axes.get((origin, name), 0)
                            dict(changed.named_parameters())[name].select(axis, channel).mul_(1 + sign * step)
                    ends.append(loss(changed, images, labels))
                changes.append(abs(ends[0] - ends[1]) / (2 * step))
            assert scores[origin][channel] == pytest.approx(np.mean(changes), rel=0.02, abs=1e-6)


def test_taylor_squares_what_each_batch_says(model: Model, coupling: Coupling) -> None:
    """Against autograd by hand: the paper's square of a batch's sum, its root mean over the batches."""
    found = taylor.first_order(model, coupling, context(), samples=64, batch_size=16, normalise=False)
    scores = by_origin(coupling, found)["second.weight"]
    squares = []
    for images, labels in context().calibration_batches(samples=64, batch_size=16):  # type: ignore[misc]
        module = Net().eval()
        module.load_state_dict(model.state_dict(), strict=False)
        nn.functional.cross_entropy(module(images), labels).backward()
        products = (module.second.weight.grad * module.second.weight).sum((1, 2, 3))  # type: ignore[operator]
        readers = (module.head.weight.grad * module.head.weight).sum(0)  # type: ignore[operator]
        squares.append(torch.stack([products, readers]).detach().double().square())
    expected = torch.stack(squares).mean(0).sqrt().mean(0)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4)


def test_fpgm_is_the_sum_of_distances_to_the_other_filters(model: Model, coupling: Coupling) -> None:
    scores = by_origin(coupling, fpgm.distances(model.graph, coupling))
    for name in ("first.weight", "second.weight"):
        filters = dict(model.named_parameters())[name].detach().double().flatten(1)
        expected = [sum(float((a - b).square().sum().sqrt()) for b in filters) for a in filters]
        np.testing.assert_allclose(scores[name], over_mean(expected), rtol=1e-6)


def test_fpgm_gives_a_double_the_same_and_the_odd_one_more() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0]] * 4 + [[0, 9.0, 0, 0]]))
    net = Model.capture(module.eval(), (torch.randn(2, 4),))
    coupling = analyse(net)
    scores = by_origin(coupling, fpgm.distances(net.graph, coupling))["0.weight"]
    assert np.allclose(scores[:4], scores[0])
    assert scores[4] > 3 * scores[0]


def test_bn_scale_is_the_magnitude_of_gamma_and_nothing_without_a_norm(model: Model, coupling: Coupling) -> None:
    scores = by_origin(coupling, bn_scale.scales(model.graph, coupling))
    gamma = model.state_dict()["norm.weight"]
    np.testing.assert_allclose(scores["first.weight"], gamma.abs().double().numpy())
    assert np.isnan(scores["second.weight"]).all()


def test_spaces_without_a_score_are_left_alone_and_told(model: Model) -> None:
    used = context()
    small = bn_scale.bn_scale(model, bn_scale.BnScaleConfig(channels=12 / 14, round_to=1), used)
    shapes = {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}
    assert shapes["first.weight"][0] == 4
    assert shapes["second.weight"][0] == 8
    kept = model.state_dict()["norm.weight"].abs().sort().values[2:]
    assert torch.equal(small.state_dict()["norm.weight"].abs().sort().values, kept)
    assert used.notes["steps"][0]["unscored"] == ["second.weight"]  # type: ignore[index]
    plain = Model.capture(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), (torch.randn(2, 4),))
    with pytest.raises(StageError, match="no score"):
        bn_scale.bn_scale(plain, bn_scale.BnScaleConfig(macs=0.5), context())


def hooked(module: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        module(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("statistic", ["mean", "apoz"])
def test_activation_is_what_the_layers_read(statistic: str, model: Model, coupling: Coupling) -> None:
    module = Net().eval()
    module.load_state_dict(model.state_dict(), strict=False)
    images = next(iter(data().train.batches(64)))[0]
    measure = {"mean": mean_magnitude, "apoz": share_of_nonzero}[statistic]
    scores = by_origin(coupling, score_values(model, coupling, measure, context(), samples=64, batch_size=16))
    for name, layer, axes in (("first.weight", module.second, (0, 2, 3)), ("second.weight", module.head, (0,))):
        values = hooked(module, layer, images)
        expected = values.abs().mean(axes) if statistic == "mean" else (values != 0).float().mean(axes)
        np.testing.assert_allclose(scores[name], over_mean(expected.numpy()), rtol=1e-4)


def test_hrank_is_the_mean_rank_of_maps_with_ties_broken_by_energy() -> None:
    torch.manual_seed(0)
    maps = torch.randn(5, 3, 6, 6)
    maps[:, 1] = torch.randn(5, 6, 1) * torch.randn(5, 1, 6)  # rank 1
    maps[:, 2, :, 3:] = 0.0  # rank 3
    found = ranks(maps, rtol=1e-4)
    by_hand = [np.mean([np.linalg.matrix_rank(maps[i, c].numpy(), tol=None) for i in range(5)]) for c in range(3)]
    assert by_hand == [6.0, 1.0, 3.0]
    torch.testing.assert_close(found, torch.tensor([6.0, 1.0, 3.0], dtype=torch.float64), atol=2e-6, rtol=0)
    # Four of five images have a higher rank: no energy makes up for that.
    maps[0, 0] = torch.randn(6, 1) * torch.randn(1, 6)
    maps[:, 2] = 100 * torch.randn(5, 6, 3) @ torch.randn(5, 3, 6)
    low, high = ranks(maps, rtol=1e-4)[[2, 0]].tolist()
    assert (round(low, 3), round(high, 3)) == (3.0, 5.0)
    tied = torch.tensor([1.0, 3.0, 2.0])[:, None, None].repeat(5, 1, 1, 1)
    assert ranks(tied, rtol=1e-4).argsort().tolist() == [0, 2, 1]
    assert bool((ranks(tied, rtol=1e-4) < 1.001).all())


def test_hrank_of_tokens_is_the_rank_over_samples_and_positions() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(4, 3, 9)  # samples, channels, positions
    tokens[:, 1] = torch.randn(4, 1) * torch.randn(1, 9)
    found = ranks(tokens, rtol=1e-4) * 4
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0, 4.0], dtype=torch.float64), atol=1e-5, rtol=0)


def test_hrank_decomposes_few_maps_at_a_time_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    maps, tokens = torch.randn(7, 5, 6, 6), torch.randn(7, 5, 9)
    maps[:, 2, :, 3:] = 0.0
    whole = [ranks(values, rtol=1e-4) for values in (maps, tokens)]
    sizes: list[int] = []
    decompose = torch.linalg.matrix_rank

    def watch(matrices: Tensor, **options: Any) -> Tensor:
        sizes.append(matrices.numel())
        return decompose(matrices, **options)

    monkeypatch.setattr(torch.linalg, "matrix_rank", watch)
    monkeypatch.setattr(hrank, "_NUMBERS_AT_ONCE", 400)
    assert torch.equal(ranks(maps, rtol=1e-4), whole[0])
    assert torch.equal(ranks(tokens, rtol=1e-4), whole[1])
    assert max(sizes) <= 400
    assert sum(sizes) == maps.numel() + tokens.numel()


def test_random_is_the_seeds(coupling: Coupling) -> None:
    one, same = (random_scores(coupling, context(seed=0).generator("random")) for _ in range(2))
    other = random_scores(coupling, context(seed=1).generator("random"))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@cache
def captured(build: Any) -> Model:
    torch.manual_seed(0)
    options = {"width": 8, "blocks": 1} if build is resnet20 else {"depth": 1, "image_size": 16, "patch": 4}
    return Model.capture(build(num_classes=3, **options).eval(), (torch.randn(2, 1, 16, 16),))


@pytest.mark.parametrize(
    ("build", "method"),
    [
        pytest.param(build, method, marks=() if place % 2 == turn or method == "bn_scale" else pytest.mark.slow)
        for place, method in enumerate(METHODS)
        for turn, build in enumerate((vit, resnet20))
    ],
)
def test_every_method_meets_its_target_on_real_architectures(build: Any, method: str) -> None:
    net = captured(build)
    used = context(data=data((1, 16, 16)))
    config = config_type("prune", method)(
        macs=0.6, round_to=1, max_per_layer=0.9, check_samples=4, recalibrate_samples=0
    )  # type: ignore[call-arg]
    if build is vit and method == "bn_scale":
        with pytest.raises(StageError, match="no score"):
            function_of(config)(net, config, used)
        return
    small = function_of(config)(net, config, used)
    assert 0.4 * net.macs() < small.macs() <= 0.6 * net.macs()
    assert torch.isfinite(small(torch.randn(3, 1, 16, 16))).all()


def test_the_first_cut_is_compared_with_a_random_one(model: Model) -> None:
    used = context()
    settings = {"macs": 0.5, "round_to": 1, "check_samples": 4, "recalibrate_samples": 32}
    small = function_of(magnitude := MagnitudeConfig(**settings))(model, magnitude, used)
    drawn = function_of(random := RandomConfig(**settings))(model, random, context())
    assert used.notes["quality_after_the_first_cut"] == used.evaluate(small).value
    assert used.notes["quality_after_a_random_cut"] == used.evaluate(drawn).value
    for config in (random, MagnitudeConfig(**settings, compare_samples=0)):
        plain = context()
        function_of(config)(model, config, plain)
        assert "quality_after_a_random_cut" not in plain.notes
