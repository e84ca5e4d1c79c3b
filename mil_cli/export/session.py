"""Runs an ONNX file in onnxruntime behind the calling form of the torch model that it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.errors import ExportError
from mil_cli.graph.samples import flatten_call
from mil_cli.graph.spec import ModelSpec
from mil_cli.graph.tree import Record as Record  # reading an output tree needs its containers registered

_QUIET = 3
"""onnxruntime's severity from which on it logs: errors."""


def session_options(*, threads: int) -> onnxruntime.SessionOptions:
    """Return the options of every session of ours: so many threads, none of which spins while it waits.

    Raises:
        ExportError: `threads` is not positive (0 would let onnxruntime choose).
    """
    if threads < 1:
        raise ExportError("a session needs at least one thread", value=threads, hint="set device.threads to 1 or more")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _QUIET
    return options


def open_session(
    path: Path, *, threads: int, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """Load an ONNX file into onnxruntime on the CPU.

    Raises:
        ExportError: There is no such file, or onnxruntime cannot load it.
    """
    if not Path(path).is_file():
        raise ExportError(f"there is no file {path}", hint="give the path of an .onnx file")
    try:
        return onnxruntime.InferenceSession(
            str(path), options or session_options(threads=threads), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path}: {error}",
            hint="check that the file is a complete ONNX model",
        ) from error


class OnnxModel:
    """An ONNX file that is called like the torch model: same args and kwargs, same outputs.

    Args:
        path: The file.
        spec: What the model takes and gives; the file's inputs and outputs must have its names.
        threads: How many threads onnxruntime uses.
        options: Of the session, `threads` among them; None: those of `session_options`.

    Raises:
        ExportError: The file cannot be loaded, or does not have the inputs and outputs of `spec`.
    """

    def __init__(
        self, path: Path, spec: ModelSpec, *, threads: int = 1, options: onnxruntime.SessionOptions | None = None
    ) -> None:
        self.path = Path(path)
        self.spec = spec
        self._session = open_session(self.path, threads=threads, options=options)
        for what, found, tensors in (
            ("inputs", self._session.get_inputs(), spec.inputs),
            ("outputs", self._session.get_outputs(), spec.outputs),
        ):
            names = [value.name for value in found]
            expected = [tensor.name for tensor in tensors]
            if names != expected:
                raise ExportError(f"{path} has other {what} than the model ({expected})", value=names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file on a call's tensors; the outputs are torch tensors in the model's own tree."""
        feeds = feeds_of(self.spec, args, kwargs)
        return unflatten_outputs(self.spec, [torch.from_numpy(value) for value in self.run(feeds)])

    def run(self, feeds: Mapping[str, npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        """Run the file on arrays by name; returns its outputs in the order of the specification.

        Raises:
            ExportError: onnxruntime fails on these inputs.
        """
        try:
            return [np.asarray(value) for value in self._session.run(None, dict(feeds))]
        except Exception as error:  # as above
            shapes = {name: list(value.shape) for name, value in feeds.items()}
            raise ExportError(f"onnxruntime fails on {self.path}: {error}", value=shapes) from error


def feeds_of(spec: ModelSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of a call as arrays, by the names that the file's inputs have.

    Raises:
        ModelError: The call does not have the form that the model was captured with.
    """
    tensors = flatten_call(spec, args, kwargs)
    return {
        tensor.name: value.detach().cpu().contiguous().numpy()
        for tensor, value in zip(spec.inputs, tensors, strict=True)
    }


def unflatten_outputs(spec: ModelSpec, tensors: Sequence[Tensor]) -> Any:
    """Put output tensors, in the order of `spec.outputs`, into the tree that the torch model returns."""
    tree = pytree.treespec_loads(spec.out_tree)
    remaining = iter(tensors)
    constants = spec.out_constants
    leaves = [constants[index] if index in constants else next(remaining) for index in range(tree.num_leaves)]
    return pytree.tree_unflatten(leaves, tree)
