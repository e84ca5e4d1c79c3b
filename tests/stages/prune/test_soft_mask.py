"""Soft masks: the gates compute what they should, the target holds, useless channels go, and kills change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.errors import StageError
from mil_cli.graph.coupling import Counter, Coupling, analyse, cut
from mil_cli.graph.coupling.expected import ExpectedCount
from mil_cli.graph.coupling.readers import scaling_members
from mil_cli.graph.model import Model
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.ops.hard_concrete import hard_concrete, probability_open
from mil_cli.stages.prune import rounds
from mil_cli.stages.prune.gates import fold_gates, insert_gates, place_gates
from mil_cli.stages.prune.soft_mask import SoftMaskConfig, soft_mask
from tests.stages.contexts import make_context, run_through_kills, trained_digits

DATA = digits()
QUICK: dict[str, Any] = {"round_to": 1, "compare_samples": 0, "trainer": {"epochs": 6, "learning_rate": 0.02}}
NETS: dict[str, Any] = {
    "resnet": lambda: resnet20(width=8, blocks=1),
    "vit": lambda: vit(image_size=8, patch=2, dim=32, depth=1, heads=4),
}


def captured(module: nn.Module) -> Model:
    return Model.capture(module.eval(), (torch.randn(2, 1, 8, 8),))


def gated(net: Model, odds: Tensor | float) -> tuple[Model, Any, Coupling]:
    coupling = analyse(net)
    gates = place_gates(net.graph, coupling)
    model = net.clone()
    insert_gates(model.graph, gates, start=0.0)
    with torch.no_grad():
        model.graph.get_parameter(gates.log_odds).copy_(torch.as_tensor(odds))
    return model, gates, coupling


@pytest.mark.parametrize("name", sorted(NETS))
def test_folding_the_gates_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    net = captured(NETS[name]())
    count = place_gates(net.graph, analyse(net)).count
    model, gates, _ = gated(net, 3 * torch.randn(count))
    folded, odds = fold_gates(model, net, gates)
    images = torch.randn(5, 1, 8, 8)
    assert bool((hard_concrete(odds, False) == 0).any())
    assert not torch.allclose(model(images), net(images), atol=1e-3)
    torch.testing.assert_close(folded(images), model.eval()(images), atol=1e-5, rtol=1e-4)
    assert set(folded.state_dict()) == set(net.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETS))
def test_a_closed_gate_is_what_the_cut_leaves_out(name: str) -> None:
    """Class by class, of every space over which no norm takes statistics."""
    torch.manual_seed(0)
    net = captured(NETS[name]())
    _, gates, coupling = gated(net, 20.0)
    images, first, proven = torch.randn(5, 1, 8, 8), 0, 0
    for number, space in enumerate(coupling.spaces):
        gone = set(space.exact[::2][: len(space.free) - 1])
        if gone:
            odds = torch.full((gates.count,), 20.0)
            odds[gates.places[first + torch.tensor(sorted(gone))]] = -20.0
            model, _, _ = gated(net, odds)
            smaller = cut(net, coupling, {number: gone})
            torch.testing.assert_close(model.eval()(images), smaller(images), atol=1e-4, rtol=1e-3)
            proven += 1
        first += space.size
    assert proven >= 3


@pytest.mark.slow
def test_gates_lie_on_what_layers_read_and_else_on_everything() -> None:
    coupling = analyse(captured(NETS["resnet"]()))
    for space in [space for space in coupling.spaces if space.free]:
        members = scaling_members(coupling, space)
        assert {member.axis for member in members} == {1}
    coupling = analyse(captured(NETS["vit"]()))
    found = [
        {member.parameter.removeprefix("blocks.0.attention.") for member in scaling_members(coupling, space)}
        for space in coupling.spaces
        if "attention" in space.origin and space.free
    ]
    # Heads by what reads them; what attention may sum over, inner channels of queries with keys and of values, by all.
    assert sorted(map(sorted, found)) == [
        ["out.weight"],
        ["out.weight", "qkv.bias", "qkv.weight"],
        ["qkv.bias", "qkv.weight"],
    ]


@pytest.mark.slow
def test_gates_drawn_at_random_keep_what_is_expected() -> None:
    """Of a transformer, whose attention is a sum of two products: the mean over cuts of what drawn gates close."""
    torch.manual_seed(0)
    coupling = analyse(captured(NETS["vit"]()))
    gates, counter = place_gates(coupling.graph, coupling), Counter(coupling)
    odds = 2 * torch.randn(gates.count)
    counts = []
    for _ in range(2000):
        open_ = gates.by_class(hard_concrete(odds, True))
        parts = torch.split(open_, [space.size for space in coupling.spaces])
        counts.append(counter.macs({n: set((part == 0).nonzero().flatten().tolist()) for n, part in enumerate(parts)}))
    expected = ExpectedCount(counter, "macs")(gates.by_class(probability_open(odds.double())))
    assert float(expected) == pytest.approx(sum(counts) / len(counts) / counter.macs({}), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target"), [("resnet", {"macs": 0.4}), ("resnet", {"params": 0.5}), ("vit", {"macs": 0.5})]
)
def test_the_target_is_met(kind: str, target: dict[str, float]) -> None:
    net = trained_digits() if kind == "resnet" else captured(NETS["vit"]())
    before = net.fingerprint()
    used = make_context(DATA, name="prune")
    trainer = {"epochs": 6, "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3}}
    settings = {**QUICK, **({"trainer": trainer} if kind == "vit" else {})}
    small = soft_mask(net, SoftMaskConfig(**target, **settings, max_per_layer=0.9), used)
    assert net.fingerprint() == before
    count = Model.macs if "macs" in target else Model.num_params
    (share,) = target.values()
    assert 0.95 * share * count(net) < count(small) <= share * count(net)
    notes: dict[str, Any] = used.notes
    assert notes["expected_share"] < share + 0.05
    assert 0 < notes["gates_closed"] < notes["gates"]
    assert all(step["check"]["difference"] < 1e-4 for step in notes["steps"])
    assert {name.partition(".")[0] for name in small.state_dict()} == {n.partition(".")[0] for n in net.state_dict()}
    if kind == "resnet":
        assert used.evaluate(small).value > 0.9


class Planted(nn.Module):
    """Half of the inner channels are read by nothing but noise of no use: the head's weights for them are tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x.flatten(1))))


