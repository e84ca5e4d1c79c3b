"""The analysis on a Model: what is frozen and why, masks, repair, the check, counts, and re-use after training."""

from __future__ import annotations

import inspect
import sys
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mil_cli.errors import ModelError
from mil_cli.graph.coupling import Counter, Coupling, analyse, check_equivalence, cut, macs_of, relations, repair
from mil_cli.graph.coupling.analysis import analyse_graph
from mil_cli.graph.coupling.cut import cut_graph
from mil_cli.graph.coupling.relations import pointwise
from mil_cli.graph.coupling.selection import keep_masks
from mil_cli.graph.coupling.table import rules_for
from mil_cli.graph.model import Model


class Renormed(nn.Module):
    """Uses an operator that has no rule, an axis taken apart, and an embedding's vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 8)
        self.third = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.renorm(self.second(x), 2, 1, 0.5)  # the line that is reported
        return self.third(x)


RENORM_LINE = inspect.getsourcelines(Renormed.forward)[1] + 2


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3), nn.Conv2d(10, 8, 1)
        self.d, self.fc = nn.Conv2d(8, 16, 1, groups=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))).flip(1))
        return self.fc(self.d(torch.relu(self.c(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def tower() -> Model:
    torch.manual_seed(0)
    return Model.capture(Tower().eval(), (torch.randn(2, 3, 10, 10),))


@pytest.fixture(scope="module")
def coupling(tower: Model) -> Coupling:
    return analyse(tower)


def number_of(coupling: Coupling, parameter: str) -> int:
    return next(number for number, space in enumerate(coupling.spaces) if space.origin == parameter)


def test_unknown_operators_are_frozen_and_reported_with_the_users_line() -> None:
    coupling = analyse(Model.capture(Renormed().eval(), (torch.randn(2, 6),)))
    assert [reason for _, reason, _ in coupling.unknown] == ["no rule for the operator renorm"]
    assert coupling.unknown[0][2] == f"{__file__}:{RENORM_LINE}"
    assert len(coupling.spaces[number_of(coupling, "first.weight")].free) == 12
    frozen = {(entry.parameter, entry.axis): entry for entry in coupling.frozen}
    entry = frozen["second.weight", 0]
    assert (entry.entries, entry.size, entry.operator) == (8, 8, "renorm")
    assert entry.reason == "no rule for the operator renorm"
    assert entry.source_line == f"{__file__}:{RENORM_LINE}"
    assert frozen["third.weight", 0].reason == "an output of the model"


def test_the_analysis_changes_nothing_and_repeats_itself(tower: Model) -> None:
    before = tower.fingerprint()
    first, second = analyse(tower), analyse(tower)
    assert tower.fingerprint() == before
    for one, other in zip(first.spaces, second.spaces, strict=True):
        assert (one.origin, one.size, one.free) == (other.origin, other.size, other.free)
        for a, b in zip(one.members, other.members, strict=True):
            assert (a.parameter, a.axis, a.classes.tolist()) == (b.parameter, b.axis, b.classes.tolist())


def test_a_model_in_training_mode_is_analysed_and_cut_in_evaluation_form() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 4))
    model = Model.capture(module.eval(), (torch.randn(2, 3, 8, 8),)).train()
    statistics = model.state_dict()["1.running_mean"].clone()
    coupling = analyse(model)
    assert model.training
    result = cut(model, coupling, {0: {1, 2}})
    assert not result.training
    assert torch.equal(model.state_dict()["1.running_mean"], statistics)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(result(x), result(x))
    result.train()
    assert not torch.equal(result(x), result(x))


def test_cutting_takes_the_present_weights(tower: Model, coupling: Coupling) -> None:
    trained = tower.clone()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    number = number_of(coupling, "a.weight")
    result = cut(trained, coupling, {number: {0, 5}})
    kept = [index for index in range(12) if index not in (0, 5)]
    assert torch.equal(result.state_dict()["a.weight"], trained.state_dict()["a.weight"][kept])
    assert torch.equal(result.state_dict()["b.weight"], trained.state_dict()["b.weight"][:, kept])
    report = check_equivalence(trained, coupling, {number: {0, 5}}, result, [tower.batch_input(3)])
    assert report.equivalent


def test_a_flip_is_followed(tower: Model, coupling: Coupling) -> None:
    space = coupling.spaces[number_of(coupling, "b.weight")]
    labels = {(member.parameter, member.axis): member.classes.tolist() for member in space.members}
    assert labels["b.weight", 0] == labels["c.weight", 1][::-1]


@pytest.mark.parametrize("removed", [{99: {0}}, {0: {99}}, {-1: {0}}, {"last": {0}}, {0: set(range(12))}])
def test_what_cannot_be_cut_is_refused(tower: Model, coupling: Coupling, removed: dict[Any, set[int]]) -> None:
    last = len(coupling.spaces) - 1  # the classifier's outputs
    with pytest.raises(ModelError):
        cut(tower, coupling, {last if number == "last" else number: classes for number, classes in removed.items()})


def test_repair_leaves_no_axis_empty(coupling: Coupling) -> None:
    everything = {number: set(range(space.size)) for number, space in enumerate(coupling.spaces)}
    removed = repair(coupling, everything)
    assert all(mask.any() for axes in keep_masks(coupling, removed).values() for mask in axes.values())
    for number, space in enumerate(coupling.spaces):
        assert not removed.get(number, set()) & set(space.frozen)
        if space.free:
            assert len(removed[number]) == space.size - 1


def test_repair_gives_back_what_would_empty_a_part_of_a_split() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(4, 6), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.a(x).split([4, 8], -1)
            return self.b(left) + self.c(right)

    model = Model.capture(Split().eval(), (torch.randn(2, 4),))
    coupling = analyse(model)
    number = number_of(coupling, "a.weight")
    assert repair(coupling, {number: {0, 1, 2, 3, 7}}) == {number: {1, 2, 3, 7}}
    assert cut(model, coupling, repair(coupling, {number: {0, 1, 2, 3}}))(torch.randn(3, 4)).shape == (3, 6)
    with pytest.raises(ModelError, match="would leave nothing"):
        cut(model, coupling, {number: {0, 1, 2, 3}})


def test_a_wrong_association_is_found_and_blamed_on_its_space(tower: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = MappingProxyType({**relations.RULES, **rules_for(pointwise.pointwise, "flip")})
    monkeypatch.setattr(relations, "RULES", wrong)
    coupling = analyse(tower)
    removed = {n: set(space.free[: space.size // 3]) for n, space in enumerate(coupling.spaces) if len(space.free) > 3}
    report = check_equivalence(tower, coupling, removed, cut(tower, coupling, removed), [tower.batch_input(4)])
    assert not report.equivalent
    assert [coupling.spaces[number].origin for number in report.failed] == ["b.weight"]
    frozen = coupling.freeze(report.failed, "it failed")
    rest = repair(frozen, removed)
    assert set(removed) - set(rest) == set(report.failed)
    assert check_equivalence(tower, frozen, rest, cut(tower, frozen, rest), [tower.batch_input(4)]).equivalent
    assert any(entry.reason == "it failed" and entry.parameter == "b.weight" for entry in frozen.frozen)


def test_a_wrong_shape_is_found_and_blamed_on_its_space(tower: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["mil_cli.graph.coupling.cut"]  # the function of that name hides it
    monkeypatch.setattr(module, "REWRITES", {name: rule for name, rule in module.REWRITES.items() if name != "conv2d"})
    coupling = analyse(tower)
    groups = next(number for number, space in enumerate(coupling.spaces) if space.size == 2 and space.free)
    removed = {groups: {0}, number_of(coupling, "a.weight"): {1, 2}}
    report = check_equivalence(tower, coupling, removed, cut(tower, coupling, removed), [tower.batch_input(4)])
    assert not report.equivalent
    assert report.difference == float("inf")
    assert report.failed == (groups,)


def test_an_unequal_weight_is_found(tower: Model, coupling: Coupling) -> None:
    removed = {number_of(coupling, "a.weight"): {1}}
    broken = cut(tower, coupling, removed)
    with torch.no_grad():
        broken.graph.get_parameter("c.weight")[0, 0] += 0.1
    assert not check_equivalence(tower, coupling, removed, broken, [tower.batch_input(4)]).equivalent


@pytest.mark.parametrize("seed", range(4))
def test_counts_equal_those_of_fvcore_on_the_cut_model(tower: Model, coupling: Coupling, seed: int) -> None:
    from fvcore.nn import FlopCountAnalysis  # counts.py has imported it before, without its warnings

    generator = np.random.default_rng(seed)
    removed = repair(
        coupling,
        {
            number: set(generator.choice(space.free, len(space.free) // 2, replace=False).tolist())
            for number, space in enumerate(coupling.spaces)
            if space.free
        },
    )
    result = cut(tower, coupling, removed)
    args, _ = result.batch_input(1)
    analysis = FlopCountAnalysis(result.graph, args)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert macs_of(coupling, removed) == analysis.total() == result.macs()
    assert Counter(coupling).params(removed) == sum(p.numel() for p in result.parameters()) == result.num_params()
    assert macs_of(coupling, {}) == tower.macs()


def test_a_saved_cut_is_loaded_and_cut_again(tower: Model, coupling: Coupling, tmp_path: Any) -> None:
    first = cut(tower, coupling, {number_of(coupling, "a.weight"): {0, 3}})
    first.save(tmp_path / "cut.pt2")
    loaded = Model.load(tmp_path / "cut.pt2")
    assert loaded.spec == tower.spec
    again = analyse(loaded)
    assert [space.size for space in again.spaces] == [space.size for space in analyse(first).spaces]
    second = cut(loaded, again, {number_of(again, "a.weight"): {0}})
    assert second.state_dict()["a.weight"].shape[0] == 9


def test_dynamic_height_and_width_survive_a_cut() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(32, 8, 1), nn.PixelShuffle(2)
    )
    model = Model.capture(
        module.eval(), (torch.randn(2, 3, 8, 8),), dynamic={"input": {0: "batch", 2: "height", 3: "width"}}
    )
    coupling = analyse(model)
    result = cut(model, coupling, {0: {1, 4, 6}})
    assert result(torch.randn(1, 3, 12, 20)).shape == (1, 2, 12, 20)


def test_a_fixed_batch_can_be_cut() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)).view(2, 2, 4).flip(0).reshape(2, 8))

    model = Model.capture(Fixed().eval(), (torch.randn(2, 6),), dynamic={})
    coupling = analyse(model)
    free = [number for number, space in enumerate(coupling.spaces) if space.free]
    removed = repair(coupling, {number: set(coupling.spaces[number].free[:1]) for number in free})
    result = cut(model, coupling, removed)
    assert check_equivalence(model, coupling, removed, result, [model.samples]).equivalent
    assert result.macs() == macs_of(coupling, removed)


def test_the_shapes_noted_beside_the_nodes_are_those_of_the_cut(tower: Model, coupling: Coupling) -> None:
    removed = {number: set(space.free[:1]) for number, space in enumerate(coupling.spaces) if space.free}
    result = cut(tower, coupling, removed)
    x = torch.randn(3, 3, 10, 10)

    class Compare(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            noted = n.meta.get("val")
            if isinstance(value, Tensor) and isinstance(noted, Tensor):
                shown = [size if isinstance(size, int) else 3 for size in noted.shape]
                assert shown == list(value.shape), n
                compared.append(n.name)
            return value

    compared: list[str] = []
    Compare(result.graph).run(x, enable_io_processing=False)
    assert {"conv2d", "conv2d_3", "linear", "mean"} <= set(compared)
    assert next(node for node in tower.graph.graph.nodes if node.name == "conv2d").meta["val"].shape[1] == 12


class Tokens(nn.Module):
    """Takes a dict and a keyword, gives a dict: embedding, positions, padding mask, masked mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 7, 24))
        layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 4)

    def forward(self, batch: dict[str, Tensor], *, scale: Tensor) -> dict[str, Tensor]:
        present = batch["tokens"] != 0
        x = self.embed(batch["tokens"]) + self.position
        x = self.body(x, src_key_padding_mask=~present)
        weight = present[..., None].to(x.dtype)
        return {"logits": self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1)) * scale, "length": present.sum(1)}


