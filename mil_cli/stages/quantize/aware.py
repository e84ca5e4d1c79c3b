"""What the methods share that train a model with its quantizers in place, batch norms still alive.

Quantizers must go where they belong once the batch norms are folded into the layers before them: on a layer's weight,
and on the output of its batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator
from torch.fx import GraphModule, Node

from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.functional import make_functional
from mil_cli.graph.mode import record_mode
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import annotate, calls, get_argument, op_name, read_annotation
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.calibrate import Seen, Watcher, place_observed
from mil_cli.stages.quantize.damping import dampen
from mil_cli.stages.quantize.insert import refuse_quantized
from mil_cli.stages.quantize.layers import NEVER, Layer
from mil_cli.stages.quantize.placement import Narrow, Placement, Policy, place_any
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settings import QuantizationConfig, Rules
from mil_cli.stages.quantize.settle import settle, strip
from mil_cli.stages.quantize.weights import settle_biases
from mil_cli.training.batch_norm import recalibrate
from mil_cli.training.objective import StepHook


class AwareConfig(QuantizationConfig):
    """Settings of a method that trains a model with its quantizers in place, beside those that all quantization shares.

    Attributes:
        distill: Key of a distill (or train) stage of the recipe whose loss trains weights and quantizers; None: the
            task's loss.
        trainer: Trainer settings over that stage's own: a lower learning rate than the float training's, fewer epochs.
        bits_schedule: Bits to train with first, fewer each time, such as ``[8, 4]`` before 2: weights and activations
            that are to have fewer bits have these instead. Each is a training of its own, as long as the last one,
            that starts from the weights of the one before and finds its ranges anew. Bits of single layers count too.
        damping: Strength with which weights are drawn to the values that they round to, so that they stop swinging
            between two of them; it grows from 0 along a cosine over the training. 0: off.
        batch_norm: ``reestimate``: batch norms train as usual, and their statistics are taken anew at the end, without
            augmentation; ``freeze``: they use and keep the statistics that they came with.
        batch_norm_samples: Training samples for the new statistics.
        thaw: Whether weights that do not train in the float model, those of a frozen encoder say, train with the
            quantizers in place; afterwards they do not again.
    """

    distill: str | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)
    bits_schedule: tuple[int, ...] = ()
    damping: float = Field(0.0, ge=0, allow_inf_nan=False)
    batch_norm: Literal["reestimate", "freeze"] = "reestimate"
    batch_norm_samples: int = Field(2048, ge=1)
    thaw: bool = False

    @field_validator("bits_schedule")
    @classmethod
    def _falls(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if any(number > 8 or number < 2 for number in bits) or sorted({*bits}, reverse=True) != [*bits]:
            raise ValueError("bits_schedule holds numbers of bits from 8 to 2, each less than the one before")
        return bits

    def fold(self, model: Model) -> Model:
        """Return a copy whose layers are those that it quantizes: what computes weights stays, since it trains."""
        return fold_batch_norm(model)

    def phases(self, rules: Rules) -> Iterator[tuple[int, Rules]]:
        """Yield the trainings, the last one with those rules: the bits of the schedule (0: the last), and the rules."""
        for bits in self.bits_schedule:
            phase = rules.at_least(bits)
            if phase != rules:
                yield bits, phase
        yield 0, rules


Insert: TypeAlias = Callable[[Model, Placement, Seen[Watcher], Rules], None]
"""Puts a method's quantizers where a placement says, in place: (model, placement, what calibration saw, rules)."""


def train_quantized(
    model: Model,
    config: AwareConfig,
    context: Context,
    *,
    watcher: Callable[[CodeRange], Watcher],
    insert: Insert[Watcher],
    before_step: StepHook | None = None,
) -> Model:
    """Train a copy of a float model with quantizers in place, and fold its batch norms.

    Where the device wants one scale for a whole weight, batch norms are folded before the training, since folding gives
    each channel a scale of its own. Layers whose input was nothing but zeros in calibration stay float.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives data, the device's rules, and the training; is told what the report shows.
        watcher: Makes what watches an activation with such codes in calibration.
        insert: Puts the method's quantizers in.
        before_step: Called before each step of the optimizer.

    Returns:
        The model in the form that post-training quantization gives it too: it can be trained further, and exported.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, calibration fails, or there is no
            stage `distill` that trains.
    """
    refuse_quantized(model.graph)
    rules = Rules.of(config, context)
    trained = model.clone().eval() if rules.all_per_channel else fold_batch_norm(model)
    earlier: list[dict[str, object]] = []
    for bits, phase in config.phases(rules):
        name = f"{config.method}-{bits}" if bits else config.method
        trained = _train(
            strip(trained), phase, config, context, name=name, watcher=watcher, insert=insert, before_step=before_step
        )
        if bits:
            earlier.append({"bits": bits, "history": context.notes.get("history")})
    if config.batch_norm == "reestimate":
        samples, size = config.batch_norm_samples, config.calibration_batch_size
        trained = recalibrate(trained, context.calibration(samples=samples, batch_size=size, model=trained))
    result = fold_batch_norm(trained)
    settle_biases(result.graph)
    context.note(**rules.facts(), batch_norm=config.batch_norm, **({"bits_before": earlier} if earlier else {}))
    return result


