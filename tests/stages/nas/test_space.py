"""The elastic space: what can shrink, what a candidate removes, and that two ways to build one agree to the bit."""

from __future__ import annotations

import itertools
import statistics
from functools import cache

import pytest
import torch
from torch import nn

from mil_cli.errors import ModelError
from mil_cli.graph.coupling import Counter, analyse
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls
from mil_cli.graph.residual import residual_chains
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.nas.space import ElasticSpace, depths_of, resolution_of, widths_of
from mil_cli.stages.nas.supernet import cut_candidate, random_pool, shared_candidate
from tests.graph.coupling.networks import NETWORKS

NETS = {
    "resnet": resnet20,
    "vit": lambda: vit(depth=3),
    "mobilenet": lambda: mobilenet(widths=(16, 32), blocks=(1, 3), last=64),
}
SEES_LESS = "mobilenet"
"""Its candidates choose how large their images are too."""


@cache
def space_of(name: str) -> tuple[Model, ElasticSpace]:
    torch.manual_seed(0)
    module, side = NETS[name](), 28
    module.train()
    with torch.no_grad():
        module(torch.randn(16, 1, side, side))
    model = Model.capture(module.eval(), (torch.randn(2, 1, side, side),))
    coupling = analyse(model)
    chains = residual_chains(coupling.graph)
    costs = {branch.addition: float(place) for chain in chains for place, branch in enumerate(chain)}
    widths = widths_of(coupling, smallest=0.25, multiple=8, most=5)
    images = resolution_of(model, coupling, smallest=0.5, most=3) if name == SEES_LESS else None
    return model, ElasticSpace(coupling, widths, depths_of(chains, costs, smallest=0.3), images)


@pytest.fixture(scope="module", params=sorted(NETS))
def case(request: pytest.FixtureRequest) -> tuple[Model, ElasticSpace]:
    return space_of(request.param)


def test_a_cut_candidate_equals_the_one_by_shared_views(case: tuple[Model, ElasticSpace]) -> None:
    model, space = case
    x = torch.randn(4, 1, 28, 28)
    for candidate in [space.largest, space.smallest, *random_pool(space, seed=1, size=4)]:
        own = cut_candidate(space, candidate, model)
        assert torch.equal(own(x), shared_candidate(space, candidate, model, training=False)(x))
        counter = Counter(space.coupling_of(candidate))
        macs = counter.macs(space.removed(candidate), space.dropped(candidate))
        assert (own.macs(), own.num_params()) == (
            macs,
            counter.params(space.removed(candidate), space.dropped(candidate)),
        )