@pytest.mark.slow
def test_a_padded_transformer_with_dicts_is_cut_in_every_way() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(1, 30, (3, 7))
    tokens[:, 5:] = 0
    model = Model.capture(Tokens().eval(), ({"tokens": tokens},), {"scale": torch.ones(3, 1)})
    coupling = analyse(model)
    assert coupling.unknown == ()
    assert coupling.cuttable_share > 0.7
    sizes = sorted(len(space.free) for space in coupling.spaces if space.free)
    assert sizes == [3, 3, 8, 8, 8, 8, 24, 40, 40]  # heads, sizes of queries and of values, features, hidden units
    removed = repair(coupling, {n: set(space.free[::3]) for n, space in enumerate(coupling.spaces) if space.free})
    result = cut(model, coupling, removed)
    calls = [model.batch_input(size) for size in (1, 4)]
    report = check_equivalence(model, coupling, removed, result, calls)
    assert report.equivalent
    assert len(report.compacted) == 4  # the layer norms
    assert macs_of(coupling, removed) == result.macs() < 0.5 * model.macs()
    outputs = result({"tokens": torch.randint(0, 30, (6, 7))}, scale=torch.ones(6, 1))
    assert outputs["logits"].shape == (6, 4)


class Rows(nn.Module):
    """Five rows of the features of all samples: of five samples, and of no other number, a row is a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.second(x) * torch.tanh(x.reshape(5, -1)).sum(1).mean()


def test_a_batch_that_equals_another_size_aligns_nothing() -> None:
    torch.manual_seed(0)
    module = Rows().eval()
    program = torch.export.export(module, (torch.randn(3, 6),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    graph = program.module(check_guards=False)
    by_accident = analyse_graph(graph, (torch.randn(5, 6),))
    assert [len(space.free) for space in by_accident.spaces] == [20, 0]
    with pytest.raises(RuntimeError):
        cut_graph(by_accident, {0: {3}})(torch.randn(3, 6))
    coupling = analyse_graph(graph, (), resized=lambda size: ((torch.randn(size, 6),), {}))
    assert coupling.recording.shapes["linear"] == (7, 20)
    assert coupling.single["linear"] == (1, 20)
    assert [len(space.free) for space in coupling.spaces] == [4, 0]
    number = number_of(coupling, coupling.spaces[0].origin)
    classes = {member.parameter: member.classes.tolist() for member in coupling.spaces[number].members}
    assert classes["first.bias"] == [0, 1, 2, 3] * 5
    result, x = cut_graph(coupling, {number: {1}}), torch.randn(3, 6)
    with torch.no_grad():
        module.first.weight[1::4], module.first.bias[1::4] = 0, 0
    torch.testing.assert_close(result(x), module(x))


def test_the_batch_of_the_run_divides_no_size() -> None:
    layers = [nn.Linear(6, 35), nn.ReLU(), nn.Linear(35, 22), nn.ReLU(), nn.Linear(22, 3)]
    coupling = analyse(Model.capture(nn.Sequential(*layers).eval(), (torch.randn(2, 6),)))
    assert coupling.recording.shapes["linear_1"] == (13, 22)


class Written(nn.Module):
    """A slice with a step is written in place, before or after it is read."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.first, self.second, self.before = nn.Linear(6, 12), nn.Linear(12, 4), before

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) * 2
        if self.before:
            y.add_(1)
        part = y[:, ::3]
        if not self.before:
            part.mul_(2)
        return self.second(y) + part.sum(1, keepdim=True)


