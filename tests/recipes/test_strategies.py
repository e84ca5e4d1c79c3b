"""The recipes that compare strategies of quantization: what their sweep multiplies out reaches every strategy."""

from __future__ import annotations

from pathlib import Path

import pytest

from mil_cli.recipe.load import load_recipe
from mil_cli.stages.quantize.settings import QuantizationConfig

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["speech_recognition", "sentence_encoder", "super_resolution"])
def test_bits_and_layers_are_those_of_all_strategies(name: str) -> None:
    path = RECIPES / name / "recipe.yaml"
    axes = ["stages.rounded.weight_bits=3", "stages.rounded.skip=[first.*]"]
    for overrides, bits, skip in (([], 8, ()), (axes, 3, ("first.*",))):
        stages = load_recipe(path, overrides).stages.values()
        strategies = [stage for stage in stages if isinstance(stage, QuantizationConfig)]
        assert len(strategies) == 3
        assert [(stage.weight_bits, stage.skip) for stage in strategies] == [(bits, skip)] * 3
