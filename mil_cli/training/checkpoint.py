"""Where a loop keeps its checkpoint: tensors and plain values, read back without running code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

import torch

from mil_cli.files import writing


class CheckpointSlot(Protocol):
    """The place of one loop's checkpoint."""

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last, or None."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Replace what is saved; a reader meets the old state or the new one, never half of one."""
        ...

    def clear(self) -> None:
        """Forget what is saved."""
        ...


class NullSlot:
    """A slot that keeps nothing."""

    def load(self) -> dict[str, Any] | None:
        """Return None."""
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Drop the state."""

    def clear(self) -> None:
        """Do nothing."""


class FileSlot:
    """A slot in a file.

    Args:
        path: The file; its folder is made when the first state is saved.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[str, Any] | None:
        """Return the state, or None if there is none; a damaged file is removed with a warning."""
        if not self._path.is_file():
            return None
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as problem:  # what damaged bytes raise is anyone's guess
            warnings.warn(f"a damaged checkpoint is ignored: {self._path.name}: {problem}", stacklevel=2)
            self.clear()
            return None
        return state if isinstance(state, dict) else None

    def save(self, state: dict[str, Any]) -> None:
        """Write the state beside the file, then rename.

        Raises:
            OutputError: The file cannot be written.
        """
        with writing(self._path) as temporary:
            torch.save(state, temporary)

    def clear(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
