"""Zero-cost scores against their authors' values, an implementation by hooks, and what must hold of any graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.assess.scores.registry import MEASURES, score
from mil_cli.data.base import Batch
from mil_cli.errors import DataError, MilError, ModelError, TaskError
from mil_cli.graph.model import Model
from mil_cli.task.classification import Classification
from tests.assess.nets import CLASSES, NETS, InPlace, Plain, batches, made
from tests.assess.reference_scores import REFERENCES

# What the authors' own code gave for these networks and batches (torch 2.13, one thread): zero-cost-nas at a43bfbc,
# `foresight.pruners.predictive.find_measures(net, batches, ("random", 1, 5), device="cpu")`; nas-without-training at
# b3a82a6, the hooks and `get_batch_jacobian` of score_networks.py with `--score hook_logdet`; ZiCo at b0fec65,
# `getzico(net, batches, CrossEntropyLoss())`. They sum in single precision.
AUTHORS = {
    "residual": {
        "synflow": 4922773.778731065,
        "snip": 11.289060592651367,
        "grasp": -8.797653198242188,
        "grad_norm": 4.962343215942383,
        "fisher": 1.2376371622085571,
        "naswot": 63.10415812181331,
        "zico": 51.46415328979492,
        "jacov": -8.277994608242688,
    },
    "plain": {
        "synflow": 17844.687682770782,
        "snip": 54.40242385864258,
        "grasp": -842.9146728515625,
        "grad_norm": 23.77029037475586,
        "fisher": 8.409168243408203,
        "naswot": 54.84942894922417,
        "zico": 27.008508682250977,
        "jacov": -8.221064138868385,
    },
    "depthwise": {
        "synflow": 196.66557372257103,
        "snip": 8.734892845153809,
        "grasp": -0.060414910316467285,
        "grad_norm": 3.2654616832733154,
        "fisher": 0.26489004492759705,
        "naswot": 61.42656738450532,
        "zico": 50.28437805175781,
        "jacov": -8.229267877669658,
    },
}


def scores_of(model: Model, names: list[str] | None = None, data: list[Batch] | None = None) -> dict[str, float]:
    found = score(model, names or list(MEASURES), task=Classification(), batches=data or batches())
    return {name: each.value for name, each in found.items()}


@cache
def captured(net: Callable[[], nn.Module]) -> Model:
    return Model.capture(made(net), (batches()[0][0],))


@pytest.mark.parametrize("name", sorted(NETS))
def test_scores_are_those_of_the_authors_code(name: str) -> None:
    found = scores_of(captured(NETS[name]), sorted(AUTHORS[name]))
    # GraSP is a sum of terms of both signs that nearly cancel in one of the networks.
    assert found == pytest.approx(AUTHORS[name], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", sorted(NETS))
def test_scores_are_those_that_hooks_on_modules_give(name: str) -> None:
    net, data = made(NETS[name]), batches(count=3, samples=6)
    found = scores_of(captured(NETS[name]), sorted(REFERENCES), data)
    assert found == pytest.approx({key: reference(net, data) for key, reference in REFERENCES.items()}, rel=1e-5)


def test_rectifiers_that_are_functions_or_work_in_place_count_like_modules() -> None:
    found, data = scores_of(captured(InPlace)), batches()
    assert found == pytest.approx(scores_of(captured(Plain)), rel=1e-9)
    net = made(InPlace)
    assert REFERENCES["naswot"](net, data) == -math.inf  # no hook sees them
    assert found["naswot"] == pytest.approx(AUTHORS["plain"]["naswot"])


class Encoder(nn.Module):
    """A transformer's block: smooth rectifiers, layer norms, attention, dropout."""

    def __init__(self, *, dropout: float = 0.0, batch_first: bool = True) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=dropout, activation="gelu", batch_first=batch_first, norm_first=True
        )
        self.head = nn.Linear(16, CLASSES)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.cut(x).flatten(2).mT
        if self.batch_first:
            return self.head(self.block(tokens).mean(1))
        return self.head(self.block(tokens.transpose(0, 1)).mean(0))


