"""Calls functions in several processes at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, TypeVar

from mil_cli.errors import MilError

R = TypeVar("R")

Backend = Literal["processes", "ray"]


class CallAll(Protocol):
    """Calls a function once for each of some arguments."""

    def __call__(self, function: Callable[..., R], arguments: Iterable[tuple[Any, ...]], /) -> Iterator[R]:
        """Yield what the function returns; all of it is to be taken before the next call.

        Args:
            function: With several workers it and its arguments are pickled, and they import user code by its name.
            arguments: Positional arguments of each call.

        Raises:
            MilError: A worker was ended from outside.
        """
        ...


@contextmanager
def workers(
    count: int, *, threads: int, where: str, backend: Backend = "processes", ordered: bool = True
) -> Iterator[CallAll]:
    """Give what calls functions in some workers, which live until the context ends.

    Args:
        count: How many calls run at the same time; 1: one after another in this process.
        threads: Threads of each worker; sums over other numbers of threads round otherwise.
        where: The setting that asks for so many workers, for errors.
        backend: ``processes`` of this machine, or ``ray``, which gives all results of a call together at its end.
        ordered: Whether results come in the order of the arguments; else as they are there.

    Raises:
        MilError: Ray is asked for and not installed.
    """
    if count == 1:
        yield lambda function, arguments: (function(*each) for each in arguments)
        return
    from joblib import Parallel, delayed  # type: ignore[import-untyped]
    from joblib.externals.loky.process_executor import TerminatedWorkerError  # type: ignore[import-untyped]

    # joblib's backend for Ray can only give all results at once.
    kind = "list" if backend == "ray" else "generator" if ordered else "generator_unordered"
    # Calls are long: each is given away by itself, when a worker is free.
    with (
        _configured(backend, threads, where),
        Parallel(n_jobs=count, return_as=kind, pre_dispatch=count, batch_size=1) as parallel,
    ):

        def call(function: Callable[..., R], arguments: Iterable[tuple[Any, ...]], /) -> Iterator[R]:
            try:
                yield from parallel(delayed(function)(*each) for each in arguments)
            except TerminatedWorkerError as error:
                hint = "memory may have run out: set it lower; what is done is kept"
                raise MilError("a worker was ended from outside", where=where, value=count, hint=hint) from error

        yield call


def _configured(backend: Backend, threads: int, where: str) -> AbstractContextManager[Any]:
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
