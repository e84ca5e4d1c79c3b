"""``mil export``: writes a `.pt2` model as ONNX and proves that the file does what the graph does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL.pt2", help="A model that mil or torch.export has saved.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.onnx", help="Beside the model by default.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="A device profile; see `mil list devices`.")] = "host_cpu",
) -> None:
    """Export a .pt2 model to ONNX and prove parity."""
    from mil_cli.cli.subjects import check_exists, check_writable, load_graph, named_device
    from mil_cli.errors import ModelError, OutputError

    check_exists(model)
    if model.suffix != ".pt2":
        hint = "name a model.pt2; `mil compress` exports a recipe's model itself"
        raise ModelError("only a .pt2 archive can be exported", where=str(model), hint=hint)
    target = output or model.with_suffix(".onnx")
    check_writable(target, option="--output")
    if target.exists() and target.samefile(model):
        raise OutputError("this is the model itself", where="--output", value=str(target), hint="name another file")
    profile = named_device(device, runnable=False)
    graph = load_graph(model)

    from mil_cli.export.onnx import export_onnx
    from mil_cli.export.parity import check_parity

    exported = export_onnx(graph, target, device=profile)
    for notice in exported.notices:
        typer.echo(f"note: {notice}", err=True)
    parity = check_parity(graph, exported.path, [graph.samples], threads=profile.threads)
    typer.echo(f"{exported.path}: {exported.path.stat().st_size} bytes, opset {exported.opset}")
    typer.echo(f"inputs {', '.join(exported.input_names)}; outputs {', '.join(exported.output_names)}")
    typer.echo(f"largest difference between graph and file: {parity.max_abs_diff:.3g} on {parity.samples} samples")
