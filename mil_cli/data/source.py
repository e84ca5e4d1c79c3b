"""Builds the data that a recipe names: the built-in sets, and whatever a user's own function returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from mil_cli.data.base import Data, Split
from mil_cli.data.datasets import DatasetSplit, check_workers
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import DataError, did_you_mean
from mil_cli.models.user_code import call_target, locate_in

_VAL_SEED = 0
_PATH_ARGUMENTS = ("root", "folder", "path")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How datasets of a user's own are loaded: the section ``data.loader``.

    Attributes:
        collate_fn: Makes a batch of samples; None stacks them.
        num_workers: Loader processes.
        val_fraction: Share of train that makes val where none is returned.
    """

    collate_fn: Callable[[Sequence[Any]], Any] | None = None
    num_workers: int = 0
    val_fraction: float | None = None


def build_data(config: Mapping[str, Any], root: Path) -> Data:
    """Build the data of a recipe.

    Args:
        config: ``_target_`` and its arguments; relative paths in the arguments `root`, `folder` and `path` are taken
            from the recipe's folder. The optional section ``loader`` says how datasets are loaded (`LoaderConfig`).
        root: The recipe's folder.

    Returns:
        The data, with their first samples checked.

    Raises:
        DataError: What is missing, empty or malformed.
    """
    settings = dict(config)
    loader = _loader_config(settings.pop("loader", None), root)
    for name in _PATH_ARGUMENTS:
        if isinstance(settings.get(name), str) and not Path(settings[name]).expanduser().is_absolute():
            settings[name] = str(root / settings[name])
        elif isinstance(settings.get(name), str):
            settings[name] = str(Path(settings[name]).expanduser())
    made = call_target(settings, root=root, where="data", error=DataError)
    return as_data(made, name=str(settings["_target_"]), loader=loader)


def as_data(made: Any, *, name: str = "data", loader: LoaderConfig | None = None) -> Data:
    """Bring what a user's function returned into `Data`.

    Args:
        made: `Data`; a mapping with the keys train, val, test (and ``train_plain``: train without augmentation); or a
            tuple (train, val, test). A split is a `Split`, a torch dataset, a tuple of tensors or arrays, or a dict of
            them. Without val, `LoaderConfig.val_fraction` of train makes it.
        name: What reports call the data.
        loader: How datasets are loaded.

    Raises:
        DataError: What is wrong with it.
    """
    loader = loader or LoaderConfig()
    if isinstance(made, Data):
        parts: dict[str, Any] = {"train": made.train, "val": made.val, "test": made.test}
        name = made.name
    elif isinstance(made, Mapping):
        parts = dict(made)
    elif isinstance(made, tuple | list) and len(made) == 3:
        parts = dict(zip(("train", "val", "test"), made, strict=True))
    else:
        raise DataError(
            "the data function must return {'train': ..., 'val': ..., 'test': ...}",
            where="data",
            value=type(made).__name__,
            hint="return a dict with a dataset for each of train, val and test",
        )
    known = ("train", "val", "test", "train_plain")
    for key in parts:
        if key not in known:
            raise DataError("no such split", where="data", value=key, hint=did_you_mean(str(key), known))
    if "train" in parts and "val" not in parts and loader.val_fraction is not None:
        parts["train"], parts["val"], parts["train_plain"] = _draw_val(
            parts["train"], parts.get("train_plain"), loader.val_fraction
        )
    for key in ("train", "val", "test"):
        if parts.get(key) is None:
            hint = f"return a dataset under '{key}' too"
            if key == "val":
                hint += ", or set data.loader.val_fraction: 0.1 to draw it from train"
            raise DataError(f"there is no {key} split", where="data", value=sorted(parts), hint=hint)
    splits = {
        key: _as_split(parts[key], f"data.{key}", loader, parts.get("train_plain") if key == "train" else None)
        for key in ("train", "val", "test")
    }
    for split in splits.values():
        if isinstance(split, DatasetSplit):
            split.check()
    return Data(name=name, train=splits["train"], val=splits["val"], test=splits["test"])


