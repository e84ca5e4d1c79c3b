"""The whole stages: they find the operator that is needed, go on after kills, stop at skips, say what they lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import MilError
from mil_cli.graph.model import Model
from mil_cli.spaces import BatchNorm2d, Channels, Choice, Conv2d, DesignedSpace, Node, Width, Zero
from mil_cli.spaces.largest import largest
from mil_cli.stages.context import Context
from mil_cli.stages.nas.darts import DartsConfig, darts
from mil_cli.stages.nas.pc_darts import PcDartsConfig, pc_darts
from mil_cli.stages.nas.relaxed import RelaxedConfig
from mil_cli.stages.registry import function_of
from mil_cli.stages.train.supervised import SupervisedConfig
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import make_context, run_through_kills

TRAINER: dict[str, Any] = {"epochs": 8, "batch_size": 32, "learning_rate": 0.05}
METHODS: dict[str, RelaxedConfig] = {
    "darts": DartsConfig(trainer=TRAINER, strength_learning_rate=0.05, skip_dropout=0.2),
    "fair": DartsConfig(trainer=TRAINER, strength_learning_rate=0.05, fair=True, zero_one_weight=1.0, threshold=0.5),
    "pc_darts": PcDartsConfig(trainer=TRAINER, strength_learning_rate=0.05, share=2),
}
WATCHED = {"max_eigenvalue_growth": 1.3, "eigenvalue_window": 3}


def stripes(samples: int, seed: int) -> TensorSplit:
    """Return images of stripes that run down or across: of both the mean and every pixel are alike."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(8) % 2 * 2.0 - 1
    signs = torch.randint(2, (samples, 1, 1), generator=generator) * 2.0 - 1
    labels = torch.arange(samples) % 2
    images = torch.where(labels[:, None, None] == 0, rows[:, None], rows[None, :]) * signs
    noise = 0.5 * torch.randn(samples, 8, 8, generator=generator)
    return TensorSplit(((images + noise).unsqueeze(1), labels))


class OnlyConvolutionsSee(nn.Module):
    """What is no convolution treats rows as it does columns, so that both classes are alike to it."""

    def __init__(self) -> None:
        super().__init__()
        width = Channels(8)
        self.stem = nn.Conv2d(1, 8, 1)
        operators = {
            "none": Zero(),
            "skip": nn.Identity(),
            "mean": nn.AvgPool2d(3, stride=1, padding=1),
            "conv": nn.Sequential(Conv2d(width, width, 3, padding=1, bias=False), BatchNorm2d(width)),
        }
        self.node = Node([Choice(operators, width=width)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu(self.node([self.stem(x)]))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def space(seed: int = 0) -> DesignedSpace:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DesignedSpace(OnlyConvolutionsSee())


def incoming(searched: DesignedSpace) -> Model:
    return Model.capture(largest(searched.module), (torch.zeros(2, 1, 8, 8),))


def context(workspace: Path | None = None, *, seed: int = 0, **changes: Any) -> Context:
    data = Data(name="stripes", train=stripes(256, 0), val=stripes(64, 1), test=stripes(64, 2))
    around: dict[str, Any] = {
        "load_space": lambda: space(seed),
        "capture": lambda module: Model.capture(module, (torch.zeros(2, 1, 8, 8),)),
        "space_fingerprint": lambda: "stripes",
        "trainer": TrainerConfig(checkpoint_every_seconds=0),
        "seed": seed,
        **changes,
    }
    return make_context(data, workspace=workspace, **around)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_operator_that_is_needed_is_found(method: str, seed: int) -> None:
    config = METHODS[method]
    used = context(seed=seed)
    function_of(config)(incoming(space(seed)), config, used)
    epochs: Any = used.notes["weights"]
    assert len(epochs) == TRAINER["epochs"]
    last = epochs[-1]["node.edges.0"]
    if method == "fair":  # others may be as strong beside it
        assert last["conv"] > 0.75
        assert last["none"] < 0.25
    else:
        assert used.notes["architecture"] == {"node.edges.0": "conv"}
        assert last["conv"] > 0.7


def test_the_winner_is_trained_by_another_stage_and_begins_afresh() -> None:
    config = DartsConfig(**{**METHODS["darts"].model_dump(), "recover": "tune"})
    tune = SupervisedConfig(trainer={"epochs": 4, "batch_size": 32, "learning_rate": 0.1})
    used = context(stages={"tune": tune})
    found = darts(incoming(space()), config, used)
    assert used.evaluate(found).value > 0.95
    untrained = darts(incoming(space()), config.model_copy(update={"recover": None}), context())
    fresh = space().build(space().architecture({"node.edges.0": "conv"}), seed=context().seed)
    for name, weight in fresh.state_dict().items():
        torch.testing.assert_close(untrained.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=pytest.mark.slow if method == "fair" else ()) for method in METHODS]
)
def test_a_killed_search_goes_on_to_the_same_bits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = METHODS[method].model_copy(update={"trainer": {**TRAINER, "epochs": 2}, "max_skips": 0, **WATCHED})
    model = incoming(space())

    def run(folder: Path) -> tuple[Model, Any]:
        used = context(folder)
        found = function_of(config)(model, config, used)
        return found, {name: used.notes[name] for name in ("weights", "architecture", "stopped", "eigenvalues")}

    notes: list[Any] = []

    def pieces() -> Model:
        found, facts = run(tmp_path / "pieces")
        notes.append(facts)
        return found

    whole, expected = run(tmp_path / "whole")
    found = run_through_kills(pieces, monkeypatch, saves=[1, 3, 5])
    assert notes == [expected]
    assert found.fingerprint() == whole.fingerprint()