def test_every_score_can_be_taken_of_a_transformer() -> None:
    found = scores_of(captured(Encoder))
    assert all(math.isfinite(value) for value in found.values())
    assert set(found) == set(MEASURES)
    assert found == pytest.approx(scores_of(captured(partial(Encoder, batch_first=False))), rel=1e-4)


def test_each_sample_counts_alone_wherever_a_network_has_its_samples() -> None:
    model, (images, labels) = captured(Encoder), batches()[0]  # tokens come first where attention is projected
    alone = [
        scores_of(model, ["fisher"], [(image[None], label[None])])["fisher"]
        for image, label in zip(images, labels, strict=True)
    ]
    # The gradient of the mean loss by a sample's value is a share of that of the sample's own loss.
    expected = sum(alone) / len(alone) / len(images) ** 2
    assert scores_of(model, ["fisher"])["fisher"] == pytest.approx(expected, rel=1e-4)


def test_scores_leave_the_model_alone_and_do_not_depend_on_each_other_or_on_what_was_drawn_before() -> None:
    model = captured(partial(Encoder, dropout=0.3))
    before = model.fingerprint()
    together = scores_of(model)
    torch.rand(5)
    state = torch.get_rng_state()
    assert scores_of(model, list(MEASURES)[::-1]) == together
    assert torch.equal(torch.get_rng_state(), state)
    assert model.fingerprint() == before
    assert not model.training
    assert [parameter.grad for parameter in model.parameters()] == [None] * len(list(model.parameters()))
    other = score(model, ["snip"], task=Classification(), batches=batches(), seed=1)["snip"].value
    assert other != together["snip"]  # other dropout


class Chain(nn.Module):
    """Linear layers without biases, a layer norm, and what names or implies single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(self.norm(layer(x))).float() @ torch.eye(6)
        return x


def test_synaptic_flow_is_the_same_through_every_layer() -> None:
    net = made(Chain)
    model = Model.capture(net, (torch.randn(4, 6),))
    data = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))]
    flow = torch.ones(6, dtype=torch.float64)
    for layer in net.layers:
        flow = layer.weight.detach().double().abs() @ flow
    assert scores_of(model, ["synflow"], data)["synflow"] == pytest.approx(3 * float(flow.sum()), rel=1e-12)


class Shared(nn.Module):
    """One convolution that runs twice, a convolution of one dimension, a normed weight and a transposed product."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv1d(4, 4, 3, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
        self.matrix = nn.Parameter(torch.empty(CLASSES, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return torch.relu(self.normed(x)).mean(2) @ self.matrix.T


def test_shared_weights_count_once_and_computed_ones_by_what_they_are_computed_from() -> None:
    net = made(Shared)
    x, labels = torch.randn(8, 4, 10), torch.randint(0, CLASSES, (8,))
    model = Model.capture(net, (x,))
    weights = [net.twice.weight, net.normed.parametrizations.weight.original1, net.matrix]
    gradients = torch.autograd.grad(functional.cross_entropy(net(x), labels), weights)
    pairs = list(zip(weights, gradients, strict=True))
    found = scores_of(model, ["snip", "grad_norm"], [(x, labels)])
    assert found["snip"] == pytest.approx(sum(float((w.detach() * g).abs().sum()) for w, g in pairs), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(sum(float(g.norm()) for g in gradients), rel=1e-5)


class Tokens(nn.Module):
    """A linear layer of tokens, which may be flattened into one axis with the samples."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.inner = nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)
        self.flat = flat

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        y = torch.relu(self.inner(x.flatten(0, 1) if self.flat else x))
        return self.head(y.reshape(*x.shape[:2], 8).mean(1))


def test_tokens_that_lie_on_the_axis_of_samples_are_told_apart_from_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 20, (8, 7), generator=generator)
    data = [(tokens, torch.randint(0, CLASSES, (8,), generator=generator))]
    models = [Model.capture(made(partial(Tokens, flat=flat)), (tokens,)) for flat in (False, True)]
    found = [scores_of(model, ["fisher", "naswot", "synflow"], data) for model in models]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["fisher"] > 0
    with pytest.raises(ModelError, match=r"score jacov: .*no floating-point input"):
        scores_of(models[0], ["jacov"], data)


class Steps(nn.Module):
    """A network whose batch is the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x)).mean(0))


