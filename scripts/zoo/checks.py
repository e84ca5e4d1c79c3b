"""What is done to one model, step by step, and whether a step fails on the cut model alone or on the original too.

A step that fails is recorded and the next are tried. Where the user's own module, or its uncut graph, fails the same
step by torch's or onnxruntime's own doing, that is recorded apart: it says nothing about the engine.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings
import zlib
from collections import Counter as Tally
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.coupling import Coupling, analyse, check_equivalence, cut, repair
from mil_cli.graph.coupling.equivalence import TOLERANCE
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute, op_name
from scripts.zoo.sample import Sample, fresh
from scripts.zoo.steps import Row, Steps, built, captured, captured_by_torch, floats

RATIO = 0.4
"""Share of the free classes of every space that is cut."""

STEPS = ("build", "capture", "analyse", "cut", "equivalence", "batch", "backward", "archive", "second cut", "onnx")

_OTHER_BATCH = 17
"""More than the analysis runs with, so that sizes of that run left in the graph are seen."""

_SHOWN_REASONS = 4


def check(name: str, report: Callable[[Row], None]) -> None:
    """Do every step on one model and report the row after each.

    Args:
        name: ``catalogue module:model``.
        report: Takes what is known so far: figures, and the steps that failed with the reason, under ``failed`` where
            the original does not fail and under ``original`` where it does.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    catalogue, model = name.split(":")
    _Check(name, report).run(lambda: importlib.import_module(catalogue).build(model))


class _Check:
    def __init__(self, name: str, report: Callable[[Row], None]) -> None:
        self.seed = zlib.crc32(name.encode())
        self._steps = Steps(name, report)
        self.row = self._steps.row

    def run(self, build: Callable[[], Sample]) -> None:
        """Do the steps; those that need what an earlier one could not give are left out."""
        step = self._steps.do
        with TemporaryDirectory(prefix="zoo-") as folder:
            path = Path(folder)
            sample = step("build", lambda: built(build))
            model = sample and step("capture", lambda: self._capture(sample), lambda: captured_by_torch(sample))
            coupling = model and step("analyse", lambda: self._analyse(model))
            removed = coupling and chosen(coupling, self.seed)
            smaller = coupling and step("cut", lambda: self._cut(model, coupling, removed))
            if smaller is not None:
                step("equivalence", lambda: self._equivalence(model, coupling, removed, smaller))
                step("batch", lambda: _other_batch(smaller), lambda: _other_batch(model))
                step("backward", lambda: _backward(smaller, sample), lambda: _backward_of_module(sample))
                step("archive", lambda: _round_trip(smaller, path), lambda: _round_trip(model, path))
                step("second cut", lambda: self._second_cut(path))
                step("onnx", lambda: _onnx(smaller, path), lambda: _onnx(model, path))
        self._steps.finish()

    def _capture(self, sample: Sample) -> Model:
        model = captured(sample)
        self.row.update(nodes=len(model.graph.graph.nodes), macs=model.macs(), params=model.num_params())
        self.row["notices"] = list(model.spec.notices)
        return model

    def _analyse(self, model: Model) -> Coupling:
        coupling = analyse(model)
        spaces = coupling.spaces
        reasons: Tally[str] = Tally()
        for frozen in coupling.frozen:
            if frozen.axis == 0:
                reasons[f"{frozen.operator}: {frozen.reason}"] += frozen.entries
        self.row.update(
            cuttable_share=round(coupling.cuttable_share, 4),
            inner_share=round(inner_share(coupling), 4),
            free=sum(bool(space.free) for space in spaces),
            frozen=sum(not space.free for space in spaces),
            inexact=sum(bool(space.inexact) for space in spaces if space.free),
            unknown=[reason for _, reason, _ in coupling.unknown],
            reasons=[f"{count} rows: {reason}" for reason, count in reasons.most_common(_SHOWN_REASONS)],
        )
        return coupling

    def _cut(self, model: Model, coupling: Coupling, removed: dict[int, set[int]]) -> Model:
        smaller = cut(model, coupling, removed)
        self.row.update(macs_after=smaller.macs(), params_after=smaller.num_params())
        return smaller

    def _equivalence(self, model: Model, coupling: Coupling, removed: dict[int, set[int]], smaller: Model) -> None:
        self.row["difference"] = _proven(model, coupling, removed, smaller, self.seed)

    def _second_cut(self, folder: Path) -> None:
        model = Model.load(folder / "model.pt2")
        coupling = analyse(model)
        removed = chosen(coupling, self.seed + 1)
        smaller = cut(model, coupling, removed)
        _proven(model, coupling, removed, smaller, self.seed)
        if removed and smaller.num_params() >= model.num_params():
            raise ValueError("the second cut removed no parameter")


def inner_share(coupling: Coupling) -> float:
    """Return the cuttable share of the rows that neither make the model's outputs nor are looked up by number."""
    recording = coupling.recording
    readers = [node for node in coupling.graph.graph.nodes if op_name(node) in ("embedding", "index", "index_select")]
    tables = {recording.key(node.args[0]) for node in readers}
    outputs: dict[str, int] = {}
    for frozen in coupling.frozen:
        if frozen.axis == 0 and frozen.operator == "output":
            outputs[frozen.parameter] = max(frozen.entries, outputs.get(frozen.parameter, 0))
    total = inner = 0
    for key, leaf in recording.leaves.items():
        if recording.is_parameter(key) and leaf.ndim > 1:
            total += leaf.shape[0]
            inner += 0 if key in tables else leaf.shape[0] - outputs.get(recording.leaf_names[key][0], 0)
    return coupling.cuttable_share * total / inner if inner else 1.0


