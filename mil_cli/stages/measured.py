"""The latency of one model beside another, as their files run on the device: what predictions are corrected by."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mil_cli.export.onnx import export_onnx
from mil_cli.export.session import feeds_of
from mil_cli.measure.latency import measure_latency
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


def latency_ratio(model: Model, reference: Model, context: Context) -> float:
    """Return a model's measured latency over that of another with the same inputs, by the protocol of all latencies.

    Args:
        model: The model.
        reference: What it is compared with.
        context: Gives the device, and a training sample to run on.

    Raises:
        ExportError: One of them cannot be exported.
        MeasureError: The runtime failed on a file.
    """
    args, kwargs = next(iter(context.calibration(samples=1, batch_size=fixed_batch(model) or 1)))
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("reference.onnx", "model.onnx")]
        for source, file in zip((reference, model), files, strict=True):
            export_onnx(source, file, device=context.device)
        feeds = feeds_of(reference.spec, args, kwargs)
        _, measured = measure_latency(files, device=context.device, feeds=feeds, progress=context.progress)
    return measured.ratio_to_baseline