def _as_split(made: Any, where: str, loader: LoaderConfig, plain: Any) -> Split:
    if isinstance(made, Split):
        if len(made) == 0:
            raise DataError("the split is empty", where=where, hint="check the folder, the filter or the split's size")
        return made
    if isinstance(made, IterableDataset):
        raise DataError(
            "an iterable dataset cannot be read in a fixed order",
            where=where,
            hint="give a map-style dataset with __len__ and __getitem__",
        )
    if loader.collate_fn is None and plain is None and (tensors := _tensors_of(made)) is not None:
        return TensorSplit(tensors, where=where)
    if isinstance(made, Mapping) or (isinstance(made, tuple | list) and all(_is_array(item) for item in made)):
        converted = _convert(made, where)
        return TensorSplit(converted, where=where)
    if not hasattr(made, "__getitem__"):
        raise DataError(
            "neither a dataset nor tensors",
            where=where,
            value=type(made).__name__,
            hint="give a torch Dataset, or a tuple of tensors",
        )
    return DatasetSplit(made, plain=plain, collate_fn=loader.collate_fn, num_workers=loader.num_workers, where=where)


def _tensors_of(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    """Return the tensors behind a dataset that is nothing but tensors, so that it takes the fast path."""
    if type(dataset) is TensorDataset:
        return dataset.tensors
    if type(dataset) is Subset and (inner := _tensors_of(dataset.dataset)) is not None:
        chosen = torch.as_tensor(list(dataset.indices), dtype=torch.long)
        return tuple(tensor[chosen] for tensor in inner)
    return None


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _convert(made: Any, where: str) -> Any:
    items = made.items() if isinstance(made, Mapping) else enumerate(made)
    converted: dict[Any, torch.Tensor] = {}
    for key, value in items:
        try:
            converted[key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise DataError(
                f"cannot be made a tensor: {problem}", where=f"{where}[{key!r}]", value=type(value).__name__
            ) from problem
    return converted if isinstance(made, Mapping) else tuple(converted.values())


def _draw_val(train: Any, plain: Any, fraction: float) -> tuple[Any, Any, Any]:
    if not 0 < fraction < 1:
        raise DataError("must be between 0 and 1", where="data.loader.val_fraction", value=fraction)
    if isinstance(train, Split):
        raise DataError(
            "val can be drawn only from a dataset or tensors",
            where="data.loader.val_fraction",
            value=type(train).__name__,
            hint="return a val split from the data function",
        )
    if isinstance(train, Mapping) or (isinstance(train, tuple | list) and all(_is_array(item) for item in train)):
        whole = TensorSplit(_convert(train, "data.train"), where="data.train")
        order, count = _val_order(len(whole), fraction)
        return whole.part(order[count:]), whole.part(order[:count]), None
    if not (hasattr(train, "__getitem__") and hasattr(train, "__len__")):
        return train, None, plain
    order, count = _val_order(len(train), fraction)
    clean: Dataset[Any] = train if plain is None else plain
    chosen, rest = order[:count].tolist(), order[count:].tolist()
    return Subset(train, rest), Subset(clean, chosen), None if plain is None else Subset(clean, rest)


def _val_order(samples: int, fraction: float) -> tuple[torch.Tensor, int]:
    if samples < 2:
        raise DataError("too few samples to draw val from", where="data.train", value=samples)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(_VAL_SEED))
    return order, min(max(1, round(fraction * samples)), samples - 1)


def _loader_config(config: Any, root: Path) -> LoaderConfig:
    if config is None:
        return LoaderConfig()
    where = "data.loader"
    if not isinstance(config, Mapping):
        raise DataError("must be a mapping", where=where, value=config)
    known = ("collate_fn", "num_workers", "val_fraction")
    for key in config:
        if key not in known:
            raise DataError(
                "unknown key", where=f"{where}.{key}", value=config[key], hint=did_you_mean(str(key), known)
            )
    collate = config.get("collate_fn")
    if isinstance(collate, str):
        collate = locate_in(collate, root=root, where=f"{where}.collate_fn", error=DataError)
    elif isinstance(collate, Mapping):
        partial = {"_partial_": True, **collate}
        collate = call_target(partial, root=root, where=f"{where}.collate_fn", error=DataError)
    workers = config.get("num_workers", 0)
    check_workers(workers, where=f"{where}.num_workers")
    fraction = config.get("val_fraction")
    if fraction is not None and (isinstance(fraction, bool) or not isinstance(fraction, int | float)):
        raise DataError("must be a number between 0 and 1", where=f"{where}.val_fraction", value=fraction)
    return LoaderConfig(collate_fn=collate, num_workers=workers, val_fraction=fraction)
