"""Weights set to zero: which ones, in which pattern, that they stay so in training, and what is told."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, op_name
from mil_cli.models.resnet import resnet20
from mil_cli.stages.context import Context
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig
from mil_cli.stages.prune.kmeans import KmeansConfig
from mil_cli.stages.prune.magnitude import MagnitudeConfig
from mil_cli.stages.prune.masks import insert_masks
from mil_cli.stages.prune.sparse import keep_largest
from mil_cli.stages.prune.sparse_magnitude import (
    SparseMagnitudeConfig,
    growing_masks,
    sparse_magnitude,
    sparsity_at,
)
from mil_cli.stages.prune.sparsegpt import SparseGptConfig, sparsegpt
from mil_cli.stages.prune.wanda import WandaConfig, input_norms, wanda, weighted
from mil_cli.stages.quantize.apot import ApotConfig
from mil_cli.stages.quantize.lsq import LsqConfig
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.registry import check_order, config_type, function_of
from mil_cli.stages.train.supervised import SupervisedConfig
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import make_context, run_through_kills, trained_digits

DATA = digits()


def context(**changes: Any) -> Context:
    return make_context(DATA, trainer=TrainerConfig(epochs=2, learning_rate=0.02), **changes)


@pytest.fixture(scope="module")
def trained() -> Model:
    return trained_digits()


def accuracy(model: Model) -> float:
    return context().evaluate(model).value


def zeros(model: Model, names: Any) -> dict[str, float]:
    state = model.state_dict()
    return {name: float((state[name] == 0).double().mean()) for name in names}


def test_the_smallest_go_by_weight_and_by_row() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert keep_largest(scores, 0.5, None).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert keep_largest(scores, 0.5, None, by_row=True).int().tolist() == [[0, 0, 1, 1]] * 2
    assert keep_largest(scores, 0.25, (1, 4)).int().tolist() == [[0, 0, 0, 1]] * 2


def test_a_pattern_lies_along_the_inputs_of_a_convolution() -> None:
    scores = torch.rand(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    mask = keep_largest(scores, 0.5, (2, 4))
    groups = mask.reshape(3, 2, 4, 2, 2)
    assert torch.equal(groups.sum(2), torch.full((3, 2, 2, 2), 2))
    kept = torch.where(groups, scores.reshape(3, 2, 4, 2, 2), -1.0)
    left = torch.where(groups, 2.0, scores.reshape(3, 2, 4, 2, 2))
    assert bool((kept.amax(2) >= 0).all())
    assert bool((torch.where(kept < 0, 2.0, kept).amin(2) >= torch.where(left > 1, -1.0, left).amax(2)).all())


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.5, 0.7875), (1.0, 0.9), (2.0, 0.9)])
def test_the_schedule_is_cubic(progress: float, share: float) -> None:
    assert sparsity_at(progress, 0.9) == pytest.approx(share)


@pytest.mark.parametrize("settings", [{"every": 1}, {"ramp": 0.0}, {"pattern": "2:4"}, {"train": False}])
def test_the_layers_have_the_sparsity_asked_for(settings: dict[str, Any], trained: Model) -> None:
    before = trained.fingerprint()
    used = context()
    share = 0.5 if "pattern" in settings else 0.8
    sparse = sparse_magnitude(trained, SparseMagnitudeConfig(**{"sparsity": share, **settings}), used)
    assert trained.fingerprint() == before
    names: Any = used.notes["sparse_layers"]
    assert len(names) > 5
    for name, found in zeros(sparse, names).items():
        assert found == pytest.approx(share, abs=2e-3), name
    assert used.notes["sparsity"] == pytest.approx(share, abs=2e-3)
    assert "no time" in str(used.notes["gain"])
    assert [op_name(node) for node in calls(sparse.graph)] == [op_name(node) for node in calls(trained.graph)]
    assert set(sparse.state_dict()) == set(trained.state_dict())


@pytest.mark.slow
def test_gradual_sparsity_keeps_what_one_shot_loses(trained: Model) -> None:
    settings: dict[str, Any] = {"sparsity": 0.85, "every": 2}
    training = {"epochs": 8, "learning_rate": 0.05}
    gradual = sparse_magnitude(trained, SparseMagnitudeConfig(**settings, trainer=training), context())
    at_once = sparse_magnitude(trained, SparseMagnitudeConfig(**settings, train=False), context())
    assert accuracy(trained) > 0.95
    assert accuracy(gradual) > 0.9
    assert accuracy(gradual) > accuracy(at_once) + 0.1


def test_wanda_scores_are_weights_times_the_norms_of_what_the_layer_reads(trained: Model) -> None:
    layers = {
        str(get_argument(node, "weight").target): node
        for node in calls(trained.graph)
        if op_name(node) in ("conv2d", "linear")
    }
    norms = input_norms(trained, layers, context(), samples=128, batch_size=32)
    module = resnet20(width=16, blocks=1).eval()
    module.load_state_dict(trained.state_dict(), strict=False)
    seen: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(lambda _, inputs, key=f"{name}.weight": seen.update({key: inputs[0]}))
    images = torch.cat([args[0] for args, _ in context().calibration(samples=128, batch_size=32)])
    with torch.no_grad():
        module(images)
    assert set(seen) == set(norms)
    for name, value in seen.items():
        axes = (0, 2, 3) if value.ndim == 4 else (0,)
        torch.testing.assert_close(norms[name].float(), value.square().sum(axes).sqrt(), rtol=1e-4, atol=1e-4)
        weight = trained.state_dict()[name]
        expected = weight.abs().double() * norms[name].reshape(1, -1, *[1] * (weight.ndim - 2))
        torch.testing.assert_close(weighted(weight, norms[name], layers[name]), expected)


def test_a_grouped_convolution_sees_the_channels_of_its_group() -> None:
    torch.manual_seed(0)
    net = Model.capture(nn.Conv2d(4, 6, 3, groups=2).eval(), (torch.randn(2, 4, 8, 8),))
    (node,) = calls(net.graph)
    weight, norms = net.state_dict()["weight"], torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    found = weighted(weight, norms, node)
    torch.testing.assert_close(found[0, 1], weight[0, 1].abs().double() * 2)
    torch.testing.assert_close(found[5, 0], weight[5, 0].abs().double() * 3)


def test_wanda_loses_less_than_magnitude_where_inputs_differ() -> None:
    """Inputs of very different size: the magnitude of a weight says little."""
    torch.manual_seed(0)
    net = Model.capture(nn.Linear(64, 10).eval(), (torch.randn(2, 64),))
    inputs = torch.randn(500, 64) * torch.logspace(-1, 1, 64)
    split = TensorSplit((inputs, torch.zeros(500, dtype=torch.int64)))
    data = Data(name="scales", train=split, val=split, test=split)
    settings: dict[str, Any] = {"sparsity": 0.5, "smallest": 0, "train": False}
    errors = []
    for method in ("wanda", "sparse_magnitude"):
        config = config_type("prune", method).model_validate(settings)
        sparse = function_of(config)(net, config, make_context(data))
        errors.append(float((sparse(inputs) - net(inputs)).detach().square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_wanda_takes_the_same_share_of_each_output_and_its_zeros_stay_in_training(trained: Model) -> None:
    used = context()
    sparse = wanda(trained, WandaConfig(sparsity=0.75), used)
    for name in used.notes["sparse_layers"]:  # type: ignore[attr-defined]
        rows = sparse.state_dict()[name].flatten(1)
        assert set((rows == 0).sum(1).tolist()) == {round(0.75 * rows.shape[1])}
    assert accuracy(sparse) > 0.85


@pytest.mark.parametrize(
    ("total", "ramp", "every"),
    [
        (15, 1.0, 20),
        (1, 0.7, 20),
        (3, 0.5, 20),
        (2, 0.7, 20),
        (4, 0.7, 20),
        (100, 1.0, 20),
        (100, 0.7, 7),
        (50, 0.0, 1),
    ],
)
def test_the_schedule_ends_at_the_sparsity_asked_for(total: int, ramp: float, every: int, trained: Model) -> None:
    net = trained.clone()
    name = "stages.0.0.conv1.weight"
    paths = insert_masks(net.graph, {name: torch.ones_like(net.state_dict()[name], dtype=torch.bool)})
    step = growing_masks(paths, 0.9, ramp=ramp, every=every)
    shares = []
    for number in range(total):
        step(net, number, total)
        shares.append(1 - float(net.state_dict()[paths[name]].double().mean()))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("trainer", [{"ema": 0.99}, {"early_stopping": 1, "epochs": 6}, {"learning_rate": 1e6}])
def test_zeros_survive_averages_and_early_ends(trainer: dict[str, Any], trained: Model) -> None:
    used = context()
    sparse = sparse_magnitude(trained, SparseMagnitudeConfig(sparsity=0.8, every=1, trainer=trainer), used)
    assert used.notes["sparsity"] == pytest.approx(0.8, abs=2e-3)
    assert all(found > 0.79 for found in zeros(sparse, used.notes["sparse_layers"]).values())


def test_no_output_of_a_depthwise_convolution_loses_all_of_its_weights() -> None:
    scores = torch.rand(4, 1, 3, 3)
    assert keep_largest(scores, 0.95, None, by_row=True).flatten(1).sum(1).tolist() == [1] * 4


class Masked(nn.Module):
    """A module of the user's own that is called masks, and a product of sizes in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = nn.ModuleList([nn.Linear(8, 64)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        samples, _, height, width = x.shape
        rows = x.reshape(samples * height, width)
        return self.head(torch.relu(self.masks[0](rows)).reshape(samples, height, 64).mean(1))


