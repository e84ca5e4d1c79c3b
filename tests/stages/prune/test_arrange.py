"""Independent choices in groups: planted useless channels go, each from its own group, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.graph.coupling import analyse
from mil_cli.graph.model import Model
from mil_cli.stages.prune.magnitude import MagnitudeConfig, magnitude
from tests.stages.contexts import make_context

GROUPS, WIDTH = 4, 8


class Grouped(nn.Module):
    """A grouped convolution whose groups read, and an attention whose heads hold, channels of very unequal weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, GROUPS * WIDTH, 3, padding=1)
        self.grouped = nn.Conv2d(GROUPS * WIDTH, 16, 3, padding=1, groups=GROUPS)
        self.qkv = nn.Linear(16, 3 * GROUPS * WIDTH)
        self.project = nn.Linear(GROUPS * WIDTH, 16)
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x)))).flatten(2).transpose(1, 2)
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, GROUPS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(self.project(x.transpose(1, 2).flatten(2)).mean(1))


def planted() -> Model:
    """Return a model in which half the channels of every group and head do nothing, at other places in each."""
    torch.manual_seed(0)
    module = Grouped().eval()
    generator = np.random.default_rng(0)
    useless = {
        part: [
            group * WIDTH + int(place)
            for group in range(GROUPS)
            for place in generator.permutation(WIDTH)[: WIDTH // 2]
        ]
        for part in ("stem", "queries", "values")
    }
    width = GROUPS * WIDTH
    with torch.no_grad():
        module.stem.weight[useless["stem"]] = 0
        module.stem.bias[useless["stem"]] = 0
        rows = [offset + place for offset in (0, width) for place in useless["queries"]]
        rows += [2 * width + place for place in useless["values"]]
        module.qkv.weight[rows] = 0
        module.qkv.bias[rows] = 0
        module.project.weight[:, useless["values"]] = 0
    return Model.capture(module, (torch.randn(2, 1, 8, 8),))


@pytest.mark.parametrize("independent", [True, False])
def test_what_each_group_can_spare_is_found_in_each(independent: bool) -> None:
    model = planted()
    total = sum(len(space.free) for space in analyse(model).spaces)
    kept = (total - 3 * WIDTH // 2) / total + 1e-6  # what is useless goes and nothing else
    context = make_context(digits())
    config = MagnitudeConfig(channels=kept, round_to=1, independent=independent, compare_samples=0)
    cut = magnitude(model, config, context)
    widths = {name: tuple(value.shape) for name, value in cut.named_parameters()}
    steps = context.notes["steps"]
    assert isinstance(steps, list)
    x = torch.randn(3, 1, 8, 8)
    same = torch.allclose(cut(x), model(x), rtol=1e-4, atol=1e-5)
    assert same == independent
    if independent:
        assert len(steps[0]["independent"]) >= 3  # the stem's groups, queries with keys, values
        assert widths["stem.weight"][0] == GROUPS * WIDTH // 2
        assert widths["qkv.weight"][0] == 3 * GROUPS * WIDTH // 2
    else:
        assert steps[0]["independent"] == []
