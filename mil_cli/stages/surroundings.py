"""Everything of a recipe that stages may read, and the fingerprint of each part by its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

from mil_cli.errors import ModelError
from mil_cli.measure.latency import LATENCY_VERSION
from mil_cli.stages.registry import StageConfig
from mil_cli.training.config import TrainerConfig

if TYPE_CHECKING:
    from torch import nn

    from mil_cli.data.base import Data, Split
    from mil_cli.device.profile import DeviceProfile
    from mil_cli.graph.model import Model
    from mil_cli.spaces import DesignedSpace
    from mil_cli.task.base import Task


def fingerprint_of(value: object) -> str:
    """Return the SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def derive_seed(seed: int, *names: str) -> int:
    """Return a seed of 63 bits that belongs to `names` under the recipe's seed."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class StoredModel(Protocol):
    """A model that is loaded only when it is needed; its fingerprint is known without."""

    @property
    def fingerprint(self) -> str:
        """The full SHA-256 of graph, weights and description."""
        ...

    def load(self) -> Model:
        """Return the model; the same object each time, not to be changed."""
        ...


def _no_other_data(settings: object) -> Data:
    raise KeyError(f"no data other than the recipe's: {settings!r}")


def _no_space() -> DesignedSpace:
    raise ModelError("there is no recipe whose model could hold choices")


def _no_capture(module: nn.Module) -> Model:
    raise ModelError("there is no recipe whose model this could replace", value=type(module).__name__)


def _whole(split: Split) -> Split:
    return split


@dataclass(frozen=True)
class Surroundings:
    """Everything of a recipe that stages may read, each part with a fingerprint.

    Attributes:
        seed: The recipe's seed.
        task: What the model is for.
        data: The three splits.
        device: The target's profile.
        trainer: The recipe's trainer settings.
        goals: Bounds by name, as JSON-able values.
        stages: All stages of the recipe by key, so that one may fine-tune by another.
        load_source: Builds a model from a source other than the recipe's (a teacher).
        source_fingerprint: Fingerprint of such a source: its settings and the content of its files.
        original: The uncompressed model where it is stored; absent while it is itself being made.
        load_data: Builds data other than the recipe's, from settings as those of its section ``data``.
        load_space: Builds the space that the recipe's own model is, with its first weights.
        capture: Captures a module that takes the place of the recipe's own.
        space_fingerprint: Fingerprint of that: the model's settings, the content of its files, the seed of its weights.
        shorten: What a dry run makes of a split that a stage makes itself; a real run leaves it as it is.
    """

    seed: int
    task: Task
    data: Data
    device: DeviceProfile
    trainer: TrainerConfig
    goals: Mapping[str, object]
    stages: Mapping[str, StageConfig]
    load_source: Callable[[object], Model]
    source_fingerprint: Callable[[object], str]
    original: StoredModel | None = None
    load_data: Callable[[object], Data] = _no_other_data
    load_space: Callable[[], DesignedSpace] = _no_space
    capture: Callable[[nn.Module], Model] = _no_capture
    space_fingerprint: Callable[[], str] = str
    shorten: Callable[[Split], Split] = _whole

    def fingerprint(self, read: str) -> str:
        """Return the present fingerprint of what a stage read under the name `read`.

        Raises:
            KeyError: Nothing has that name now (a stage key that is gone, say); the caller takes it as changed.
        """
        kind, _, name = read.partition("/")
        match kind:
            case "seed":
                return str(self.seed)
            case "task":
                return self._task_fingerprint
            case "data":
                return cast("Split", getattr(self.data, name)).fingerprint()
            case "device":
                return self.device.field_fingerprints()[name]
            case "trainer":
                return fingerprint_of(self.trainer.model_dump(mode="json"))
            case "goal":
                return fingerprint_of(self.goals.get(name))
            case "stage":
                config = self.stages[name]
                return fingerprint_of([config.family, config.method, config.version, config.model_dump(mode="json")])
            case "original":
                return "none" if self.original is None else self.original.fingerprint
            case "latency_protocol":
                return str(LATENCY_VERSION)
            case "space":
                return self.space_fingerprint()
            case "source":
                return self.source_fingerprint(json.loads(name))
            case "other_data":
                return self.load_data(json.loads(name)).train.fingerprint()
        raise KeyError(read)

    @cached_property
    def _task_fingerprint(self) -> str:
        return self.task.fingerprint()