QUICK = {"attention_with_weights", "channel_shuffle_module", "gated_recurrent", "grouped", "nested_residuals"}
"""Networks of each kind: residual branches inside each other, groups, heads, recurrence, channels that are moved."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(NETWORKS)]
)
def test_candidates_of_any_network_are_counted_cut_and_shared_alike(name: str) -> None:
    torch.manual_seed(0)
    module, shape = NETWORKS[name]()
    model = Model.capture(module.eval(), (torch.randn(2, *shape),))
    coupling = analyse(model)
    chains = residual_chains(coupling.graph)
    costs = {branch.addition: float(place) for chain in chains for place, branch in enumerate(chain)}
    widths = widths_of(coupling, smallest=0.25, multiple=2, most=5)
    space = ElasticSpace(coupling, widths, depths_of(chains, costs, smallest=0.3))
    counter, x = Counter(coupling), torch.randn(4, *shape)
    assert space.widths
    for candidate in [space.smallest, *random_pool(space, seed=0, size=3)]:
        own = cut_candidate(space, candidate, model)
        assert torch.equal(own(x), shared_candidate(space, candidate, model, training=False)(x))
        parts = space.removed(candidate), space.dropped(candidate)
        assert (own.macs(), own.num_params()) == (counter.macs(*parts), counter.params(*parts))
        shared_candidate(space, candidate, model)(x).sum().backward()


def test_training_a_shared_candidate_reaches_its_prefix_alone(case: tuple[Model, ElasticSpace]) -> None:
    model, space = case
    model = model.clone().train()
    graph = shared_candidate(space, space.smallest, model)
    before = {name: buffer.clone() for name, buffer in model.graph.named_buffers()}
    graph(torch.randn(8, 1, 28, 28)).square().sum().backward()
    numbered = model.clone()
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape))
    own = dict(cut_candidate(space, space.smallest, numbered).named_parameters())
    for name, parameter in model.named_parameters():
        if name not in own:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            gradient = parameter.grad.flatten().clone()
            gradient[own[name].detach().flatten().long()] = 0.0
            assert not bool(gradient.any()), f"{name} got a gradient outside of what the candidate keeps"
    for name, buffer in model.graph.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, before[name]), f"{name} is the whole model's"


def test_widths_end_on_multiples_and_begin_whole(case: tuple[Model, ElasticSpace]) -> None:
    model, space = case
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for width in space.widths:
        assert list(width.choices) == sorted(set(width.choices), reverse=True)
        assert len(width.choices) <= 5
        assert width.choices[-1] >= 0.25 * width.choices[0]
    for candidate in random_pool(space, seed=2, size=4):
        for name, parameter in cut_candidate(space, candidate, model).named_parameters():
            if parameter.ndim > 1 and parameter.shape[0] != sizes[name][0] and "attention" not in name:
                assert parameter.shape[0] % 8 == 0  # heads and their size are chosen one by one


def test_the_most_important_branches_stay() -> None:
    _, space = space_of("resnet")
    assert [depth.choices for depth in space.depths] == [(3, 2, 1)] * 3
    candidate = (*[0] * len(space.widths), 1, 2, 0)
    left_out = {branch.addition for branch in space.branches(candidate)}
    chains = residual_chains(space.coupling.graph)
    # Here the last of a chain counts most.
    assert left_out == {chains[0][0].addition, chains[1][0].addition, chains[1][1].addition}


def test_candidates_that_differ_in_what_they_leave_out_are_one() -> None:
    model, space = space_of("resnet")
    depths = (0, 0, 2)
    inner = next(
        place
        for place, width in enumerate(space.widths)
        if width.name.startswith("stages.2.1.conv1") and width.name not in dict(space_parameters(space, depths, model))
    )
    one = (*[0] * len(space.widths), *depths)
    other = (*(1 if place == inner else 0 for place in range(len(space.widths))), *depths)
    assert space.canonical(one) == space.canonical(other)
    assert space.canonical(other) != other


def test_a_block_that_is_left_out_takes_the_choices_inside_it_along() -> None:
    module, shape = NETWORKS["nested_residuals"]()
    model = Model.capture(module.eval(), (torch.randn(2, *shape),))
    chains = residual_chains(model.graph)
    outer = next(chain for chain in chains if any(branch.holds(chains[0][0]) for branch in chain))
    costs = {branch.addition: float(place) for chain in chains for place, branch in enumerate(chain)}
    space = ElasticSpace(analyse(model), (), depths_of(chains, costs, smallest=0.3))
    place = [depth.branches[0] in outer for depth in space.depths].index(True)
    kept = len(space.depths[place].choices) - 1
    candidates = {
        space.canonical(tuple(kept if axis == place else choice for axis, choice in enumerate(inner)))
        for inner in itertools.product(*(range(len(depth.choices)) for depth in space.depths))
    }
    nets = {tuple(node.name for node in calls(cut_candidate(space, entry, model).graph)) for entry in candidates}
    assert 1 < len(candidates) == len(nets)


def space_parameters(space: ElasticSpace, depths: tuple[int, ...], model: Model) -> dict[str, torch.Tensor]:
    return dict(cut_candidate(space, (*[0] * len(space.widths), *depths), model).named_parameters())


def test_random_candidates_cover_small_and_large_nets() -> None:
    _, space = space_of("resnet")
    counter = Counter(space.coupling)
    whole = counter.macs({})
    shares = [
        counter.macs(space.removed(candidate), space.dropped(candidate)) / whole
        for candidate in random_pool(space, seed=3, size=300)
    ]
    tenths = statistics.quantiles(shares, n=10)
    assert tenths[0] < 0.15
    assert tenths[-1] > 0.7
    # No level is left out: neighbouring tenths are near each other.
    assert max(high - low for low, high in itertools.pairwise(tenths)) < 0.25


def test_children_are_candidates_of_the_space() -> None:
    _, space = space_of("vit")
    generator = torch.Generator().manual_seed(0)
    first, second = random_pool(space, seed=4, size=2)
    for _ in range(50):
        child = space.mutate(space.cross(first, second, generator), generator, probability=0.2)
        assert child == space.canonical(child)
        assert all(0 <= choice < len(axis.choices) for axis, choice in zip(space.axes, child, strict=True))


def test_what_a_candidate_keeps_is_told_by_name() -> None:
    _, space = space_of("resnet")
    told = space.describe(space.smallest)
    assert {"name": "stem.weight", "kept": 8, "of": 16} in told["widths"]
    assert [entry["kept"] for entry in told["depths"]] == [1, 1, 1]


def test_sizes_of_images_are_those_that_strides_divide_and_the_whole_one_comes_first() -> None:
    model, space = space_of(SEES_LESS)
    assert space.resolution is not None
    assert space.resolution.choices == (28, 26, 14)
    assert len(space.couplings) == 3
    whole, small = space.largest, (*space.largest[:-1], 2)
    x = torch.randn(3, 1, 28, 28)
    seen = nn.functional.interpolate(x, size=14, mode="bilinear")
    resized = cut_candidate(space, small, model)
    assert torch.equal(resized(x), model(seen))
    assert resized.macs() < cut_candidate(space, whole, model).macs() == model.macs()
    assert space.describe(small)["resolutions"] == [{"name": "x", "kept": 14, "of": 28}]


def test_nets_that_take_no_smaller_images_are_told() -> None:
    model, space = space_of("vit")
    with pytest.raises(ModelError, match="does not run on smaller images"):
        resolution_of(model, space.coupling, smallest=0.5, most=3)
    with pytest.raises(ModelError, match="no smaller images"):
        resolution_of(model, space.coupling, smallest=0.99, most=3)
