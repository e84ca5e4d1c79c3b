"""The section `model`: its forms, its mistakes, and what is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mil_cli.errors import CheckpointError, MilError, ModelError
from mil_cli.models.source import ModelSource, build_model, build_module, describe

EXAMPLE: tuple[tuple[Any, ...], dict[str, Any]] = ((torch.zeros(4, 3),), {})


def test_other_keys_are_arguments() -> None:
    source = ModelSource.model_validate({"_target_": "m.f", "width": 3, "checkpoint": "a.pt", "arguments": {"pt2": 1}})
    assert source.target == "m.f"
    assert source.arguments == {"width": 3, "pt2": 1}
    assert source.checkpoint == Path("a.pt")
    again = ModelSource.model_validate(source.model_dump(mode="json"))
    assert again == source
    assert ModelSource.model_validate(source.model_dump(mode="json", by_alias=True)) == source


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "either _target_"),
        ({"_target_": "m.f", "pt2": "a.pt2"}, "either _target_"),
        ({"pt2": "a.pt2", "checkpoint": "b.pt"}, "leave checkpoint out"),
        ({"pt2": "a.pt2", "input_names": ["x"]}, "leave dynamic and the names out"),
        ({"pt2": "a.pt2", "width": 3}, "width"),
        ({"_target_": "m.f", "dynamic": {"x": ["batch"]}}, "dynamic"),
    ],
)
def test_malformed_sections_are_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelSource.model_validate(content)


def test_a_model_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own_linear_model.py").write_text(
        "from torch import nn\ndef build(out=2, act=None):\n"
        "    return nn.Sequential(nn.Linear(3, out), act or nn.ReLU())\n"
    )
    source = ModelSource.model_validate(
        {
            "_target_": "own_linear_model.build",
            "out": 5,
            "act": {"_target_": "torch.nn.Tanh"},
            "output_names": ["scores"],
            "checkpoint": "weights.pt",
        }
    )
    trained = build_module(source.model_copy(update={"checkpoint": None}), root=tmp_path, seed=3)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    model = build_model(source, root=tmp_path, example=EXAMPLE, seed=4)
    x = torch.randn(6, 3)
    torch.testing.assert_close(model(x), torch.tanh(trained[0](x)))
    assert model.spec.outputs[0].name == "scores"
    assert model.spec.source == "own_linear_model.build with weights.pt"
    assert str(tmp_path) not in describe(source)
    assert source.files(tmp_path) == [tmp_path / "weights.pt"]

    model.save(tmp_path / "model.pt2")
    stored = ModelSource.model_validate({"pt2": "model.pt2"})
    again = build_model(stored, root=tmp_path, example=EXAMPLE, seed=0)
    assert torch.equal(again(x), model(x))
    assert stored.files(tmp_path) == [tmp_path / "model.pt2"]


def test_the_seed_decides_and_the_global_state_stays(tmp_path: Path) -> None:
    source = ModelSource.model_validate({"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2})
    state = torch.get_rng_state()
    first, second, third = (build_module(source, root=tmp_path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, third.weight)


def test_weights_are_brought_to_float32(tmp_path: Path) -> None:
    (tmp_path / "own_half_model.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Linear(3, 2).half()\n"
    )
    source = ModelSource.model_validate({"_target_": "own_half_model.build"})
    assert build_module(source, root=tmp_path, seed=0).weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ({"_target_": "no_such_module.build"}, ModelError, "put no_such_module.py beside the recipe"),
        ({"_target_": "mil_cli.models.resnet.resnet2"}, ModelError, "did you mean 'resnet20'"),
        ({"_target_": "mil_cli.models.resnet.resnet20", "widht": 3}, ModelError, "did you mean 'width"),
        ({"_target_": "torch.nn.Linear", "in_features": 3}, ModelError, "needs out_features"),
        ({"_target_": "builtins.dict"}, ModelError, "must give a torch.nn.Module"),
        ({"_target_": "math.pi"}, ModelError, "not a function or class"),
        ({"_target_": "not a path"}, ModelError, "not a dotted path"),
        ({"_target_": "torch.nn.Linear", "in_features": 3, "out_features": -2}, ModelError, "calling torch.nn.Linear"),
        ({"_target_": "torch.nn.ReLU", "checkpoint": "none.pt"}, CheckpointError, "checkpoint is missing"),
        ({"pt2": "none.pt2"}, MilError, "none.pt2"),
    ],
)
def test_mistakes_are_told(content: dict[str, Any], kind: type[MilError], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        build_model(ModelSource.model_validate(content), root=tmp_path, example=EXAMPLE, seed=0)


@pytest.mark.parametrize(
    ("made", "words"),
    [("torch.jit.script(nn.Linear(3, 2))", "before torch.jit.script"), ("nn.Linear(3, 2, device='meta')", "to_empty")],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit itself
def test_modules_that_cannot_be_captured_are_told(made: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "own_odd_model.py").write_text(f"import torch\nfrom torch import nn\ndef build():\n    return {made}\n")
    source = ModelSource.model_validate({"_target_": "own_odd_model.build"})
    with pytest.raises(ModelError, match=words):
        build_module(source, root=tmp_path, seed=0)
    del sys.modules["own_odd_model"]


def test_modules_of_several_kinds_are_taken() -> None:
    assert isinstance(
        build_module(ModelSource.model_validate({"_target_": "torch.nn.Identity"}), root=Path(), seed=0), nn.Module
    )


def test_a_space_is_captured_as_its_largest_net_with_the_weights_that_it_has() -> None:
    source = ModelSource.model_validate(
        {"_target_": "mil_cli.models.small_nets.small_nets", "widths": [[4, 8], [8, 16]], "blocks": [1, 1]}
    )
    example: tuple[tuple[Any, ...], dict[str, Any]] = ((torch.zeros(4, 1, 8, 8),), {})
    model = build_model(source, root=Path(), example=example, seed=3)
    shared = build_module(source, root=Path(), seed=3)
    assert next(weight.shape[0] for name, weight in model.named_parameters()) == 8
    torch.testing.assert_close(model.state_dict()["head.weight"], shared.state_dict()["head.weight"], rtol=0, atol=0)
