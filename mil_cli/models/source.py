"""Where the uncompressed model comes from: a function or class with a checkpoint, or a `.pt2` file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mil_cli.errors import ModelError
from mil_cli.models.user_code import call_target

if TYPE_CHECKING:
    from torch import nn

    from mil_cli.graph.model import Model


class ModelSource(BaseModel):
    """The settings of the section ``model``.

    Keys that are not listed here are arguments of the target; ``arguments`` takes those whose names are listed.

    Attributes:
        target: Dotted path of a function or class that gives an `nn.Module` (the key is ``_target_``).
        arguments: Its keyword arguments; nested mappings with a ``_target_`` are built first.
        pt2: A `.pt2` file, instead of a target.
        checkpoint: Weights for the target: safetensors, or a `.pt` file that loads with ``weights_only=True``.
        dynamic: For each input the axes whose size may change, and their names, such as ``{x: {0: batch}}``; None: the
            batch axis is found by two batches.
        input_names: Names for the model's inputs; None: those of `forward`.
        output_names: Names for the model's outputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_alias=True, validate_by_name=True)

    target: str | None = Field(None, alias="_target_")
    arguments: dict[str, Any] = Field(default_factory=dict)
    pt2: Path | None = None
    checkpoint: Path | None = None
    dynamic: dict[str, dict[int, str]] | None = None
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather_arguments(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or content.get("_target_", content.get("target")) is None:
            return content
        own = {"_target_", *cls.model_fields}
        arguments = {key: value for key, value in content.items() if key not in own}
        given = content.get("arguments") or {}
        if not isinstance(given, Mapping):
            return content
        kept = {key: value for key, value in content.items() if key in own}
        return {**kept, "arguments": {**arguments, **given}}

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSource:
        if (self.target is None) == (self.pt2 is None):
            raise ValueError("give either _target_ (a function or class that builds the model) or pt2 (a .pt2 file)")
        if self.pt2 is not None and self.checkpoint is not None:
            raise ValueError("a .pt2 file holds its weights; leave checkpoint out")
        if self.pt2 is not None and (self.dynamic is not None or self.input_names or self.output_names):
            raise ValueError("a .pt2 file fixes its names and dynamic axes; leave dynamic and the names out")
        return self

    def files(self, root: Path) -> list[Path]:
        """Return the files that the model is made from; relative paths are taken from the folder `root`."""
        return [resolve_path(path, root) for path in (self.pt2, self.checkpoint) if path is not None]


def build_model(
    source: ModelSource, *, root: Path, example: tuple[tuple[Any, ...], Mapping[str, Any]], seed: int
) -> Model:
    """Build a model, load its weights, and capture it; a module that holds choices as its largest architecture.

    Args:
        source: Where it comes from.
        root: The recipe's folder.
        example: Positional and keyword arguments that the model is captured with, of a batch of 2 samples or more.
        seed: Seed of the weights that no checkpoint gives.

    Raises:
        ModelError: The target cannot be called or gives no module.
        CheckpointError: The weights cannot be read safely or do not fit.
        CaptureError: `torch.export` cannot capture the model.
        ArchiveError: The `.pt2` file is missing, damaged or unsafe.
    """
    from mil_cli.graph.model import Model
    from mil_cli.spaces.largest import largest

    if source.pt2 is not None:
        return Model.load(resolve_path(source.pt2, root))
    return capture_module(source, largest(build_module(source, root=root, seed=seed)), example=example)


def capture_module(
    source: ModelSource, module: nn.Module, *, example: tuple[tuple[Any, ...], Mapping[str, Any]]
) -> Model:
    """Capture a module that a source gave, or one that takes its place, with the source's names and dynamic axes.

    Args:
        source: Where it comes from.
        module: The module.
        example: Positional and keyword arguments, of a batch of 2 samples or more.

    Raises:
        CaptureError: `torch.export` cannot capture the module.
    """
    from mil_cli.graph.model import Model

    return Model.capture(
        module,
        example[0],
        dict(example[1]),
        dynamic=source.dynamic,
        source=describe(source),
        input_names=source.input_names,
        output_names=source.output_names,
    )


def build_module(source: ModelSource, *, root: Path, seed: int) -> Any:
    """Build the `nn.Module` of a source with a target, and load its checkpoint.

    The global random state is left as it was.

    Raises:
        ModelError: The target cannot be called, or gives no module, one of TorchScript or one without weights.
        CheckpointError: The weights cannot be read safely or do not fit.
    """
    import torch
    from torch import nn

    from mil_cli.models.checkpoint import load_checkpoint

    config = {"_target_": source.target, **source.arguments}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = call_target(config, root=root, where="model", error=ModelError)
    if not isinstance(module, nn.Module):
        raise ModelError(
            "the target must give a torch.nn.Module",
            where="model._target_",
            value=type(module).__name__,
            hint=f"return the module from {source.target}",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            "the target gives a TorchScript module, whose graph torch.export does not read",
            where="model._target_",
            value=source.target,
            hint="return the module as it is before torch.jit.script or torch.jit.trace",
        )
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError(
            "the target gives a module on the device meta, which has no weights",
            where="model._target_",
            value=source.target,
            hint="build it on the cpu, or call module.to_empty(device='cpu') and set its weights",
        )
    module = module.cpu()
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in module.parameters()):
        module = module.float()
    if source.checkpoint is not None:
        load_checkpoint(module, resolve_path(source.checkpoint, root))
    return module


def describe(source: ModelSource) -> str:
    """Return where a model comes from in a few words, without paths of this machine."""
    if source.pt2 is not None:
        return source.pt2.name
    return f"{source.target}" + (f" with {source.checkpoint.name}" if source.checkpoint is not None else "")


def resolve_path(path: Path, root: Path) -> Path:
    """Return a path with ``~`` expanded, taken from the folder `root` if it is relative."""
    path = path.expanduser()
    return path if path.is_absolute() else root / path
