"""Calls a function in several processes at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

from mil_cli.errors import MilError

R = TypeVar("R")

Backend = Literal["processes", "ray"]


def call_in_workers(
    function: Callable[..., R],
    arguments: Iterable[tuple[Any, ...]],
    *,
    workers: int,
    threads: int,
    where: str,
    backend: Backend = "processes",
    ordered: bool = True,
) -> Iterator[R]:
    """Yield what a function returns for each of some arguments.

    Args:
        function: What is called; it and its arguments are pickled, and workers import user code by its name.
        arguments: Positional arguments of each call.
        workers: How many calls run at the same time; 1: one after another in this process.
        threads: Threads of each worker; sums over other numbers of threads round otherwise.
        where: The setting that asks for so many workers, for errors.
        backend: ``processes`` of this machine, or ``ray``.
        ordered: Whether results come in the order of the arguments; else as they are there.

    Raises:
        MilError: Ray is asked for and not installed, or a worker was ended from outside.
    """
    if workers == 1:
        yield from (function(*each) for each in arguments)
        return
    from joblib import Parallel, delayed  # type: ignore[import-untyped]
    from joblib.externals.loky.process_executor import TerminatedWorkerError  # type: ignore[import-untyped]

    kind = "generator" if ordered else "generator_unordered"
    with _workers(backend, threads, where):
        # Calls are long: each is given away by itself, when a worker is free.
        parallel = Parallel(n_jobs=workers, return_as=kind, pre_dispatch=workers, batch_size=1)
        try:
            yield from parallel(delayed(function)(*each) for each in arguments)
        except TerminatedWorkerError as error:
            hint = "memory may have run out: set it lower; what is done is kept"
            raise MilError("a worker was ended from outside", where=where, value=workers, hint=hint) from error


def _workers(backend: Backend, threads: int, where: str) -> AbstractContextManager[Any]:
    from joblib import parallel_config

    if backend == "processes":
        return parallel_config("loky", inner_max_num_threads=threads)  # type: ignore[no-any-return]
    try:
        from ray.util.joblib import register_ray  # type: ignore[import-not-found]
    except ImportError:
        hint = "pip install 'mil-cli[ray]'"
        raise MilError("Ray is not installed, which runs them", where=where, value=backend, hint=hint) from None
    register_ray()
    return parallel_config("ray")  # type: ignore[no-any-return]
