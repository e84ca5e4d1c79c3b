"""``mil inspect``: layers, shapes, operations and parameters; what can be pruned or quantized, and why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mil_cli.graph.coupling import Coupling
    from mil_cli.graph.model import Model
    from mil_cli.stages.quantize.describe import LayerBits


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
    bits, origin = _bits(model, graph)
    _show_signature(graph, stdout)
    _show_layers(graph, _cuttable(coupling), bits, everything, stdout)
    stdout.print(f"bits of weights (W) and of what layers read (A): {origin}", markup=False, soft_wrap=True)
    for sentence in bits.form:
        stdout.print(f"  {sentence}", markup=False, soft_wrap=True)
    _show_limits(coupling, stdout)
    _show_float(bits, stdout)
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


def _weights(graph: Model) -> dict[str, str]:
    """Return node name -> name of the parameter that it reads as its weight, whatever module that belongs to."""
    from mil_cli.graph.nodes import calls, get_argument, schema_index

    found = {}
    for node in calls(graph.graph):
        weight = get_argument(node, "weight") if schema_index(node, "weight") is not None else None
        if weight is not None and weight.op == "get_attr":
            found[node.name] = str(weight.target)
    return found


def _bits(path: Path, graph: Model) -> tuple[LayerBits, str]:
    """Return the bits that layers have or would have, and by what."""
    from mil_cli.device.host import resolve
    from mil_cli.recipe.load import load_recipe
    from mil_cli.stages.quantize import dynamic, weight_only
    from mil_cli.stages.quantize.describe import planned_bits, present_bits
    from mil_cli.stages.quantize.mixed import MixedConfig
    from mil_cli.stages.quantize.settings import QuantizationConfig, Rules
    from mil_cli.stages.quantize.static import StaticConfig

    present = present_bits(graph)
    if present.bits:
        return present, "as they are"
    device: dict[str, Any] = {"name": "host_cpu"}
    config: QuantizationConfig = StaticConfig()
    origin = "as quantize/static would give them by itself"
    if path.suffix == ".yaml":
        recipe = load_recipe(path)
        device = recipe.device
        for name in recipe.chain:
            stage = recipe.stages[name]
            as_given = f"as the stage '{name}' ({stage.key()}) gives them"
            if isinstance(stage, QuantizationConfig):
                config, origin = stage, as_given
            elif isinstance(stage, MixedConfig):
                given = recipe.stages.get(stage.by) if stage.by is not None else config
                config = given if isinstance(given, QuantizationConfig) else config
                widths = ", ".join(map(str, stage.bits))
                origin = f"{as_given}, but for those of weights, which it chooses from {widths} when it runs"
            elif isinstance(stage, weight_only.WeightOnlyConfig):
                return weight_only.planned_bits(graph, stage), as_given
            elif isinstance(stage, dynamic.DynamicConfig):
                form = resolve(device, runnable=False).int8
                return dynamic.planned_bits(graph, stage, form), as_given
    profile = resolve(device, runnable=False)
    rules = Rules.on(config, profile.int8)
    return planned_bits(graph, rules, config.skip, fold=config.fold), f"{origin}, on {profile.name}"


def _show_layers(
    graph: Model, cuttable: dict[str, tuple[int, int]], bits: LayerBits, everything: bool, stdout: Console
) -> None:
    from rich.markup import escape

    from mil_cli.graph.count import count_layers
    from mil_cli.report.terminal import new_table, show

    table = new_table("Layers", "module", "op", "output", "macs", "parameters", "prunable", "bits", numbers_from=3)
    weights = _weights(graph)
    for layer in count_layers(graph):
        if not everything and not layer.macs and not layer.params:
            continue
        rows = cuttable.get(weights.get(layer.node, f"{layer.module}.weight"))
        table.add_row(
            escape(layer.module or layer.node),
            escape(layer.op),
            "x".join(str(size) for size in layer.shape),
            f"{layer.macs:,}" if layer.macs else "",
            f"{layer.params:,}" if layer.params else "",
            f"{rows[0]} of {rows[1]}" if rows is not None and layer.params else "",
            _shown(bits.bits.get(layer.node), computes=bool(layer.macs)),
        )
    show(stdout, table)


def _shown(bits: tuple[int, int | None] | None, *, computes: bool) -> str:
    if bits is None:
        return "float" if computes else ""
    weight, read = bits
    return f"W{weight}" if read is None else f"W{weight}A{read}"


def _show_float(bits: LayerBits, stdout: Console) -> None:
    if bits.kept_float:
        stdout.print("stay float:")
    for name, reason in bits.kept_float.items():
        stdout.print(f"  {name}: {reason}", markup=False, soft_wrap=True)


def _show_limits(coupling: Coupling, stdout: Console) -> None:
    if not coupling.frozen:
        return
    stdout.print("cannot be pruned:")
    for frozen in coupling.frozen:
        line = f"  {frozen.parameter} axis {frozen.axis}, {frozen.entries} of {frozen.size}: {frozen.reason}"
        if frozen.source_line:
            line += f" ({frozen.source_line})"
        stdout.print(line, markup=False, soft_wrap=True)
