"""Archives: exact round trips, atomic writes, clear errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mil_cli.errors import ArchiveError, OutputError
from mil_cli.graph import archive
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, module_path, op_name, source_line


class Net(nn.Module):
    """Tied weights, a frozen weight, a buffer out of the state dict, a plain tensor, constants in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.register_buffer("offset", torch.randn(8), persistent=False)
        self.plain = torch.randn(8)

    def forward(self, x: Tensor, *, scale: float = 2.0, extra: Tensor | None = None) -> dict[str, object]:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        x = self.second(F.dropout(self.first(x), 0.3, self.training)) + self.offset + self.plain
        return {"logits": x * scale, "parts": (x, 3), "none": extra}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model.capture(Net(), (torch.randn(4, 3, 8, 8),), {"scale": 0.5, "extra": None}, source="a test")


@pytest.fixture(scope="module")
def written(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model.pt2"
    model.save(path)
    return path


@pytest.fixture
def saved(written: Path, tmp_path: Path) -> Path:
    for file in written.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / written.name


def difference(a: Model, b: Model, batch: int = 7) -> float:
    args, kwargs = a.batch_input(batch)
    pairs = zip(a.flatten_outputs(a(*args, **kwargs)), b.flatten_outputs(b(*args, **kwargs)), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def test_a_round_trip_is_exact(model: Model, saved: Path, tmp_path: Path) -> None:
    loaded = Model.load(saved)
    assert difference(model, loaded) == 0
    assert loaded.spec == model.spec
    assert loaded.fingerprint() == model.fingerprint()
    assert set(loaded.state_dict()) == set(Net().state_dict())
    assert loaded.graph.get_parameter("first.weight") is loaded.graph.get_parameter("second.weight")
    assert not loaded.graph.get_parameter("second.bias").requires_grad
    for ours, theirs in zip(loaded.flat_inputs(*loaded.samples[0], **loaded.samples[1]), model.samples[0], strict=True):
        assert torch.equal(ours, theirs)
    loaded.save(tmp_path / "again.pt2")
    again = Model.load(tmp_path / "again.pt2")
    assert again.fingerprint() == model.fingerprint()
    assert difference(model, again) == 0
    assert loaded.num_params() == model.num_params()
    assert loaded.macs() == model.macs()


def test_where_nodes_came_from_survives(model: Model, saved: Path) -> None:
    loaded = Model.load(saved)
    ours = [(node.target, module_path(node), source_line(node)) for node in calls(model.graph)]
    assert [(node.target, module_path(node), source_line(node)) for node in calls(loaded.graph)] == ours
    assert any(path == "conv" for _, path, _ in ours)
    assert all(line and line.startswith(__file__) for _, _, line in ours)


def test_a_model_in_training_is_saved_in_evaluation_form(model: Model, saved: Path, tmp_path: Path) -> None:
    training = model.clone().train()
    training.save(tmp_path / "training.pt2")
    assert training.training
    loaded = Model.load(tmp_path / "training.pt2")
    assert not loaded.training
    assert loaded.fingerprint() == model.fingerprint()


def test_a_loaded_model_trains(saved: Path) -> None:
    model = Model.load(saved).train()
    args, kwargs = model.batch_input(16)
    before = model.state_dict()["norm.running_mean"].clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        loss = model(*args, **kwargs)["logits"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(before, model.state_dict()["norm.running_mean"])


def test_channels_last_weights_are_kept(model: Model, tmp_path: Path) -> None:
    model = model.clone()
    model.graph.to(memory_format=torch.channels_last)
    model.save(tmp_path / "last.pt2")
    loaded = Model.load(tmp_path / "last.pt2")
    assert loaded.state_dict()["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert loaded.fingerprint() == model.fingerprint()


def test_torch_alone_reads_the_archive(model: Model, saved: Path, tmp_path: Path) -> None:
    args, _ = model.batch_input(3)
    expected = model(*args, scale=0.5, extra=None)["logits"]
    torch.save({"x": args[0], "expected": expected}, tmp_path / "io.pt")
    script = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1])\n"
        "data = torch.load(sys.argv[2], weights_only=True)\n"
        "out = program.module()(data['x'], scale=0.5, extra=None)\n"
        "assert type(out) is dict and list(out) == ['logits', 'parts', 'none'], out\n"
        "assert (out['logits'] - data['expected']).abs().max() == 0\n"
        "assert not any(name.startswith('mil_cli') for name in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(saved), str(tmp_path / "io.pt")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr


def test_no_sample_inputs_lie_in_the_archive(saved: Path) -> None:
    reader = torch._C.PyTorchFileReader(str(saved))
    assert reader.get_record("data/sample_inputs/model.pt") == b""


def test_two_saves_are_the_same_bytes(model: Model, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name / "model.pt2")
    for suffix in (".pt2", ".json", ".samples.safetensors"):
        first, second = ((tmp_path / name / f"model{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second, suffix


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("sidecar", [True, False])
def test_a_truncated_archive_is_refused(saved: Path, keep: float, sidecar: bool) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    if not sidecar:
        archive.sidecar_path(saved).unlink()
    with pytest.raises(ArchiveError) as caught:
        Model.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sidecar: sidecar.update(version=99), "version"),
        (lambda sidecar: sidecar.update(format="other"), "version"),
        (lambda sidecar: sidecar.pop("spec"), "damaged"),
        (lambda sidecar: sidecar["spec"].update(version=99), "damaged"),
        (lambda sidecar: sidecar["spec"].update(inputs=[{"name": "x"}]), "damaged"),
        (lambda sidecar: sidecar["spec"].update(in_tree="[1"), "damaged"),
        (lambda sidecar: sidecar["spec"].update(out_tree=sidecar["spec"]["in_tree"]), "damaged"),
        (lambda sidecar: sidecar["sha256"].update(archive="0"), "does not belong"),
        (lambda sidecar: sidecar["sha256"].update(samples="0"), "do not belong"),
        (lambda sidecar: sidecar.update(tied=[["no.such", "first.weight"]]), "lacks"),
    ],
)
def test_a_bad_sidecar_is_refused(saved: Path, change, message: str) -> None:
    path = archive.sidecar_path(saved)
    sidecar = json.loads(path.read_text())
    change(sidecar)
    path.write_text(json.dumps(sidecar))
    with pytest.raises(ArchiveError, match=message):
        Model.load(saved)


def test_a_sidecar_that_is_no_json_is_refused(saved: Path) -> None:
    archive.sidecar_path(saved).write_text("{")
    with pytest.raises(ArchiveError, match="sidecar is damaged"):
        Model.load(saved)


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no such file"):
        Model.load(tmp_path / "absent.pt2")
    archive.samples_path(saved).unlink()
    with pytest.raises(ArchiveError, match=r"model\.samples\.safetensors: there is no such file"):
        Model.load(saved)


def test_only_pt2_files_are_written(model: Model, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.pt2"):
        model.save(tmp_path / "model.onnx")
    assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_full_disk_leaves_the_old_files(
    model: Model, saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in saved.parent.glob("*model*")}
    changed = model.clone()
    changed.graph.get_parameter("conv.weight").data += 1

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(archive.os, "fsync" if failing == "write" else "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        changed.save(saved)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in saved.parent.glob("*model*")} == before
    assert difference(Model.load(saved), model) == 0


def test_a_folder_in_the_way_is_an_output_error(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError) as caught:
        model.save(tmp_path / "file" / "model.pt2")
    assert caught.value.hint
    assert [file.name for file in tmp_path.iterdir() if file.name != "mil-cache"] == ["file"]


def test_samples_of_a_type_without_a_format_are_refused(tmp_path: Path) -> None:
    class Magnitude(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.abs()

    model = Model.capture(Magnitude(), (torch.randn(4, 3, dtype=torch.complex128),))
    with pytest.raises(ArchiveError, match="complex128"):
        model.save(tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.layer(x)[0]
        return states


def test_a_recurrent_layer_that_was_trained_comes_back(tmp_path: Path) -> None:
    """The second export copies the layer's note of its mode to the nodes that take its results apart."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    model = Model.capture(Recurrent(), (x,)).train().eval()
    model.save(tmp_path / "model.pt2")
    loaded = Model.load(tmp_path / "model.pt2")
    assert torch.equal(loaded(x), model(x))
    (layer,) = (node for node in calls(loaded.train().graph) if op_name(node) == "gru")
    assert get_argument(layer, "train")