@pytest.mark.parametrize("before", [True, False])
def test_a_slice_with_a_step_is_cut_only_if_nothing_is_written_through_it(before: bool) -> None:
    coupling = analyse(Model.capture(Written(before=before).eval(), (torch.randn(2, 6),)))
    space = coupling.spaces[number_of(coupling, "first.weight")]
    assert len(space.free) == (12 if before else 0)
    assert before or all("shares memory that is written later" in reason for reason in space.frozen.values())


@pytest.mark.parametrize("size", [1, 2])
def test_an_axis_that_a_cut_leaves_one_entry_is_not_squeezed(size: int) -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x)).squeeze(1)
            return self.second(x.mean(2, keepdim=True)).squeeze()

    model = Model.capture(Squeezed().eval(), (torch.randn(2, 3, 5),))
    coupling = analyse(model)
    number = number_of(coupling, "first.weight")
    result = cut(model, coupling, {number: set(range(6 - size))})
    assert check_equivalence(model, coupling, {number: set(range(6 - size))}, result, [model.batch_input(3)]).equivalent


class Folded(nn.Module):
    """Channels are folded into the samples, and that axis is sliced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.first(x)).flatten(0, 1)[:, 1:]
        return self.second(rows.reshape(x.shape[0], -1, 4))


def test_a_slice_to_the_end_is_one_in_larger_batches_too() -> None:
    model = Model.capture(Folded().eval(), (torch.randn(2, 3, 5),))
    coupling = analyse(model)
    removed = {number_of(coupling, "first.weight"): {1, 4}}
    assert any(node.target is torch.ops.aten.slice.Tensor and node.args[1] == 0 for node in model.graph.graph.nodes)
    result = cut(model, coupling, removed)
    assert result.num_params() < model.num_params()
    assert check_equivalence(model, coupling, removed, result, [model.batch_input(100)]).equivalent


@pytest.mark.parametrize("window", [slice(None, -2), slice(-4, None), slice(-5, -1), slice(1, 5), slice(-3, -1)])
def test_slices_are_counted_from_the_side_that_they_were_counted_from(window: slice) -> None:
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.second(x) + x[:, window].sum(1, keepdim=True)

    model = Model.capture(Windowed().eval(), (torch.randn(2, 3),))
    coupling = analyse(model)
    number = number_of(coupling, "first.weight")
    for gone in ({0, 5}, {1, 2, 4}, {2, 4, 5}):
        result = cut(model, coupling, {number: gone})
        assert check_equivalence(model, coupling, {number: gone}, result, [model.batch_input(3)]).equivalent
