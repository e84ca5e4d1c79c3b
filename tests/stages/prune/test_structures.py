"""Structures: what they cost, what they cut, and that a branch which is left out is really gone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mil_cli.errors import StageError
from mil_cli.graph.coupling import analyse, analysis, rows
from mil_cli.graph.coupling.record import Recording
from mil_cli.graph.coupling.table import RelationTable
from mil_cli.graph.model import Model
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.breeding import with_choice
from mil_cli.stages.prune.evolution import EvolutionConfig
from mil_cli.stages.prune.searching import Search
from mil_cli.stages.prune.structures import Limit, Structures
from mil_cli.stages.registry import config_type, function_of
from tests.stages.prune import blocks


def found(model: Model, **changes: object) -> tuple[Search, Structures]:
    config = EvolutionConfig.model_validate(blocks.settings(**{"macs": 0.5, **changes}))
    search = Search(model, config, blocks.context(), {})
    return search, search.structures(search.model)


@pytest.fixture(scope="module")
def model() -> Model:
    module = blocks.module()
    module.train()
    with torch.no_grad():
        module(torch.randn(16, 1, 8, 8))
    return Model.capture(module.eval(), (torch.randn(2, 1, 8, 8),))


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_a_cost_is_that_of_the_model_that_is_cut(model: Model, quantity: str) -> None:
    search, structures = found(model, **{"macs": None, quantity: 0.5})
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        draws = [int(torch.randint(most + 1, (), generator=generator)) for most in structures.last]
        candidate = structures.canonical(tuple(draws))
        cut = search.cut(structures, candidate)
        assert structures.cost(candidate) == (cut.macs() if quantity == "macs" else cut.num_params())
        assert cut(torch.randn(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("method", ["magnitude", "evolution"])
def test_the_model_that_comes_in_is_analysed_once(method: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    analysed: list[object] = []
    real = analysis.relate  # its relations are the costly part, and are needed again for choices inside groups

    def watched(recording: Recording) -> RelationTable:
        analysed.append(recording)
        return real(recording)

    for module in (analysis, rows):
        monkeypatch.setattr(module, "relate", watched, raising=False)
    searched = {} if method == "magnitude" else {"evaluations": 3, "population": 2}
    settings = {key: value for key, value in blocks.settings(macs=0.5).items() if searched or key != "search_samples"}
    config = config_type("prune", method).model_validate({**settings, **searched})
    function_of(config)(model, config, blocks.context())
    assert len(analysed) == 1


def test_a_model_without_a_block_equals_one_built_without_it(model: Model) -> None:
    search, structures = found(model)
    assert len(structures.branches) == 3
    place = len(structures.widths) + 1  # the second block
    cut, check = search.proven(structures, with_choice(structures.whole, place, 1))
    by_hand = blocks.Blocks()
    by_hand.blocks = nn.ModuleList([by_hand.blocks[0], by_hand.blocks[2]])
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.1.")}
    by_hand.load_state_dict(
        {name.replace("blocks.2.", "blocks.1."): value for name, value in weights.items()},
        strict=False,
    )
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(cut(x), by_hand.eval()(x))
    assert cut.num_params() == sum(parameter.numel() for parameter in by_hand.parameters())
    assert not any(name.startswith("blocks.1.") for name, _ in cut.named_parameters())
    assert check["difference"] < 1e-5


@pytest.mark.parametrize(
    "build",
    [
        lambda: vit(image_size=8, patch=2, dim=16, depth=2, heads=4),
        lambda: mobilenet(widths=(8, 16), blocks=(2, 2), expansion=2, last=32),
        pytest.param(lambda: resnet20(widths=(8, 16, 16)), marks=pytest.mark.slow),
    ],
    ids=["vit", "mobilenet", "resnet"],
)
def test_structures_of_other_networks_are_cut_and_proven(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Model.capture(build().eval(), (torch.randn(2, 1, 8, 8),))
    search, structures = found(model, max_per_chain=1.0, macs=0.9)
    assert structures.branches
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        draws = tuple(int(torch.randint(most + 1, (), generator=generator)) for most in structures.last)
        cut, check = search.proven(structures, structures.canonical(draws))
        assert check["difference"] < 1e-4
        assert cut.macs() == structures.cost(draws) == structures.cost(structures.canonical(draws))


def test_a_branch_that_is_wrongly_left_out_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    search, structures = found(model)
    monkeypatch.setattr("mil_cli.stages.prune.searching.remove_branches", lambda graph, branches: None)
    with pytest.raises(StageError, match="does not compute what the model does"):
        search.proven(structures, with_choice(structures.whole, len(structures.widths), 1))


def test_a_chain_keeps_as_many_branches_as_it_must(model: Model) -> None:
    for share, most in ((0.0, 0), (0.5, 1), (0.8, 2), (1.0, 3)):
        _, structures = found(model, max_per_chain=share, macs=0.9)
        for bits in itertools.product((0, 1), repeat=len(structures.branches)):
            candidate = (*structures.whole[: len(structures.widths)], *bits)
            assert structures.allows(candidate) == (sum(bits) <= most)
        assert sum(structures.smallest[len(structures.widths) :]) == most


def test_a_limit_forgets_what_is_gone() -> None:
    left = Limit(frozenset("abc"), 2).without(["b", "z"])
    assert left == Limit(frozenset("ac"), 1)


def test_what_lies_in_a_branch_left_out_makes_no_difference(model: Model) -> None:
    _, structures = found(model)
    inner = next(place for place, width in enumerate(structures.widths) if width.name == "blocks.1.first.weight")
    without = with_choice(structures.whole, len(structures.widths) + 1, 1)
    narrowed = with_choice(without, inner, 2)
    assert structures.canonical(narrowed) == without
    assert structures.cost(narrowed) == structures.cost(without)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "fpgm", "activation"])
def test_the_least_important_classes_go_first(model: Model, importance: str) -> None:
    weak = model.clone()
    with torch.no_grad():
        for name, value in weak.named_parameters():
            if name.startswith("blocks.1.first"):
                value[[2, 5]] *= 1e-4
            elif name == "blocks.1.second.weight":
                value[:, [2, 5]] *= 1e-4
            elif name.startswith("blocks.1.norm"):
                value[[2, 5]] *= 1e-4
    _, structures = found(weak, importance=importance)
    width = next(width for width in structures.widths if width.name == "blocks.1.first.weight")
    first = {label for chunk in width.chunks[:2] for label in chunk}
    if importance == "fpgm":  # two filters near zero are near each other, yet not near all
        assert len(first) == 2
    else:
        assert first == {2, 5}
    assert width.kept(2) == 6
    assert width.kept(len(width.chunks)) == 2  # max_per_layer


@pytest.mark.parametrize(
    "method", ["netadapt", *(pytest.param(method, marks=pytest.mark.slow) for method in ("sensitivity", "evolution"))]
)
def test_a_latency_is_met_by_its_table(method: str) -> None:
    torch.manual_seed(0)
    # large enough for time to go with widths: of a few microseconds most are calls, whatever is cut
    first, second = nn.Conv2d(1, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1)
    layers = [first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(8192, 10)]
    model = Model.capture(nn.Sequential(*layers).eval(), (torch.randn(2, 1, 8, 8),))
    quick = {
        "sensitivity": {"points": 2},
        "evolution": {"evaluations": 3},
        "netadapt": {"finetune_steps": 1, "reduction": 0.2},
    }
    config = config_type("prune", method).model_validate(
        blocks.settings(latency="60%", measured=False, round_to=16, search_samples=64, **quick[method])
    )
    around = blocks.context()
    result = function_of(config)(model, config, around)
    assert around.notes["left"] <= around.notes["target"]  # type: ignore[operator]
    assert around.notes["latency_table"]
    assert result.macs() < model.macs()
    assert all(space.size % 16 == 0 for space in analyse(result).spaces if space.free)