def test_names_and_products_of_the_users_own_are_left_alone() -> None:
    net = Model.capture(Masked().eval(), (torch.randn(2, 1, 8, 8),))
    sparse = sparse_magnitude(net, SparseMagnitudeConfig(trainer={"epochs": 1}), context())
    assert set(sparse.state_dict()) == set(net.state_dict())
    assert float((sparse.state_dict()["masks.0.weight"] == 0).double().mean()) == 0.5
    assert sparse(torch.randn(5, 1, 8, 8)).shape == (5, 10)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SparseMagnitudeConfig(sparsity=0.8, every=1, trainer={"epochs": 2, "checkpoint_every_seconds": 0})
    whole = sparse_magnitude(trained, config, context(workspace=tmp_path / "whole"))
    resumed = run_through_kills(
        lambda: sparse_magnitude(trained, config, context(workspace=tmp_path / "killed")),
        monkeypatch,
        saves=(2, 7),
    )
    assert resumed.fingerprint() == whole.fingerprint()


@pytest.mark.slow
def test_the_file_is_smaller_when_it_is_zipped(trained: Model, tmp_path: Path) -> None:
    sparse = sparse_magnitude(trained, SparseMagnitudeConfig(sparsity=0.9, train=False), context())
    files = [export_onnx(model, tmp_path / f"{i}.onnx").path for i, model in enumerate((trained, sparse))]
    check_parity(sparse, files[1], [((torch.randn(16, 1, 8, 8),), {})])
    dense, zipped = (len(zlib.compress(file.read_bytes(), 6)) for file in files)
    assert zipped < 0.3 * dense


