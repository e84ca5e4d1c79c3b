"""Every kind of network is analysed, cut at random, and compared with its own eager module with weights at zero."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from mil_cli.graph.coupling import Counter, Coupling, arrange, find_rows, group_norms, reorder, repair
from mil_cli.graph.coupling.analysis import analyse_graph
from mil_cli.graph.coupling.cut import cut_graph, shared_cut
from mil_cli.graph.coupling.equivalence import check_graphs
from mil_cli.graph.coupling.selection import keep_masks
from mil_cli.graph.model import copy_graph
from tests.graph.coupling.networks import EXPECTED, NETWORKS, TRICKS


def captured(module: nn.Module, x: Tensor) -> GraphModule:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            return program.module(check_guards=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def warmed(module: nn.Module) -> nn.Module:
    """Return the module with running statistics and affine parameters that are no defaults."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return module.eval()


def random_classes(coupling: Coupling, ratio: float, seed: int, *, exact: bool = False) -> dict[int, set[int]]:
    generator = np.random.default_rng(seed)
    chosen = {}
    for number, space in enumerate(coupling.spaces):
        labels = space.exact if exact else space.free
        count = min(math.ceil(len(labels) * ratio), len(labels))
        chosen[number] = set(generator.choice(labels, count, replace=False).tolist()) if count else set()
    return repair(coupling, chosen)


def zeroed(module: nn.Module, coupling: Coupling, removed: dict[int, set[int]]) -> nn.Module:
    """Return the eager module with every removed entry of a parameter, and of a running mean, at zero."""
    result = copy.deepcopy(module)
    state = {**dict(result.named_parameters(remove_duplicate=False)), **dict(result.named_buffers())}
    for number, classes in removed.items():
        for member in coupling.spaces[number].members:
            if member.trainable or member.parameter.endswith("running_mean"):
                index = torch.from_numpy(np.flatnonzero(np.isin(member.classes, sorted(classes))))
                with torch.no_grad():
                    state[member.parameter].index_fill_(member.axis, index, 0)
    return result


BATCH = 5

# By network: rows and classes of each space that has any: groups x channels, heads x head size.
ROWS = {
    "attention_with_weights": [(3, 8), (3, 8)],  # queries with keys, and values
    "channel_shuffle_module": [(3, 4), (3, 4)],
    "enabled_gqa": [(2, 8), (2, 8)],  # the heads of keys
    "encoder": [(4, 8)] * 4,
    "explicit_attention": [(4, 6), (4, 6)],
    "grouped": [(2, 2), (2, 6), (4, 4), (4, 6)],
    "group_norm": [(4, 4)],
    "grouped_transposed": [(4, 4), (4, 6)],
    "shifted_windows": [(3, 8), (3, 8)],
    "vision_transformer": [(4, 8), (4, 8)],
    "flatten_then_linear": [],  # a class has entries at several places of an image, but one filter makes them
    "glu_gate": [],
    "plain": [],
}

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


class Case(NamedTuple):
    module: nn.Module
    coupling: Coupling
    graph: GraphModule
    shape: tuple[int, ...]
    name: str


def resizer(shape: tuple[int, ...]) -> Callable[[int], tuple[tuple[Tensor], dict[str, Any]]]:
    return lambda size: ((torch.randn(size, *shape),), {})


@pytest.fixture(scope="module", params=sorted({**NETWORKS, **TRICKS}))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    module, shape = {**NETWORKS, **TRICKS}[request.param]()
    warmed(module)
    graph = captured(module, torch.randn(2, *shape))
    coupling = analyse_graph(graph, (), resized=resizer(shape))
    return Case(module, coupling, graph, shape, request.param)


only_networks = pytest.mark.parametrize("case", sorted(NETWORKS), indirect=True, scope="module")


def leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def loss(outputs: Any) -> Tensor:
    return sum((leaf.pow(2).sum() for leaf in leaves(outputs) if leaf.requires_grad), torch.zeros(()))


def trained(case: Case) -> list[set[str]]:
    """Return the parameters that the eager module gives a gradient to, for inputs that take different branches."""
    found = []
    branches = case.graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    for size in (0.1, 1.0, 2.0, 10.0) * 4 if branches else (1.0,):
        module = copy.deepcopy(case.module)
        loss(module(size * torch.randn(3, *case.shape))).backward()
        found.append({name for name, parameter in module.named_parameters() if parameter.grad is not None})
    return found


