"""Scores several candidates at the same time, with the results in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from joblib import Parallel, delayed, parallel_config  # type: ignore[import-untyped]

from mil_cli.errors import StageError
from mil_cli.stages.nas.search.strategy import SearchConfig
from mil_cli.stages.nas.search.trial import C, Proposal, Score


def scores(score: Score[C], proposals: Sequence[Proposal[C]], config: SearchConfig, *, where: str) -> Iterator[float]:
    """Yield the score of each proposal.

    Args:
        score: What scores; with several jobs it is sent to other processes, which import user code by its name.
        proposals: What is scored.
        config: How many at a time, and where.
        where: The settings' key, for errors.

    Raises:
        StageError: Ray is asked for and not installed.
    """
    if config.jobs == 1:
        for proposal in proposals:
            yield score(proposal.candidate, proposal.fidelity)
        return
    with _workers(config, where):
        work = (delayed(score)(proposal.candidate, proposal.fidelity) for proposal in proposals)
        yield from Parallel(n_jobs=config.jobs, return_as="generator")(work)


def _workers(config: SearchConfig, where: str) -> AbstractContextManager[Any]:
    if config.backend == "processes":
        # As many threads as here: sums over other numbers of threads round otherwise.
        return parallel_config("loky", inner_max_num_threads=torch.get_num_threads())  # type: ignore[no-any-return]
    try:
        from ray.util.joblib import register_ray  # type: ignore[import-not-found]
    except ImportError:
        raise StageError(
            "Ray is not installed", where=f"{where}.backend", value="ray", hint="pip install 'mil-cli[ray]'"
        ) from None
    register_ray()
    return parallel_config("ray")  # type: ignore[no-any-return]
