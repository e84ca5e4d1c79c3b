"""The preflight: runs the whole chain and the export on a handful of samples, and estimates what the run will take.

Nothing is cached and nothing is judged; what fails here would have failed hours into the run.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mil_cli.data.base import Batch, Data, Split, part_of
from mil_cli.events import Progress, SilentProgress
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.models.user_code import importable
from mil_cli.run.cache import Cache
from mil_cli.run.execute import StageResult
from mil_cli.run.goals import check_measurable
from mil_cli.run.runner import check_chain, run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.training.evaluate import whole_batches

if TYPE_CHECKING:
    import torch

    from mil_cli.recipe.schema import Recipe

BATCHES = 2
"""How many batches of each split the dry run sees."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage as the dry run saw it.

    Attributes:
        name: Its key in the recipe; ``baseline`` for the training of the uncompressed model.
        family: Its family.
        method: Its method.
        seconds: Estimated seconds of the real run.
        macs: Multiply-accumulates of one sample after it.
        params: Parameters after it.
    """

    name: str
    family: str
    method: str
    seconds: float
    macs: int
    params: int


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        name: The recipe's name.
        macs: Multiply-accumulates of one sample of the uncompressed model.
        params: Its parameters.
        samples: Split name -> samples.
        stages: The stages in order.
        goals: Goal name -> bounds.
        dynamic: Input name -> its dynamic axes.
        notices: What capture and export have to say.
    """

    name: str
    macs: int
    params: int
    samples: dict[str, int]
    stages: list[PlannedStage]
    goals: dict[str, dict[str, float]]
    dynamic: dict[str, dict[str, str]]
    notices: list[str]

    @property
    def seconds(self) -> float:
        """Estimated seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)


@dataclass
class _Head:
    """The first batches of a split; counts the time that their user spends on them, if `made` also that of making."""

    split: Split
    clock: Callable[[], float]
    limit: int
    made: bool = False
    seconds: float = 0.0
    parts: list[_Head] = field(default_factory=list)

    def __len__(self) -> int:
        return min(self.limit, len(self.split))

    def batches(self, batch_size: int, **options: Any) -> Iterator[Batch]:
        since = self.clock()
        for batch in itertools.islice(self.split.batches(batch_size, **options), -(-len(self) // batch_size)):
            if not self.made:
                since = self.clock()
            try:
                yield batch
            finally:  # a user may stop at the last one
                now = self.clock()
                self.seconds += now - since
                since = now

    def part(self, indices: torch.Tensor) -> Split:
        piece = _Head(part_of(self.split, indices), self.clock, len(indices), self.made)
        self.parts.append(piece)
        return piece

    def fingerprint(self) -> str:
        return f"the first {self.limit} of {self.split.fingerprint()}"

    @property
    def growth(self) -> float:
        """How many times larger the whole split is."""
        return len(self.split) / len(self)

    def take_seconds(self) -> float:
        """Return the seconds spent since the last call; parts are read side by side, so that the longest counts."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds + max((part.take_seconds() for part in self.parts), default=0.0)


def plan_recipe(recipe: Recipe, *, progress: Progress, clock: Callable[[], float] = time.perf_counter) -> Plan:
    """Dry-run a recipe.

    Args:
        recipe: The validated recipe.
        progress: Where work is reported.
        clock: Seconds, from any zero.

    Raises:
        MilError: What would have stopped the run.
    """
    check_chain(recipe)
    with importable(recipe.root):
        return _plan(recipe, progress, clock)


def _plan(recipe: Recipe, progress: Progress, clock: Callable[[], float]) -> Plan:
    surroundings = build_surroundings(recipe)
    check_measurable(recipe.goals, surroundings.device, higher_is_better=surroundings.task.higher_is_better)
    full = surroundings.data
    limit = BATCHES * recipe.trainer.batch_size
    heads = {name: _Head(getattr(full, name), clock, limit) for name in ("train", "val", "test")}
    others: list[_Head] = []
    stages: list[PlannedStage] = []

    def shorten(split: Split, *, made: bool = True) -> Split:
        others.append(_Head(split, clock, limit, made))
        return others[-1]

    def load_data(settings: object) -> Data:
        other = surroundings.load_data(settings)
        return replace(other, train=shorten(other.train, made=False))

    small = replace(surroundings, data=Data(name=full.name, **heads), load_data=load_data, shorten=shorten)

    def keep(_: int, result: StageResult) -> None:
        handled = [(head.take_seconds(), head.growth) for head in [*heads.values(), *others]]
        fixed = result.facts["seconds"] - sum(seconds for seconds, _ in handled)
        stages.append(
            PlannedStage(
                name=result.name,
                family=result.config.family,
                method=result.config.method,
                seconds=max(0.0, fixed) + sum(seconds * growth for seconds, growth in handled),
                macs=result.facts["macs"],
                params=result.facts["params"],
            )
        )

    progress.notice("dry run of the whole chain and the export on a few samples")
    with tempfile.TemporaryDirectory(prefix="mil-plan-") as folder:
        cache = Cache(Path(folder), SilentProgress())
        chain = run_chain(recipe, small, cache=cache, fresh=False, progress=SilentProgress(), on_result=keep)
        final = chain.final.load()
        exported = export_onnx(final, Path(folder) / "model.onnx", device=surroundings.device)
        batch = next(whole_batches(final.spec, full.val, "val", batch_size=BATCHES))
        check_parity(final, exported.path, [surroundings.task.inputs(batch)], threads=surroundings.device.threads)
        original = chain.original.load()
    return Plan(
        name=recipe.name,
        macs=original.macs(),
        params=original.num_params(),
        samples={name: len(getattr(full, name)) for name in heads},
        stages=stages,
        goals=recipe.goals.asked(),
        dynamic={spec.name: {str(axis): name for axis, name in spec.dynamic.items()} for spec in original.spec.inputs},
        notices=[*original.spec.notices, *exported.notices],
    )