def test_a_search_that_skips_too_much_ends_before_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([0, 0, 0, 3, 0])  # of the first two epochs, then of the second and third
    monkeypatch.setattr("mil_cli.stages.nas.relaxed.count_skips", lambda searched, architecture: next(counts))
    used = context()
    config = METHODS["darts"].model_copy(update={"max_skips": 2})
    darts(incoming(space()), config, used)
    weights: Any = used.notes["weights"]
    assert len(weights) == 3
    assert "3 skips" in str(used.notes["stopped"])


def test_a_search_whose_loss_comes_to_bend_sharply_ends_before_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1.0, 1.0, 1.0, 1.2, 1.2, 2.0, 9.0])
    monkeypatch.setattr("mil_cli.stages.nas.strengths.largest_eigenvalue", lambda loss, at: next(values))
    used = context()
    config = METHODS["darts"].model_copy(update={"max_eigenvalue_growth": 1.3, "eigenvalue_window": 3})
    darts(incoming(space()), config, used)
    weights: Any = used.notes["weights"]
    assert used.notes["eigenvalues"] == [1.0, 1.0, 1.0, 1.2, 1.2, 2.0]  # 4.4 / 3 of the mean of the middle ones
    assert len(weights) == 6
    assert "grew to 1.38" in str(used.notes["stopped"])


class Degenerate(nn.Module):
    """The skip alone lets the labels through; the layer begins as good and is held back."""

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(
            [Choice({"block": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(8)), "skip": nn.Identity()})]
        )
        self.conv = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu(self.conv(self.node([x])))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def test_strengths_come_to_skip_and_the_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = DesignedSpace(Degenerate())
    used = context(load_space=lambda: DesignedSpace(Degenerate()))
    config = DartsConfig(trainer={**TRAINER, "epochs": 24}, strength_learning_rate=0.02, max_skips=0)
    begin = torch.tensor([0.5, 0.0])

    def first(size: int, *, generator: torch.Generator) -> torch.Tensor:
        return 1e3 * begin[:size]

    monkeypatch.setattr("mil_cli.stages.nas.strengths.torch.randn", first)
    darts(incoming(searched), config, used)
    assert used.notes["architecture"] == {"node.edges.0": "block"}
    assert "came to have 1 skips" in str(used.notes["stopped"])
    last: Any = used.notes["weights"][-1]["node.edges.0"]  # type: ignore[index]
    assert last["skip"] > last["block"]


class NoOperators(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = Width([2, 4])
        self.conv, self.head = Conv2d(1, width, 3), Conv2d(width, 2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x)).flatten(1)  # type: ignore[no-any-return]


class WithoutWidth(OnlyConvolutionsSee):
    def __init__(self) -> None:
        super().__init__()
        self.node = Node([Choice({"skip": nn.Identity(), "conv": nn.Conv2d(8, 8, 1)})])


class Misfit(OnlyConvolutionsSee):
    def __init__(self) -> None:
        super().__init__()
        self.node = Node([Choice({"skip": nn.Identity(), "conv": nn.Conv2d(4, 8, 1), "wide": nn.Conv2d(8, 8, 5)})])


@pytest.mark.parametrize(
    ("module", "words"),
    [(NoOperators, "holds no Choice"), (WithoutWidth, "one of 4 channels"), (Misfit, "does not run on the shapes")],
)
def test_what_cannot_be_searched_is_told(module: type[nn.Module], words: str) -> None:
    searched = DesignedSpace(module())
    with pytest.raises(MilError, match=words):
        pc_darts(incoming(searched), PcDartsConfig(), context(load_space=lambda: DesignedSpace(module())))


def test_train_that_cannot_be_divided_is_told() -> None:
    class Own:
        def __len__(self) -> int:
            return 8

        def batches(self, batch_size: int, **options: Any) -> Any:
            return stripes(8, 0).batches(batch_size, **options)

        def fingerprint(self) -> str:
            return "own"

    used = context()
    used._surroundings.data.__dict__["train"] = Own()
    with pytest.raises(MilError, match="cannot be divided"):
        darts(incoming(space()), DartsConfig(), used)


@pytest.mark.parametrize(
    "settings",
    [
        {"frozen": 1.0},
        {"edges": 0},
        {"skip_dropout": 1.0},
        {"max_skips": -1},
        {"eigenvalue_window": 2},
        {"strength_learning_rate": 0.0},
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DartsConfig(**settings)