def test_every_operator_is_known(case: Case) -> None:
    expected = EXPECTED[case.name].frozen
    assert all(expected and expected in reason for _, reason, _ in case.coupling.unknown), case.coupling.unknown


def test_what_is_frozen_says_why_and_where(case: Case) -> None:
    expected = EXPECTED[case.name]
    if expected.frozen:
        shown = {(entry.reason, entry.source_line) for entry in case.coupling.frozen}
        assert any(expected.frozen in reason and expected.line in ("", line) for reason, line in shown), shown


@only_networks
def test_shapes_alone_are_those_of_a_full_run(case: Case) -> None:
    module, coupling, graph, shape, _ = case
    shown = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda part, given, result: shown.update({name: result.shape}) if isinstance(result, Tensor) else None

    handles = [part.register_forward_hook(keep(name)) for name, part in module.named_modules() if name]
    placeholder = next(iter(graph.graph.find_nodes(op="placeholder")))
    module(torch.randn(coupling.recording.shapes[placeholder.name][0], *shape))
    for handle in handles:
        handle.remove()
    recorded = set(coupling.recording.shapes.values())
    assert {tuple(size) for size in shown.values()} <= recorded


def test_most_rows_can_be_cut(case: Case) -> None:
    module, coupling, _, _, name = case
    rows = sum(p.shape[0] for p in module.parameters() if p.ndim > 1)
    outputs = 10  # at most ten of the rows make the output of a classifier
    assert coupling.cuttable_share * rows >= EXPECTED[name].share * (rows - outputs)


@pytest.mark.parametrize("ratio", [0.4, pytest.param(0.9, marks=pytest.mark.slow)])
def test_equals_eager_module_with_weights_at_zero(case: Case, ratio: float) -> None:
    module, coupling, _, shape, name = case
    removed = random_classes(coupling, ratio, 1, exact=True)
    if not EXPECTED[name].linear:
        pytest.skip("a weight of zero does not make zero: masked activations are compared instead")
    x = torch.randn(3, *shape)
    with torch.no_grad():
        expected = leaves(zeroed(module, coupling, removed)(x))
        given = leaves(cut_graph(coupling, removed)(x))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5 * max(float(y.abs().max()) for y in expected))


@pytest.mark.parametrize("ratio", [pytest.param(0.3, marks=pytest.mark.slow), 0.9])
def test_cut_runs_trains_and_is_proven(case: Case, ratio: float) -> None:
    module, coupling, graph, shape, _ = case
    before = {name: value.clone() for name, value in module.state_dict().items()}
    removed = random_classes(coupling, ratio, 2)
    cut = cut_graph(coupling, removed)
    report = check_graphs(
        coupling, removed, cut, [((torch.randn(4, *shape),), {})], recut=lambda subset: cut_graph(coupling, subset)
    )
    assert report.equivalent, report
    output = cut(torch.randn(7, *shape))
    assert [part.shape for part in leaves(output)] == [part.shape for part in leaves(graph(torch.randn(7, *shape)))]
    loss(output).backward()
    reached = trained(case)
    for name, parameter in cut.named_parameters():
        if all(name in some for some in reached):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        elif not any(name in some for some in reached):
            assert parameter.grad is None or not parameter.grad.any(), name
    if coupling.spaces and any(space.free for space in coupling.spaces):
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in graph.parameters())
        assert sum(p.numel() for p in cut.parameters()) == Counter(coupling).params(removed)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"the analysed weight {name} changed"


def test_counts_equal_those_of_the_cut_model(case: Case) -> None:
    _, coupling, _, shape, name = case
    if not EXPECTED[name].counted:
        pytest.skip("torch's counter does not know an operator of it")
    for removed in ({}, random_classes(coupling, 0.4, 5)):
        model = cut_graph(coupling, removed)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
            model(torch.randn(1, *shape))
        assert 2 * Counter(coupling).macs(removed) == counted.get_total_flops()


RECAPTURED = {"channel_shuffle_module", "gated_recurrent", "grouped", "nested_residuals", "plain", "u_net"}
"""Networks whose cut is captured once more in the quick tests, too; of the others it is analysed as it is."""


