"""The record of what a stage read: data and device that write down each read, and checkpoints that depend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mil_cli.errors import MilError
from mil_cli.stages.surroundings import Surroundings
from mil_cli.training.checkpoint import CheckpointSlot

if TYPE_CHECKING:
    from mil_cli.data.base import Data, Split
    from mil_cli.device.profile import DeviceProfile


class ReadDevice:
    """The device profile, each field recorded as it is read."""

    def __init__(self, profile: DeviceProfile, record: Callable[[str], None]) -> None:
        self._profile = profile
        self._record = record

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._profile, name)
        if name in type(self._profile).model_fields:
            self._record(f"device/{name}")
        return value


class ReadData:
    """The data as a stage may see them: `train` and `val`, recorded; `test` is for the report alone."""

    def __init__(self, data: Data, record: Callable[[str], None], train: Split | None = None) -> None:
        self._data = data
        self._record = record
        self._train = train
        self.name = data.name

    @property
    def train(self) -> Split:
        """The split that is learnt from, or what a stage put in its place."""
        if self._train is not None:
            return self._train
        self._record("data/train")
        return self._data.train

    @property
    def val(self) -> Split:
        """The split that decisions are made on."""
        self._record("data/val")
        return self._data.val

    @property
    def test(self) -> Split:
        """Refuse.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("a stage must not read the test split: it is for reporting only")


@dataclass
class Trace:
    """What a stage has read so far: name -> fingerprint at the time of reading."""

    reads: dict[str, str] = field(default_factory=dict)

    def holds(self, surroundings: Surroundings) -> bool:
        """Whether everything that was read has the same fingerprint now."""
        try:
            return all(surroundings.fingerprint(name) == value for name, value in self.reads.items())
        except (KeyError, AttributeError, MilError):  # it is not there any more
            return False


class TracedSlot:
    """A checkpoint slot whose every save first stores the trace that it depends on."""

    def __init__(self, slot: CheckpointSlot, before_save: Callable[[], None]) -> None:
        self._slot = slot
        self._before_save = before_save

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, or None."""
        return self._slot.load()

    def save(self, state: dict[str, Any]) -> None:
        """Store the trace, then the state."""
        self._before_save()
        self._slot.save(state)

    def clear(self) -> None:
        """Forget the checkpoint."""
        self._slot.clear()
