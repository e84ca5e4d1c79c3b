"""A teacher at work beside a training: in evaluation mode, without gradients, its answers kept where views repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.errors import StageError
from mil_cli.graph.taps import tap
from mil_cli.training.layout import use_channels_last
from mil_cli.training.objective import Running

if TYPE_CHECKING:
    from mil_cli.data.base import Batch, Data
    from mil_cli.graph.model import Model
    from mil_cli.task.base import Task

_PROBE = 32


class Teacher:
    """A model that answers the batches of a training.

    Args:
        model: The teacher; it is not changed.
        task: Gives the model's inputs.
        running: The training that it helps.
        taps: Module paths whose values `study` gives.
        memory: Where answers are kept, if views repeat; None computes each anew.
    """

    def __init__(
        self, model: Model, task: Task, running: Running, *, taps: Sequence[str] = (), memory: Memory | None = None
    ) -> None:
        self._model = model.clone().eval()
        use_channels_last(self._model, wanted=running.channels_last)
        self._model.graph.to(running.device)
        self._graph = tap(self._model, taps).graph() if taps else self._model.graph
        self._taps = bool(taps)
        self._task, self._running, self._memory = task, running, memory

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
        outputs, values = self._forward(*self._task.inputs(batch))
        return outputs, values

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        outputs = self._forward(args, kwargs)
        return outputs[0] if self._taps else outputs

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            try:
                return self._running.forward(self._graph, *args, **kwargs)
            except RuntimeError as problem:
                raise StageError(
                    f"the teacher does not run on the student's inputs: {problem}",
                    where="teacher",
                    hint="the teacher must take the same inputs as the model",
                ) from problem


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


class Memory:
    """Answers to single samples, in one memory-mapped file of bounded size, found by the content of the inputs.

    A sample whose view changed has another content, so that it is computed; what does not fit is computed each time.

    Args:
        folder: An empty folder.
        limit: Bytes at most.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._path = folder / "answers.bin"
        self._limit = limit
        self._rows: dict[bytes, int] = {}
        self._layout: _Layout | None = None
        self._stored = torch.empty(0, 0, dtype=torch.uint8)

    def answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compute: Callable[..., Any]) -> Any:
        """Return the outputs for a call, from the file if all its samples are there, else by ``compute(args, kwargs)``.

        The first axis of every tensor counts the samples; calls of which that is not true are computed.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        keys = _sample_keys(leaves)
        if keys is None:
            return compute(args, kwargs)
        if self._layout is not None and all(key in self._rows for key in keys):
            rows = torch.tensor([self._rows[key] for key in keys])
            device = next(leaf for leaf in leaves if isinstance(leaf, Tensor)).device
            return self._layout.unpack(self._stored[rows], device)
        outputs = compute(args, kwargs)
        layout = _Layout.of(outputs, samples=len(keys))
        if layout is not None and (self._layout is None or layout == self._layout):
            self._keep(keys, layout, outputs)
        return outputs

    def _keep(self, keys: list[bytes], layout: _Layout, outputs: Any) -> None:
        if self._layout is None:
            self._layout = layout
            shape = (max(self._limit // layout.row_bytes, 1), layout.row_bytes)
            # The file is sparse: it takes place only where it is written.
            self._stored = torch.from_numpy(np.memmap(self._path, dtype=np.uint8, mode="w+", shape=shape))
        for key, row in zip(keys, layout.pack(outputs), strict=True):
            if key not in self._rows and len(self._rows) < len(self._stored):
                self._stored[len(self._rows)] = row
                self._rows[key] = len(self._rows)


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
        if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples for leaf in leaves):
            return None
        layout = cls(tree, tuple(tuple(leaf.shape[1:]) for leaf in leaves), tuple(leaf.dtype for leaf in leaves))
        return layout if layout.row_bytes else None

    def pack(self, outputs: Any) -> Tensor:
        """Return the outputs as bytes of shape (samples, row_bytes)."""
        leaves = (leaf.detach().cpu() for leaf in pytree.tree_leaves(outputs))
        return torch.cat([leaf.reshape(len(leaf), -1).contiguous().view(torch.uint8) for leaf in leaves], 1)

    def unpack(self, rows: Tensor, device: torch.device) -> Any:
        """Return the outputs that `pack` gave these rows of."""
        parts = torch.split(rows, self.sizes, 1)
        leaves = [
            part.contiguous().view(dtype).view(len(rows), *shape).to(device)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.tree)


def _sample_keys(leaves: Sequence[Any]) -> list[bytes] | None:
    """Return a digest for each sample of a call's inputs; None if its tensors do not all count samples first."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(not tensor.ndim or len(tensor) != len(tensors[0]) for tensor in tensors):
        return None
    constants = repr([leaf for leaf in leaves if not isinstance(leaf, Tensor)]).encode()
    arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in tensors]
    keys = []
    for index in range(len(arrays[0])):
        digest = hashlib.blake2b(constants, digest_size=16)
        for array in arrays:
            digest.update(array[index].data)
        keys.append(digest.digest())
    return keys
