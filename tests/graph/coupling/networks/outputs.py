"""What goes in and out: intermediate features, trees of outputs, whole numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, pooled, trick


@dataclass
class Result:
    logits: Tensor
    hidden: Tensor


torch.export.register_dataclass(Result, serialized_type_name="tests.graph.coupling.networks.outputs.Result")


@trick(share=0.3, frozen="an output of the model")
def features_are_outputs() -> nn.Module:
    def forward(net: Net, x: Tensor) -> dict[str, Tensor]:
        first = F.relu(net.a(x))
        second = F.relu(net.b(first))
        return {"logits": net.fc(pooled(net.c(second))), "features": second}

    return Net({"a": conv(3, 16), "b": conv(16, 8), "c": conv(8, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def a_dataclass_and_a_list() -> nn.Module:
    def forward(net: Net, x: Tensor) -> tuple[Result, list[Tensor]]:
        y = F.relu(net.a(x))
        z = net.b(y)
        return Result(net.fc(pooled(z)), z.mean((1, 2, 3))), [y.amax((1, 2, 3)), y.sum((1,))]

    return Net({"a": conv(3, 16), "b": conv(16, 12), "fc": nn.Linear(12, 10)}, forward)


@trick((9,), share=0.25)
def whole_numbers() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        tokens = (x.abs() * 7).long() % 20
        kinds = tokens % 3
        present = tokens != 0
        y = net.embed(tokens) + net.kind(kinds) + net.position(torch.arange(9, device=x.device))
        y = net.a(y) * present[..., None]
        counts = F.one_hot(tokens, 20).sum(1).float()
        return net.fc(torch.cat([y.sum(1) / present.sum(1, keepdim=True).clamp(min=1), net.bag(counts)], -1))

    return Net(
        {
            "embed": nn.Embedding(20, 16),
            "kind": nn.Embedding(3, 16),
            "position": nn.Embedding(9, 16),
            "a": nn.Linear(16, 14),
            "bag": nn.Linear(20, 6),
            "fc": nn.Linear(20, 10),
        },
        forward,
    )


@trick((9,), share=0.0)
def bags_of_words() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(F.relu(net.bag((x.abs() * 7).long() % 20)))

    return Net({"bag": nn.EmbeddingBag(20, 16), "fc": nn.Linear(16, 10)}, forward)