def _thaw(model: Model) -> list[str]:
    """Let all parameters of a model train, in place, and return the names of those that did not."""
    frozen = {name: parameter for name, parameter in model.graph.named_parameters() if not parameter.requires_grad}
    for parameter in frozen.values():
        parameter.requires_grad_()
    return list(frozen)


def _train(
    start: Model,
    rules: Rules,
    config: AwareConfig,
    context: Context,
    *,
    name: str,
    watcher: Callable[[CodeRange], Watcher],
    insert: Insert[Watcher],
    before_step: StepHook | None,
) -> Model:
    """Insert quantizers into a float model, in place, and return it trained, its quantizers settled."""

    def place(silent: Collection[Node]) -> Placement:
        return place_unfolded(
            start, policy=rules.policy, skip=config.skip, narrow=rules.narrow, silent=silent, never=rules.never
        )

    placement, seen = place_observed(start, place, watcher, rules, config, context)
    facts = placement.facts()
    thawed = _thaw(start) if config.thaw else []
    insert(start, placement, seen, rules)
    frozen = freeze_norms(start.graph) if config.batch_norm == "freeze" else {}
    hooks = [hook for hook in (before_step, dampen(config.damping) if config.damping else None) if hook is not None]

    def each(training: Model, steps: int, total: int) -> None:
        for hook in hooks:
            hook(training, steps, total)

    trained = context.finetune(
        start,
        stage=config.distill,
        name=name,
        trainer=config.trainer,
        before_step=each if hooks else None,
    )
    for name in thawed:
        trained.graph.get_parameter(name).requires_grad_(False)
    settle(trained.graph)
    release_norms(trained.graph, frozen)
    context.note(**facts)
    return trained


def place_unfolded(
    model: Model,
    *,
    policy: Literal["auto"] | Policy,
    skip: Sequence[str],
    narrow: Narrow | None,
    silent: Collection[Node] = (),
    never: Mapping[str, str] = NEVER,
) -> Placement:
    """Decide where quantizers go on a model whose batch norms will be folded later.

    Args:
        model: In evaluation mode; its in-place operators are replaced.
        policy: The policy; ``auto`` goes by the graph.
        skip: Patterns of layers to leave float.
        narrow: Says which layers read fewer bits than the rest of the graph has; None: no layer does.
        silent: Values of `model` of which nothing but zeros was seen; they and their readers stay float.
        never: Operator -> why it stays float.

    Returns:
        The placement that the folded model would get, on the nodes of `model`; the value of a layer that a batch norm
        is folded into is that of the batch norm.

    Raises:
        StageError: No layer is left to quantize, or a pattern of `skip` fits none.
    """
    folded = fold_batch_norm(model)
    make_functional(folded.graph)
    make_functional(model.graph)
    here = {node.name: node for node in model.graph.graph.nodes}
    remaining = {node.name for node in folded.graph.graph.nodes}

    def value(node: Node) -> Node:
        found: Node = here[node.name]
        while (norm := next((user for user in found.users if user.name not in remaining), None)) is not None:
            found = norm
        return found

    unheard = {node for node in folded.graph.graph.nodes if node.name in here and value(node) in silent}
    chosen = place_any(folded.graph, policy=policy, skip=skip, narrow=narrow, silent=unheard, never=never)

    def layer(old: Layer) -> Layer:
        bias = None if old.bias is None else here.get(old.bias.name)
        node, weight = here[old.node.name], here[old.weight.name]
        partners = tuple(layer(other) for other in old.partners)
        return Layer(node, old.name, old.alias, value(old.source), weight, old.axis, bias, old.edge, partners)

    return Placement(
        policy=chosen.policy,
        layers=[layer(old) for old in chosen.layers],
        owned=[value(node) for node in chosen.owned],
        shared={value(node): value(root) for node, root in chosen.shared.items()},
        exclusive={value(node) for node in chosen.exclusive},
        readers={value(node): {here[user.name] for user in users} for node, users in chosen.readers.items()},
        edges={value(node) for node in chosen.edges},
        narrow={value(node): {here[user.name] for user in users} for node, users in chosen.narrow.items()},
        kept_float=chosen.kept_float,
        names=chosen.names,
    )


def freeze_norms(graph: GraphModule) -> dict[str, Any]:
    """Let batch norms use and keep their running statistics in training too, in place; those without any stay.

    Args:
        graph: A graph in evaluation mode.

    Returns:
        What `release_norms` needs to undo it.
    """
    before: dict[str, Any] = {}
    for node in calls(graph):
        if op_name(node) == "batch_norm" and not get_argument(node, "training"):
            before[node.name] = read_annotation(node, "mode")
            record_mode(node, "training", evaluation=False, training=False)
    return before


def release_norms(graph: GraphModule, before: dict[str, Any]) -> None:
    """Undo `freeze_norms` on a graph in evaluation mode that has the same nodes."""
    for node in calls(graph):
        if node.name in before:
            annotate(node, "mode", before[node.name])
