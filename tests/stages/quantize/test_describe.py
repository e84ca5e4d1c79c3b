"""What is said of layers before quantization is what they have after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mil_cli.errors import StageError
from mil_cli.graph.count import count_layers
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.models.vit import vit
from mil_cli.stages.quantize.describe import planned_bits, present_bits
from mil_cli.stages.quantize.dynamic import DynamicConfig
from mil_cli.stages.quantize.dynamic import quantize as quantize_dynamic
from mil_cli.stages.quantize.lsq import LsqConfig
from mil_cli.stages.quantize.lsq import quantize as quantize_lsq
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settings import Rules
from mil_cli.stages.quantize.static import StaticConfig, quantize
from tests.stages.quantize.test_static import context, make_model

BITS: dict[str, Any] = {"weight_bits": 4, "activation_bits": 5, "skip": ["head"]}


def transformer() -> Model:
    torch.manual_seed(0)
    return Model.capture(vit(image_size=8, patch=4, dim=16, depth=1, heads=2).eval(), (torch.randn(2, 1, 8, 8),))


@pytest.mark.slow
def test_the_plan_is_what_quantization_does() -> None:
    for model, layer in ((transformer(), "blocks.0.mlp.0"), (make_model(), "body.0")):
        settings = {**BITS, "layers": {layer: {"weight_bits": 2}}}
        config, used = StaticConfig.model_validate(settings), context()
        plan = planned_bits(model, Rules.of(config, used), config.skip)
        done = quantize(model, config, used)
        assert plan.bits == present_bits(done).bits
        assert 2 in {weight for weight, _ in plan.bits.values()}
        assert plan.kept_float == used.notes["kept_float"]
        assert not present_bits(model).bits


def test_a_quantized_model_tells_its_signs_and_ranges_and_counts_as_before() -> None:
    model, used = make_model(), context()
    config = StaticConfig(activations="int8", reduce_range=True)
    plan = planned_bits(model, Rules.of(config, used))
    done = quantize(model, config, used)
    said = present_bits(done).form
    assert "activations int8; weights of 8 bits in [-64, 64], a reduced range" in said
    assert set(said) < set(plan.form)
    assert any("between layers" in sentence for sentence in said)

    def parameters(of: Model) -> dict[str, int]:
        return {layer.node: layer.params for layer in count_layers(of) if layer.macs}

    assert parameters(done) == parameters(fold_batch_norm(model))


def test_the_device_says_what_stays_float_and_what_first_and_last_layers_have() -> None:
    used = context(left_float=("linear",), first_last_bits=5)
    model, config = make_model(), StaticConfig(weight_bits=3, activation_bits=3)
    plan = planned_bits(model, Rules.of(config, used))
    assert plan.kept_float == {"head": "the device profile leaves linear in float"}
    assert {weight for weight, _ in plan.bits.values()} == {3, 5}
    assert plan.bits == present_bits(quantize(model, config, used)).bits
    own = Rules.of(config.model_copy(update={"first_last_bits": 3}), used)
    assert {weight for weight, _ in planned_bits(model, own).bits.values()} == {3}

    trained = LsqConfig(weight_bits=3, activation_bits=3, trainer={"epochs": 1})
    planned = planned_bits(model, Rules.of(trained, used), fold=trained.fold)
    assert (planned.bits, planned.kept_float) == (plan.bits, plan.kept_float)
    assert planned.bits == present_bits(quantize_lsq(model, trained, used)).bits

    net, ranges_at_run_time = transformer(), DynamicConfig(weight_bits=3)
    with pytest.raises(StageError, match="no product of the model can be quantized"):
        quantize_dynamic(net, ranges_at_run_time, used)
    bits = present_bits(quantize_dynamic(net, ranges_at_run_time, context(first_last_bits=5))).bits
    assert {weight for weight, _ in bits.values()} == {3, 5}


def test_a_pattern_that_fits_nothing_is_told_before_any_data_are_seen() -> None:
    config = StaticConfig.model_validate({"layers": {"nothing": {"weight_bits": 2}}})
    with pytest.raises(StageError, match="'nothing' fits no layer"):
        planned_bits(make_model(), Rules.of(config, context()))


def test_codes_need_the_bits_that_tell_them_apart() -> None:
    for codes in (CodeRange(0, 255), CodeRange(-127, 127), CodeRange(-64, 64), CodeRange(-2, 1), CodeRange(-7, 7)):
        assert codes.bits == math.ceil(math.log2(codes.quant_max - codes.quant_min + 1))


def test_weights_alone_may_have_few_bits() -> None:
    model = quantize(make_model(), StaticConfig(), context())
    graph = model.graph
    layer = next(node for node in calls(graph) if op_name(node) == "conv2d")
    source = layer.args[0]
    layer.replace_input_with(source, source.args[0])  # type: ignore[union-attr,arg-type]
    graph.recompile()
    assert present_bits(model).bits[layer.name] == (8, None)
