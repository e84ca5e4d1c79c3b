"""What a model takes and gives: names, shapes, dtypes and dynamic axes of its inputs and outputs, as versioned JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mil_cli.errors import ModelError

BATCH = "batch"
SPEC_VERSION = 1


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that enters or leaves a model.

    Attributes:
        name: The name it keeps in every exported file.
        shape: Its shape on the samples; dynamic axes show the samples' size.
        dtype: The dtype's short name, such as ``float32``.
        dynamic: The name of each axis whose size may change.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dynamic: Mapping[int, str] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {self.dtype!r}")
        return dtype

    def batch_axis(self, name: str = BATCH) -> int | None:
        """The axis whose size is the number of samples, or None."""
        return next((axis for axis, axis_name in sorted(self.dynamic.items()) if axis_name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "dynamic": {str(axis): name for axis, name in sorted(self.dynamic.items())},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorSpec:
        """Read what `to_json` wrote."""
        spec = cls(
            name=str(value["name"]),
            shape=tuple(int(size) for size in value["shape"]),
            dtype=str(value["dtype"]),
            dynamic={int(axis): str(name) for axis, name in value["dynamic"].items()},
        )
        if spec.torch_dtype is None or any(not 0 <= axis < len(spec.shape) for axis in spec.dynamic):
            raise ValueError(f"bad tensor specification {value!r}")
        return spec


@dataclass(frozen=True)
class ModelSpec:
    """What a model takes and gives, and where it came from.

    Attributes:
        inputs: The tensors among the leaves of ``(args, kwargs)``, in their order.
        outputs: The tensors among the leaves of the outputs, in their order.
        in_tree: The tree of ``(args, kwargs)``, by `torch.utils._pytree.treespec_dumps`.
        out_tree: The tree of the outputs, in the same form.
        out_constants: Leaves of the outputs that are not tensors, by their index among all leaves.
        task: The name of the task the model is for.
        source: Where the model came from, in words.
        notices: What the user should know: dimensions that became static, what training mode had and this has not.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    in_tree: str
    out_tree: str
    out_constants: Mapping[int, Any] = field(default_factory=dict)
    task: str | None = None
    source: str = ""
    notices: tuple[str, ...] = ()

    @property
    def batch(self) -> str | None:
        """The name of the batch dimension: ``batch`` if any axis has it, else None."""
        return BATCH if any(tensor.batch_axis() is not None for tensor in self.inputs) else None

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the model is fixed to, by its first input; None if it takes any."""
        if self.batch is not None or not self.inputs or not self.inputs[0].shape:
            return None
        return self.inputs[0].shape[0]

    def with_(self, **changes: Any) -> ModelSpec:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def in_place_of(self, other: ModelSpec) -> ModelSpec:
        """Return this specification under the names of another, whose model this one's is to replace.

        Raises:
            ModelError: Shapes, dtypes, dynamic axes or trees differ, so that it is no drop-in.
        """
        for kind, own, wanted in (("in", self.inputs, other.inputs), ("out", self.outputs, other.outputs)):
            mine, theirs = ([replace(tensor, name="").to_json() for tensor in side] for side in (own, wanted))
            if mine != theirs:
                raise ModelError(
                    f"its {kind}puts are {[_shown(tensor) for tensor in own]}, those of the model that it is to replace"
                    f" {[_shown(tensor) for tensor in wanted]}",
                    hint="it must take and give the same shapes and types, with the same dynamic axes",
                )
        for own_tree, wanted_tree in ((self.in_tree, other.in_tree), (self.out_tree, other.out_tree)):
            if own_tree != wanted_tree:
                raise ModelError(
                    "its arguments or outputs are nested otherwise than those of the model that it is to replace",
                    value=own_tree,
                    hint="forward must take the same arguments and return the same structure",
                )
        return self.with_(inputs=other.inputs, outputs=other.outputs, task=other.task)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            "version": SPEC_VERSION,
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
            "in_tree": self.in_tree,
            "out_tree": self.out_tree,
            "out_constants": {str(index): value for index, value in sorted(self.out_constants.items())},
            "task": self.task,
            "source": self.source,
            "notices": list(self.notices),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: If something is missing or has the wrong form.
        """
        if value["version"] != SPEC_VERSION:
            raise ValueError(f"specification version {value['version']!r}, this package reads {SPEC_VERSION}")
        return cls(
            inputs=tuple(TensorSpec.from_json(tensor) for tensor in value["inputs"]),
            outputs=tuple(TensorSpec.from_json(tensor) for tensor in value["outputs"]),
            in_tree=str(value["in_tree"]),
            out_tree=str(value["out_tree"]),
            out_constants={int(index): constant for index, constant in value["out_constants"].items()},
            task=value["task"],
            source=str(value["source"]),
            notices=tuple(str(notice) for notice in value["notices"]),
        )


def _shown(tensor: TensorSpec) -> str:
    return f"{tensor.dtype} {tuple(tensor.dynamic.get(axis, size) for axis, size in enumerate(tensor.shape))}"
