"""Weight clustering: the values against another k-means, what training keeps, and the file that comes out."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.errors import StageError
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.count import count_layers
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.models.vit import vit
from mil_cli.ops.codebook import lookup
from mil_cli.stages.context import Context
from mil_cli.stages.prune.kmeans import KmeansConfig, cluster_values, kmeans
from mil_cli.stages.prune.magnitude import MagnitudeConfig
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.registry import check_order
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import make_context, trained_digits

DATA = digits()


def context(**changes: Any) -> Context:
    return make_context(DATA, trainer=TrainerConfig(epochs=2, learning_rate=0.01), **changes)


@pytest.fixture(scope="module")
def trained() -> Model:
    return trained_digits()


def accuracy(model: Model) -> float:
    return context().evaluate(model).value


def values_of(model: Model, name: str) -> Tensor:
    book = dict(model.graph.named_parameters())[f"codebooks.{name.replace('.', '_')}"]
    return book.detach()


@pytest.mark.parametrize("clusters", [2, 5, 16])
def test_values_are_those_of_another_k_means(clusters: int) -> None:
    rows = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
    found = cluster_values(rows, clusters, zero=False)
    for row, values in zip(rows, found, strict=True):
        start = np.linspace(float(row.min()), float(row.max()), clusters)[:, None]
        other = KMeans(clusters, init=start, n_init=1, max_iter=30, tol=0).fit(row[:, None].numpy())
        if clusters < 16:  # with many values there are many optima
            np.testing.assert_allclose(values.numpy(), np.sort(other.cluster_centers_[:, 0]), atol=2e-2)
        error = float((row[:, None] - values).abs().amin(1).square().sum())
        assert error <= other.inertia_ * 1.05


def test_zero_is_held_where_it_is_asked_for() -> None:
    rows = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)) + 0.3
    assert bool((cluster_values(rows, 8, zero=True) == 0).any())
    assert not bool((cluster_values(rows, 8, zero=False) == 0).any())


def test_every_layer_takes_few_values_and_training_brings_the_quality_back(trained: Model) -> None:
    before = trained.fingerprint()
    used = context()
    settings = {"clusters": 4, "smallest": 128}
    result = kmeans(trained, KmeansConfig(**settings, trainer={"epochs": 4}), used)
    rounded = kmeans(trained, KmeansConfig(**settings, train=False), context())
    assert trained.fingerprint() == before
    assert accuracy(trained) > 0.95
    assert accuracy(result) > max(accuracy(rounded), 0.9)
    layers = used.notes["layers"]
    assert isinstance(layers, dict)
    assert "stem.weight" not in layers  # the first convolution stays
    assert all(len(values_of(result, name)) == 4 for name in layers)
    assert all(0 < facts["relative_error"] < 1 for facts in layers.values())
    assert result.num_params() == fold_batch_norm(trained).num_params()
    assert result.macs() == fold_batch_norm(trained).macs()


def test_without_training_weights_are_rounded_to_the_nearest_value(trained: Model) -> None:
    rounded = kmeans(trained, KmeansConfig(train=False), context())
    folded = fold_batch_norm(trained).clone()
    with torch.no_grad():
        for name, weight in folded.named_parameters():
            if f"codebooks.{name.replace('.', '_')}" in dict(rounded.graph.named_parameters()):
                values = values_of(rounded, name)
                weight.copy_(values[(weight[..., None] - values).abs().argmin(-1)])
    x = torch.randn(8, 1, 8, 8)
    torch.testing.assert_close(rounded(x), folded(x), rtol=1e-4, atol=1e-4)


def test_groups_of_channels_have_values_of_their_own(trained: Model) -> None:
    errors = []
    for size in (None, 8):
        used = context()
        result = kmeans(trained, KmeansConfig(clusters=4, channels_per_group=size, train=False), used)
        layers: Any = used.notes["layers"]
        errors.append({name: facts["relative_error"] for name, facts in layers.items()})
    name = next(iter(layers))
    channels = len(dict(trained.named_parameters())[name])
    assert len(values_of(result, name)) == 4 * channels // 8
    assert layers[name]["groups"] == channels // 8
    assert np.mean(list(errors[1].values())) < np.mean(list(errors[0].values()))


def test_sparse_weights_keep_their_zeros_in_training(trained: Model) -> None:
    sparse = trained.clone()
    with torch.no_grad():
        for weight in sparse.parameters():
            if weight.ndim > 1:
                weight.masked_fill_(weight.abs() < weight.abs().median(), 0.0)
    settings = KmeansConfig(clusters=32, trainer={"epochs": 1, "learning_rate": 0.2})
    result = kmeans(sparse, settings, context())
    tensors = result.state_dict()
    books = [name for name in tensors if name.startswith("codebooks") and not name.endswith("_indices")]
    assert books
    for name in books:
        weight = lookup(tensors[name], tensors[f"{name}_indices"], 1)
        assert float((weight == 0).double().mean()) > 0.49


@pytest.mark.parametrize(
    ("clusters", "group", "kind"),
    [
        pytest.param(16, None, "UINT4", marks=pytest.mark.slow),
        (16, 8, "UINT4"),
        (4, 8, "UINT2"),
        pytest.param(40, None, "UINT8", marks=pytest.mark.slow),
    ],
)
def test_the_file_holds_packed_indices_and_runs(
    clusters: int, group: int | None, kind: str, trained: Model, tmp_path: Path
) -> None:
    settings = KmeansConfig(clusters=clusters, channels_per_group=group, train=False)
    result = kmeans(trained, settings, context())
    exported = export_onnx(result, tmp_path / "model.onnx")
    check_parity(result, exported.path, [((torch.randn(16, 1, 8, 8),), {})])
    graph = onnx.load(exported.path).graph
    kinds = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    assert kind in kinds
    assert "fewer bytes on disk" in " ".join(exported.notices)
    assert not any(node.domain for node in graph.node)
    float_file = export_onnx(trained, tmp_path / "float.onnx").path
    assert exported.path.stat().st_size < float_file.stat().st_size / 2
    zipped, float_zipped = (len(gzip.compress(file.read_bytes())) for file in (exported.path, float_file))
    assert zipped < float_zipped / 2
    old = DeviceProfile(name="old", int8=Int8Form(activations="uint8", reduce_range=False), weight_bits=(8,))
    bytes_only = export_onnx(result, tmp_path / "bytes.onnx", device=old)
    check_parity(result, bytes_only.path, [((torch.randn(16, 1, 8, 8),), {})])


def test_the_result_is_saved_loaded_and_trained_further(trained: Model, tmp_path: Path) -> None:
    result = kmeans(trained, KmeansConfig(clusters=8, trainer={"epochs": 1}), context())
    result.save(tmp_path / "model.pt2")
    loaded = Model.load(tmp_path / "model.pt2")
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(x), result(x))
    again = context().finetune(loaded, stage=None, name="more", trainer={"epochs": 2, "learning_rate": 0.01})
    assert again.fingerprint() != result.fingerprint()
    assert accuracy(again) > 0.9
    names = [name for name, _ in again.graph.named_parameters() if name.startswith("codebooks")]
    assert all(len(dict(again.graph.named_parameters())[name]) == 8 for name in names)


@pytest.mark.slow
def test_transformers_and_shared_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Model.capture(vit(num_classes=10, image_size=8, patch=4, dim=32, depth=1).eval(), (torch.randn(2, 1, 8, 8),))
    result = kmeans(net, KmeansConfig(trainer={"epochs": 1}), context())
    check_parity(result, export_onnx(result, tmp_path / "vit.onnx").path, [((torch.randn(4, 1, 8, 8),), {})])

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x.flatten(1))))[:, :10]

    tied = Model.capture(Tied().eval(), (torch.randn(2, 1, 8, 8),))
    result = kmeans(tied, KmeansConfig(trainer={"epochs": 1}), context())
    assert sum(name.startswith("codebooks") for name, _ in result.graph.named_parameters()) == 1
    assert result.num_params() == tied.num_params()
    assert [name for name in result.state_dict() if name.endswith(".weight")] == []
    assert sum(layer.params for layer in count_layers(result)) == result.num_params()


def test_names_that_differ_in_a_dot_alone_have_codebooks_of_their_own() -> None:
    inner = nn.ModuleDict({"b_c": nn.Linear(64, 32), "d": nn.ModuleDict({"c": nn.Linear(32, 32)})})

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.a_b, self.head = inner, nn.ModuleDict({"c": nn.Linear(32, 32)}), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a_b["c"](torch.relu(self.a["b_c"](x.flatten(1)))))

    net = Model.capture(Named().eval(), (torch.randn(2, 1, 8, 8),))
    result = kmeans(net, KmeansConfig(smallest=0, clusters=64, train=False), context())
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(result(x), net(x), rtol=0.1, atol=0.1)
    assert sum(name.startswith("codebooks") for name, _ in result.graph.named_parameters()) == 3


def test_what_cannot_be_is_told(trained: Model) -> None:
    with pytest.raises(StageError, match="no layer of the model can be clustered"):
        kmeans(trained, KmeansConfig(skip=("*",)), context())
    with pytest.raises(StageError, match="'head' fits no weight of a layer"):
        kmeans(trained, KmeansConfig(skip=("*", "head")), context())
    cut, quantized, clustered = MagnitudeConfig(macs=0.5), StaticConfig(), KmeansConfig()
    assert check_order([("cut", cut), ("cluster", clustered)]) == []
    for later in (cut, quantized):
        (problem,) = check_order([("cluster", clustered), ("later", later)])
        assert "'later'" in str(problem)
    assert check_order([("quantize", quantized), ("cluster", clustered)])
