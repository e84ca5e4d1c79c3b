"""The strategies that settings may name."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from mil_cli.stages.nas.search.bayesian import Bayesian
from mil_cli.stages.nas.search.evolution import Evolution
from mil_cli.stages.nas.search.halving import Halving
from mil_cli.stages.nas.search.nsga2 import NSGA2
from mil_cli.stages.nas.search.random import Random
from mil_cli.stages.nas.search.strategy import SearchConfig

SEARCHES: dict[str, type[SearchConfig]] = {
    "random": Random,
    "evolution": Evolution,
    "nsga2": NSGA2,
    "bayesian": Bayesian,
    "halving": Halving,
}
"""The settings of each strategy, by the name that they have under ``strategy``."""

Search: TypeAlias = Annotated[Random | Evolution | NSGA2 | Bayesian | Halving, Field(discriminator="strategy")]
"""The settings of a search, as a stage's settings hold them."""
