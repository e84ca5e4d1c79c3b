"""Goals: units, bounds that make no sense, and what is asked."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mil_cli.recipe.goals import Goals


def test_units_become_plain_numbers() -> None:
    goals = Goals.model_validate(
        {
            "quality": {"max_drop": "1%", "min": 0.9},
            "latency": {"max": "2 ms", "max_ratio": "25%"},
            "size": {"max": "100 kB"},
            "macs": {"max": "6M"},
            "memory": {"max": "1 MiB"},
            "energy": {"max": "3 mJ"},
            "cost": {"max": 0.5},
        }
    )
    assert goals.asked() == {
        "quality": {"max_drop": 0.01, "min": 0.9},
        "latency": {"max": 0.002, "max_ratio": 0.25},
        "size": {"max": 100_000.0},
        "macs": {"max": 6e6},
        "memory": {"max": 2.0**20},
        "energy": {"max": 0.003},
        "cost": {"max": 0.5},
    }


def test_no_goals_ask_nothing() -> None:
    assert Goals().asked() == {}


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ({"latency": {}}, ("latency",), "bounds nothing"),
        ({"latency": None}, ("latency",), "bounds nothing"),
        ({"latncy": {"max": 1}}, ("latncy",), "Extra inputs"),
        ({"size": {"max": "100 furlongs"}}, ("size", "max"), "100 furlongs"),
        ({"size": {"max": 0}}, ("size", "max"), "can never be met"),
        ({"size": {"max": -3}}, ("size", "max"), "can never be met"),
        ({"size": {"max": True}}, ("size", "max"), "not a size"),
        ({"latency": {"max_ratio": "inf"}}, ("latency", "max_ratio"), "inf"),
        ({"latency": {"max_ratio": float("inf")}}, ("latency", "max_ratio"), "can never be met"),
        ({"quality": {"max_drop": 1}}, ("quality", "max_drop"), "100 %"),
        ({"quality": {"max_drop": "150%"}}, ("quality", "max_drop"), "100 %"),
        ({"quality": {"max_drop": -2}}, ("quality", "max_drop"), "100 %"),
        ({"quality": {"min": float("nan")}}, ("quality", "min"), "finite"),
        ({"quality": 0.9}, ("quality",), "dictionary"),
    ],
)
def test_goals_that_mean_nothing_are_refused(content: dict[str, Any], key: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Goals.model_validate(content)
    (finding,) = caught.value.errors()
    assert finding["loc"] == key
    assert expected in finding["msg"]


def test_a_gain_may_be_asked_for() -> None:
    assert Goals.model_validate({"quality": {"max_drop": "-1%"}}).asked() == {"quality": {"max_drop": -0.01}}
