"""What ``mil inspect`` says of the bits of layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mil_cli.cli.main import main


def test_the_bits_of_a_recipe_are_shown(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    stages = "stages:\n  quantize: {skip: [head], layers: {conv: {weight_bits: 3}}}"
    assert main(["inspect", str(project(("stages:", stages)) / "recipe.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "W3A8" in shown
    assert "as the stage 'quantize' (quantize/static) gives them" in shown
    assert "head: skipped by 'head'" in shown


def test_signs_ranges_and_what_is_quantized_beside_layers_are_shown(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(project(("stages:", "stages:\n  quantize: {activations: int8, reduce_range: true}")) / "recipe.yaml")
    assert main(["inspect", recipe]) == 0
    shown = capsys.readouterr().out
    assert "policy cnn" in shown
    assert "at least 8 bits next to inputs and outputs" in shown
    assert "activations int8; weights of 8 bits in [-64, 64], a reduced range" in shown
    assert "with integers between layers: 1 mean" in shown


def test_bits_that_are_chosen_in_the_run_are_not_made_up(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project(("quantize: static", "quantize: mixed\n  - /stage/quantize@stages.made: lsq")) / "recipe.yaml"
    stages = "stages:\n  quantize: {by: made, average_bits: 4}\n  made: {activation_bits: 4, first_last_bits: 2}"
    recipe.write_text(recipe.read_text().replace("\nstages:", f"\n{stages}"))
    assert main(["inspect", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "but for those of weights, which it chooses from 2, 4, 8 when it runs" in shown
    assert shown.count("A4") == 2


def test_without_a_recipe_it_shows_what_could_be(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(project(("chain: [quantize]", "chain: [prune]")) / "recipe.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "as quantize/static would give them by itself" in shown
    assert shown.count("W8A8") == 2


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("weight_only", "{first_last_bits: 2}", {"W4": 2, "W4A": 0}),
        ("dynamic", "{weight_bits: 3, first_last_bits: 2}", {"W3A8": 1, "take quantize/static": 1}),
    ],
)
def test_methods_without_calibration_show_their_bits(
    method: str,
    settings: str,
    expected: dict[str, int],
    project: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = project(("quantize: static", f"quantize: {method}")) / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("\nstages:", f"\nstages:\n  quantize: {settings}"))
    assert main(["inspect", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert f"as the stage 'quantize' (quantize/{method}) gives them" in shown
    assert {text: shown.count(text) for text in expected} == expected


def test_weights_that_no_layer_of_torch_holds_can_be_pruned_all_the_same(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    functional = "self.kernel = nn.Parameter(torch.randn(width, 1, 3, 3))"
    folder = project(model=("self.conv = nn.Conv2d(1, width, 3)", functional))
    text = (folder / "model.py").read_text()
    (folder / "model.py").write_text(text.replace("self.conv(image)", "nn.functional.conv2d(image, self.kernel)"))
    assert main(["inspect", str(folder / "recipe.yaml")]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "conv2d" in line)
    assert "8 of 8" in row
