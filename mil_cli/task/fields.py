"""Which entries of a batch go into the model, which is the target, and which output is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_map

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError, did_you_mean

Entry: TypeAlias = int | str
"""A position in a tuple batch, or a key of a dict batch."""

InputEntries: TypeAlias = Entry | Sequence[Entry] | Mapping[str, Entry] | None
"""The entry that goes into the model, several in this order, or argument name -> entry; None: all but the target."""

TARGET_KEYS = ("labels", "label", "target", "targets", "y")
_OUTPUT_KEYS = ("logits", "output", "outputs", "out", "prediction", "predictions")


def entry(batch: Batch, name: Entry, *, where: str) -> torch.Tensor:
    """Return one entry of a batch.

    Raises:
        TaskError: There is none of that name.
    """
    if isinstance(batch, Mapping):
        if name in batch:
            return batch[name]  # type: ignore[no-any-return,index]
        raise TaskError(
            "the batch has no such entry", where=where, value=name, hint=did_you_mean(str(name), map(str, batch))
        )
    if isinstance(name, int) and -len(batch) <= name < len(batch):
        return batch[name]  # type: ignore[no-any-return]
    raise TaskError(
        f"the batch is a tuple of {len(batch)} entries and has none at that position",
        where=where,
        value=name,
        hint=f"give a position from 0 to {len(batch) - 1}",
    )


def tensor_entry(batch: Batch, name: Entry, *, where: str) -> torch.Tensor:
    """Return one entry of a batch that must be a tensor.

    Raises:
        TaskError: There is none of that name, or it is something else.
    """
    found = entry(batch, name, where=where)
    if not isinstance(found, torch.Tensor):
        raise TaskError(
            f"the entry {name!r} of the batch is no tensor",
            where=where,
            value=type(found).__name__,
            hint="return numbers from the dataset's __getitem__, or name another entry",
        )
    return found


def target_entry(batch: Batch, target: Entry | None) -> Entry:
    """Return which entry is the target: as set, else the last of a tuple, or the usual key of a dict.

    Raises:
        TaskError: A dict without one of the usual keys.
    """
    if target is not None:
        return target
    if not isinstance(batch, Mapping):
        return len(batch) - 1
    for key in TARGET_KEYS:
        if key in batch:
            return key
    raise TaskError(
        "which entry of the batch is the target is not clear",
        where="task.target_key",
        value=sorted(map(str, batch)),
        hint=f"set task.target_key, or call the entry one of {', '.join(TARGET_KEYS)}",
    )


def model_inputs(
    batch: Batch, inputs: InputEntries, *, without: Sequence[Entry]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the model's arguments out of a batch.

    Args:
        batch: The batch.
        inputs: Which entries; see `InputEntries`.
        without: Entries left out where `inputs` is None: the target and what belongs to it.

    Returns:
        Positional and keyword arguments: entries of a dict go in by name, those of a tuple by position.

    Raises:
        TaskError: No such entry.
    """
    where = "task.input_keys"
    if isinstance(inputs, int | str):
        inputs = [inputs]
    if isinstance(inputs, Mapping):
        return (), {name: entry(batch, key, where=where) for name, key in inputs.items()}
    if isinstance(batch, Mapping):
        names = [key for key in batch if key not in without] if inputs is None else list(inputs)
        return (), {str(key): entry(batch, key, where=where) for key in names}
    if inputs is None:
        left_out = {position % len(batch) for position in without if isinstance(position, int)}
        inputs = [position for position in range(len(batch)) if position not in left_out]
    return tuple(entry(batch, position, where=where) for position in inputs), {}


def output_tensor(outputs: Any, name: Entry | None) -> torch.Tensor:
    """Return the output that is scored: as set, else the only one, the one with a usual key, or the first of a tuple.

    Raises:
        TaskError: It is not clear which, or it is no tensor.
    """
    where = "task.output_key"
    chosen: Any = outputs
    if name is not None:
        try:
            chosen = outputs[name]
        except (KeyError, IndexError, TypeError) as problem:
            raise TaskError(
                f"the model's outputs ({_describe(outputs)}) have no such entry", where=where, value=name
            ) from problem
    elif isinstance(outputs, Mapping):
        usual = [key for key in _OUTPUT_KEYS if key in outputs]
        if len(outputs) == 1:
            chosen = next(iter(outputs.values()))
        elif usual:
            chosen = outputs[usual[0]]
    elif isinstance(outputs, tuple | list) and outputs:
        chosen = outputs[0]
    if not isinstance(chosen, torch.Tensor):
        raise TaskError(
            "which of the model's outputs is scored is not clear",
            where=where,
            value=_describe(outputs),
            hint="set task.output_key to a key or position of a tensor",
        )
    return chosen


def replace_output(outputs: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """Return outputs with one tensor in place of another that they hold."""
    return tree_map(lambda leaf: new if leaf is old else leaf, outputs)


class NoClassesError(TaskError):
    """A task without classes, or without a label for each position, was asked for class scores."""


def no_class_scores(task: str, reason: str) -> NoClassesError:
    """Return the error of a task that cannot give class scores with a label each."""
    return NoClassesError(
        f"this method compares the scores of classes position by position, and the task {task} gives none: {reason}",
        where="task",
        hint="distil by soft_labels, which uses the task's own distance",
    )


def check_choice(value: str, known: Sequence[str], *, where: str) -> None:
    """Refuse a setting that is not one of those known.

    Raises:
        TaskError: It is not.
    """
    if value not in known:
        raise TaskError("unknown choice", where=where, value=value, hint=did_you_mean(str(value), known))


def _describe(outputs: Any) -> str:
    if isinstance(outputs, torch.Tensor):
        return f"tensor {tuple(outputs.shape)}"
    if isinstance(outputs, Mapping):
        return "dict with " + ", ".join(map(str, outputs))
    if isinstance(outputs, tuple | list):
        return f"{type(outputs).__name__} of {len(outputs)}"
    return type(outputs).__name__
