"""``mil inspect``: layers, shapes, operations and parameters; what can be pruned or quantized, and why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mil_cli.graph.coupling import Coupling
    from mil_cli.graph.model import Model

QUANTIZABLE = ("conv1d", "conv2d", "conv3d", "linear", "matmul", "bmm", "addmm", "mm")
"""Operators with int8 kernels in the runtimes."""


def inspect(
    model: Annotated[Path, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, a .pt2 archive or an .onnx file.")],
    everything: Annotated[bool, typer.Option("--all", help="Also nodes without operations or parameters.")] = False,
) -> None:
    """Show a model's layers, and what can be pruned or quantized and what cannot, with the reason."""
    from mil_cli.cli import console
    from mil_cli.cli.subjects import check_exists

    check_exists(model)
    stdout = console.results()
    if model.suffix == ".onnx":
        _show_onnx(model, stdout)
        return

    from mil_cli.cli.subjects import load_graph
    from mil_cli.graph.coupling import analyse

    graph = load_graph(model)
    coupling = analyse(graph)
    _show_signature(graph, stdout)
    _show_layers(graph, _cuttable(coupling), everything, stdout)
    _show_limits(coupling, stdout)
    for notice in graph.spec.notices:
        stdout.print(f"note: {notice}", markup=False)


def _show_onnx(path: Path, stdout: Console) -> None:
    from collections import Counter

    import onnx

    from mil_cli.cli.subjects import signature

    inputs = signature(path)
    graph = onnx.load(path, load_external_data=False).graph
    for name, (shape, dtype) in inputs.items():
        stdout.print(f"input   {name}: {list(shape)} {dtype} (free axes shown as 1)", markup=False)
    for value in graph.output:
        stdout.print(f"output  {value.name}", markup=False)
    for operator, count in Counter(node.op_type for node in graph.node).most_common():
        stdout.print(f"{count:>6}  {operator}", markup=False)
    stdout.print(f"{path.stat().st_size} bytes", markup=False)


def _show_signature(graph: Model, stdout: Console) -> None:
    for kind, specs in (("input", graph.spec.inputs), ("output", graph.spec.outputs)):
        for spec in specs:
            shape = [spec.dynamic.get(axis, size) for axis, size in enumerate(spec.shape)]
            text = ", ".join(str(size) for size in shape)
            stdout.print(f"{kind:<7} {spec.name}: [{text}] {spec.dtype}", markup=False)
    stdout.print(f"macs    {graph.macs():,} for one sample; parameters {graph.num_params():,}", markup=False)


def _cuttable(coupling: Coupling) -> dict[str, tuple[int, int]]:
    """Return parameter name -> (rows that can be cut, rows): a row is an entry of its first axis."""
    import numpy as np

    free: dict[str, Any] = {}
    for space in coupling.spaces:
        for member in space.members:
            if member.axis != 0:
                continue
            rows = np.isin(member.classes, space.free)
            for name in member.names:
                free[name] = free[name] | rows if name in free else rows
    return {name: (int(rows.sum()), len(rows)) for name, rows in free.items()}


def _show_layers(graph: Model, cuttable: dict[str, tuple[int, int]], everything: bool, stdout: Console) -> None:
    from rich.markup import escape

    from mil_cli.graph.count import count_layers
    from mil_cli.report.terminal import new_table, show

    table = new_table("Layers", "module", "op", "output", "macs", "parameters", "prunable", "int8", numbers_from=3)
    for layer in count_layers(graph):
        if not everything and not layer.macs and not layer.params:
            continue
        rows = cuttable.get(f"{layer.module}.weight" if layer.module else "weight")
        table.add_row(
            escape(layer.module or layer.node),
            escape(layer.op),
            "x".join(str(size) for size in layer.shape),
            f"{layer.macs:,}" if layer.macs else "",
            f"{layer.params:,}" if layer.params else "",
            f"{rows[0]} of {rows[1]}" if rows is not None and layer.params else "",
            "yes" if layer.op in QUANTIZABLE and layer.macs else "",
        )
    show(stdout, table)


def _show_limits(coupling: Coupling, stdout: Console) -> None:
    if not coupling.frozen:
        return
    stdout.print("cannot be pruned:")
    for frozen in coupling.frozen:
        line = f"  {frozen.parameter} axis {frozen.axis}, {frozen.entries} of {frozen.size}: {frozen.reason}"
        if frozen.source_line:
            line += f" ({frozen.source_line})"
        stdout.print(line, markup=False, soft_wrap=True)
