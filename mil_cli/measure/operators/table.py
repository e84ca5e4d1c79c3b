"""The table of operator latencies of one device: asked for sums, it measures what it does not know yet."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import MeasureError
from mil_cli.events import Bar, Progress, SilentProgress
from mil_cli.measure.operators.models import build, empty
from mil_cli.measure.operators.operator import Operator, approximation
from mil_cli.measure.process import run_job

TABLE_VERSION: Final = 1
"""The version of the table's JSON form and of how operators are built and timed."""

OVERHEAD = "overhead"
"""The key of what one run of any model takes beside its operators."""

COPIES = 4
"""How many copies of an operator its larger model holds."""

SECONDS_PER_OPERATOR = 0.03

_DEVICE_FIELDS = ("provider", "provider_options", "threads", "requires", "int8", "remote")


class OperatorTable:
    """Seconds of single operators on a device, and of models as their sum.

    A candidate's latency is the sum over its operators, plus what one run of a session takes whatever it holds
    (Cai et al. 2019, ProxylessNAS, arXiv:1812.00332, section 4.2, predict latency so). Operators are timed by
    processor time if they run on one thread of the processor, as ratios of latencies are.

    Args:
        device: The profile to measure on.
        known: Seconds by operator key, from an earlier table.
        progress: Where work is reported.
    """

    def __init__(
        self, device: DeviceProfile, known: Mapping[str, float] | None = None, progress: Progress | None = None
    ) -> None:
        self.device = device
        self._seconds = dict(known or {})
        self._progress: Progress = SilentProgress() if progress is None else progress

    @property
    def known(self) -> dict[str, float]:
        """Seconds by operator key, in the order of the keys."""
        return dict(sorted(self._seconds.items()))

    def seconds(self, operators: Iterable[Operator]) -> float:
        """Return the predicted seconds of a model of these operators; those not known yet are measured first.

        Raises:
            MeasureError: The runtime cannot even run an empty model.
        """
        listed = list(operators)
        try:
            return self._sum(listed)
        except KeyError:
            self.measure(listed)
            return self._sum(listed)

    def _sum(self, operators: Sequence[Operator]) -> float:
        return self._seconds[OVERHEAD] + sum(self._seconds[operator.key] for operator in operators)

    def measure(self, operators: Iterable[Operator]) -> None:
        """Measure those of some operators that are not known yet, all in one fresh process.

        An operator that the runtime refuses counts as one pass over the elements that it gives, with a notice.

        Raises:
            MeasureError: The runtime cannot even run an empty model.
        """
        unknown = {operator.key: operator for operator in operators if operator.key not in self._seconds}
        if not unknown and OVERHEAD in self._seconds:
            return
        with self._progress.work("measuring operators", len(unknown)) as bar:
            refused = self._take([unknown[key] for key in sorted(unknown)], bar)
        if not refused:
            return
        substitutes = {operator.key: approximation(operator.elements) for operator in refused}
        missing = {one.key: one for one in substitutes.values() if one.key not in self._seconds}
        with self._progress.work("measuring approximations", len(missing)) as bar:
            for operator in self._take([missing[key] for key in sorted(missing)], bar) if missing else ():
                self._seconds[operator.key] = 0.0
        for operator in refused:
            self._seconds.setdefault(operator.key, self._seconds[substitutes[operator.key].key])
            self._progress.notice(f"the latency of {operator.key} is a guess: onnxruntime does not run it alone")

    def _take(self, operators: Sequence[Operator], bar: Bar) -> list[Operator]:
        """Measure operators and return those that the runtime refused; one that ends the process is found by halving.

        Raises:
            MeasureError: The runtime cannot even run an empty model.
        """
        try:
            result = self._run(operators, bar)
        except MeasureError:
            if not operators:
                raise
            self._take([], bar)  # if this fails, none of the operators is to blame
            if len(operators) == 1:
                return list(operators)
            half = len(operators) // 2
            return [*self._take(operators[:half], bar), *self._take(operators[half:], bar)]
        self._seconds.setdefault(OVERHEAD, result["overhead"])
        refused = []
        for operator, seconds in zip(operators, result["seconds"], strict=True):
            if isinstance(seconds, str):
                refused.append(operator)
            else:
                self._seconds[operator.key] = seconds
        return refused

    def _run(self, operators: Sequence[Operator], bar: Bar) -> Any:
        settings = {
            "copies": COPIES,
            "seconds": SECONDS_PER_OPERATOR,
            "processor_time": self.device.threads == 1 and self.device.provider == "CPUExecutionProvider",
        }
        form = self.device.int8
        with tempfile.TemporaryDirectory(prefix="mil-operators-") as folder:
            bare = Path(folder) / "empty.onnx"
            onnx.save(empty(form), bare)
            files = [bare]
            for position, operator in enumerate(operators):
                for copies in (1, COPIES):
                    files.append(Path(folder) / f"{position}x{copies}.onnx")
                    onnx.save(build(operator, copies, form=form, most=COPIES), files[-1])
            name = onnx.load(bare).graph.input[0].name
            feeds = {name: np.zeros(1, np.float32)}
            return run_job(
                "operators", files, device=self.device, feeds=feeds, settings=settings, on_advance=bar.advance
            )

    def to_json(self) -> dict[str, Any]:
        """Return the table as it is saved."""
        return {"version": TABLE_VERSION, "device": _identity(self.device), "seconds": self.known}

    @classmethod
    def from_json(
        cls, document: Mapping[str, Any], device: DeviceProfile, progress: Progress | None = None
    ) -> OperatorTable:
        """Return a saved table.

        Args:
            document: What `to_json` gave.
            device: The profile; its runtime settings must be those that the table was measured with.
            progress: Where work is reported.

        Raises:
            MeasureError: The document is of another version or device, or is damaged.
        """
        if document.get("version") != TABLE_VERSION:
            raise MeasureError(
                "a latency table of another version", value=document.get("version"), hint="measure it again"
            )
        if document.get("device") != _identity(device):
            raise MeasureError(
                f"the latency table was not measured on the device {device.name}", hint="measure it again"
            )
        seconds = document.get("seconds")
        if not isinstance(seconds, Mapping) or not all(
            isinstance(key, str) and isinstance(value, float | int) and 0 <= value < float("inf")
            for key, value in seconds.items()
        ):
            raise MeasureError("the latency table is damaged", hint="measure it again")
        return cls(device, {key: float(value) for key, value in seconds.items()}, progress)


def _identity(device: DeviceProfile) -> dict[str, str]:
    """Return fingerprints of what in a profile decides how long an operator takes."""
    prints = device.field_fingerprints()
    return {name: prints[name] for name in _DEVICE_FIELDS}
