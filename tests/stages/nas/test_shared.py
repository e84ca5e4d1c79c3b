"""The shared weights of a designed space under the one training loop."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.spaces import Architecture, Choice, DesignedSpace, Zero
from mil_cli.stages.nas.bignas import sandwiched, silence
from mil_cli.stages.nas.fairnas import fair, fair_paths
from mil_cli.stages.nas.ofa import partly, shrinking
from mil_cli.stages.nas.one_shot import Judge
from mil_cli.stages.nas.shared import SharedModule, step_generator
from mil_cli.stages.nas.spos import SposConfig, single_path
from mil_cli.task.classification import Classification
from mil_cli.training.batch_norm import recalibrate, recalibrate_module
from mil_cli.training.config import TrainerConfig
from mil_cli.training.objective import Binding, Running
from tests.spaces.nets import conv_net
from tests.stages.contexts import run_through_kills
from tests.stages.nas.designed import context, incoming, space

BINDINGS: dict[str, Any] = {
    "spos": lambda shared: single_path(Classification(), seed=1),
    "fairnas": lambda shared: fair_paths(Classification(), seed=1),
    "bignas": lambda shared: sandwiched(Classification(), random=1, temperature=1.0, seed=1),
    "ofa": lambda shared: shrinking(
        Classification(),
        free=("kernels", "widths"),
        teacher=shared.clone().eval(),
        paths=2,
        temperature=1.0,
        distill=1.0,
        seed=1,
    ),
}


def _shared() -> SharedModule:
    return SharedModule.beside(incoming(), space())


def _running(shared: SharedModule, step: int = 0) -> Running[SharedModule]:
    return Running(
        model=shared,
        steps=lambda: step,
        total_steps=10,
        forward=lambda graph, *args, **kwargs: graph(*args, **kwargs),
        tapped=dict,
        device=torch.device("cpu"),
        channels_last=False,
    )


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(context().data.train.batches(16)))  # type: ignore[return-value]


def _loss(shared: SharedModule, bind: Binding[SharedModule], step: int = 0) -> torch.Tensor:
    objective = bind(_running(shared, step))
    shared.train()
    batch = _batch()
    loss = objective(shared(batch[0]), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _by_hand(shared: SharedModule, architecture: Architecture) -> torch.Tensor:
    """Return what an architecture gives in training, as a plain module of its own with copies of the weights."""
    module = shared.space.build(architecture, inherit=True).train()
    outputs: torch.Tensor = module(_batch()[0])
    return outputs


@pytest.mark.parametrize(
    "method", ["ofa", *(pytest.param(each, marks=pytest.mark.slow) for each in ("spos", "fairnas", "bignas"))]
)
def test_training_goes_on_after_kills_to_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainerConfig(epochs=1, batch_size=256, checkpoint_every_seconds=0)

    def run(folder: Path) -> Any:
        shared = _shared()
        return context(folder).fit(shared, settings=settings, doing="training", bind=BINDINGS[method](shared))

    whole = run(tmp_path / "whole")
    pieces = run_through_kills(lambda: run(tmp_path / "pieces"), monkeypatch, saves=[1, 3])
    tree_map(lambda one, other: torch.testing.assert_close(one, other, rtol=0, atol=0), *_states(whole, pieces))


def _states(*trained: SharedModule) -> list[dict[str, torch.Tensor]]:
    return [one.state_dict() for one in trained]


def test_one_path_learns_and_nothing_else_and_others_come() -> None:
    touched = set()
    for step in range(8):
        shared = _shared()
        _loss(shared, single_path(Classification(), seed=3), step)
        path = shared.space.sample(step_generator(3, step))
        names = {name for name, weight in shared.named_parameters() if weight.grad is not None}
        with shared.space.active(path):
            expected = shared.space.module.zero_grad() or _reached(shared)
        assert names == expected
        touched.add(path)
    assert len(touched) > 4


def _reached(shared: SharedModule) -> set[str]:
    shared.space.module(_batch()[0]).sum().backward()
    return {name for name, weight in shared.named_parameters() if weight.grad is not None}


def test_all_choices_learn_equally_often_in_a_step() -> None:
    searched = space()
    for step in range(4):
        paths = fair(searched, step_generator(0, step))
        assert len(paths) == 4  # operators of a block
        for decision in searched.decisions:
            counts = Counter(path[decision.name] for path in paths if decision.name in path)
            if sum(counts.values()) == len(paths):  # it acts in all
                assert set(counts.values()) == {4 // len(decision.choices)}


def test_a_fair_step_is_the_mean_over_its_paths() -> None:
    shared = _shared()
    expected = sum(
        Classification().loss(_by_hand(shared, path), _batch()) for path in fair(shared.space, step_generator(5, 2))
    )
    torch.testing.assert_close(_loss(shared, fair_paths(Classification(), seed=5), 2), torch.as_tensor(expected) / 4)


def test_the_sandwich_by_hand() -> None:
    shared, task = _shared(), Classification()
    searched = shared.space
    random = searched.sample(step_generator(7, 0))
    largest = _by_hand(shared, searched.largest)
    expected = task.loss(largest, _batch())
    for smaller in (searched.smallest, random):
        expected = expected + task.distance(_by_hand(shared, smaller), largest.detach(), _batch(), temperature=2.0)
    given = _loss(shared, sandwiched(task, random=1, temperature=2.0, seed=7))
    torch.testing.assert_close(given, expected / 3)


def test_only_the_largest_net_learns_with_dropout() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Choice({"some": nn.Linear(64, 8), "none": nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))})
            self.drop = nn.Dropout(0.5)
            self.seen: list[bool] = []
            self.drop.register_forward_hook(lambda layer, args, result: self.seen.append(layer.training))
            self.head = nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.drop(self.first(x.flatten(1))))  # type: ignore[no-any-return]

    shared = SharedModule.beside(incoming(), DesignedSpace(Dropping()))
    _loss(shared, sandwiched(Classification(), random=2, temperature=1.0, seed=0))
    assert shared.space.module.seen == [True, False, False, False]
    assert shared.space.module.drop.training  # type: ignore[union-attr]


def test_norms_begin_at_zero_where_asked() -> None:
    searched = space()
    silence(searched.module, ["*.inverted.body.7"], where="zero_init")
    zeroed = {name for name, weight in searched.module.named_parameters() if not weight.any() and "weight" in name}
    assert len(zeroed) == 4
    assert all(name.endswith("inverted.body.7.weight") for name in zeroed)
    with pytest.raises(StageError, match="fits no norm"):
        silence(searched.module, ["*.body.0"], where="zero_init")  # a convolution


def test_what_is_not_let_go_stays_as_large_as_it_is() -> None:
    searched = space()
    draw = partly(searched, ("kernels", "depths"))
    drawn = [draw(step_generator(0, step)) for step in range(30)]
    assert len(set(drawn)) > 5
    for name in ("widths.0", "widths.1"):
        assert {path[name] for path in drawn} == {searched.largest[name]}
    assert {path["stages.0.3"] for path in drawn} == {1, 2}


def test_a_shrinking_step_by_hand() -> None:
    shared, task = _shared(), Classification()
    teacher = SharedModule.beside(incoming(), space(seed=1)).eval()
    draw = partly(shared.space, ("widths",))
    generator = step_generator(4, 0)
    targets = teacher(_batch()[0]).detach()
    expected = torch.zeros(())
    for path in (draw(generator), draw(generator)):
        given = _by_hand(shared, path)
        expected = expected + task.loss(given, _batch()) + 0.5 * task.distance(given, targets, _batch(), temperature=3)
    bind = shrinking(task, free=("widths",), teacher=teacher, paths=2, temperature=3, distill=0.5, seed=4)
    torch.testing.assert_close(_loss(shared, bind), expected / 2)


def test_statistics_of_a_module_are_those_of_the_captured_model() -> None:
    searched, x = conv_net()
    module = searched.build(searched.largest).eval()
    calls = [((torch.randn_like(x),), {}) for _ in range(3)]
    model = recalibrate(Model.capture(module, (x,)), calls)
    recalibrate_module(module, calls)
    assert not module.training
    counted = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, tensor in module.state_dict().items():
        if name in counted:
            torch.testing.assert_close(tensor, counted[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_architecture_is_judged_by_statistics_of_its_own() -> None:
    around, shared = context(), _shared().eval()
    config = SposConfig(search_samples=200, recalibrate_samples=128)
    judge = Judge(shared, config, around)
    before = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    path = shared.space.sample(step_generator(0, 0))
    module = shared.space.build(path, inherit=True).eval()
    recalibrate_module(module, around.calibration(samples=128, batch_size=64))
    assert judge(path) == around.evaluate(module, limit=200).value
    torch.testing.assert_close(shared.state_dict(), before, rtol=0, atol=0)


def test_operators_without_outputs_are_no_reason_to_stop() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = Choice({"one": nn.Identity(), "zero": Zero()})
            self.head = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(1 / self.path(x).flatten(1).abs().sum(1, keepdim=True).expand(-1, 64))  # type: ignore[no-any-return]

    shared = SharedModule.beside(incoming(), DesignedSpace(Broken())).eval()
    judge = Judge(shared, SposConfig(recalibrate_samples=0), context())
    assert judge(shared.space.architecture({"path": "zero"})) == float("-inf")
    assert judge(shared.space.architecture({"path": "one"})) >= 0