def test_what_cannot_be_is_told(trained: Model) -> None:
    with pytest.raises(StageError, match="no layer of the model can become sparse"):
        sparse_magnitude(trained, SparseMagnitudeConfig(skip=("*",)), context())
    with pytest.raises(StageError, match="'head' fits no weight of a layer") as caught:
        sparse_magnitude(trained, SparseMagnitudeConfig(skip=("*", "head")), context())
    assert str(caught.value.where).endswith(".skip")
    with pytest.raises(StageError, match="no layer of the model can become sparse"):
        wanda(trained, WandaConfig(pattern="2:63"), context())
    grouped = Model.capture(nn.Conv2d(16, 16, 3, groups=2).eval(), (torch.randn(2, 16, 8, 8),))
    with pytest.raises(StageError, match="no layer of the model can become sparse"):
        sparsegpt(grouped, SparseGptConfig(), context())
    sparse = SparseMagnitudeConfig()
    for later in (SupervisedConfig(), SoftLabelsConfig(), LsqConfig(), ApotConfig()):
        (problem,) = check_order([("sparse", sparse), ("later", later)])
        assert "fill the zeros" in str(problem)
    assert check_order([("sparse", sparse), ("later", StaticConfig())]) == []
    for again in (SparseMagnitudeConfig(), MagnitudeConfig(macs=0.5)):
        assert check_order([("sparse", sparse), ("later", again)])
    assert check_order([("sparse", sparse), ("later", KmeansConfig())]) == []
    for wrong in ("4:2", "2", "2:2", "a:b", 124):
        with pytest.raises(ValidationError, match="no pattern"):
            WandaConfig(pattern=wrong)
