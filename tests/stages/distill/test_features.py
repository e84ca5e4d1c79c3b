"""What distillation by features shares, on three families of networks and on cut, quantized and foreign students."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.context import Context
from mil_cli.stages.distill.features import FeatureConfig
from mil_cli.stages.distill.hints import HintsConfig, hints
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_labels
from mil_cli.stages.prune.magnitude import MagnitudeConfig
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.registry import config_type, function_of
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import make_context, run_through_kills

METHODS = ["hints", "attention_transfer", "relational", "similarity"]
FAMILIES = ["resnet", "mobilenet", "vit"]
KINDS = ["cut", "quantized", "foreign"]


@cache
def _net(family: str, width: int) -> Model:
    nets = {
        "resnet": lambda: resnet20(width=width, blocks=1),
        "mobilenet": lambda: mobilenet(widths=(width, 2 * width), blocks=(1, 2), last=4 * width, expansion=2),
        "vit": lambda: vit(image_size=8, patch=2, dim=4 * width, depth=2, heads=2, mlp_ratio=2.0),
    }
    with torch.random.fork_rng():
        torch.manual_seed(width)
        model = Model.capture(nets[family](), (torch.rand(2, 1, 8, 8),)).train()
        for _ in range(
            30
        ):  # statistics of batch norms, so that features are of the size that they have in trained nets
            model(torch.rand(16, 1, 8, 8))
        return model.eval()


@cache
def _data() -> Data:
    generator = torch.Generator().manual_seed(0)

    def split(samples: int) -> TensorSplit:
        labels = torch.randint(10, (samples,), generator=generator)
        return TensorSplit((torch.rand(samples, 1, 8, 8, generator=generator), labels))

    return Data(name="noise", train=split(32), val=split(16), test=split(16))


class Silent(Classification):
    """Neither labels nor the teacher's outputs say anything: only features are left to learn from."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return 0 * cast("Tensor", outputs.sum())

    def distance(self, outputs: Any, targets: Any, batch: Any, *, temperature: float) -> Tensor:
        return self.loss(outputs, batch)


def _context(teacher: Model, *, epochs: int = 1, **changes: Any) -> Context:
    optimizer = {"_target_": "torch.optim.SGD", "lr": 0.005, "momentum": 0.9, "weight_decay": 0.0}
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": 16, "optimizer": optimizer, "scheduler": "constant"}
    settings.update(changes.pop("trainer", {}))
    return make_context(_data(), original=teacher, trainer=TrainerConfig(**settings), name="recover", **changes)


@cache
def _student(family: str, kind: str) -> Model:
    teacher = _net(family, 8)
    context = _context(teacher)
    if kind == "cut":
        config: Any = MagnitudeConfig(params=0.5)
    elif kind == "quantized":
        config = StaticConfig(calibration_samples=16, calibration_batch_size=16)
    else:
        return _net(FAMILIES[FAMILIES.index(family) - 1], 4)
    return function_of(config)(teacher, config, context)


def _configured(method: str, **settings: Any) -> FeatureConfig:
    return cast("FeatureConfig", config_type("distill", method)(**settings))


