"""Post-training quantization to int8 of one model, from the user's module to onnxruntime, on random data."""

from __future__ import annotations

import importlib
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.device.host import resolve
from mil_cli.device.profile import DeviceProfile
from mil_cli.events import SilentProgress
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.export.session import OnnxModel, session_options
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.static import StaticConfig, quantize
from mil_cli.stages.surroundings import Surroundings
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from scripts.zoo.sample import Sample, fresh
from scripts.zoo.steps import Row, Steps, built, captured, captured_by_torch, floats

STEPS = ("build", "capture", "quantize", "export", "agree", "coverage")

TOLERANCE = 0.01
"""How far a file's outputs may be off those of its graph: root mean square, over the range of the float model's.

Steps of 8 bits are 0.004 of that range. Deep random networks round so coarsely that a sum in another order, which tips
values over their thresholds, changes more: there the file may differ by as much as the graph does from the float model.
"""

SAMPLES, BATCH = 16, 8
"""Calibration samples, and how many at once."""

COMPARED = 2
"""Batches of the model's own samples' size that are compared."""


def check(name: str, report: Callable[[Row], None]) -> None:
    """Quantize one model after training, export it, run it and compare; report the row after each step.

    Args:
        name: ``catalogue module:model``.
        report: Takes what is known so far.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    catalogue, model = name.split(":")
    seed = zlib.crc32(name.encode())
    _Check(Steps(name, report), seed).run(lambda: importlib.import_module(catalogue).build(model))


class _Check:
    def __init__(self, steps: Steps, seed: int) -> None:
        self._steps = steps
        self._seed = seed
        self._device = resolve({"name": "host_cpu"})

    def run(self, build: Callable[[], Sample]) -> None:
        step, row = self._steps.do, self._steps.row
        with TemporaryDirectory(prefix="zoo-") as folder:
            path = Path(folder) / "model.onnx"
            sample = step("build", lambda: built(build))
            model = sample and step("capture", lambda: captured(sample), lambda: captured_by_torch(sample))
            if model is not None:
                row.update(macs=model.macs(), params=model.num_params())
            context = model and _context(model, self._device, self._seed)
            quantized = context and step("quantize", lambda: quantize(model, _SETTINGS, context))
            if quantized is not None:
                row.update(
                    {name: context.notes[name] for name in ("policy", "reduce_range", "quantized_layers", "kept_float")}
                )
                exported = step(
                    "export",
                    lambda: self._export(quantized, path),
                    lambda: export_onnx(model, path, device=self._device),
                )
                if exported is not None:
                    step("agree", lambda: self._agree(model, quantized, path))
                    step("coverage", lambda: self._coverage(path))
        self._steps.finish()

    def _export(self, quantized: Model, path: Path) -> bool:
        export_onnx(quantized, path, device=self._device)
        self._steps.row["bytes"] = path.stat().st_size
        return True

    def _agree(self, model: Model, quantized: Model, path: Path) -> None:
        batches = [fresh(model.samples, self._seed + number + 1) for number in range(COMPARED)]
        exact = session_options(threads=1)
        exact.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        runs = {
            "float": _outputs(model, model, batches),
            "graph": _outputs(model, quantized, batches),
            "file": _outputs(model, OnnxModel(path, model.spec), batches),
            "unfused": _outputs(model, OnnxModel(path, model.spec, options=exact), batches),
        }
        span = float(runs["float"].max() - runs["float"].min())

        def apart(one: str, other: str) -> float:
            return float((runs[one] - runs[other]).square().mean().sqrt()) / span

        row = self._steps.row
        row.update(
            difference=apart("file", "graph"),
            largest=float((runs["file"] - runs["graph"]).abs().max()) / span,
            rounding=apart("graph", "float"),
            writing=apart("unfused", "graph"),
            kernels=apart("file", "unfused"),
        )
        check_parity(quantized, path, batches)
        if row["difference"] > max(TOLERANCE, row["rounding"]):
            raise ValueError(f"the outputs differ by {row['difference']:.2g} of their range")

    def _coverage(self, path: Path) -> None:
        """Note what runs on integers and what does not.

        Raises:
            ValueError: A layer that was quantized runs in float.
        """
        found = integer_coverage(path)
        row = self._steps.row
        row.update(integer=found.integer, float_layers=list(found.float_layers), float_operators=found.float_operators)
        if found.integer_layers < row["quantized_layers"]:
            raise ValueError(
                f"{found.integer_layers} of {row['quantized_layers']} quantized layers run on integers; "
                f"in float: {', '.join(found.float_layers)}"
            )


_SETTINGS = StaticConfig(calibration_samples=SAMPLES, calibration_batch_size=BATCH)


def _outputs(
    model: Model, predict: Callable[..., Any], batches: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> Tensor:
    with torch.no_grad():
        runs = [floats(model, predict(*args, **kwargs)) for args, kwargs in batches]
    return torch.cat([value.double().flatten() for outputs in runs for value in outputs])


def _context(model: Model, device: DeviceProfile, seed: int) -> Context:
    """Return what a stage has around it, with random samples to calibrate on."""
    (image,) = model.flat_inputs(*model.samples[0], **model.samples[1])
    images = torch.randn(SAMPLES, *image.shape[1:], generator=torch.Generator().manual_seed(seed))
    split = TensorSplit((images, torch.zeros(SAMPLES, dtype=torch.int64)))

    def no_source(source: object) -> Model:
        raise KeyError(f"no other model: {source!r}")

    around = Surroundings(
        seed=seed,
        task=Classification(),
        data=Data(name="noise", train=split, val=split, test=split),
        device=device,
        trainer=TrainerConfig(),
        goals={},
        stages={},
        load_source=no_source,
        source_fingerprint=str,
    )
    return Context(name="quantize", surroundings=around, progress=SilentProgress())
