"""Which layers are paired: by name, by resolution, by the recipe."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.errors import StageError
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.taps import tap
from mil_cli.models.convnet import convnet
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.distill.pairs import Pair, pair_layers

WHERE = "stages.recover.pairs"


@cache
def _captured(name: str) -> Model:
    nets = {
        "resnet20": resnet20,
        "resnet8": lambda: resnet20(width=4, blocks=1),
        "mobilenet": mobilenet,
        "convnet": convnet,
        "vit": vit,
        "coarse_vit": lambda: vit(patch=7, dim=32, depth=2),
    }
    return Model.capture(nets[name]().eval(), (torch.rand(2, 1, 28, 28),))


def _pairs(student: str | Model, teacher: str | Model, **options: Any) -> list[Pair]:
    one, other = (_captured(model) if isinstance(model, str) else model for model in (student, teacher))
    settings: dict[str, Any] = {"given": {}, "count": 3, "mapped": False, "where": WHERE, **options}
    return pair_layers(one, other, **settings)


def _names(pairs: list[Pair]) -> dict[str, str]:
    return {pair.student.path: pair.teacher.path for pair in pairs}


def test_a_network_is_paired_with_itself_at_the_ends_of_its_stages() -> None:
    pairs = _pairs("resnet20", "resnet20")
    assert _names(pairs) == {"stages.0": "stages.0", "stages.1": "stages.1", "stages": "stages"}
    assert [pair.student.shape[1:] for pair in pairs] == [(16, 28, 28), (32, 14, 14), (64, 7, 7)]
    assert _names(_pairs("resnet20", "resnet20", count=1)) == {"stages": "stages"}
    five = _names(_pairs("resnet20", "resnet20", count=5))
    assert set(five) >= {"stages.0", "stages.1", "stages"}
    assert len(five) == 5


def test_blocks_are_no_ends_and_the_output_is_none() -> None:
    names = _names(_pairs("resnet20", "resnet20", count=100))
    assert names == {name: name for name in names}
    blocks = [f"stages.{stage}.{block}" for stage in range(3) for block in range(2)]
    assert set(names) == {"bn", *blocks, "stages.0", "stages.1", "stages"} | {f"stages.{stage}.1" for stage in range(3)}


@pytest.mark.parametrize(
    "name", ["resnet20", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet", "vit"))]
)
def test_folded_batch_norms_pair_equal_values(name: str) -> None:
    teacher = _captured(name)
    student = fold_batch_norm(teacher)
    pairs = _pairs(student, teacher, count=100)
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        ours = tap(student, [pair.student.path for pair in pairs])(x)[1]
        theirs = tap(teacher, [pair.teacher.path for pair in pairs])(x)[1]
    assert len(pairs) > 4
    for pair in pairs:
        torch.testing.assert_close(pair.student.read(ours), pair.teacher.read(theirs), rtol=1e-3, atol=1e-4)


def test_the_same_names_count_where_the_student_is_shallower() -> None:
    assert _names(_pairs("resnet8", "resnet20")) == {"stages.0": "stages.0", "stages.1": "stages.1", "stages": "stages"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("mobilenet", "resnet20", {"features.5": "stages.1", "features.8": "stages.2.1", "features": "stages"}),
        ("resnet20", "mobilenet", {"stages.0": "features.3", "stages.1": "features.5", "stages": "features"}),
        pytest.param(
            *("convnet", "resnet20", {"features.6": "stages.1", "features": "stages.2.1", "head.1": "stages"}),
            marks=pytest.mark.slow,
        ),
        ("coarse_vit", "vit", {"blocks.0": "blocks.1", "blocks": "blocks.2", "norm": "norm"}),
    ],
)
def test_others_are_paired_by_resolution(student: str, teacher: str, expected: dict[str, str]) -> None:
    assert _names(_pairs(student, teacher)) == expected


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param("mobilenet", "resnet20", marks=pytest.mark.slow),
        ("coarse_vit", "mobilenet"),
        ("convnet", "coarse_vit"),
    ],
)
def test_order_is_kept_and_the_last_belong_together(student: str, teacher: str) -> None:
    ours, theirs = ([pair.student.path for pair in _pairs(net, net, count=100)] for net in (student, teacher))
    for count in (1, 2, 5):
        pairs = _names(_pairs(student, teacher, count=count))
        places = [(ours.index(one), theirs.index(other)) for one, other in pairs.items()]
        assert 1 <= len(pairs) <= count
        assert places == sorted(places)
        assert len({other for _, other in places}) == len(places)
        assert places[-1] == (len(ours) - 1, len(theirs) - 1)


def test_layers_without_a_map_are_left_out_where_maps_are_asked_for() -> None:
    assert list(_names(_pairs("convnet", "resnet20", mapped=True)))[-1] == "features"


def test_the_axis_of_channels_comes_second() -> None:
    pair = _pairs("vit", "resnet20", given={"blocks.1": "stages.1.0"})[0]
    assert pair.student.shape[1:] == (96, 49)
    value = torch.rand(4, 49, 96)
    assert torch.equal(pair.student.read({"blocks.1": value}), value.transpose(1, 2))
    assert pair.facts() == {
        "student": "blocks.1",
        "teacher": "stages.1.0",
        "student_shape": [96, 49],
        "teacher_shape": [32, 14, 14],
    }


def test_paths_that_are_unknown_or_do_not_fit_are_told() -> None:
    with pytest.raises(StageError, match=rf"{WHERE}.*student.*\n.*did you mean 'stages.1'"):
        _pairs("resnet20", "resnet20", given={"stage.1": "stages.1"})
    with pytest.raises(StageError, match=rf"{WHERE}.*teacher.*\n.*did you mean 'features.12'"):
        _pairs("resnet20", "mobilenet", given={"stages.1": "features.112"})
    with pytest.raises(StageError, match="single position"):
        _pairs("convnet", "resnet20", given={"head.1": "stages"}, mapped=True)
    sequences = Model.capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.rand(2, 24, 4),))
    with pytest.raises(StageError, match=r"\[\d, 6, 24\].* cannot be compared"):
        _pairs(sequences, "resnet20", given={"1": "stages"})


def test_sequences_of_a_convolution_are_no_tokens() -> None:
    wave = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 6, 1))
    model = Model.capture(wave, (torch.rand(2, 1, 16),))
    assert _pairs(model, model, given={"1": "1"})[0].tokens == (False, False)
    assert _pairs("vit", "vit", given={"blocks.1": "blocks.1"})[0].tokens == (True, True)
    images = Model.capture(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1)), (torch.rand(2, 1, 4, 4),)
    )
    with pytest.raises(StageError, match="cannot be compared"):
        _pairs(model, images, given={"1": "1"})


class Hourglass(nn.Module):
    """A U-net with a state beside it: shortcuts go around everything, and one module returns what nobody reads here."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.up, self.head = nn.ConvTranspose2d(2 * width, width, 2, 2), nn.Conv2d(2 * width + 1, 1, 1)
        self.memory = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.first(x)
        return self.head(torch.cat([x, fine, self.up(self.down(fine).relu())], 1)), self.memory(fine)


def test_where_shortcuts_go_around_everything_all_modules_count() -> None:
    student, teacher = (Model.capture(Hourglass(width), (torch.rand(2, 1, 8, 8),)) for width in (4, 8))
    assert _names(_pairs(student, teacher)) == {"first": "first", "down": "down", "up": "up"}


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() @ self.weight


def test_where_no_layer_is_found_names_are_asked_for() -> None:
    bare = Model.capture(Bare(), (torch.rand(3, 4),))
    with pytest.raises(StageError, match=rf"{WHERE}.*\n.*name them"):
        _pairs(bare, "resnet20")


def test_values_that_are_no_rows_of_samples_are_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            self.total = nn.Flatten(0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.head(y) + self.total(y).sum()

    model = Model.capture(Mixed(), (torch.rand(3, 4),))
    with pytest.raises(StageError, match="'total' is no feature"):
        _pairs(model, model, given={"total": "total"})
