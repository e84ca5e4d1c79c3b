"""The choice of one width for each weight: least summed cost under a bound on the mean of bits, or on the file."""

from __future__ import annotations

import glob
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mil_cli.errors import StageError
from mil_cli.export.onnx import export_onnx
from mil_cli.export.packing import storage_bits
from mil_cli.measure.size import size_bytes
from mil_cli.stages.knapsack import choose
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.sensitivity import Changes, Curves, Weight
from mil_cli.stages.quantize.settings import LayerSettings
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.targets import parse_size

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

Choice = tuple[int, ...]
"""By weight: the place of its width among those that it may have."""

Step = tuple[int, int]
"""A weight, and by how many places its width changes: -1 gives it more bits, 1 fewer."""

_FILES = 6
"""How many choices are exported, at most, until a file keeps its bound."""

_STEPS = 16
"""How many weights are looked at, at most, that an exchange may give bits to, and how many that it may take from."""

_TRIED = 8
"""How many exchanges are measured, at most, until one costs less."""


@dataclass(frozen=True)
class Search:
    """Chooses a width for each weight.

    Attributes:
        weights: The weights.
        curves: What their widths add to the cost.
        cost: What it costs to round some of them together.
        static: By which settings files are made to be measured.
        context: Gives the device.
        state: What was measured of choices, each a pair of choice and figure: ``files``, the bytes of exported files,
            an empty choice being the float model, and ``together``, costs with all weights rounded.
        keep: Called after each new measurement.
        exchanges: How many times, at most, bits pass between weights after the programme's choice.
    """

    weights: Sequence[Weight]
    curves: Curves
    cost: Callable[[Changes], float]
    static: StaticConfig
    context: Context
    state: dict[str, list[Any]]
    keep: Callable[[], None]
    exchanges: int

    def within_average(self, bound: float) -> Choice:
        """Return the best choice whose mean of bits keeps a bound."""
        bits = [np.array(weight.widths) * float(weight.numbers) for weight in self.weights]
        numbers = sum(weight.numbers for weight in self.weights)
        savings = [axis[0] - axis for axis in bits]
        needed = sum(float(axis[0]) for axis in bits) - bound * numbers
        found = self._choose(savings, needed)
        if found is None:
            least = sum(float(axis[-1]) for axis in bits) / numbers
            raise self._unreachable("average_bits", bound, f"the smallest mean is {least:.4g} bits")
        return self._exchanged(found, savings, needed)

    def within_size(self, model: Model, size: str | float) -> Choice:
        """Return the best choice whose exported file keeps a bound.

        Files differ by the codes of their weights, and a little by how these are packed, which is measured.

        Args:
            model: The float model.
            size: The bound.
        """

        def measured(choice: Choice) -> int:
            return int(self._known("files", choice, lambda: self._file_bytes(model, choice)))

        bound = self._bytes_allowed(model, size)
        stored = [np.array([self._stored(codes) for codes in weight.codes]) for weight in self.weights]
        savings = [(axis[0] - axis) * weight.numbers / 8 for axis, weight in zip(stored, self.weights, strict=True)]
        widest = measured((0,) * len(self.weights))
        narrowest = tuple(len(weight.widths) - 1 for weight in self.weights)
        beyond = 0.0
        for _ in range(_FILES):
            found = self._choose(savings, widest + beyond - bound)
            if found is None:
                break
            if (taken := measured(found)) <= bound:
                exchanged = self._exchanged(found, savings, widest + beyond - bound)
                return exchanged if measured(exchanged) <= bound else found
            beyond = max(beyond + 1, taken - (widest - _sum(savings, found)))
        if (taken := measured(narrowest)) <= bound:
            return narrowest
        raise self._unreachable("size", size, f"the smallest file has {taken:,} bytes")

    def tell_if_larger(self, result: Model, model: Model, size: str | float) -> None:
        """Tell the user where the file of what was made is larger than its bound.

        Its method may store weights otherwise than the static one whose files were measured: levels take tables.

        Args:
            result: What was made.
            model: The float model.
            size: The bound.
        """
        taken, bound = self._exported_bytes(result), self._bytes_allowed(model, size)
        if taken > bound:
            self.context.progress.notice(
                f"{self.context.name}: the file has {taken:,} bytes, and `size` allows {bound:,.0f}: the form in which "
                "its weights are stored takes more than integers do; lower `size` by as much"
            )

    def _bytes_allowed(self, model: Model, size: str | float) -> float:
        kept = parse_size(size)
        return kept.resolve(1 if kept.absolute else self._known("files", (), lambda: self._file_bytes(model, ())))

    def _choose(self, savings: Sequence[NDArray[np.float64]], needed: float) -> Choice | None:
        """Return the best choice that saves enough, or None.

        Costs of single weights do not quite add up, and estimates may be off: the most bits that all weights alike may
        have are taken if it costs less to round all of them so.
        """
        found = choose(self.curves, savings, needed)
        if found is None:
            return None
        for bits in sorted({bits for weight in self.weights for bits in weight.widths}, reverse=True):
            alike = tuple(int(np.argmin([abs(width - bits) for width in weight.widths])) for weight in self.weights)
            if _sum(savings, alike) >= needed:
                return min(found, alike, key=self._cost_together)
        return found

    def _exchanged(self, choice: Choice, savings: Sequence[NDArray[np.float64]], needed: float) -> Choice:
        """Return a choice that costs no more together and saves enough, after weights gave bits to each other."""
        title = f"{self.context.name}: exchanging bits"
        with self.context.progress.work(title, self.exchanges) as bar:
            for _ in range(self.exchanges):
                better = self._one_exchange(choice, savings, needed)
                if better is None:
                    break
                choice = better
                bar.advance()
        return choice

    def _one_exchange(self, choice: Choice, savings: Sequence[NDArray[np.float64]], needed: float) -> Choice | None:
        """Return the first of the most promising exchanges that costs less together, or None.

        One weight gets its next width, paid for by one or two others, or by none where there is room. The steps that
        promise most by what weights cost alone are measured with all other weights rounded as they are; sums of these
        say which exchanges are tried.
        """
        before = self._cost_together(choice)
        raised, lowered = (self._steps(choice, step) for step in (-1, 1))
        added = {step: self._cost_together(_moved(choice, [step])) - before for step in (*raised, *lowered)}
        promising = []
        for step in raised:
            others = [other for other in lowered if other[0] != step[0]]
            for payers in (pair for count in (0, 1, 2) for pair in itertools.combinations(others, count)):
                moved = _moved(choice, [step, *payers])
                gain = added[step] + sum(added[payer] for payer in payers)
                if gain < 0 and _sum(savings, moved) >= needed:
                    promising.append((gain, moved))
        promising.sort()
        return next((moved for _, moved in promising[:_TRIED] if self._cost_together(moved) < before), None)

    def _steps(self, choice: Choice, step: int) -> list[Step]:
        """Return the weights that may go to their next width, those first for which it is best by itself."""
        able = {
            place: float(curve[choice[place] + step] - curve[choice[place]])
            for place, curve in enumerate(self.curves)
            if 0 <= choice[place] + step < len(curve) and np.isfinite(curve[choice[place] + step])
        }
        return [(place, step) for place in sorted(able, key=lambda place: able[place])[:_STEPS]]

    def _cost_together(self, choice: Choice) -> float:
        changes = [(weight, weight.codes[place]) for weight, place in zip(self.weights, choice, strict=True)]
        cost = self._known("together", choice, lambda: self.cost(changes))
        return cost if math.isfinite(cost) else math.inf

    def _known(self, kind: str, choice: Choice, measure: Callable[[], float]) -> float:
        """Return what was measured of a choice, or is now."""
        for other, value in self.state[kind]:
            if tuple(other) == choice:
                return float(value)
        value = measure()
        self.state[kind].append([list(choice), value])
        self.keep()
        return value

    def _stored(self, codes: CodeRange) -> int:
        return storage_bits(codes.quant_min, codes.quant_max, self.context.device.weight_bits)

    def _file_bytes(self, model: Model, choice: Choice) -> int:
        if choice:
            config = self.static.model_copy(update={"layers": self.layers(choice, self.static.layers)})
            model = self.context.run(model, config, name="size")
        return self._exported_bytes(model)

    def _exported_bytes(self, model: Model) -> int:
        with TemporaryDirectory() as folder:
            return size_bytes(export_onnx(model, Path(folder) / "model.onnx", device=self.context.device).path)

    def _unreachable(self, key: str, bound: object, least: str) -> StageError:
        return StageError(
            f"the bound cannot be kept: {least}",
            where=f"stages.{self.context.name}.{key}",
            value=bound,
            hint="raise it, add fewer bits to `bits`, or lower first_last_bits of the stage that quantizes",
        )

    def layers(self, choice: Choice, own: Mapping[str, LayerSettings]) -> dict[str, LayerSettings]:
        """Return what the quantizing stage is told of its layers: its own, and the bits that were chosen."""
        result = dict(own)
        # Sorted: the path of a layer is also a pattern for those below it, whose own bits must come later.
        chosen = {
            layer.name: weight.widths[place]
            for weight, place in zip(self.weights, choice, strict=True)
            for layer in weight.layer.sharing
        }
        for name, bits in sorted(chosen.items()):
            pattern = glob.escape(name)
            result[pattern] = result.get(pattern, LayerSettings()).model_copy(update={"weight_bits": bits})
        return result

    def facts(self, choice: Choice) -> dict[str, Any]:
        """Return what the report shows of a choice."""
        numbers = sum(weight.numbers for weight in self.weights)
        bits = [weight.widths[place] * weight.numbers for weight, place in zip(self.weights, choice, strict=True)]
        return {
            "weight_bits": f"{sum(bits) / numbers:.3g} on average",
            "average_bits": sum(bits) / numbers,
            "summed_cost": _sum(self.curves, choice),
            "sensitivities": [
                {"name": weight.layer.name, "bits": list(weight.widths), "added_cost": _finite(curve)}
                for weight, curve in zip(self.weights, self.curves, strict=True)
            ],
        }


def _sum(values: Sequence[NDArray[np.float64]], choice: Choice) -> float:
    return sum(float(axis[place]) for axis, place in zip(values, choice, strict=True))


def _moved(choice: Choice, steps: Iterable[Step]) -> Choice:
    moved = list(choice)
    for place, step in steps:
        moved[place] += step
    return tuple(moved)


def _finite(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