@pytest.mark.parametrize(
    ("case", "recaptured"),
    [
        *((name, name in RECAPTURED) for name in sorted(NETWORKS)),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in sorted(NETWORKS.keys() - RECAPTURED)),
        *(pytest.param(name, again, marks=pytest.mark.slow) for name in sorted(TRICKS) for again in (False, True)),
    ],
    indirect=["case"],
    scope="module",
)
def test_cut_a_second_time(case: Case, recaptured: bool) -> None:
    _, coupling, _, shape, name = case
    resized = resizer(shape)
    first = cut_graph(coupling, random_classes(coupling, 0.3, 3))
    x = torch.randn(2, *shape)
    again = captured(first, x) if recaptured else first
    if recaptured:
        torch.testing.assert_close(leaves(first(x)), leaves(again(x)), rtol=0, atol=0)
    second = analyse_graph(again, (), resized=resized)
    assert [reason for _, reason, _ in second.unknown] == [reason for _, reason, _ in coupling.unknown]
    if recaptured and name in NETWORKS:
        assert [space.size for space in second.spaces if space.free] == [
            space.size for space in analyse_graph(first, (), resized=resized).spaces if space.free
        ]
    removed = random_classes(second, 0.5, 4)
    report = check_graphs(
        second, removed, cut_graph(second, removed), [((x,), {})], recut=lambda subset: cut_graph(second, subset)
    )
    assert report.equivalent, report


def test_a_shared_cut_is_the_cut_and_trains_the_shared_weights(case: Case) -> None:
    _, coupling, graph, shape, _ = case
    removed = random_classes(coupling, 0.4, 6)
    shared, own = shared_cut(coupling, removed, graph), cut_graph(coupling, removed)
    x = torch.randn(4, *shape)
    torch.testing.assert_close(leaves(shared(x)), leaves(own(x)), rtol=0, atol=0)
    whole = {id(parameter): name for name, parameter in graph.named_parameters()}
    assert all(id(parameter) in whole for parameter in shared.parameters())
    graph.zero_grad()
    loss(shared(x)).backward()
    loss(own(x)).backward()
    masks = keep_masks(coupling, removed)
    for name, parameter in own.named_parameters():
        gradient = dict(graph.named_parameters())[name].grad
        if parameter.grad is None:
            assert gradient is None, name
            continue
        assert gradient is not None, name
        for axis, mask in masks.get(coupling.recording._leaf_keys[name], {}).items():
            gradient = gradient.index_select(axis, torch.from_numpy(np.flatnonzero(mask)))
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1))
    graph.zero_grad()


@only_networks
def test_reordered_weights_compute_the_same_and_fall_in_importance(case: Case) -> None:
    _, coupling, graph, shape, _ = case
    ordered = copy_graph(graph)
    scores = group_norms(graph, coupling)
    done = reorder(ordered, coupling, scores, [((torch.randn(3, *shape),), {})])
    x = torch.randn(4, *shape)
    with torch.no_grad():
        expected, given = leaves(graph(x)), leaves(ordered(x))
    torch.testing.assert_close(
        given, expected, rtol=1e-4, atol=1e-5 * (1 + max(float(y.abs().max()) for y in expected))
    )
    after = group_norms(ordered, coupling)
    for number in done:
        free = list(coupling.spaces[number].free)
        np.testing.assert_allclose(after[number][free], np.sort(scores[number][free])[::-1], rtol=1e-4)


@only_networks
def test_any_order_within_rows_computes_the_same(case: Case) -> None:
    _, coupling, graph, shape, name = case
    rows = find_rows(coupling)
    if name in ROWS:
        assert sorted(found.entries.shape for found in rows.values()) == sorted(ROWS[name])
    generator = np.random.default_rng(1)
    orders = {
        number: np.stack([generator.permutation(found.entries.shape[1]) for _ in found.entries])
        for number, found in rows.items()
    }
    arranged = copy_graph(graph)
    x = torch.randn(3, *shape)
    assert arrange(arranged, coupling, rows, orders, [((x,), {})]) == list(rows)
    if rows:
        assert any(
            not torch.equal(one, other) for one, other in zip(graph.parameters(), arranged.parameters(), strict=True)
        )