def test_planted_useless_channels_go(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = make_context(DATA).finetune(captured(Planted()), stage=None, name="base", trainer={"epochs": 8})
    with torch.no_grad():
        # by magnitude these are the largest: they see nothing, and are read by large weights
        net.state_dict()["first.weight"][::2] *= 0.0
        net.state_dict()["first.bias"][::2] = -1.0
        net.state_dict()["second.weight"][:, ::2] = 3.0
    net = make_context(DATA).finetune(
        net, stage=None, name="rest", trainer={"epochs": 4, "learning_rate": 0.02, "optimizer": {"weight_decay": 0.0}}
    )
    removed: list[Any] = []
    original = rounds.cut

    def watch(model: Model, coupling: Coupling, classes: Any) -> Model:
        removed.append({number: set(found) for number, found in classes.items()})
        return original(model, coupling, classes)

    monkeypatch.setattr(rounds, "cut", watch)
    trainer = {"epochs": 12, "learning_rate": 0.02}
    soft_mask(net, SoftMaskConfig(channels=0.5, **{**QUICK, "trainer": trainer}), make_context(DATA, name="prune"))
    (classes,) = removed[0].values()
    assert len(classes & set(range(0, 32, 2))) >= 14
    assert len(classes) == 16


@pytest.mark.slow
def test_a_latency_is_trained_for_as_operations_and_met() -> None:
    used = make_context(DATA, name="prune")
    config = SoftMaskConfig(latency=0.8, **{**QUICK, "trainer": {"epochs": 1}})
    soft_mask(trained_digits(), config, used)
    (step,) = used.notes["steps"]  # type: ignore[misc]
    assert step["left"] <= step["target"]
    assert 0 < used.notes["allowed_share"] < 1  # type: ignore[operator]


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = {"epochs": 2, "learning_rate": 0.02, "checkpoint_every_seconds": 0}
    config = SoftMaskConfig(macs=0.6, **{**QUICK, "trainer": trainer})
    whole = soft_mask(trained_digits(), config, make_context(DATA, workspace=tmp_path / "whole"))
    resumed = run_through_kills(
        lambda: soft_mask(trained_digits(), config, make_context(DATA, workspace=tmp_path / "killed")),
        monkeypatch,
        saves=(2, 7),
    )
    assert resumed.fingerprint() == whole.fingerprint()


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ValidationError, match="trained once and cut once"):
        SoftMaskConfig(macs=0.5, steps=2)
    net = captured(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(StageError, match="can have a gate"):
        soft_mask(net, SoftMaskConfig(macs=0.5), make_context(DATA))
