"""Loads weights into a module without running anything that the file brings along."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from mil_cli.errors import CheckpointError

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
_SHOWN = 8


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load a checkpoint into a module, all of it.

    A tensor that the module has under several names (tied weights) may lack in the file under some of them, as in
    safetensors. Wrappers such as ``{"state_dict": ...}``, and prefixes that DDP (``module.``), `torch.compile`
    (``_orig_mod.``) and training frameworks (``model.``) put before names are understood.

    Args:
        module: The module; changed in place.
        path: A safetensors file, or one that `torch.load` reads with ``weights_only=True``.

    Raises:
        CheckpointError: The file is missing, damaged or needs unpickling, or its tensors do not fit: those missing,
            unexpected or of another shape are listed by name.
    """
    expected = module.state_dict()
    tensors = _with_shared(module, _fit_names(read_tensors(path), set(expected)))
    # Checkpoints from before batch norm counted its batches lack the count; nothing depends on it with a momentum set.
    missing = [name for name in expected if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name}: the file has {tuple(tensors[name].shape)}, the model {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and isinstance(value, torch.Tensor) and tensors[name].shape != value.shape
    ]
    if missing or unexpected or misshapen:
        parts = [
            f"{title}: {_listed(names)}"
            for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        raise CheckpointError(
            "the checkpoint does not fit the model. " + "; ".join(parts),
            where="model.checkpoint",
            value=str(path),
            hint="check the model's arguments (number of classes, widths), or that the file belongs to this model",
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"the tensor {name} holds NaN or infinities",
                where="model.checkpoint",
                value=str(path),
                hint="take a checkpoint from before the training diverged",
            )
    module.load_state_dict(tensors, strict=False)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors by name, out of whatever wraps them.

    Raises:
        CheckpointError: The file is missing, damaged, needs unpickling, or holds no tensors.
    """
    where = "model.checkpoint"
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint is missing", where=where, value=str(path), hint="set model.checkpoint to an existing file"
        )
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as problem:
            hint = "the file is damaged: write or copy it again"
            raise CheckpointError(
                f"not a safetensors file: {problem}", where=where, value=str(path), hint=hint
            ) from problem
    if path.suffix == ".pt2":
        raise CheckpointError(
            "a .pt2 file is a whole model, not a checkpoint",
            where=where,
            value=str(path),
            hint="use model: {pt2: FILE}",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise CheckpointError(
            "the file holds more than tensors (a whole pickled model, say), or is damaged; opening it could run code",
            where=where,
            value=str(path),
            hint="where you trust the file, save its weights alone: torch.save(model.state_dict(), 'weights.pt')",
        ) from problem
    except Exception as problem:  # what damaged bytes raise is anyone's guess
        raise CheckpointError(
            f"the file cannot be read: {_first_line(problem)}",
            where=where,
            value=str(path),
            hint="save the weights with torch.save(model.state_dict(), 'weights.pt') or as safetensors",
        ) from problem
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    while isinstance(content, Mapping):
        tensors = {
            str(name): value.to_dense() if value.layout is not torch.strided else value
            for name, value in content.items()
            if isinstance(value, torch.Tensor)
        }
        inner = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]), None
        )
        if inner is None or len(tensors) > len(content) / 2:
            if tensors:
                return tensors
            break
        content = inner
    raise CheckpointError(
        "the file holds no weights by name",
        where="model.checkpoint",
        value=str(path),
        hint="save the weights with torch.save(model.state_dict(), 'weights.pt')",
    )


def _fit_names(tensors: dict[str, torch.Tensor], expected: set[str]) -> dict[str, torch.Tensor]:
    """Strip what frameworks put before names, as far as that makes names fit."""

    def fitting(names: Iterable[str]) -> int:
        return sum(name in expected for name in names)

    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            # Compiled submodules carry the prefix inside the name as well.
            shorter = {
                name.replace(prefix, "") if prefix == "_orig_mod." else name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
            }
            whole = len(shorter) == len(tensors) and shorter.keys() != tensors.keys()
            if whole and fitting(shorter) >= fitting(tensors) and fitting(tensors) < len(tensors):
                # A strip that gains nothing yet may be the first of several.
                if fitting(shorter) == fitting(tensors) and not all(name.startswith(prefix) for name in tensors):
                    continue
                tensors, stripped = shorter, True
    return tensors


def _with_shared(module: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the names under which a module has a tensor that the file holds under another of its names."""
    names_of: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        names_of.setdefault(id(value), []).append(name)
    added = {}
    for names in names_of.values():
        found = next((tensors[name] for name in names if name in tensors), None)
        if found is not None:
            added.update({name: found for name in names if name not in tensors})
    return {**tensors, **added}


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
