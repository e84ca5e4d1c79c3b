"""Quantization that stops short of a bound on the loss of quality: the worst layers get more bits, or stay float."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch.fx import GraphModule, Node

from mil_cli.graph.nodes import get_argument, op_name
from mil_cli.stages.quantize.holding import BoundedConfig, Holding
from mil_cli.stages.quantize.passing import after_rectifier
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.post_training import PostTrainingConfig, prepare
from mil_cli.stages.quantize.settings import LayerSettings, QuantizationConfig, shared_settings

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

F = TypeVar("F", bound=Callable[..., "Model"])

_MOST_BITS = 8
_WIDER = (4, _MOST_BITS)
"""Bits that layers get where theirs are too few, of those that the target's files pack."""

NamesOf = Callable[["Model", Any, "Context"], Sequence[str]]
"""Returns the names of the layers that a method would quantize, from the model, its settings and the context."""


def within_drop(quantize: F) -> F:
    """Make a method that has bits by layer hold `max_drop`, where its settings ask for it.

    Args:
        quantize: The method's function; its settings are a `QuantizationConfig`.

    Returns:
        A function that runs it once, or tries settings until the quality on val holds.
    """
    return _holding(quantize, _Widening)


def within_drop_by_skipping(names_of: NamesOf, **quick: object) -> Callable[[F], F]:
    """Make a method that has no bits by layer hold `max_drop`: the worst layers stay float.

    Args:
        names_of: Says which layers there are.
        quick: Settings by which the damage of single layers is measured, where that takes less time.

    Returns:
        What makes a function that runs the method once, or tries settings until the quality on val holds.
    """
    return partial(_holding, search=partial(_Skipping, names_of=names_of, quick=quick))


def _holding(quantize: F, search: Callable[[Model, Any, Context], Holding[Any]]) -> F:
    @wraps(quantize)
    def controlled(model: Model, config: BoundedConfig, context: Context) -> Model:
        if config.max_drop is None:
            return quantize(model, config, context)
        return search(model, config, context).search()

    return cast("F", controlled)


class _Widening(Holding[QuantizationConfig]):
    """Layers get more bits before any stays float; all are measured in one graph, the others' quantizers left out.

    That graph's weights are rounded and no more, whatever the method does beyond it: it only ranks the layers.
    """

    def __init__(self, model: Model, config: QuantizationConfig, context: Context) -> None:
        super().__init__(model, config, context)
        self._quantized: tuple[Model, Placement] | None = None

    def _with(self, *, widened: Mapping[str, int], spared: Sequence[str]) -> QuantizationConfig:
        layers = dict(self._config.layers)
        for name, bits in sorted(widened.items()):  # the path of a layer is also a pattern for those below it
            layers.pop(glob.escape(name), None)
            form = self._state["forms"][name]
            more = {key: max(bits, form[key]) for key in ("weight_bits", "activation_bits")}
            layers[glob.escape(name)] = LayerSettings(**more, per_channel=form["per_channel"])
        return super()._with(widened=widened, spared=spared).model_copy(update={"layers": layers})

    def _wider(self) -> dict[int, list[str]]:
        return {
            bits: [
                name
                for name, form in self._state["forms"].items()
                if min(form["weight_bits"], form["activation_bits"]) < bits
            ]
            for bits in _WIDER
            if bits in {*self._context.device.weight_bits, _MOST_BITS}
        }

    def _names(self, widened: Mapping[str, int]) -> list[str]:
        own = self._with(widened=widened, spared=[])
        # Biases that make up for the rounding of all layers would be wrong for each of them alone.
        settings = shared_settings(own, PostTrainingConfig) | {"bias_correction": False}
        prepared = prepare(self._model, PostTrainingConfig.model_validate(settings), self._context, fold=own.fold)
        placement, rules = prepared.placement, prepared.rules
        self._quantized = prepared.insert(), placement
        forms = {layer.name: rules.of_layer(layer) for layer in placement.layers}
        if not widened:
            computing = {layer.name for layer in placement.products}
            self._state["forms"] = {
                name: {
                    "weight_bits": form.weight_bits,
                    "activation_bits": form.activation_bits if name in computing else _MOST_BITS,
                    "per_channel": form.per_channel,
                }
                for name, form in forms.items()
            }
        return list(forms)

    def _damage(self, name: str, widened: Mapping[str, int]) -> float:
        assert self._quantized is not None
        model, placement = self._quantized
        nodes = [layer.node for layer in placement.layers if layer.name == name]
        with alone(model.graph, nodes, placement):
            return self._loss(model)


class _Skipping(Holding[BoundedConfig]):
    """Layers stay float; each is measured by the method on it alone."""

    def __init__(
        self,
        model: Model,
        config: BoundedConfig,
        context: Context,
        *,
        names_of: NamesOf,
        quick: Mapping[str, object],
    ) -> None:
        super().__init__(model, config, context)
        self._quick = quick
        self._known = list(dict.fromkeys(names_of(model, config, context)))

    def _names(self, widened: Mapping[str, int]) -> list[str]:
        return self._known

    def _damage(self, name: str, widened: Mapping[str, int]) -> float:
        others = [other for other in self._known if other != name]
        settings = self._with(widened={}, spared=others).model_copy(update=self._quick)
        return self._loss(self._context.run(self._model, settings, name="alone"))


@contextmanager
def alone(graph: GraphModule, layers: Collection[Node], placement: Placement) -> Iterator[None]:
    """Let nothing of a quantized graph be quantized but what some layers read and give, for as long as it lasts."""
    kept = {node for layer in layers for source in layer.all_input_nodes for node in _quantizers(source)}
    given = {after_rectifier(layer) for layer in layers} & placement.exclusive
    kept |= {user for value in given for user in value.users if op_name(user) == "quantize_affine"}
    changed: list[tuple[Node, Node, Node]] = []
    for reader in list(graph.graph.nodes):
        for quantized in list(reader.all_input_nodes):
            exact = next((node for node in _quantizers(quantized) if node in kept), None)
            exact = _exact(quantized) if exact is None else exact
            if exact is not quantized and reader not in kept:
                reader.replace_input_with(quantized, exact)
                changed.append((reader, quantized, exact))
    graph.recompile()
    try:
        yield
    finally:
        for reader, quantized, exact in changed:
            reader.replace_input_with(exact, quantized)
        graph.recompile()


def _quantizers(value: Node) -> Iterator[Node]:
    """Yield the quantizers that a value has just gone through, the last one first."""
    while op_name(value) == "quantize_affine":
        yield value
        value = get_argument(value, "x")


def _exact(value: Node) -> Node:
    for quantizer in _quantizers(value):
        value = get_argument(quantizer, "x")
    return value
