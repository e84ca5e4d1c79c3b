"""Models that take batches of one size only: scored, trained, calibrated and proven on what fills such batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.data.base import Data, repeated
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import DataError
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.run.cache import Cache
from mil_cli.run.execute import CapturedModel
from mil_cli.run.prove import Prover
from mil_cli.stages.context import Context
from mil_cli.stages.judging import mean_loss
from mil_cli.stages.quantize.static import StaticConfig, quantize
from mil_cli.training.batch_norm import recalibrate
from mil_cli.training.evaluate import evaluate
from tests.run.toys import toy_surroundings
from tests.stages.contexts import Notices, make_context

SIZE = 4


class Net(nn.Module):
    def __init__(self, fixed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.shape = (SIZE, -1) if fixed else (-1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(self.shape))


def make_model(*, fixed: bool = True) -> Model:
    model = Model.capture(Net(fixed), (torch.randn(SIZE, 4),))
    assert (model.spec.batch is None) == fixed
    return model


def split(samples: int) -> TensorSplit:
    features = torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples))
    return TensorSplit((features, (features[:, 0] > 0).long()))


def data(*, train: int = 8, val: int = 8, test: int = 8) -> Data:
    return Data(name="toy", train=split(train), val=split(val), test=split(test))


def test_what_does_not_fill_a_batch_is_left_out_of_a_score() -> None:
    context = make_context(data(val=10))
    first_eight = next(context.data.val.batches(8))
    figure = context.evaluate(make_model())
    free = make_model(fixed=False)
    expected = (free(first_eight[0]).argmax(1) == first_eight[1]).double().mean()
    assert (figure.samples, figure.value) == (8, pytest.approx(float(expected)))


@pytest.mark.parametrize("score", ["quality", "loss"])
def test_fewer_samples_than_a_batch_are_no_score(score: str) -> None:
    context = make_context(data(val=3))
    with pytest.raises(DataError, match=r"data.val: .*batches of 4 only.*\(got 3\)(?s:.*)give val 4 samples or more"):
        context.evaluate(make_model()) if score == "quality" else mean_loss(make_model(), context, samples=100)


def test_training_scores_on_whole_batches_and_refuses_less_than_one() -> None:
    trained = make_context(data(train=10, val=10)).finetune(make_model(), stage=None, name="t", trainer={"epochs": 1})
    assert trained.spec.batch is None
    with pytest.raises(DataError, match=r"data.train: .*\(got 3\)"):
        make_context(data(train=3)).finetune(make_model(), stage=None, name="t", trainer={"epochs": 1})


def test_repeated_samples_keep_their_order_and_what_belongs_to_none() -> None:
    batch = repeated({"x": torch.arange(3), "name": "noise", "scale": torch.tensor(2.0)}, 7)
    assert batch["x"].tolist() == [0, 1, 2, 0, 1, 2, 0]  # type: ignore[call-overload, union-attr]
    assert batch["name"] == "noise"  # type: ignore[call-overload]
    assert repeated((torch.arange(2), torch.tensor(5)), 3)[1].shape == ()  # type: ignore[union-attr]


def test_ranges_from_few_samples_are_those_of_a_model_that_takes_them_as_they_are() -> None:
    def scales(model: Model, context: Context) -> list[float]:
        quantized = quantize(model, StaticConfig(observer="min_max", bias_correction=True), context)
        nodes = [node for node in calls(quantized.graph) if op_name(node) == "quantize_affine"]
        return [float(get_attribute(quantized.graph, str(get_argument(node, "scale").target)).max()) for node in nodes]

    told = Notices()
    few = data(train=3)
    assert scales(make_model(), make_context(few, progress=told)) == scales(make_model(fixed=False), make_context(few))
    (notice,) = told.told  # though calibration looks at the samples more than once
    assert "batches of 4 only, and train has 3 samples: some count more than once" in notice


def test_a_file_of_a_fixed_batch_is_proven_and_measured(tmp_path: Path) -> None:
    around = toy_surroundings(data=data(val=10, test=9))
    progress: Any = Notices()
    prover = Prover(around.task, around.data, around.device, Cache(tmp_path, progress), False, progress)
    proof = prover.prove("final", CapturedModel(make_model()), judged=True)
    assert proof.quality["samples"] == 8
    assert proof.parity["samples"] == 8
    in_torch = evaluate(make_model(), task=around.task, split=split(9), split_name="test")
    assert in_torch.value == proof.quality["value"]


def test_a_norm_of_one_value_a_channel_keeps_its_statistics() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
            self.features, self.last = nn.Linear(16, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.features(self.norm(self.conv(x)).reshape(1, 16)))

    model = Model.capture(Single().eval(), (torch.randn(1, 1, 4, 4),))
    inputs = [torch.randn(1, 1, 4, 4) for _ in range(3)]
    found = recalibrate(model, [((x,), {}) for x in inputs]).state_dict()
    means = torch.stack(
        [functional.conv2d(x, found["conv.weight"], found["conv.bias"]).mean((0, 2, 3)) for x in inputs]
    )
    torch.testing.assert_close(found["norm.running_mean"], means.mean(0))
    assert torch.equal(found["last.running_var"], model.state_dict()["last.running_var"])
