"""``mil measure``: latency, memory, size and operations of several models, timed interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mil_cli.errors import MeasureError

if TYPE_CHECKING:
    from rich.console import Console

    from mil_cli.cli.subjects import Subject
    from mil_cli.device.profile import DeviceProfile


def measure(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help=".onnx, .pt2, or a recipe (its uncompressed model).")
    ],
    device: Annotated[str, typer.Option("--device", help="A device profile; see `mil list devices`.")] = "host_cpu",
    against: Annotated[
        Path | None, typer.Option("--against", metavar="MODEL", help="What the others are compared with.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=60, help="Rounds of the interleaved measurement.")] = 60,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            "--axis", metavar="NAME=LENGTH", help="The length of a free axis, such as length=128; repeatable."
        ),
    ] = None,
) -> None:
    """Measure models side by side; the first, or --against, is what the others are compared with."""
    import tempfile

    from mil_cli.cli import console
    from mil_cli.cli.subjects import as_onnx, check_exists, check_writable, named_device

    named = ([against] if against is not None else []) + models
    for path in named:
        check_exists(path)
    if json_file is not None:
        check_writable(json_file, option="--json")
    sizes = dict(map(_length, axis or ()))
    profile = named_device(device)
    with tempfile.TemporaryDirectory(prefix="mil-measure-") as folder:
        subjects = [
            as_onnx(path, device=profile, folder=Path(folder), number=number) for number, path in enumerate(named)
        ]
        figures = _figures(subjects, profile, rounds, sizes)
    if json_file is not None:
        from mil_cli.files import write_json

        write_json(json_file, {"version": 1, "device": profile.model_dump(mode="json"), "models": figures})
    _show(figures, console.results())


def _length(word: str) -> tuple[str, int]:
    """Return name and length of an axis, from `NAME=LENGTH`.

    Raises:
        MeasureError: It is something else.
    """
    name, _, length = word.partition("=")
    if not name or not length.isascii() or not length.isdigit() or int(length) < 1:
        raise MeasureError("this is no NAME=LENGTH", where="--axis", value=word, hint="such as --axis length=128")
    return name, int(length)


def _figures(
    subjects: list[Subject], profile: DeviceProfile, rounds: int, sizes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return name, verdict and a measurement, as in a report but without quality, of each model."""
    from mil_cli.cli import console
    from mil_cli.cli.progress import progress_on
    from mil_cli.cli.subjects import feeds_for
    from mil_cli.measure.cost import cost_per_million
    from mil_cli.measure.energy import measure_energy
    from mil_cli.measure.latency import measure_latency
    from mil_cli.measure.memory import measure_memory
    from mil_cli.measure.size import size_bytes, zipped_bytes

    feeds = feeds_for(subjects, sizes)
    progress = progress_on(console.messages())
    latencies = measure_latency(
        [subject.path for subject in subjects], device=profile, feeds=feeds, rounds=rounds, progress=progress
    )
    return [
        {
            "name": subject.name,
            "verdict": latency.verdict,
            "measurement": {
                "quality": None,
                "params": None if subject.model is None else subject.model.num_params(),
                "macs": None if subject.model is None else subject.model.macs(),
                "size_bytes": size_bytes(subject.path),
                "zipped_bytes": zipped_bytes(subject.path),
                "latency_ms": latency.to_json(),
                "throughput_per_s": latency.throughput_per_s,
                "peak_memory_bytes": measure_memory(subject.path, device=profile, feeds=feeds),
                "energy_j": measure_energy(subject.path, device=profile, feeds=feeds, latency=latency),
                "cost_per_million": cost_per_million(latency, profile),
            },
        }
        for subject, latency in zip(subjects, latencies, strict=True)
    ]


def _show(figures: list[dict[str, Any]], stdout: Console) -> None:
    from rich.markup import escape

    from mil_cli.report import text
    from mil_cli.report.terminal import new_table, show

    table = new_table(
        "Models", "model", "p50", "p90", "p99", "ratio", "95 % interval", "verdict", "size", "memory", "macs"
    )
    for row in figures:
        measured = row["measurement"]
        latency = measured["latency_ms"]
        low, high = latency["ratio_ci95"]
        table.add_row(
            escape(row["name"]),
            *(text.milliseconds(latency[name]) for name in ("p50", "p90", "p99")),
            f"{latency['ratio_to_baseline']:.3f}",
            f"{low:.3f} to {high:.3f}",
            escape(str(row["verdict"])),
            text.size(measured["size_bytes"]),
            text.size(measured["peak_memory_bytes"]),
            text.count(measured["macs"]),
        )
    table.caption = "ratio: of the fastest inferences of each turn, paired; percentiles: of all inferences"
    show(stdout, table)
