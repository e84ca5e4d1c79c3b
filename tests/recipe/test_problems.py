"""Pydantic's findings as messages: the full key, the value, the bound, a did-you-mean."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from mil_cli.errors import RecipeError
from mil_cli.recipe.problems import dotted, validate


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float = Field(0.5, gt=0, le=1)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["minmax", "percentile"] = "minmax"
    inner: Inner | None = None
    steps: list[int] = []
    pair: tuple[int, ...] = Field((1,), min_length=1, max_length=2)
    named: dict[str, Inner] = {}
    flag: bool = False
    need: int


@pytest.mark.parametrize(
    ("content", "where", "expected"),
    [
        ({"need": 1, "kindd": "x"}, "stages.q.kindd", "did you mean 'kind'?"),
        ({"need": 1, "inner": {"rates": 1}}, "stages.q.inner.rates", "did you mean 'rate'?"),
        ({"need": 1, "named": {"rate": {"rates": 1}}}, "stages.q.named.rate.rates", "did you mean 'rate'?"),
        ({"need": 1, "pair": ["x"]}, "stages.q.pair[0]", "whole number"),
        ({"need": 1, "pair": []}, "stages.q.pair", "must have at least 1 entry"),
        ({"need": 1, "pair": [1, 2, 3]}, "stages.q.pair", "must have at most 2 entries"),
        ({"need": 1, "inner": {"rate": 1.5}}, "stages.q.inner.rate", "less than or equal to 1"),
        ({"need": 1, "inner": 3}, "stages.q.inner", "mapping"),
        ({"need": 1, "kind": "minmaxx"}, "stages.q.kind", "did you mean 'minmax'?"),
        ({"need": 1, "steps": [1, "x"]}, "stages.q.steps[1]", "whole number"),
        ({"need": 1, "steps": 3}, "stages.q.steps", "list"),
        ({"need": 1, "flag": "perhaps"}, "stages.q.flag", "true or false"),
        ({}, "stages.q.need", "set stages.q.need"),
        ({"need": 1.5}, "stages.q.need", "whole number"),
    ],
)
def test_message(content: dict[str, object], where: str, expected: str) -> None:
    problems: list[RecipeError] = []
    assert validate(Outer, content, where="stages.q", problems=problems) is None
    (problem,) = problems
    assert problem.where == where
    assert expected in str(problem)


def test_every_problem_is_reported() -> None:
    problems: list[RecipeError] = []
    validate(Outer, {"kind": "x", "inner": {"rate": -1}, "flag": 7, "other": 1}, problems=problems)
    assert {problem.where for problem in problems} == {"kind", "inner.rate", "flag", "other", "need"}


def test_dotted() -> None:
    assert dotted("stages", "prune", 2, "x") == "stages.prune[2].x"
    assert dotted("", "seed") == "seed"
