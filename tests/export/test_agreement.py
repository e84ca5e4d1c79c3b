"""Files of every form predict what their graphs predict, on ten thousand samples, in the bytes that were promised."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.data.tensors import TensorSplit
from mil_cli.export.onnx import export_onnx
from mil_cli.export.session import OnnxModel
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.ops import QUANTIZERS
from mil_cli.run.agreement import Predictions
from mil_cli.stages.quantize.describe import present_bits
from mil_cli.stages.registry import config_type, function_of
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.evaluate import evaluate
from mil_cli.training.loop import fit
from tests.stages.contexts import make_context

SAMPLES = 10_000
OPERATOR_BYTES = 600
"""What each quantizer takes in a file for its operators and their names."""

VALUES = 17
"""Grey values of a pixel, which the net that looks values up takes for words."""


class Lookup(nn.Module):
    """Looks the pixels up in a table, and their places in another."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.places = nn.Embedding(VALUES, 16), nn.Embedding(64, 16)
        self.inner, self.head = nn.Linear(64 * 16, 64), nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.values(tokens) + self.places(torch.arange(64, device=tokens.device))
        logits: Tensor = self.head(torch.relu(self.inner(found.flatten(1))))
        return logits


def as_tokens(images: Tensor) -> Tensor:
    return ((images + 1) * 8).round().clamp(0, VALUES - 1).long().flatten(1)


def unchanged(images: Tensor) -> Tensor:
    return images


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], float]] = {
    "resnet": (lambda: resnet20(widths=(8, 16, 32), blocks=1), unchanged, 0.1),
    "mobilenet": (lambda: mobilenet(widths=(8, 16, 32), blocks=(1, 2, 2)), unchanged, 0.1),
    "vit": (lambda: vit(image_size=8, in_channels=1, num_classes=10, patch=2, dim=32, depth=2), unchanged, 0.02),
    "lookup": (Lookup, as_tokens, 0.005),
}


@cache
def trained(name: str) -> tuple[Model, Data]:
    """Return a net that has learned the digits, and data to test it: noisy shifted copies of all of them."""
    build, form, rate = NETS[name]
    generator = torch.Generator().manual_seed(0)
    loaded = digits(crop_padding=0)
    splits = {key: next(iter(getattr(loaded, key).batches(2000))) for key in ("train", "val", "test")}
    images, labels = (torch.cat([split[part] for split in splits.values()]) for part in (0, 1))
    drawn = torch.randint(0, len(images), (SAMPLES,), generator=generator)
    noisy = torch.stack([image.roll(int(step), 2) for image, step in zip(images[drawn], drawn % 3 - 1, strict=True)])
    noisy += 0.2 * torch.randn(noisy.shape, generator=generator)
    data = Data(
        name="digits",
        train=TensorSplit((form(splits["train"][0]), splits["train"][1])),
        val=TensorSplit((form(splits["val"][0]), splits["val"][1])),
        test=TensorSplit((form(noisy), labels[drawn])),
    )
    torch.manual_seed(0)
    net = Model.capture(build(), (form(images[:2]),))
    settings = TrainerConfig(epochs=8, batch_size=64, learning_rate=rate, channels_last=False)
    return fit(net, task=Classification(), data=data, settings=settings, seed=0).model, data


def bytes_of(path: Path) -> tuple[int, int]:
    """Return the bytes of a file's numbers, and of all else in it."""
    numbers = sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    return numbers, path.stat().st_size - numbers


@cache
def bytes_around(name: str) -> int:
    """Return the bytes of a net's float file beside its numbers."""
    with TemporaryDirectory() as folder:
        return bytes_of(export_onnx(trained(name)[0], Path(folder) / "float.onnx").path)[1]


def promised_bytes(model: Model) -> float:
    """Return what numbers take: weights in their bits, others in 32, scales and zero points of rows 5 bytes."""
    total, rounded, layers = 0.0, set(), present_bits(model).bits
    for node in calls(model.graph):
        kind = op_name(node)
        if kind in QUANTIZERS and get_argument(node, "x").op == "get_attr":
            name = str(get_argument(node, "x").target)
            (reader,) = {user.name for user in node.users} & set(layers)
            bits, weight = layers[reader][0], get_attribute(model.graph, name)
            packed = (2, 4) if kind == "quantize_levels" else (2, 3, 4)
            stored = min(width for width in (*packed, 8) if width >= bits)
            scales = get_attribute(model.graph, str(get_argument(node, "scale").target))
            each = 5 if kind != "quantize_blocks" else 4 if scales.shape[-1] == 1 else 2
            total += weight.numel() * stored / 8 + each * scales.numel()
            rounded.add(name)
        elif kind == "lookup":
            codebook, indices = (get_attribute(model.graph, str(source.target)) for source in node.all_input_nodes)
            count = len(codebook) // int(get_argument(node, "groups"))
            total += indices.numel() * next(bits for bits in (2, 4, 8) if count <= 2**bits) / 8
    return total + 4 * sum(value.numel() for name, value in model.named_parameters() if name not in rounded)