def _combinations() -> list[Any]:
    """Return every method with every family and kind of student; in the quick ones each of them occurs."""
    found = []
    for (place, kind), (row, method), family in itertools.product(enumerate(KINDS), enumerate(METHODS), FAMILIES):
        quick = place == row % len(KINDS) and family == FAMILIES[row % len(FAMILIES)]
        found.append(pytest.param(method, family, kind, marks=() if quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("method", "family", "kind"), _combinations())
def test_features_alone_are_learnt(method: str, family: str, kind: str) -> None:
    student, teacher = _student(family, kind), _net(family, 8)
    if kind == "quantized":
        # It would know the features already.
        student = student.clone()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    config = _configured(method)
    trainer = {"learning_rate": 0.002 if kind == "quantized" else 0.02 if method == "hints" else 0.005}
    context = _context(teacher, epochs=8, task=Silent(), trainer=trainer)
    trained = function_of(config)(student, config, context)
    losses = [entry["train_loss"] for entry in cast("list[dict[str, Any]]", context.notes["history"])]
    assert losses[-1] < 0.95 * losses[0]
    before, after = (dict(model.named_parameters()) for model in (student, trained))
    assert list(after) == list(before)
    first, *_, head = (name for name, parameter in before.items() if parameter.ndim > 1)
    assert not torch.equal(before[first], after[first])
    assert torch.equal(before[head], after[head])
    pairs = cast("list[dict[str, Any]]", context.notes["pairs"])
    assert 1 <= len(pairs) <= config.count
    assert (kind == "foreign") != all(pair["student"] == pair["teacher"] for pair in pairs)


def test_without_weight_the_features_change_nothing() -> None:
    teacher, student = _net("resnet", 8), _net("resnet", 4)
    settings = {"weight": 0.7, "temperature": 2.0}
    plain = soft_labels(student, SoftLabelsConfig(**settings), _context(teacher, epochs=2))
    mixed = hints(student, HintsConfig(feature_weight=0.0, **settings), _context(teacher, epochs=2))
    for (name, one), (_, other) in zip(plain.named_parameters(), mixed.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_terms_are_added() -> None:
    teacher, student = _net("resnet", 8), _net("resnet", 4)
    losses = []
    trainer = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 1e-12}}
    for settings in ({"feature_weight": 0.0}, {"feature_weight": 2.0}, {"feature_weight": 2.0, "weight": 0.0}):
        context = _context(teacher, trainer=trainer)
        hints(student, HintsConfig(**settings), context)
        losses.append(cast("Any", context.notes["history"])[0]["train_loss"])
    silent = _context(teacher, trainer=trainer, task=Silent())
    hints(student, HintsConfig(), silent)
    features = cast("Any", silent.notes["history"])[0]["train_loss"]
    assert losses[1] == pytest.approx(losses[0] + 2 * features, rel=1e-4)
    labels = _context(teacher, trainer=trainer)
    soft_labels(student, SoftLabelsConfig(weight=0.0), labels)
    assert losses[2] == pytest.approx(cast("Any", labels.notes["history"])[0]["train_loss"] + 2 * features, rel=1e-4)


def test_adapters_are_not_in_the_result_and_the_models_stay() -> None:
    teacher, student = _net("resnet", 8), _net("resnet", 4)
    before = teacher.fingerprint(), student.fingerprint()
    trained = hints(student, HintsConfig(), _context(teacher))
    assert (teacher.fingerprint(), student.fingerprint()) == before
    assert {name: value.shape for name, value in trained.state_dict().items()} == {
        name: value.shape for name, value in student.state_dict().items()
    }
    assert trained.graph.code == student.graph.code
    assert trained.fingerprint() == hints(student, HintsConfig(), _context(teacher)).fingerprint()


@pytest.mark.parametrize("method", ["hints", *(pytest.param(each, marks=pytest.mark.slow) for each in METHODS[1:])])
def test_a_killed_training_ends_alike(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = _net("resnet", 8), _net("mobilenet", 4)
    config = _configured(method)

    def run(workspace: Path) -> Model:
        context = _context(teacher, epochs=3, workspace=workspace, trainer={"checkpoint_every_seconds": 0})
        return function_of(config)(student, config, context)

    whole = run(tmp_path / "whole")
    killed = run_through_kills(lambda: run(tmp_path / "killed"), monkeypatch, saves={2, 5})
    assert killed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        *(("hints", "lsq"), ("relational", "pact")),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("relational", "lsq"), ("hints", "lsq_plus"), ("hints", "apot"))
        ),
    ],
)
def test_step_sizes_are_trained_by_features(method: str, quantization: str) -> None:
    teacher = _net("mobilenet", 8)
    settings = {"weight_bits": 4, "activation_bits": 4, "distill": "by", "calibration_samples": 16}
    config = config_type("quantize", quantization).model_validate(settings)
    context = _context(teacher, stages={"by": _configured(method)}, trainer={"epochs": 2})
    trained = function_of(config)(teacher, config, context)
    names = {op_name(node) for node in calls(trained.graph)}
    assert ("quantize_levels" if quantization in ("pact", "apot") else "quantize_affine") in names
    pairs = cast("list[dict[str, Any]]", context.notes["pairs"])
    assert pairs
    assert all(pair["student"] == pair["teacher"] for pair in pairs)


def test_given_pairs_are_used_and_checked() -> None:
    teacher, student = _net("resnet", 8), _net("vit", 4)
    context = _context(teacher)
    hints(student, HintsConfig(pairs={"blocks.0": "stages.1", "norm": "stages.1"}), context)
    pairs = cast("list[dict[str, Any]]", context.notes["pairs"])
    assert [(pair["student"], pair["teacher"]) for pair in pairs] == [("blocks.0", "stages.1"), ("norm", "stages.1")]
    with pytest.raises(StageError, match=r"stages.recover.pairs.*block.0.*\n.*did you mean 'blocks.0'"):
        hints(student, HintsConfig(pairs={"block.0": "stages.1"}), context)


@pytest.mark.parametrize("content", [{"count": 0}, {"feature_weight": -1}, {"weight": 2}, {"pairs": ["a"]}])
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HintsConfig.model_validate(content)
