"""AdaRound: against every rounding there is, its decisions, what it falls back on, kills, the exported file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.base import Data, Split
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.events import SilentProgress
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute
from mil_cli.run.plan import _Head
from mil_cli.stages.quantize.adaround import AdaroundConfig, quantize
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from mil_cli.stages.registry import config_type, function_of
from tests.stages.contexts import run_through_kills
from tests.stages.quantize.learned import context, make_model, quick, weights


def config(**changes: Any) -> AdaroundConfig:
    return AdaroundConfig.model_validate(quick(**changes))


def static(**changes: Any) -> StaticConfig:
    """Return the settings of nearest rounding that fit `config`."""
    shared = quick(bias_correction=False, **changes)
    return StaticConfig.model_validate({k: v for k, v in shared.items() if k in StaticConfig.model_fields})


def one_layer() -> tuple[Model, Data]:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    rows = torch.randn(64, 5, generator=generator).cumsum(1)
    split = TensorSplit((rows, torch.zeros(64, dtype=torch.int64)))
    model = Model.capture(nn.Sequential(nn.Linear(5, 2), nn.ReLU()).eval(), (torch.randn(2, 5),))
    return model, Data(name="walks", train=split, val=split, test=split)


def test_its_choice_is_near_the_best_of_all_roundings() -> None:
    model, walks = one_layer()
    settings = config(iterations=400, calibration_batch_size=64)
    nearest = quantize_static(model, static(calibration_batch_size=64), context(data=walks))
    learned = quantize(model, settings, context(data=walks))
    (batch,) = walks.train.batches(64)
    target = model(batch[0])

    def error(candidate: Model) -> float:
        with torch.no_grad():
            return float((candidate(batch[0]) - target).square().sum())

    # The outputs of a linear layer do not touch each other, so the best of 2^10 roundings is the best of 2^5 for each.
    (name,) = weights(nearest)
    _, scale = weights(nearest)[name]
    below = (get_attribute(model.graph, name).detach() / scale).floor()
    best = 0.0
    for row in range(2):
        errors = []
        for ups in itertools.product((0.0, 1.0), repeat=5):
            tried = nearest.clone()
            rounded = (below[row] + torch.tensor(ups)).clamp(-4, 3) * scale[row]
            with torch.no_grad():
                get_attribute(tried.graph, name)[row].copy_(rounded)
                errors.append(float((tried(batch[0]) - target)[:, row].square().sum()))
        best += min(errors)
    assert best < 0.9 * error(nearest)  # else there would be nothing to find
    assert error(learned) <= error(nearest)
    assert error(learned) <= 1.1 * best


def test_every_weight_lies_on_the_code_below_it_or_above() -> None:
    model = make_model()
    used = context()
    learned = quantize(model, config(), used)
    folded, moved = fold_batch_norm(model), 0
    assert len(weights(learned)) == 4
    for name, (weight, scale) in weights(learned).items():
        codes = weight / scale
        assert float((codes - codes.round()).abs().max()) < 1e-5
        before = get_attribute(folded.graph, name).detach() / scale
        down, up = before.floor().clamp(-4, 3), (before.floor() + 1).clamp(-4, 3)
        assert bool(((codes.round() == down) | (codes.round() == up)).all())
        moved += int((codes.round() != before.round().clamp(-4, 3)).sum())
    assert moved > 0
    facts: Any = used.notes["units"]
    assert [unit["layers"] for unit in facts] == [("stem",), ("first",), ("second",), ("head",)]
    assert all(unit["kept"] and unit["learned"] <= unit["nearest"] for unit in facts)
    assert {"data/train", "task", "seed", "device/int8"} <= set(used.trace.reads)
    assert "data/val" not in used.trace.reads


def test_the_outputs_come_closer_than_by_nearest_rounding() -> None:
    model = make_model()
    (batch,) = context().data.train.batches(64)

    def noise(quantized: Model) -> float:
        with torch.no_grad():
            return float((quantized(batch[0]) - model(batch[0])).norm() / model(batch[0]).norm())

    assert noise(quantize(model, config(), context())) < 0.7 * noise(quantize_static(model, static(), context()))


@pytest.mark.slow
def test_the_penalty_makes_learning_decide_by_itself() -> None:
    def undecided(penalty: float) -> int:
        used = context()
        quantize(make_model(), config(iterations=100, learning_rate=0.2, penalty=penalty), used)
        facts: Any = used.notes["units"]
        return int(sum(unit["undecided"] for unit in facts))

    weights_in_all = 72 + 576 + 576 + 32
    assert undecided(0.1) < 0.05 * weights_in_all
    assert undecided(0.0) > 0.5 * weights_in_all


def test_what_is_worse_than_nearest_rounding_is_not_kept() -> None:
    model = make_model()
    used = context()
    # One step so large that every weight leaves its nearer code for the sign of its gradient.
    learned = quantize(model, config(iterations=1, learning_rate=100.0), used).state_dict()
    before = quantize_static(model, static(), context()).state_dict()
    facts: Any = used.notes["units"]
    thrown = [unit for unit in facts if not unit["kept"]]
    assert {"first", "second"} <= {name for unit in thrown for name in unit["layers"]}
    for unit in facts:
        assert (unit["learned"] > unit["nearest"]) == (not unit["kept"])
        (name,) = unit["layers"]
        assert torch.equal(learned[f"{name}.weight"], before[f"{name}.weight"]) == (not unit["kept"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.stem(x)))))))


def test_a_weight_that_two_layers_read_stays() -> None:
    torch.manual_seed(0)
    rows = torch.randn(64, 4)
    split = TensorSplit((rows, torch.zeros(64, dtype=torch.int64)))
    walks = Data(name="rows", train=split, val=split, test=split)
    model = Model.capture(Tied().eval(), (torch.randn(2, 4),))
    learned = quantize(model, config(), context(data=walks))
    before, after = model.state_dict(), learned.state_dict()
    assert torch.equal(after["twice.weight"], before["twice.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_killed_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    whole = quantize(model, config(iterations=20), context(tmp_path / "whole"))
    resumed = run_through_kills(
        lambda: quantize(model, config(iterations=20), context(tmp_path / "killed")), monkeypatch, saves=(1, 3)
    )
    assert resumed.fingerprint() == whole.fingerprint()


class Counting(SilentProgress):
    """Counts steps."""

    def __init__(self) -> None:
        self.steps = 0

    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Any:
        return _Work(self)


class _Work:
    def __init__(self, owner: Counting) -> None:
        self.owner = owner

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        self.owner.steps += steps


def test_a_dry_run_takes_few_steps() -> None:
    def shorten(split: Split) -> Split:
        return _Head(split, lambda: 0.0, 48, made=True)

    progress = Counting()
    quantize(make_model(), config(iterations=10_000), context(progress=progress, shorten=shorten))
    assert progress.steps == 1 + 4 * 3  # calibration, and 48 samples of 16 for each layer


def test_biases_are_corrected_for_the_learned_roundings() -> None:
    model = make_model()
    (batch,) = context().data.train.batches(64)
    plain, corrected = (quantize(model, config(bias_correction=on), context()) for on in (False, True))
    for name, (weight, _) in weights(plain).items():
        assert torch.equal(weight, weights(corrected)[name][0])
    with torch.no_grad():
        wanted, before, after = (found(batch[0]).mean(0) for found in (model, plain, corrected))
    assert float((after - wanted).abs().max()) < 0.2 * float((before - wanted).abs().max())


def test_a_bound_on_the_drop_is_held() -> None:
    used = context()
    model = make_model()
    learned = quantize(model, config(weight_bits=2, iterations=10, max_drop=0.0), used)
    assert used.evaluate(learned).value >= used.evaluate(model).value


def test_the_file_gives_what_the_graph_gives(tmp_path: Path) -> None:
    used = context()
    learned = quantize(make_model(), config(weight_bits=4, first_last_bits=8, activation_bits=4), used)
    file = export_onnx(learned, tmp_path / "model.onnx", device=used.device).path
    (batch,) = used.data.val.batches(64)
    check_parity(learned, file, [used.task.inputs(batch)], threads=1)
    held = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    for weight, scale in weights(learned).values():
        codes = (weight / scale).round().numpy()
        assert any(array.shape == codes.shape and (array.astype(codes.dtype) == codes).all() for array in held)


def test_problems_are_named() -> None:
    model = make_model()
    with pytest.raises(StageError, match="quantized already"):
        quantize(quantize_static(model, static(), context()), config(), context())
    with pytest.raises(StageError, match="no layer of the model can be quantized"):
        quantize(model, config(skip=("*",)), context())
    for wrong in (
        {"iterations": 0},
        {"warmup": 1.0},
        {"penalty": -1.0},
        {"learning_rate": 0},
        {"exponents": (2.0, 0.5)},
    ):
        with pytest.raises(ValidationError):
            config(**wrong)


def test_registered() -> None:
    assert config_type("quantize", "adaround") is AdaroundConfig
    assert function_of(AdaroundConfig()) is quantize