TRAINER = {"epochs": 1, "batch_size": 64, "learning_rate": 0.01}
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"{net}-W{bits}A8": (net, "quantize/static", {"weight_bits": bits}) for net in NETS for bits in (8, 4, 3, 2)},
    "resnet-W4A4": ("resnet", "quantize/static", {"weight_bits": 4, "activation_bits": 4}),
    "mobilenet-W5A6": ("mobilenet", "quantize/static", {"weight_bits": 5, "activation_bits": 6}),
    "resnet-one-scale": ("resnet", "quantize/static", {"per_channel": False}),
    "vit-signed": ("vit", "quantize/static", {"activations": "int8"}),
    "vit-reduced": ("vit", "quantize/static", {"reduce_range": True}),
    "resnet-gptq": ("resnet", "quantize/gptq", {"weight_bits": 3}),
    "mobilenet-brecq": ("mobilenet", "quantize/brecq", {"weight_bits": 2, "activation_bits": 4, "iterations": 20}),
    "resnet-lsq": ("resnet", "quantize/lsq", {"weight_bits": 2, "activation_bits": 2, "trainer": TRAINER}),
    "vit-lsq_plus": ("vit", "quantize/lsq_plus", {"weight_bits": 3, "activation_bits": 3, "trainer": TRAINER}),
    **{
        f"resnet-{method}-W{bits}": (
            "resnet",
            f"quantize/{method}",
            {"weight_bits": bits, "activation_bits": 4, "trainer": TRAINER},
        )
        for method in ("pact", "dorefa", "apot")
        for bits in (2, 3, 4)
    },
    "resnet-apot-W8": ("resnet", "quantize/apot", {"weight_bits": 8, "first_last_bits": 2, "trainer": TRAINER}),
    "vit-dynamic": ("vit", "quantize/dynamic", {}),
    "lookup-dynamic": ("lookup", "quantize/dynamic", {"weight_bits": 4}),
    **{
        f"{net}-weights-W{bits}": (net, "quantize/weight_only", {"weight_bits": bits, "first_last_bits": 2})
        for net in ("vit", "lookup")
        for bits in (8, 4, 3, 2)
    },
    "vit-rows": ("vit", "quantize/weight_only", {"weight_bits": 4, "block_size": None}),
    "vit-weights-gptq": ("vit", "quantize/weight_only", {"weight_bits": 3, "rounding": "gptq"}),
    **{
        f"resnet-codebook-{count}": ("resnet", "prune/kmeans", {"clusters": count, "trainer": TRAINER})
        for count in (4, 8, 16, 64)
    },
}
QUICK = ("resnet-W8A8", "mobilenet-W2A8", "vit-dynamic", "lookup-W3A8", "resnet-apot-W4", "vit-weights-W2")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_a_file_predicts_what_its_graph_predicts(name: str, tmp_path: Path) -> None:
    net, stage, settings = FORMS[name]
    model, data = trained(net)
    family, method = stage.split("/")
    config = config_type(family, method).model_validate(settings)
    context = make_context(data, name="stage", trainer=TrainerConfig(**TRAINER, channels_last=False))
    made = function_of(config)(model, config, context)
    path = export_onnx(made, tmp_path / "model.onnx").path
    file = OnnxModel(path, made.spec)
    seen = [Predictions(context.task), Predictions(context.task)]
    in_torch, in_onnx = (
        evaluate(each, task=context.task, split=data.test, split_name="test", watch=predictions.watch).value
        for each, predictions in zip((made, file), seen, strict=True)
    )
    assert 0.15 < in_torch < 1  # it is no constant that both give
    agreement = seen[0].agreement(seen[1])
    assert agreement is not None
    assert agreement >= 0.999
    assert in_onnx == pytest.approx(in_torch, rel=0.001)
    numbers, rest = bytes_of(path)
    assert numbers == pytest.approx(promised_bytes(made), rel=0.05)
    quantizers = sum(op_name(node) in {*QUANTIZERS, "lookup"} for node in calls(made.graph))
    assert rest - bytes_around(net) <= OPERATOR_BYTES * quantizers
