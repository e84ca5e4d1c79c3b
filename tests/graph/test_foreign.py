"""Archives that someone else wrote: no sidecar, everything inferred."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from mil_cli.errors import ArchiveError
from mil_cli.graph.model import Model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: Tensor, ids: Tensor, *, flag: bool = True) -> dict[str, Tensor]:
        features = self.drop(self.norm(self.conv(image))).mean((2, 3))
        return {"sum": features + self.embed(ids), "image": image}


def export(path: Path, *, training: bool = False, dynamic: bool = True) -> nn.Module:
    module = Net().train(training)
    args = (torch.randn(4, 3, 8, 12), torch.randint(0, 9, (4,)))
    batch, height = Dim("n", min=2, max=64), Dim("h", min=4)
    shapes = {"image": {0: batch, 2: height}, "ids": {0: batch}, "flag": None} if dynamic else None
    torch.export.save(torch.export.export(module, args, {"flag": True}, dynamic_shapes=shapes), path)
    return module


def test_everything_is_inferred(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt2"
    module = export(path).eval()
    model = Model.load(path)
    assert [tensor.name for tensor in model.spec.inputs] == ["image", "ids"]
    assert dict(model.spec.inputs[0].dynamic) == {0: "batch", 2: "dim_1"}
    assert dict(model.spec.inputs[1].dynamic) == {0: "batch"}
    assert [tensor.name for tensor in model.spec.outputs] == ["sum", "image"]
    assert dict(model.spec.outputs[1].dynamic) == {0: "batch", 2: "dim_1"}
    assert "no sidecar" in model.spec.notices[0]
    image, ids = torch.randn(7, 3, 10, 12), torch.randint(0, 9, (7,))
    torch.testing.assert_close(model(image, ids, flag=True)["sum"], module(image, ids)["sum"])
    args, kwargs = model.batch_input(3)
    assert args[0].shape[0] == 3
    assert kwargs == {"flag": True}
    assert model.macs() == 16 * 12 * 4 * 27


def test_it_is_saved_and_loaded_as_ours(tmp_path: Path) -> None:
    export(tmp_path / "foreign.pt2")
    model = Model.load(tmp_path / "foreign.pt2")
    model.save(tmp_path / "ours.pt2")
    again = Model.load(tmp_path / "ours.pt2")
    assert again.fingerprint() == model.fingerprint()
    assert again.spec == model.spec


def test_a_training_export_is_switched(tmp_path: Path) -> None:
    module = export(tmp_path / "t.pt2", training=True)
    model = Model.load(tmp_path / "t.pt2")
    assert "training mode" in model.spec.notices[1]
    image, ids = torch.randn(7, 3, 10, 12), torch.randint(0, 9, (7,))
    expected = module.eval()(image, ids)["sum"]
    torch.testing.assert_close(model(image, ids, flag=True)["sum"], expected)
    model.train()
    assert not torch.allclose(model(image, ids, flag=True)["sum"], expected)


def test_fixed_sizes(tmp_path: Path) -> None:
    export(tmp_path / "s.pt2", dynamic=False)
    model = Model.load(tmp_path / "s.pt2")
    assert model.spec.batch is None
    assert model.samples[0][0].shape == (4, 3, 8, 12)


def test_numbers_as_inputs_are_refused(tmp_path: Path) -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * n

    program = torch.export.export(Scales(), (torch.randn(4, 3), 3), dynamic_shapes={"x": None, "n": Dim.DYNAMIC})
    torch.export.save(program, tmp_path / "n.pt2")
    with pytest.raises(ArchiveError, match="not tensors"):
        Model.load(tmp_path / "n.pt2")