def chosen(coupling: Coupling, seed: int) -> dict[int, set[int]]:
    """Return classes to remove: a random share of the free ones of every space, as far as no axis becomes empty."""
    generator = np.random.default_rng(seed)
    removed = {}
    for number, space in enumerate(coupling.spaces):
        count = math.floor(RATIO * len(space.free))
        removed[number] = set(generator.choice(space.free, count, replace=False).tolist()) if count else set()
    return repair(coupling, removed)


def _proven(model: Model, coupling: Coupling, removed: dict[int, set[int]], smaller: Model, seed: int) -> float:
    """Return the difference of the cut model from the masked one.

    Where a network is so sensitive that single precision cannot tell, the same is done in double precision, to a
    thousandth of the tolerance: what the engine does wrong stays, what rounding does goes.

    Raises:
        ValueError: The two differ; names the spaces that are to blame.
    """
    inputs = fresh(model.samples, seed)
    analysed = check_equivalence(model, coupling, {}, model, [inputs])
    if not analysed.equivalent:
        raise ValueError(f"the analysed graph differs from the model by {analysed.difference:.2g}")
    report = check_equivalence(model, coupling, removed, smaller, [inputs])
    if report.equivalent:
        return report.difference
    whole = in_double_precision(model)
    again = analyse(whole)
    double_inputs = fresh(whole.samples, seed)
    exact = check_equivalence(
        whole, again, removed, cut(whole, again, removed), [double_inputs], tolerance=1e-3 * TOLERANCE
    )
    if not exact.equivalent:
        origins = [coupling.spaces[number].origin for number in exact.failed]
        raise ValueError(f"the outputs differ by {exact.difference:.2g} by the spaces of {', '.join(origins)}")
    return exact.difference


def in_double_precision(model: Model) -> Model:
    """Return a copy of a model whose weights, samples and constants of single precision have double precision."""

    def doubled(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    copied = model.clone()
    copied.graph.double()
    for node in copied.graph.graph.nodes:
        node.args = pytree.tree_map(doubled, node.args)
        node.kwargs = pytree.tree_map(doubled, node.kwargs)
    copied.graph.recompile()
    samples = pytree.tree_map_only(
        Tensor, lambda value: value.double() if value.is_floating_point() else value, copied.samples
    )
    return Model(graph=copied.graph, spec=copied.spec, samples=samples)


def _other_batch(model: Model) -> None:
    """Check that another batch runs and that each sample's result does not depend on those beside it.

    Raises:
        ValueError: The batch is fixed, or a result changes.
    """
    if model.spec.batch is None:
        raise ValueError(f"the batch is fixed: {' '.join(model.spec.notices)}")
    args, kwargs = model.batch_input(_OTHER_BATCH)
    with torch.no_grad():
        many = floats(model, model(*args, **kwargs))
        few = floats(model, model(*model.samples[0], **model.samples[1]))
    for whole, part in zip(many, few, strict=True):
        shared = whole
        for axis, size in enumerate(part.shape):
            shared = shared.narrow(axis, 0, size)  # the first samples are the same in both
        difference = (shared - part).abs().max()
        if difference > 1e-4 * part.abs().max():
            raise ValueError(f"a sample's result differs by {difference:.2g} in another batch")


def _loss(outputs: Any) -> Tensor:
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([tensor.square().mean() for tensor in tensors]).sum()


def _backward(smaller: Model, sample: Sample) -> None:
    """Check that training reaches every parameter that is left, but those that it does not reach in the original."""
    model = smaller.clone().train()
    _loss(model(*model.samples[0], **model.samples[1])).backward()
    read = {str(node.target) for node in model.graph.graph.find_nodes(op="get_attr") if node.users}
    shared = {id(get_attribute(model.graph, name)) for name in read}
    without = {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in shared and parameter.requires_grad and parameter.grad is None
    }
    if without:
        without -= _backward_of_module(sample)
    if without:
        raise ValueError(f"no gradient for {', '.join(sorted(without)[:5])}")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            raise ValueError(f"the gradient of {name} is not finite")


def _backward_of_module(sample: Sample) -> set[str]:
    """Train the user's module for a step; return the parameters that get no gradient."""
    module = copy.deepcopy(sample.module).train()
    _loss(_leaves(module(*sample.args, **sample.kwargs))).backward()
    return {name for name, parameter in module.named_parameters() if parameter.grad is None}


def _leaves(outputs: Any) -> Any:
    """Return a record as the dictionary that it is, for torch's trees do not know every record."""
    return dict(outputs) if hasattr(outputs, "items") else outputs


def _round_trip(model: Model, folder: Path) -> None:
    path = folder / "model.pt2"
    model.save(path)
    loaded = Model.load(path)
    with torch.no_grad():
        before = model.flatten_outputs(model(*model.samples[0], **model.samples[1]))
        after = loaded.flatten_outputs(loaded(*model.samples[0], **model.samples[1]))
    weights, read = model.state_dict(), loaded.state_dict()
    if weights.keys() != read.keys() or not all(torch.equal(value, read[name]) for name, value in weights.items()):
        raise ValueError("the archive gives other weights")
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise ValueError("the archive gives other outputs")


def _onnx(model: Model, folder: Path) -> None:
    path = folder / "model.onnx"
    export_onnx(model, path)
    check_parity(model, path, [fresh(model.samples, 1)])