def test_samples_may_lie_on_another_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(3, 8, 6, generator=generator), torch.arange(8) % CLASSES
    net = made(Steps)
    model = Model.capture(net, (x,), dynamic={"x": {1: "batch"}})
    task = Classification(input_keys=[1], target_key=0)
    found = score(model, ["jacov", "naswot"], task=task, batches=[(labels, x)])
    leaf = x.clone().requires_grad_(True)
    net(leaf).sum().backward()
    values = torch.linalg.eigvalsh(torch.corrcoef(leaf.grad.movedim(1, 0).flatten(1).double())) + 1e-5
    assert found["jacov"].value == pytest.approx(-float((values.log() + 1 / values).sum()))
    on = (net.inner(x) > 0).movedim(1, 0).flatten(1)
    alike = (on[:, None] == on[None]).sum(-1).double()
    assert found["naswot"].value == pytest.approx(float(torch.linalg.slogdet(alike).logabsdet))


class Mixed(nn.Module):
    """A network that looks at the mean of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(3, 6), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))
        return self.head(means) * torch.relu(self.shared(means.mean(0))).sum()


def test_a_model_of_a_fixed_batch_has_the_scores_of_a_free_one() -> None:
    images = batches()[0][0]
    fixed, names = Model.capture(made(Plain), (images,), dynamic={}), sorted(REFERENCES)
    assert scores_of(fixed, names) == pytest.approx(scores_of(captured(Plain), names), rel=1e-6)


def test_samples_that_are_alike_and_weights_that_overflow_give_infinities_and_no_error() -> None:
    images, labels = batches()[0]
    images = torch.cat([images[:1], images[:1], images[2:]])
    assert scores_of(captured(Plain), ["naswot"], [(images, labels)])["naswot"] == -math.inf
    net = made(Plain)
    net.conv1.weight.data.fill_(math.inf)
    model = Model.capture(net, (images,))
    found = scores_of(model, ["synflow", "snip", "jacov"], [(images, labels)])
    assert not any(math.isfinite(value) for value in found.values())


class Distances(nn.Module):
    """Classifies by distances to centres, which torch cannot derive twice; it has no rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.centres = nn.Parameter(torch.empty(CLASSES, 4))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.inner(x.mean((2, 3))), self.centres)


@pytest.mark.parametrize(
    ("net", "name", "said"),
    [
        (Distances, "grasp", "derivative for"),
        (Distances, "naswot", "no rectifier"),
        (Mixed, "fisher", "one part for each sample"),
        (Mixed, "naswot", "one part for each sample"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), "snip", "no convolution and no linear layer"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), "synflow", "no convolution and no linear layer"),
    ],
)
def test_a_score_that_cannot_be_taken_says_why(net: Callable[[], nn.Module], name: str, said: str) -> None:
    with pytest.raises(ModelError, match=f"score {name}: .*{said}"):
        scores_of(captured(net), [name])


def test_what_is_asked_for_is_checked_before_anything_is_computed() -> None:
    model = captured(Plain)
    with pytest.raises(MilError, match="did you mean 'synflow'"):
        scores_of(model, ["sinflow"])
    with pytest.raises(DataError, match="zico needs at least 2 batches"):
        scores_of(model, ["zico"], batches(count=1))
    assert scores_of(model, ["params"], []) == {"params": model.num_params()}


def test_scores_that_say_so_need_no_labels() -> None:
    images = batches()[0][0]
    task = Classification(input_keys=[0], target_key="labels")
    for name, measure in MEASURES.items():
        if measure.labels:
            with pytest.raises(TaskError):
                score(captured(Plain), [name], task=task, batches=[(images,), (images,)])
        else:
            score(captured(Plain), [name], task=task, batches=[(images,)])


def test_each_score_is_timed() -> None:
    wall, processor = itertools.count(0.0, 2.0), itertools.count(0.0, 3.0)
    found = score(
        captured(Plain),
        ["snip", "macs"],
        task=Classification(),
        batches=batches(),
        clock=lambda: next(wall),
        cpu_clock=lambda: next(processor),
    )
    assert list(found) == ["snip", "macs"]
    assert {(each.seconds, each.cpu_seconds) for each in found.values()} == {(2.0, 3.0)}
