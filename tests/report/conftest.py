"""A report as a run writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest


def quality(value: float, split: str = "test") -> dict[str, Any]:
    return {"metric": "accuracy", "value": value, "higher_is_better": True, "samples": 10_000, "split": split}


def measurement(
    *, value: float, split: str = "test", params: int, macs: int, size: int | None = None, p50: float | None = None,
    ratio: float = 1.0, interval: tuple[float, float] = (1.0, 1.0), memory: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    latency = None
    if p50 is not None:
        latency = {
            "p50": p50,
            "p90": p50 * 1.08,
            "p99": p50 * 1.3,
            "ratio_to_baseline": ratio,
            "ratio_ci95": list(interval),
        }
    return {
        "quality": quality(value, split),
        "params": params,
        "macs": macs,
        "size_bytes": size,
        "latency_ms": latency,
        "throughput_per_s": None if p50 is None else 1000 / p50,
        "peak_memory_bytes": memory,
        "energy_j": None,
        "cost_per_million": None,
    }


def stage(name: str, family: str, method: str, seconds: float, figures: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {
        "name": name,
        "family": family,
        "method": method,
        "seconds": seconds,
        "cached": False,
        "measurement": figures,
        "notes": {},
        **rest,
    }


_HISTORY = [
    {"epoch": epoch, "train_loss": 2.0 / epoch, "learning_rate": 0.1, "val": 0.93 - 0.4 / epoch}
    for epoch in range(1, 21)
]

_REPORT: dict[str, Any] = {
    "version": 1,
    "name": "resnet20_prune_distill_int8",
    "command": ["compress", "recipes/fashion_mnist/resnet20_prune_distill_int8.yaml"],
    "recipe": {
        "name": None,
        "seed": 0,
        "chain": ["prune", "recover", "quantize"],
        "goals": {"quality": {"max_drop": 0.01}},
        "stages": {"prune": {"family": "prune", "method": "magnitude", "macs": 0.25}},
    },
    "environment": {
        "versions": {"mil": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "onnxruntime": "1.32.0"},
        "cores": 2,
        "memory_bytes": 8_000_000_000,
    },
    "device": {
        "version": 1, "name": "host_cpu", "description": "AMD EPYC", "threads": 1, "watts": None,
        "requires": {"isa": ["avx2", "avx512_vnni"], "packages": []},
    },
    "preparation": stage(
        "baseline", "train", "supervised", 2411.0,
        measurement(value=0.9341, split="val", params=1_075_000, macs=34_120_000), cached=True,
        notes={"history": _HISTORY, "stopped": None},
    ),
    "baseline": measurement(
        value=0.9325, params=1_075_000, macs=34_120_000, size=4_323_000, p50=1.94, memory=21_400_000
    ),
    "final": measurement(
        value=0.9288, params=262_000, macs=8_420_000, size=301_000, p50=0.47, ratio=0.2421, interval=(0.2366, 0.2473),
        memory=14_900_000,
    ),
    "stages": [
        stage("prune", "prune", "magnitude", 402.0,
              measurement(value=0.9207, split="val", params=262_000, macs=8_420_000),
              notes={"before": 34_120_000, "target": 8_530_000, "multiple": 16,
                     "widths": [{"parameter": "layer1.0.conv1.weight", "before": [32, 32, 3, 3],
                                 "after": [16, 32, 3, 3]}]}),
        stage("recover", "distill", "soft_labels", 613.0,
              measurement(value=0.9312, split="val", params=262_000, macs=8_420_000),
              notes={"history": _HISTORY, "stopped": "val did not improve for 5 epochs",
                     "convergence": {
                         "distilled": [[390, 0.90], [780, 0.9312]], "plain": [[390, 0.80], [780, 0.89]],
                         "seconds": 613.0, "plain_seconds": 412.0,
                         "reached": [{"quality": 0.89, "steps": 390, "plain_steps": 780},
                                     {"quality": 0.95, "steps": None, "plain_steps": 780}],
                     }}),
        stage("quantize", "quantize", "static", 14.2,
              measurement(value=0.9301, split="val", params=262_000, macs=8_420_000),
              notes={"policy": "cnn", "quantized_layers": 21, "kept_float": {}}),
    ],
    "goals": [
        {"name": "quality", "kind": "max_drop", "bound": 0.01, "value": 0.003968, "met": True},
        {"name": "latency", "kind": "max_ratio", "bound": 0.2857, "value": 0.2421, "met": True},
        {"name": "size", "kind": "max", "bound": 300_000.0, "value": 301_000.0, "met": False},
    ],
    "goals_met": False,
    "parity": {
        "max_abs_diff": 3.1e-6,
        "samples": 128,
        "metric_torch": 0.9288,
        "metric_onnx": 0.9288,
        "agreement": 0.99996,
    },
    "baseline_parity": {"max_abs_diff": 1.2e-6, "samples": 128, "metric_torch": 0.9325, "metric_onnx": 0.9325},
    "kernels": {"quantized_layers": 21, "integer_layers": 21, "float_layers": ["stem"], "conversions": 4,
                "float_operators": {"Softmax": 2}},
    "notices": ["the batch axis of input x is free"],
}  # fmt: skip


@pytest.fixture
def make_report() -> Callable[..., dict[str, Any]]:
    """Return a function that copies the report and replaces parts of it."""
    return lambda **changes: {**copy.deepcopy(_REPORT), **changes}
