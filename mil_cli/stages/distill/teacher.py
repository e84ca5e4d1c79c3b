"""A teacher at work beside a training: in evaluation mode, without gradients, its answers kept where views repeat."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.errors import StageError
from mil_cli.events import Progress, SilentProgress
from mil_cli.graph.taps import tap
from mil_cli.training.layout import use_channels_last
from mil_cli.training.objective import Running

if TYPE_CHECKING:
    from mil_cli.data.base import Batch, Data
    from mil_cli.graph.model import Model
    from mil_cli.task.base import Task

_PROBE = 32
_LEFT_FREE = 10**9  # bytes of the disk that checkpoints and others may need
_UNFIT = (RuntimeError, TypeError, ValueError, IndexError, KeyError)


class Teacher:
    """A model that answers the batches of a training.

    Args:
        model: The teacher; it is not changed.
        task: Gives the model's inputs.
        running: The training that it helps.
        taps: Module paths whose values `study` gives.
        memory: Where answers are kept, if views repeat; None computes each anew.
        where: The recipe's key that names the teacher.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        running: Running,
        *,
        taps: Sequence[str] = (),
        memory: Memory | None = None,
        where: str = "teacher",
    ) -> None:
        self._model = model.clone().eval()
        use_channels_last(self._model, wanted=running.channels_last)
        self._model.graph.to(running.device)
        self._graph = tap(self._model, taps).graph() if taps else self._model.graph
        self._taps = bool(taps)
        self._task, self._running, self._memory, self._where = task, running, memory, where

    def __call__(self, batch: Batch) -> Any:
        """Return the outputs for a batch, without gradients.

        Raises:
            StageError: The teacher does not run on the student's inputs.
        """
        args, kwargs = self._task.inputs(batch)
        if self._memory is not None:
            return self._memory.answer(args, kwargs, self._run)
        return self._run(args, kwargs)

    def study(self, batch: Batch) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the outputs and the values at the taps, without gradients.

        Raises:
            StageError: The teacher does not run on the student's inputs.
        """
        return self._forward(*self._task.inputs(batch))

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._forward(args, kwargs)[0]

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Tensor]]:
        with torch.no_grad():
            try:
                result = self._running.forward(self._graph, *args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except _UNFIT as problem:
                raise StageError(
                    f"the teacher does not run on the student's inputs: {problem}",
                    where=self._where,
                    hint="the teacher must take the same inputs as the model",
                ) from problem
        return result if self._taps else (result, {})


def views_repeat(data: Data, task: Task, *, seed: int) -> bool:
    """Whether training gives the same inputs in each epoch, as far as the first samples tell."""
    passes = (
        next(iter(data.train.batches(min(_PROBE, len(data.train)), augment=True, seed=seed, epoch=epoch)))
        for epoch in range(2)
    )
    first, second = (pytree.tree_leaves(task.inputs(batch)) for batch in passes)
    return all(
        torch.equal(one, other) if isinstance(one, Tensor) else one == other
        for one, other in zip(first, second, strict=True)
    )


def answers_by_sample(model: Model) -> bool:
    """Whether the first axis of everything that a model takes and gives counts the samples."""
    tensors = (*model.spec.inputs, *model.spec.outputs)
    return bool(tensors) and all(tensor.batch_axis() == 0 for tensor in tensors)


class Memory:
    """Answers to single samples, in one file of bounded size, found by the content of the inputs.

    A sample whose view changed has another content, so that it is computed; what does not fit is computed each time,
    and so is everything from when the file can't be written or read, on a full disk say.

    Args:
        folder: An empty folder.
        limit: Bytes at most; 1 GB of the disk is left free in any case.
        progress: Where the end of keeping is told.
    """

    def __init__(self, folder: Path, *, limit: int, progress: Progress | None = None) -> None:
        self._path = folder / "answers.bin"
        self._limit = limit
        self._progress = progress if progress is not None else SilentProgress()
        self._rows: dict[bytes, int] = {}
        self._layout: _Layout | None = None

    def answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compute: Callable[..., Any]) -> Any:
        """Return the outputs for a call, from the file if all its samples are there, else by ``compute(args, kwargs)``.

        The first axis of every tensor counts the samples; see `answers_by_sample`.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        keys = _sample_keys(leaves) if self._limit else None
        if not keys:
            return compute(args, kwargs)
        if self._layout is not None and all(key in self._rows for key in keys):
            rows = self._read([self._rows[key] for key in keys], self._layout.row_bytes)
            if rows is not None:
                return self._layout.unpack(rows, next(leaf for leaf in leaves if isinstance(leaf, Tensor)).device)
        outputs = compute(args, kwargs)
        layout = _Layout.of(outputs, samples=len(keys))
        if layout is not None and (self._layout is None or layout == self._layout):
            self._layout = layout
            self._keep(keys, layout.pack(outputs))
        return outputs

    def _keep(self, keys: Sequence[bytes], rows: Tensor) -> None:
        row_bytes = rows.shape[1]
        free = shutil.disk_usage(self._path.parent).free - _LEFT_FREE
        room = max(min(self._limit // row_bytes - len(self._rows), free // row_bytes), 0)
        new = {key: index for index, key in enumerate(keys) if key not in self._rows}
        added = list(new.items())[:room]
        if not added:
            return
        try:
            with self._path.open("ab") as file:
                file.write(rows[[index for _, index in added]].numpy().data)
        except OSError as problem:
            self._stop(problem)
            return
        for key, _ in added:
            self._rows[key] = len(self._rows)

    def _read(self, places: Sequence[int], row_bytes: int) -> Tensor | None:
        """Return rows as bytes of shape (rows, row_bytes); None if they are lost."""
        rows = bytearray(len(places) * row_bytes)
        view = memoryview(rows)
        try:
            with self._path.open("rb", buffering=0) as file:
                for index, place in enumerate(places):
                    file.seek(place * row_bytes)
                    if file.readinto(view[index * row_bytes : (index + 1) * row_bytes]) != row_bytes:
                        raise OSError("the file is shorter than what was written")
        except OSError as problem:
            self._stop(problem)
            return None
        return torch.frombuffer(rows, dtype=torch.uint8).view(len(places), row_bytes)

    def _stop(self, problem: OSError) -> None:
        self._limit = 0
        self._rows.clear()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        self._progress.notice(f"teacher outputs are no longer kept, each is computed from now on: {problem}")


@dataclass(frozen=True)
class _Layout:
    """How the outputs for one sample lie in a row of bytes."""

    tree: pytree.TreeSpec
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return [dtype.itemsize * torch.Size(shape).numel() for shape, dtype in pairs]

    @property
    def row_bytes(self) -> int:
        """Bytes of all."""
        return sum(self.sizes)

    @classmethod
    def of(cls, outputs: Any, *, samples: int) -> _Layout | None:
        """Return the layout of outputs that give every sample a row of each tensor, else None."""
        leaves, tree = pytree.tree_flatten(outputs)
        if not all(_by_sample(leaf, samples) for leaf in leaves):
            return None
        layout = cls(tree, tuple(tuple(leaf.shape[1:]) for leaf in leaves), tuple(leaf.dtype for leaf in leaves))
        return layout if layout.row_bytes else None

    def pack(self, outputs: Any) -> Tensor:
        """Return the outputs as bytes of shape (samples, row_bytes)."""
        return torch.cat([_as_bytes(leaf) for leaf in pytree.tree_leaves(outputs)], 1)

    def unpack(self, rows: Tensor, device: torch.device) -> Any:
        """Return the outputs that `pack` gave these rows of."""
        parts = torch.split(rows, self.sizes, 1)
        leaves = [
            # A copy, since bytes that lie in the midst of a row may not begin where the dtype could.
            part.clone(memory_format=torch.contiguous_format).view(-1).view(dtype).view(len(rows), *shape).to(device)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.tree)


def _sample_keys(leaves: Sequence[Any]) -> list[bytes] | None:
    """Return a digest for each sample of a call's inputs; None if its tensors do not all count samples first."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not tensors[0].ndim or not all(_by_sample(tensor, len(tensors[0])) for tensor in tensors):
        return None
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    forms = [(str(tensor.dtype), tuple(tensor.shape[1:])) for tensor in tensors]
    common = repr((others, forms)).encode()
    arrays = [_as_bytes(tensor).numpy() for tensor in tensors]
    keys = []
    for index in range(len(arrays[0])):
        digest = hashlib.blake2b(common, digest_size=16)
        for array in arrays:
            digest.update(array[index].data)
        keys.append(digest.digest())
    return keys


def _by_sample(value: object, samples: int) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return value.ndim > 0 and len(value) == samples


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return a copy, on the CPU, as bytes of shape (samples, bytes of each)."""
    # A copy, since `contiguous` leaves odd strides of axes of length 1, which no other dtype can view.
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    return flat.view(len(tensor), flat.numel() // max(len(tensor), 1))
