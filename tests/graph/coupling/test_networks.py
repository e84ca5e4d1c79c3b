"""Every kind of network is analysed, cut at random, and compared with its own eager module with weights at zero."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mil_cli.graph.coupling import Counter, Coupling, group_norms, reorder, repair
from mil_cli.graph.coupling.analysis import analyse_graph
from mil_cli.graph.coupling.cut import cut_graph, shared_cut
from mil_cli.graph.coupling.equivalence import check_graphs
from mil_cli.graph.coupling.selection import keep_masks
from mil_cli.graph.model import copy_graph
from tests.graph.coupling import networks_of_libraries as networks_of_libraries  # registers its networks
from tests.graph.coupling.networks import NETWORKS

BATCH = 5


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


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]]:
    torch.manual_seed(0)
    module, shape = NETWORKS[request.param]()
    warmed(module)
    graph = captured(module, torch.randn(2, *shape))
    coupling = analyse_graph(graph, (torch.randn(BATCH, *shape),), single=((torch.randn(1, *shape),), {}))
    return module, coupling, graph, shape


EVERYTHING_INEXACT = {"standardised_weight"}


def test_every_operator_is_known(case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]]) -> None:
    assert case[1].unknown == ()


def test_shapes_alone_are_those_of_a_full_run(
    case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]],
) -> None:
    module, coupling, _, shape = case
    shown = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda part, given, result: shown.update({name: result.shape}) if isinstance(result, Tensor) else None

    handles = [part.register_forward_hook(keep(name)) for name, part in module.named_modules() if name]
    module(torch.randn(BATCH, *shape))
    for handle in handles:
        handle.remove()
    recorded = set(coupling.recording.shapes.values())
    assert {tuple(size) for size in shown.values()} <= recorded


def test_most_rows_can_be_cut(case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]]) -> None:
    module, coupling, _, _ = case
    rows = sum(p.shape[0] for p in module.parameters() if p.ndim > 1)
    outputs = 10  # at most ten of the rows make the output of a classifier
    assert coupling.cuttable_share * rows >= 0.55 * (rows - outputs)


def test_equals_eager_module_with_weights_at_zero(
    case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]], request: pytest.FixtureRequest
) -> None:
    module, coupling, _, shape = case
    removed = random_classes(coupling, 0.4, 1, exact=True)
    if "weight_norm" in request.node.name or "linear_attention" in request.node.name:
        pytest.skip("a weight of zero has no direction; elu(0) + 1 is not 0: masked activations are compared instead")
    if not removed:
        assert any(name in request.node.name for name in EVERYTHING_INEXACT)
        return
    x = torch.randn(3, *shape)
    expected = zeroed(module, coupling, removed)(x)
    given = cut_graph(coupling, removed)(x)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_cut_runs_trains_and_is_proven(
    case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]], ratio: float
) -> None:
    module, coupling, graph, shape = case
    before = {name: value.clone() for name, value in module.state_dict().items()}
    removed = random_classes(coupling, ratio, 2)
    cut = cut_graph(coupling, removed)
    report = check_graphs(
        coupling, removed, cut, [((torch.randn(4, *shape),), {})], recut=lambda subset: cut_graph(coupling, subset)
    )
    assert report.equivalent, report
    output = cut(torch.randn(7, *shape))
    assert output.shape == graph(torch.randn(7, *shape)).shape
    output.pow(2).sum().backward()
    for name, parameter in cut.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    if coupling.spaces and any(space.free for space in coupling.spaces):
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in graph.parameters())
        assert sum(p.numel() for p in cut.parameters()) == Counter(coupling).params(removed)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"the analysed weight {name} changed"


def test_counts_equal_those_of_the_cut_model(
    case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]], request: pytest.FixtureRequest
) -> None:
    _, coupling, _, shape = case
    if "memory" in request.node.name or "gated_recurrent" in request.node.name:
        pytest.skip("torch's counter does not know recurrent layers")
    for removed in ({}, random_classes(coupling, 0.4, 5)):
        model = cut_graph(coupling, removed)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
            model(torch.randn(1, *shape))
        assert 2 * Counter(coupling).macs(removed) == counted.get_total_flops()


def test_cut_a_second_time(case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]]) -> None:
    _, coupling, _, shape = case
    first = cut_graph(coupling, random_classes(coupling, 0.3, 3))
    x = torch.randn(2, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(first, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        again = program.module(check_guards=False)
    assert torch.equal(first(x), again(x))
    second = analyse_graph(again, (torch.randn(BATCH, *shape),))
    assert second.unknown == ()
    assert [space.size for space in second.spaces if space.free] == [
        space.size for space in analyse_graph(first, (torch.randn(BATCH, *shape),)).spaces if space.free
    ]
    removed = random_classes(second, 0.5, 4)
    report = check_graphs(
        second, removed, cut_graph(second, removed), [((x,), {})], recut=lambda subset: cut_graph(second, subset)
    )
    assert report.equivalent, report


def test_a_shared_cut_is_the_cut_and_trains_the_shared_weights(
    case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]],
) -> None:
    _, coupling, graph, shape = case
    removed = random_classes(coupling, 0.4, 6)
    shared, own = shared_cut(coupling, removed, graph), cut_graph(coupling, removed)
    x = torch.randn(4, *shape)
    assert torch.equal(shared(x), own(x))
    whole = {id(parameter): name for name, parameter in graph.named_parameters()}
    assert all(id(parameter) in whole for parameter in shared.parameters())
    graph.zero_grad()
    shared(x).pow(2).sum().backward()
    own(x).pow(2).sum().backward()
    masks = keep_masks(coupling, removed)
    for name, parameter in own.named_parameters():
        gradient = dict(graph.named_parameters())[name].grad
        assert gradient is not None, name
        for axis, mask in masks.get(coupling.recording._leaf_keys[name], {}).items():
            gradient = gradient.index_select(axis, torch.from_numpy(np.flatnonzero(mask)))
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1))
    graph.zero_grad()


def test_reordered_weights_compute_the_same_and_fall_in_importance(
    case: tuple[nn.Module, Coupling, GraphModule, tuple[int, ...]],
) -> None:
    _, coupling, graph, shape = case
    ordered = copy_graph(graph)
    scores = group_norms(graph, coupling)
    done = reorder(ordered, coupling, scores, [((torch.randn(3, *shape),), {})])
    x = torch.randn(4, *shape)
    with torch.no_grad():
        expected, given = graph(x), ordered(x)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1))
    after = group_norms(ordered, coupling)
    for number in done:
        free = list(coupling.spaces[number].free)
        np.testing.assert_allclose(after[number][free], np.sort(scores[number][free])[::-1], rtol=1e-4)
