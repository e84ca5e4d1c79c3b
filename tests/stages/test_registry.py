"""The registry: methods are found by name, errors say what there is, orders that cannot work are refused."""

from __future__ import annotations

from typing import ClassVar

import pytest

from mil_cli.errors import StageError
from mil_cli.stages.registry import METHODS, StageConfig, check_order, config_type, function_of


@pytest.mark.parametrize(("family", "method"), sorted(METHODS))
def test_every_listed_method_registers_itself(family: str, method: str) -> None:
    found = config_type(family, method)
    assert (found.family, found.method) == (family, method)
    assert found.__doc__


def test_unknown_names_say_what_was_meant() -> None:
    with pytest.raises(StageError, match=r"no family 'prun'.*\n.*did you mean 'prune'"):
        config_type("prun", "magnitude")
    with pytest.raises(StageError, match=r"no method 'magnitud'.*\n.*did you mean 'magnitude'"):
        config_type("prune", "magnitud")


class _Cut(StageConfig):
    family: ClassVar[str] = "prune"
    method: ClassVar[str] = "cut"
    never_after: ClassVar[dict[str, str]] = {"quantize": "scales would no longer fit"}


class _Round(StageConfig):
    family: ClassVar[str] = "quantize"
    method: ClassVar[str] = "round"


def test_an_order_that_cannot_work_is_named_with_the_reason() -> None:
    assert check_order([("cut", _Cut()), ("round", _Round())]) == []
    (problem,) = check_order([("round", _Round()), ("cut", _Cut())])
    assert "'cut' (prune) cannot follow 'round' (quantize): scales would no longer fit" in str(problem)
    assert problem.hint == "put 'cut' before 'round'"


def test_stages_that_exclude_each_other_are_not_told_to_change_places() -> None:
    class Again(_Round):
        never_after: ClassVar[dict[str, str]] = {"quantize": "two sets of quantizers"}

    (problem,) = check_order([("first", Again()), ("second", Again())])
    assert problem.hint == "leave one of the two out"


def test_settings_are_frozen_and_closed() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="extra"):
        _Cut.model_validate({"ratio": 0.5})
    assert function_of(config_type("train", "supervised")()) is not None
