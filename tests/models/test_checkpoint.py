"""Weights from files: every usual wrapping, exact mismatches, and nothing that runs code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from mil_cli.errors import CheckpointError
from mil_cli.models.checkpoint import load_checkpoint, read_tensors


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


class _Holder(nn.Module):
    """A module whose own names begin with what frameworks prepend."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


WRAPPINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state, "args": [1, 2]},
    "nested": lambda state: {"checkpoint": 1, "model": {"state_dict": state}},
    "ddp": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "ddp of compiled": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
    "without counts": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_wrappings(wrap: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    trained, fresh = _net(1), _net(2)
    torch.save(wrap(trained.state_dict()), tmp_path / "weights.pt")
    load_checkpoint(fresh, tmp_path / "weights.pt")
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_may_be_in_the_file_once(tmp_path: Path) -> None:
    trained, fresh = _Tied(), _Tied()
    safetensors.torch.save_model(trained, str(tmp_path / "weights.safetensors"))
    assert len(safetensors.torch.load_file(tmp_path / "weights.safetensors")) == 1
    load_checkpoint(fresh, tmp_path / "weights.safetensors")
    assert torch.equal(fresh.head.weight, trained.head.weight)
    assert fresh.head.weight is fresh.embedding.weight


@pytest.mark.parametrize("convert", [lambda x: x.to(torch.float8_e4m3fn), lambda x: x.to_sparse()])
def test_tensors_of_other_forms_are_taken(convert: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    numbers = {"weight": torch.tensor([[1.0, 0.0], [0.5, 2.0]]), "bias": torch.ones(2)}
    torch.save({name: convert(value) for name, value in numbers.items()}, tmp_path / "weights.pt")
    load_checkpoint(module, tmp_path / "weights.pt")
    assert torch.equal(module.weight, numbers["weight"])


def test_names_that_only_look_wrapped_stay(tmp_path: Path) -> None:
    trained, fresh = _Holder(), _Holder()
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    load_checkpoint(fresh, tmp_path / "weights.pt")
    assert torch.equal(fresh.model.weight, trained.model.weight)
    torch.save({f"module.{k}": v for k, v in trained.state_dict().items()}, tmp_path / "ddp.pt")
    fresh = _Holder()
    load_checkpoint(fresh, tmp_path / "ddp.pt")
    assert torch.equal(fresh.head.weight, trained.head.weight)


def test_safetensors(tmp_path: Path) -> None:
    trained, fresh = _net(1), _net(2)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(fresh, tmp_path / "weights.safetensors")
    assert torch.equal(fresh.state_dict()["3.weight"], trained.state_dict()["3.weight"])


def test_mismatches_are_listed_by_name_and_change_nothing(tmp_path: Path) -> None:
    state = _net(1).state_dict()
    del state["0.bias"]
    state["3.weight"] = torch.zeros(5, 8)
    state["9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pt")
    fresh = _net(2)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(fresh, tmp_path / "weights.pt")
    text = str(caught.value)
    assert "missing: 0.bias" in text
    assert "unexpected: 9.weight" in text
    assert "3.weight: the file has (5, 8), the model (3, 8)" in text
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in before.items())


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched-by-checkpoint"),))


def test_a_file_that_needs_unpickling_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _net().state_dict(), "extra": _Evil()}, "weights.pt")
    with pytest.raises(CheckpointError, match=r"torch.save\(model.state_dict\(\)"):
        read_tensors(tmp_path / "weights.pt")
    torch.save(_net(), "module.pt")
    with pytest.raises(CheckpointError, match="could run code") as told:
        read_tensors(tmp_path / "module.pt")
    assert "\x1b" not in str(told.value)  # torch's own message is coloured, and names ways that are no use here
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "raw.pt")
    assert not (tmp_path / "touched-by-checkpoint").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.pt", None, "is missing"),
        ("empty.pt", b"", "cannot be read|damaged"),
        ("text.pt", b"not a checkpoint", "cannot be read|damaged"),
        ("bad.safetensors", b"12345678901234567890", "not a safetensors file"),
        ("model.pt2", b"PK", "whole model"),
    ],
)
def test_files_that_are_none(name: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_tensors(tmp_path / name)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(_net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError):
        read_tensors(path)


def test_values_that_are_no_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "losses": [1.0]}, tmp_path / "log.pt")
    with pytest.raises(CheckpointError, match="no weights by name"):
        read_tensors(tmp_path / "log.pt")
    state = _net().state_dict()
    state["0.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"0\.weight holds NaN"):
        load_checkpoint(_net(), tmp_path / "nan.pt")
