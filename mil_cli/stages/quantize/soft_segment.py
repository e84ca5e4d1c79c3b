"""A part of a quantized graph whose roundings, and if wanted activation steps, can be learned."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mil_cli.graph.fold import reads_alone
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name, set_attribute
from mil_cli.graph.segment import Segment
from mil_cli.ops.learned_scale import SMALLEST_SCALE
from mil_cli.stages.quantize.insert import Quantizer
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.rounding import SoftRounding


class SoftSegment:
    """A copy of a part of a quantized graph, for learning; the graph is not changed.

    Weights that nothing but one quantizer reads, and only for this part, are rounded softly; others stay as they are.

    Args:
        graph: The quantized graph.
        part: The part of it.
        taken: Names of weights and steps that stay as they are.
        steps: Whether the steps of activations are learned.
        drop: Share of each activation's values that go past its quantizer, drawn anew in each run.
        random: Draws them.
    """

    def __init__(
        self,
        graph: GraphModule,
        part: Segment,
        taken: Collection[str],
        *,
        steps: bool,
        drop: float,
        random: torch.Generator,
    ) -> None:
        self.part, self.random = part, random
        self.module = part.module(graph)
        self.roundings: dict[str, SoftRounding] = {}
        self.steps: dict[str, nn.Parameter] = {}
        alone = {node.name for node in part.nodes if _rounds_alone(graph, node, part)}
        for node in list(calls(self.module)):
            if op_name(node) != "quantize_affine":
                continue
            source, scale = get_argument(node, "x"), str(get_argument(node, "scale").target)
            if source.op == "get_attr":
                if node.name in alone and str(source.target) not in taken:
                    self._soften(node, str(source.target))
                continue
            if steps and scale not in taken and scale not in self.steps:
                self.steps[scale] = nn.Parameter(get_attribute(self.module, scale).clone())
                set_attribute(self.module, scale, self.steps[scale])
            if drop:
                self._drop(node, drop)
        self.module.graph.eliminate_dead_code()
        self.module.recompile()

    @property
    def names(self) -> list[str]:
        """Names of all that is learned, as the graph has them."""
        return [*self.roundings, *self.steps]

    def values(self) -> dict[str, Tensor]:
        """Return what was learned: weights on their codes, and steps, by name."""
        weights = {name: rounding.decided() for name, rounding in self.roundings.items()}
        return {**weights, **{name: step.detach().clone() for name, step in self.steps.items()}}

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Raise steps that learning took below the smallest there may be."""
        for step in self.steps.values():
            step.clamp_(min=SMALLEST_SCALE)

    def undecided(self) -> int:
        """Return how many weights learning has left between two codes."""
        return sum(rounding.undecided() for rounding in self.roundings.values())

    def _soften(self, node: Node, name: str) -> None:
        scale, zero_point = (
            get_attribute(self.module, str(get_argument(node, key).target)) for key in ("scale", "zero_point")
        )
        codes = CodeRange(get_argument(node, "quant_min"), get_argument(node, "quant_max"))
        form = Quantizer(scale, zero_point, codes, get_argument(node, "axis"))
        self.roundings[name] = SoftRounding(get_attribute(self.module, name), form)
        target = f"rounding_{len(self.roundings)}"
        self.module.add_module(target, self.roundings[name])
        with self.module.graph.inserting_before(node):
            node.replace_all_uses_with(self.module.graph.call_module(target))

    def _drop(self, node: Node, drop: float) -> None:
        target = f"drop_{node.name}"
        self.module.add_module(target, _Drop(drop, self.random))
        with self.module.graph.inserting_after(node):
            mixed = self.module.graph.call_module(target, (node, get_argument(node, "x")))
        node.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)


class _Drop(nn.Module):
    def __init__(self, drop: float, random: torch.Generator) -> None:
        super().__init__()
        self._drop, self._random = drop, random

    def forward(self, quantized: Tensor, smooth: Tensor) -> Tensor:
        mixed: Tensor = kept_or_dropped(quantized, smooth, self._drop, self._random)
        return mixed


def kept_or_dropped(quantized: Any, smooth: Any, drop: float, random: torch.Generator) -> Any:
    """Return a quantized value in which a share of the entries, drawn at random, are those of the smooth one.

    Wei et al., QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization (2022). What is
    no tensor of floating-point numbers stays.
    """
    if not isinstance(quantized, Tensor) or not quantized.is_floating_point():
        return quantized
    keep = (torch.rand(quantized.shape, generator=random) >= drop).to(quantized.dtype)
    return torch.lerp(smooth, quantized, keep)  # exact at both ends, and twice as fast as `where`


def _rounds_alone(graph: GraphModule, node: Node, part: Segment) -> bool:
    """Whether a node quantizes a weight that nothing outside of a part reads."""
    inside = op_name(node) == "quantize_affine" and set(node.users) <= set(part.nodes)
    return inside and reads_alone(graph, get_argument(node, "x"), node)
